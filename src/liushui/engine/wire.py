"""Messages as bytes: msgpack with types, checked when read; a frame is a length of 4 bytes (big-endian) and a message.

Nothing that is read can name code: unlike pickle, the worst that a wrong frame does is to be refused.
"""

import struct
from typing import Any

import msgspec

from liushui.engine.messages import Facts, Orders, Setup, Told

MAX_FRAME = 1 << 30
"""Bytes. More is not a message of ours."""
_LENGTH = struct.Struct(">I")

_encoder = msgspec.msgpack.Encoder()
orders = msgspec.msgpack.Decoder(Orders)
setup = msgspec.msgpack.Decoder(Setup)
facts = msgspec.msgpack.Decoder(Facts)
told = msgspec.msgpack.Decoder(Told)


def frame(message: Any) -> bytes:
    """One message, ready to be sent."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body):,} bytes")
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Bytes as they come, cut into the bodies of frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Bodies that are complete now. Raises `ValueError` for a length that cannot be."""
        self._bytes += data
        bodies: list[bytes] = []
        start = 0
        while len(self._bytes) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes, start)
            if length > MAX_FRAME:
                raise ValueError(f"a frame of {length:,} bytes")
            end = start + _LENGTH.size + length
            if len(self._bytes) < end:
                break
            bodies.append(bytes(self._bytes[start + _LENGTH.size : end]))
            start = end
        del self._bytes[:start]
        return bodies

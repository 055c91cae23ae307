"""Who may ask, and how much: API keys with names and quotas.

    [keys.alice]
    key = "sk-..."                    # or sha256 = "hex digits": printf %s KEY | sha256sum
    max_requests = 8                  # unfinished at once
    requests_per_minute = 120
    tokens_per_minute = 50_000        # prompt and answer
    priority = 0                      # the best (lowest) priority it may ask for
    admin = false                     # may read /metrics and /debug

Only hashes are kept. A key that comes in is hashed too and compared with all of them in constant time.
"""

import hmac
import re
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from liushui.errors import ParameterError
from liushui.server.errors import ApiError
from liushui.server.settings import ServerConfig

MAX_KEY = 512
_FLOOR = -100  # what the schema allows
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_HEX = re.compile(r"[0-9a-fA-F]{64}\Z")


@dataclass(frozen=True, slots=True)
class Key:
    """One caller. `name` is the tenant: the share of the engine, the prefix cache, the log."""

    name: str
    max_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    priority: int = 0
    admin: bool = False


NOBODY = Key("", priority=_FLOOR, admin=True)
"""Everybody, where no keys are asked for: only this machine gets in."""


class Bucket:
    """A leaky bucket: `rate` a minute, a minute's worth at most. Overdrawn, it says how long."""

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self._rate, self._clock = rate / 60, clock
        self._full = self._left = float(rate)
        self._at = clock()

    def take(self, amount: float) -> None:
        self._refill()
        self._left -= amount

    def wait(self, amount: float = 0.0) -> float:
        """Seconds until there is `amount` left, or anything at all; 0 if there is now."""
        self._refill()
        enough = self._left > 0 and self._left >= amount - 1e-9
        return 0.0 if enough else (max(amount, 1.0) - self._left) / self._rate

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(self._full, self._left + (now - self._at) * self._rate)
        self._at = now


class Quota:
    """What one key has used."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key
        self._unfinished = 0
        self._requests = Bucket(key.requests_per_minute, clock) if key.requests_per_minute else None
        self._tokens = Bucket(key.tokens_per_minute, clock) if key.tokens_per_minute else None

    def check(self) -> None:
        """Raises `ApiError` 429 if a request would be one too many now."""
        most = self._key.max_requests
        if most is not None and self._unfinished >= most:
            raise _exceeded("max_requests", f"{most} unfinished requests at once", 1.0)
        for bucket, name, limit, amount in (
            (self._requests, "requests_per_minute", self._key.requests_per_minute, 1.0),
            (self._tokens, "tokens_per_minute", self._key.tokens_per_minute, 0.0),  # how many is known afterwards
        ):
            if bucket is not None and (wait := bucket.wait(amount)) > 0:
                raise _exceeded(name, f"{limit} {name.replace('_', ' ')}", wait)

    def enter(self) -> None:
        """Count a request in, or raise `ApiError` 429. Whoever entered leaves by `leave`."""
        self.check()
        if self._requests is not None:
            self._requests.take(1)
        self._unfinished += 1

    def leave(self, tokens: int) -> None:
        self._unfinished -= 1
        if self._tokens is not None:
            self._tokens.take(tokens)


def _exceeded(quota: str, what: str, wait: float) -> ApiError:
    return ApiError(429, "rate_limit_exceeded", f"the quota of this key is {what} ({quota})", retry_after=wait)


class KeyRing:
    """All keys. Without any, everybody is `NOBODY`."""

    def __init__(self, keys: Iterable[tuple[bytes, Key]] = (), clock: Callable[[], float] = time.monotonic) -> None:
        """`keys`: (SHA-256 of the key, key)."""
        self._keys = list(keys)
        self._quotas = {key.name: Quota(key, clock) for _, key in self._keys}
        self._quotas.setdefault("", Quota(NOBODY, clock))

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str) -> Key | None:
        """The key, or None. Looks at all of them, and at all of each."""
        digest = sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found

    def quota(self, key: Key) -> Quota:
        return self._quotas[key.name]

    @classmethod
    def load(cls, config: ServerConfig) -> "KeyRing":
        """The keys of the settings. Raises `ParameterError`."""
        keys: list[tuple[bytes, Key]] = []
        for number, text in enumerate(config.api_key):
            name = "key" if len(config.api_key) == 1 else f"key-{number + 1}"
            keys.append((_digest("api_key", text), Key(name, priority=_FLOOR, admin=True)))
        if config.api_key_file is not None:
            keys += _read(Path(config.api_key_file))
        names, digests = [key.name for _, key in keys], [digest for digest, _ in keys]
        if len(set(names)) < len(names) or len(set(digests)) < len(digests):
            raise ParameterError("api_key_file", "the same name or the same key is there twice")
        if config.keyed and not keys:
            raise ParameterError("api_key_file", f"{config.api_key_file} has no keys; add a table [keys.NAME]")
        return cls(keys)


def _digest(field: str, text: str) -> bytes:
    if not 8 <= len(text) <= MAX_KEY:
        raise ParameterError(field, f"a key must have 8 to {MAX_KEY} characters (make one: openssl rand -hex 24)")
    return sha256(text.encode()).digest()


def _read(path: Path) -> list[tuple[bytes, Key]]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ParameterError("api_key_file", f"{path} cannot be read: {error}") from None
    tables = data.get("keys")
    if set(data) - {"keys"} or not isinstance(tables, dict):
        raise ParameterError("api_key_file", f"{path} must hold tables [keys.NAME], and nothing else")
    return [_key(name, table) for name, table in tables.items()]


def _key(name: str, table: Any) -> tuple[bytes, Key]:
    where = f"[keys.{name}]"
    if not _NAME.match(name):
        raise ParameterError("api_key_file", f"{where}: a name has letters, digits, . _ - and at most 64 of them")
    if not isinstance(table, dict) or ("key" in table) == ("sha256" in table):
        raise ParameterError("api_key_file", f"{where} must have key or sha256, one of the two")
    limits = {item.name for item in fields(Key)} - {"name"}
    if extra := set(table) - limits - {"key", "sha256"}:
        raise ParameterError("api_key_file", f"{where} has no setting {min(extra)}; known: {', '.join(sorted(limits))}")
    for setting in limits & set(table):
        value = table[setting]
        if setting == "admin":
            good = isinstance(value, bool)
        else:
            good = type(value) is int and (setting == "priority" or value > 0)
        if not good:
            raise ParameterError("api_key_file", f"{where} {setting} cannot be {value!r}")
    if "key" in table:
        digest = _digest("api_key_file", str(table["key"]))
    elif isinstance(table["sha256"], str) and _HEX.match(table["sha256"]):
        digest = bytes.fromhex(table["sha256"])
    else:
        raise ParameterError("api_key_file", f"{where} sha256 must be 64 hexadecimal digits")
    return digest, Key(name, **{setting: table[setting] for setting in limits & set(table)})

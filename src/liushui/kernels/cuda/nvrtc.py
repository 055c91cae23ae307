"""CUDA C++ files of this folder as machine code: compiled by NVRTC through ctypes, and kept on disk.

What is read back from the disk goes to the driver alone, which checks it; nothing of it runs on the host.
"""

import ctypes
import hashlib
import importlib.metadata
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from liushui.kernels.cuda import CudaUnavailableError

FOLDER = Path(__file__).parent
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
_PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")
_ELF = b"\x7fELF"
_one_at_a_time = threading.Lock()


def cache_folder() -> Path:
    """Where machine code is kept; Linux alone has it."""
    custom = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(custom) if os.path.isabs(custom) else Path.home() / ".cache"
    return base / "liushui" / "cubin"


def machine_code(name: str, defines: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """The file `name` with macros set, for GPUs of one compute capability.

    Raises `CudaUnavailableError` where there is no NVRTC, or with the compiler's words.
    """
    with _one_at_a_time:  # who asks second finds it on the disk
        library = _library()
        sources = {path.name: path.read_bytes() for path in sorted(FOLDER.glob("*.cu*"))}
        major, minor = capability
        options = [f"--gpu-architecture=sm_{major}{minor}{'a' if major >= 9 else ''}", "--std=c++17"]
        options += [f"-D{key}={value}" for key, value in sorted(defines.items())]
        kept = cache_folder() / f"{_key(library, name, sources, options)}.cubin"
        try:
            code = kept.read_bytes()
        except OSError:
            code = b""
        if not code.startswith(_ELF):
            code = _compiled(library, name, sources, options)
            _keep(kept, code)
        return code


@cache
def _library() -> ctypes.CDLL:
    for place in _places():
        try:
            for builtins in sorted(Path(place).parent.glob("libnvrtc-builtins.so.*")) if "/" in place else ():
                ctypes.CDLL(str(builtins))  # NVRTC asks for it by its name alone: it has to be there already
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise CudaUnavailableError("NVRTC was not found (pip install nvidia-cuda-nvrtc)")


def _places() -> list[str]:
    """Where the library may lie: the package that PyTorch brings, where the loader looks, a system's CUDA."""
    found: list[str] = []
    for package in _PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [str(file.locate()) for file in files if file.name in _NAMES]
    return [*found, *_NAMES, *(f"/usr/local/cuda/lib64/{name}" for name in _NAMES)]


def _key(library: ctypes.CDLL, name: str, sources: Mapping[str, bytes], options: list[str]) -> str:
    version = (ctypes.c_int * 2)()
    library.nvrtcVersion(ctypes.byref(version, 0), ctypes.byref(version, 4))
    parts = [name.encode(), *(k.encode() + v for k, v in sources.items()), *(o.encode() for o in options)]
    whole = hashlib.sha256(f"{version[0]}.{version[1]}".encode())
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


def _keep(target: Path, code: bytes) -> None:
    """Whole or not at all; a folder that cannot be written to costs the next start a compilation."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as part:
            part.write(code)
        Path(part.name).replace(target)
    except OSError:
        return


def _compiled(library: ctypes.CDLL, name: str, sources: Mapping[str, bytes], options: list[str]) -> bytes:
    headers = {key: text for key, text in sources.items() if key.endswith(".cuh")}
    names = _strings([key.encode() for key in headers])
    texts = _strings(list(headers.values()))
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(
        ctypes.byref(program), sources[name], name.encode(), len(headers), texts, names
    ))  # fmt: skip
    try:
        failed = library.nvrtcCompileProgram(program, len(options), _strings([o.encode() for o in options]))
        if failed:
            log = _fetched(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            words = log.rstrip(b"\0").decode(errors="replace").strip()
            raise CudaUnavailableError(f"{name} does not compile: {words}")
        return _fetched(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(items: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(items))(*items)


def _fetched(size_of: Callable[..., int], fetch: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(fetch(program, buffer))
    return buffer.raw


def _check(error: int) -> None:
    if error:
        raise CudaUnavailableError(f"NVRTC failed with error {error}")

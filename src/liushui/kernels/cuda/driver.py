"""The CUDA driver through ctypes: machine code becomes a kernel that is launched beside PyTorch's."""

import ctypes
from functools import cache, lru_cache

import torch

from liushui.kernels.cuda import CudaUnavailableError

_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION, _PROGRAMMATIC_SERIALIZATION = 4, 6  # CU_LAUNCH_ATTRIBUTE_...
_BFLOAT16, _PLAIN, _SWIZZLE_128, _PROMOTE_256 = 9, 0, 3, 3
TensorMap = ctypes.c_ubyte * 128
"""CUtensorMap, as a field of a kernel's parameter."""


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaUnavailableError(f"no CUDA driver: {error}") from None


class Kernel:
    """One kernel of a compiled file, in torch's current CUDA context; its parameter is one structure, by value."""

    def __init__(self, code: bytes, name: str, threads: int) -> None:
        """The file says how much shared memory it takes (`shared_bytes`). Raises `CudaUnavailableError`."""
        torch.cuda.synchronize()  # the context is this thread's from here on
        self.threads = threads
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(self._module), code))
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
        self.shared_bytes = int.from_bytes(self._read("shared_bytes", 4), "little")
        _check(_driver().cuFuncSetAttribute(self._function, _DYNAMIC_SHARED, self.shared_bytes))

    def _read(self, name: str, size: int) -> bytes:
        """A global variable of the file."""
        address, length, buffer = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.create_string_buffer(size)
        _check(_driver().cuModuleGetGlobal_v2(
            ctypes.byref(address), ctypes.byref(length), self._module, name.encode()
        ))  # fmt: skip
        _check(_driver().cuMemcpyDtoH_v2(buffer, address, ctypes.c_size_t(size)))
        return buffer.raw

    def resident(self) -> int:
        """Blocks that fit on a multiprocessor at once."""
        count = ctypes.c_int()
        _check(_driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
            ctypes.byref(count), self._function, self.threads, ctypes.c_size_t(self.shared_bytes)
        ))  # fmt: skip
        return count.value

    def clusters(self, size: int) -> int:
        """Clusters of `size` blocks that fit on the GPU at once."""
        count, how = ctypes.c_int(), self._how(size, size, False, None)
        _check(_driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), self._function, ctypes.byref(how)))
        return count.value

    def _how(self, blocks: int, size: int, chained: bool, stream: int | None) -> "_Launch":
        attributes = (_Attribute * 2)()
        attributes[0].kind, attributes[0].value[:3] = _CLUSTER_DIMENSION, (size, 1, 1)
        attributes[1].kind, attributes[1].value[0] = _PROGRAMMATIC_SERIALIZATION, 1
        return _Launch(blocks, 1, 1, self.threads, 1, 1, self.shared_bytes, stream, attributes, 2 if chained else 1)

    def launch_clusters(self, count: int, size: int, parameter: ctypes.Structure, chained: bool) -> None:
        """On torch's stream, in clusters of `size` blocks; `chained`: before the kernels ahead are done.

        Raises `CudaUnavailableError` where it is refused.
        """
        how = self._how(count * size, size, chained, torch.cuda.current_stream().cuda_stream)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(how), self._function, pointers, None))

    def launch(self, blocks: int, parameter: ctypes.Structure) -> None:
        """On torch's stream, all blocks at once or not at all. Raises `CudaUnavailableError` where it is refused."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(_driver().cuLaunchCooperativeKernel(
            self._function, blocks, 1, 1, self.threads, 1, 1, self.shared_bytes, stream, pointers
        ))  # fmt: skip


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("kind", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("blocks", "y", "z", "threads", "ty", "tz", "shared_bytes")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


def tensor_map(tensor: torch.Tensor, rows: int, columns: int, box: int) -> bytes:
    """For the copy engine: bfloat16 [rows, columns] at `tensor`, boxes [box, 64] swizzled by 128 bytes."""
    return boxes(tensor.data_ptr(), (columns, rows), (columns * 2,), (64, box))


@lru_cache(4096)
def boxes(address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """The same for any number of dimensions, the innermost first; strides, without the innermost, are in bytes."""
    store = (ctypes.c_ubyte * 192)()
    at = (ctypes.addressof(store) + 63) // 64 * 64
    rank = len(sizes)
    u64s, u32s = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    _check(_driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), _BFLOAT16, rank, ctypes.c_void_p(address), u64s(*sizes), u64s(*strides), u32s(*box),
        u32s(*[1] * rank), _PLAIN, _SWIZZLE_128, _PROMOTE_256, 0,
    ))  # fmt: skip
    return ctypes.string_at(at, 128)


def tile_map(weight: torch.Tensor) -> bytes:
    """For the copy engine: bfloat16 [N, K] as tiles of 8 rows and 512 columns, 64 columns after 64, swizzled."""
    rows, columns = weight.shape
    return boxes(weight.data_ptr(), (64, rows, columns // 64), (columns * 2, 128), (64, 8, 8))


def _check(error: int) -> None:
    if error:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(error, ctypes.byref(text))
        raise CudaUnavailableError(f"the driver says {(text.value or b'').decode() or error}")

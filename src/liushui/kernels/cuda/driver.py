"""The CUDA driver through ctypes: machine code becomes a kernel that is launched beside PyTorch's."""

import ctypes
from functools import cache

import torch

from liushui.kernels.cuda import CudaUnavailableError

_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_BFLOAT16, _PLAIN, _SWIZZLE_128, _PROMOTE_256 = 9, 0, 3, 3


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

    def launch(self, blocks: int, parameter: ctypes.Structure) -> None:
        """On torch's stream, all blocks at once or not at all. Raises `CudaUnavailableError` where it is refused."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(_driver().cuLaunchCooperativeKernel(
            self._function, blocks, 1, 1, self.threads, 1, 1, self.shared_bytes, stream, pointers
        ))  # fmt: skip


def tensor_map(tensor: torch.Tensor, rows: int, columns: int, box: int) -> bytes:
    """For the copy engine: bfloat16 [rows, columns] at `tensor`, boxes [box, 64] swizzled by 128 bytes."""
    store = (ctypes.c_ubyte * 192)()
    at = (ctypes.addressof(store) + 63) // 64 * 64
    u64s, u32s = ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
    _check(_driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), _BFLOAT16, 2, ctypes.c_void_p(tensor.data_ptr()), u64s(columns, rows),
        u64s(columns * 2, 0), u32s(64, box), u32s(1, 1), _PLAIN, _SWIZZLE_128, _PROMOTE_256, 0,
    ))  # fmt: skip
    return ctypes.string_at(at, 128)


def tile_map(weight: torch.Tensor) -> bytes:
    """For the copy engine: bfloat16 [N, K] as tiles of 8 rows and 512 columns, 64 columns after 64, swizzled."""
    rows, columns = weight.shape
    store = (ctypes.c_ubyte * 192)()
    at = (ctypes.addressof(store) + 63) // 64 * 64
    u64s, u32s = ctypes.c_uint64 * 3, ctypes.c_uint32 * 3
    _check(_driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), _BFLOAT16, 3, ctypes.c_void_p(weight.data_ptr()), u64s(64, rows, columns // 64),
        u64s(columns * 2, 128, 0), u32s(64, 8, 8), u32s(1, 1, 1), _PLAIN, _SWIZZLE_128, _PROMOTE_256, 0,
    ))  # fmt: skip
    return ctypes.string_at(at, 128)


def _check(error: int) -> None:
    if error:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(error, ctypes.byref(text))
        raise CudaUnavailableError(f"the driver says {(text.value or b'').decode() or error}")

"""Kernels in CUDA C++, compiled when a model is loaded (NVRTC, which comes with PyTorch's CUDA wheels)."""


class CudaUnavailableError(Exception):
    """Why such a kernel cannot run here, in words for a person."""

"""What this machine offers: processor features, cores, free memory."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from liushui.errors import ParameterError

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The processor's feature names as Linux prints them; empty where that cannot be known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AMX, AVX512-BF16, Arm BF16)."""
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"})


def pick_device(choice: str) -> torch.device:
    """`EngineConfig.device` -> the device."""
    import torch

    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ParameterError("device", "cuda was asked for, and torch sees no NVIDIA GPU here; choose cpu or auto")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise ParameterError("device", f"the GPU has compute capability {major}.{minor}; 8.0 is needed: choose cpu")
    return torch.device("cuda", torch.cuda.current_device())


def on_gpu(choice: str) -> bool:
    """Whether `pick_device` gives a GPU; torch is asked only where there may be one."""
    if choice == "cpu" or (choice == "auto" and not may_have_gpu()):
        return False
    return pick_device(choice).type == "cuda"


def pick_dtype(choice: str, device: torch.device | None = None) -> torch.dtype:
    """`EngineConfig.dtype` -> the arithmetic type."""
    import torch

    if choice == "auto" and device is not None and device.type == "cuda":
        return torch.bfloat16
    if choice == "auto":
        choice = host_dtype(choice)
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]


def host_dtype(choice: str) -> str:
    """`EngineConfig.dtype` -> the name of the arithmetic type on the processor."""
    if choice == "auto":
        return "bfloat16" if has_bfloat16() else "float32"
    return choice


def may_have_gpu() -> bool:
    """False where torch sees no GPU, or would see none for want of NVIDIA's driver: asking that costs nothing."""
    if "torch" in sys.modules or sys.platform != "linux":
        import torch

        return torch.cuda.is_available()
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def default_threads() -> int:
    """Physical cores among those this process may use, within the container's quota."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    quota = _cpu_quota()
    return max(1, min(len(cores), quota) if quota else len(cores))


def _cpu_quota() -> int | None:
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else max(1, round(int(limit) / int(period)))
    except (OSError, ValueError):
        return None


def set_threads(count: int | None) -> int:
    """Set torch's threads once for the process and return their number."""
    import torch

    threads = count or default_threads()
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return threads


def free_memory_bytes() -> int:
    """Memory that can be taken without swapping, within the container's limit."""
    free = _available()
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass
    return max(free, 0)


def free_gpu_bytes(device: torch.device, reserve: int) -> int:
    """Memory of the device that can be taken when `reserve` bytes stay for the steps themselves."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free - reserve)


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return pages * size // 2  # nothing tells what is free here: half is a careful guess


def describe() -> str:
    """One line for reports: processor, cores, matrix features, torch."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    features = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in cpu_flags()]
    return f"{name}, {default_threads()} cores, {' '.join(features) or platform.machine()}, torch {torch.__version__}"

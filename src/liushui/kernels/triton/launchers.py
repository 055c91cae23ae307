"""The small libraries with which Triton reaches the device: each is C source that it has compiled at first use.

Without torch, so that they can be made while that is being imported.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from triton.runtime import build

# Triton itself reads this variable when kernels are defined; on a CPU they then run in its interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def from_a_file_of_its_own(load: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    """`load`, which imports the small library with which Triton launches kernels of some parameters, made safe.

    Threads and processes that meet such kernels at once each write that library, one over the other's. Python knows a
    library by its file's number, and a file that is replaced while it is loaded leaves its number to another: that one
    then is taken for it, and kernels fail for having too many arguments. So each is loaded from a copy.
    """

    def loaded(name: str, path: str) -> Any:
        try:
            folder = tempfile.TemporaryDirectory(dir=os.path.dirname(path), ignore_cleanup_errors=True)
        except OSError:  # nobody can write there, so nobody replaces it
            return load(name, path)
        with folder:
            return load(name, shutil.copy2(path, folder.name))

    return loaded


if not INTERPRETED and hasattr(build, "_load_module_from_path"):
    build._load_module_from_path = from_a_file_of_its_own(build._load_module_from_path)


def make_driver() -> None:
    """Compile what loads kernels, or find it compiled. What cannot be made here fails, by name, where it is needed."""
    with suppress(Exception):
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()

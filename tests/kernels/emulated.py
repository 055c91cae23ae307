"""The native kernels with software in place of the instructions of AMX and AVX-512, built for the tests."""

import hashlib
import os
import platform
import tempfile
from functools import cache
from pathlib import Path

import pytest

from liushui.kernels.native import open_library
from liushui.kernels.native_linear import NativeProducts
from tests.support.files import ROOT, module_at

# Here and not in a test: setuptools is to be imported before anything can have touched distutils.
SANITIZE = module_at("scripts/sanitize.py")
SETS = ("avx512", "avx512bf16", "amx")
"""Instruction sets that can be emulated."""


@cache
def library(units: tuple[str, ...] = ("linear",), sets: tuple[str, ...] = SETS) -> Path:
    """`_cpu.so` with instruction sets emulated; built once for each state of the sources."""
    if platform.machine().lower() not in ("x86_64", "amd64") or "avx2" not in _cpu_flags():
        pytest.skip("the emulation is made of AVX2")
    module = SANITIZE.load_setup()
    module.PER_INSTRUCTION_SET = units
    sources = [ROOT / "setup.py", Path(__file__), *sorted((ROOT / module.SOURCES).glob("*.*"))]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    name = "-".join((*units, *sets, state))
    folder = Path(tempfile.gettempdir()) / f"liushui-emulated-{os.getuid()}-{name}"
    target = folder / f"_cpu{module.SUFFIX}"
    if not target.exists():
        flags = ["-mavx2", "-mfma", "-mf16c", "-O1", "-DLS_EMULATE", "-DLS_WIDTH=16", "-DLS_REGISTERS=32"]
        variants = {"avx512": flags, "avx512bf16": [*flags, "-DLS_EMULATE_BF16"], "amx": [*flags, "-DLS_EMULATE_AMX"]}
        variants = {name: variants[name] for name in sets}
        made = folder / f"{os.getpid()}{module.SUFFIX}"
        here = Path.cwd()
        os.chdir(ROOT)
        try:
            module.build_library(made, folder / f"objects-{os.getpid()}", variants)
        except (module.BuildFailed, OSError) as error:
            pytest.skip(f"cannot be built: {error}")
        finally:
            os.chdir(here)
        made.replace(target)
    return target


def products(isa: str, threads: int) -> NativeProducts:
    return NativeProducts(open_library(library()), isa, threads)


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8") if info.exists() else ""

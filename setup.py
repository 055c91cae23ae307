"""Builds the CPU kernels (liushui/kernels/cpu) into one shared library, once per instruction set.

All other metadata is in pyproject.toml. The library is optional: without a C++ compiler the package installs all
the same, and the reason is left beside the place where the library would be, for the program to tell.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = Path("liushui/kernels")
SOURCES = "src" / PACKAGE / "cpu"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")]
AVX512 += ["-mfma", "-mf16c", "-mtune=icelake-server"]
AVX512BF16 = [*AVX512, "-mavx512vbmi", "-mavx512bf16"]
X86_64 = {
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": AVX512BF16,
    "amx": [*AVX512BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mtune=sapphirerapids"],
}
COMMON = ("library", "threads", "features")
PER_INSTRUCTION_SET = ("kernels", "linear", "step")
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


class BuildFailed(Exception):
    """The reason, in words for the user."""


def find_compiler() -> list[str]:
    candidates = [os.environ.get("CXX", ""), sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise BuildFailed("no C++ compiler found")


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows the instruction set; says so where it does not."""
    probe = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    known = subprocess.run(probe, input="", capture_output=True, text=True, check=False).returncode == 0
    if not known:
        sys.stderr.write(f"{compiler[0]} does not know {' '.join(flags)}: kernels for these are left out\n")
    return known


def build_library(
    target: Path, objects: Path, variants: dict[str, list[str]] | None = None, link_flags: Sequence[str] = ()
) -> None:
    """Compile every object at once, then link. Raises `BuildFailed`.

    `variants`: the instruction sets and their flags; by default all that the compiler knows for this machine.
    """
    if sys.platform not in ("linux", "darwin"):
        raise BuildFailed(f"not supported on {sys.platform} yet")
    compiler = find_compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if variants is None:
        variants = {isa: flags for isa, flags in X86_64.items() if accepts(compiler, flags)} if x86 else {"generic": []}
    # The shared objects need to know of software that stands in for instructions (tests).
    emulated = [flag for flag in ("-DLS_EMULATE",) if any(flag in flags for flags in variants.values())]
    jobs = [(f"{name}.cpp", name, emulated) for name in COMMON]
    for isa, flags in variants.items():
        jobs += [(f"{name}.cpp", f"{name}-{isa}", [*flags, f"-DLS_ISA={isa}"]) for name in PER_INSTRUCTION_SET]
    objects.mkdir(parents=True, exist_ok=True)
    outputs = [str(objects / f"{name}.o") for _, name, _ in jobs]

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.stderr.write(f"{shlex.join(command)}\n{done.stderr}")
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise BuildFailed(f"{compiler[0]} failed: {next((x for x in lines if 'error' in x), lines[0])}")

    commands = [
        [*compiler, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", output]
        for (source, _, flags), output in zip(jobs, outputs, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    target.parent.mkdir(parents=True, exist_ok=True)
    link = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared", "-Wl,-z,defs"]
    run([*compiler, *link, *link_flags, "-pthread", *outputs, "-o", str(target)])


class BuildKernels(build_ext):
    """Leaves `_cpu.so`, or `_cpu.reason` with the words why not, in the package."""

    def run(self) -> None:
        names = self._names(Path(self.build_lib) / PACKAGE)
        for old in names:
            old.unlink(missing_ok=True)
        names[0].parent.mkdir(parents=True, exist_ok=True)
        try:
            build_library(names[0], Path(self.build_temp) / "kernels")
        except (BuildFailed, OSError) as error:
            sys.stderr.write(f"native kernels not built: {error}\n")
            names[1].write_text(f"{error}\n", encoding="utf-8")
        if self.inplace:
            for made, place in zip(names, self._names(Path("src") / PACKAGE), strict=True):
                place.unlink(missing_ok=True)  # not overwritten: a running process may have it mapped
                if made.exists():
                    shutil.copy2(made, place)

    def get_outputs(self) -> list[str]:
        return [str(name) for name in self._names(Path(self.build_lib) / PACKAGE) if name.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        places = zip(self._names(Path(self.build_lib) / PACKAGE), self._names(Path("src") / PACKAGE), strict=True)
        return {str(made): str(place) for made, place in places if made.exists()}

    @staticmethod
    def _names(folder: Path) -> list[Path]:
        return [folder / f"_cpu{SUFFIX}", folder / "_cpu.reason"]


class PlatformWheel(bdist_wheel):
    """The wheel is for this platform but for any Python: the library is loaded with ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "liushui.kernels._cpu",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = Path("liushui/kernels")
SOURCES = "src" / PACKAGE / "cpu"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
X86_64 = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mtune=haswell"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mtune=icelake-server"],
}
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


def build_library(target: Path, objects: Path) -> None:
    """Compile every object at once, then link. Raises `BuildFailed`."""
    if sys.platform not in ("linux", "darwin"):
        raise BuildFailed(f"not supported on {sys.platform} yet")
    compiler = find_compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    jobs = [(f"{name}.cpp", name, []) for name in ("library", "threads")]
    for isa, flags in (X86_64 if x86 else {"generic": []}).items():
        jobs.append(("kernels.cpp", f"kernels-{isa}", [*flags, f"-DLS_ISA={isa}"]))
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
    run([*compiler, *link, "-pthread", *outputs, "-o", str(target)])


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

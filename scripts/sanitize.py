"""The kernel tests under the address and undefined-behaviour sanitizers (make sanitize).

Builds the native library once more, instrumented, into a temporary folder, and lets the tests load it there instead of
the installed one. Where the compiler has no sanitizer runtime it says so and ends well.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import setuptools

ROOT = Path(__file__).resolve().parents[1]
INSTRUMENTED = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g1",
    "-O1",
]
TESTS = ["tests/kernels/test_attention.py", "tests/kernels/test_rows.py", "tests/kernels/test_native_linear.py",
         "tests/runner/test_whole_step.py", "tests/runner/test_int8_cache.py"]  # fmt: skip


def main() -> int:
    setup = load_setup()
    try:
        compiler = setup.find_compiler()
    except setup.BuildFailed as error:
        print(f"sanitize: skipped: {error}")
        return 0
    runtimes = [runtime for name in ("asan", "ubsan") if (runtime := find_runtime(compiler, name))]
    if len(runtimes) < 2 or not setup.accepts(compiler, INSTRUMENTED):
        print(f"sanitize: skipped: {compiler[0]} has no sanitizer runtime (with gcc: libasan and libubsan)")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"_cpu{setup.SUFFIX}"
        setup.FLAGS = [flag for flag in setup.FLAGS if flag != "-O3"] + INSTRUMENTED
        os.chdir(ROOT)
        variants = best_instruction_set(setup)
        setup.build_library(library, Path(folder) / "objects", variants, link_flags=INSTRUMENTED[:1])
        print(f"sanitize: {', '.join(variants)} with {shlex.join(compiler)}", flush=True)
        environment = os.environ | {
            "LD_PRELOAD": " ".join(runtimes),
            # Python itself does not free everything, and torch's allocator hands out what it likes.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:verify_asan_link_order=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
        plugin = ["-p", "tests.support.other_library", "--native-library", str(library)]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not torch",
            *plugin,
            *TESTS,
            *sys.argv[1:],
        ]
        return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def load_setup() -> ModuleType:
    """setup.py as a module, without its setup()."""
    spec = importlib.util.spec_from_file_location("liushui_setup", ROOT / "setup.py")
    if spec is None or spec.loader is None:
        raise SystemExit("setup.py cannot be read")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(setuptools, "setup"):
        spec.loader.exec_module(module)
    return module


def best_instruction_set(setup: ModuleType) -> dict[str, list[str]]:
    """The one that the installed library takes on this machine: the others cost time and run elsewhere."""
    from liushui.errors import LiushuiError
    from liushui.kernels.ops import load_ops

    try:
        isa = getattr(load_ops("native", 1), "isa", "generic")
    except LiushuiError:
        isa = "generic"
    return {isa: setup.X86_64.get(isa, [])}


def find_runtime(compiler: list[str], name: str) -> str | None:
    """The runtime's shared library, by gcc's name or clang's."""
    for file in (f"lib{name}.so", f"libclang_rt.{name}-x86_64.so", f"libclang_rt.{name}.so"):
        command = [*compiler, f"-print-file-name={file}"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if Path(found).is_absolute() and Path(found).exists():
            return found
    print(f"sanitize: {shlex.join(compiler)} has no lib{name}")
    return None


if __name__ == "__main__":
    raise SystemExit(main())

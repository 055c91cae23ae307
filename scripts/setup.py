"""Make a virtual environment with liushui in it. Standard library only; safe to run again.

    python3 scripts/setup.py --venv .venv --extras dev

What it decides is which torch to install: where Linux has no NVIDIA driver, the CPU build (200 MB instead of
gigabytes of CUDA); a torch that is already in the environment is kept. Everything installed afterwards is
held to that torch by a constraint, so that no dependency can replace it.

This file must parse on Python 3.6, or it could not say that a Python is too old.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
TORCH_ANY = "torch>=2.11,<2.14"
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class SetupError(Exception):
    """Something the person at the keyboard has to fix; the message says what."""


def check_python(version, which=shutil.which):
    """Raise SetupError, naming a Python to use instead, if `version` is too old."""
    if tuple(version[:2]) >= OLDEST:
        return
    names = [f"python3.{minor}" for minor in (13, 12, 11)]
    found = next((name for name in names if which(name)), None)
    remedy = f"try: make PYTHON={found}" if found else "install one, then: make PYTHON=python3.11"
    raise SetupError(f"liushui needs Python 3.11 or newer; {sys.executable} is {version[0]}.{version[1]}. {remedy}")


def has_nvidia_driver(root=Path("/"), which=shutil.which):
    """Whether this machine has an NVIDIA driver (a CUDA toolkit alone does not count)."""
    marks = ("proc/driver/nvidia/version", "dev/nvidia0", "dev/nvidiactl")
    return any((root / mark).exists() for mark in marks) or which("nvidia-smi") is not None


def torch_attempts(platform, nvidia):
    """The pip requirements to try, in order, on this platform."""
    if not platform.startswith("linux") or nvidia:
        return [[TORCH_ANY]]
    return [[TORCH_CPU], [TORCH_CPU, "--extra-index-url", TORCH_CPU_INDEX]]


def make_venv(venv):
    """Create the environment if it is not there; return its Python."""
    python = venv / "bin" / "python"
    if python.exists():
        return python
    try:
        import ensurepip  # noqa: F401
        import venv as _venv  # noqa: F401
    except ImportError:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            f"{sys.executable} cannot make virtual environments. On Debian and Ubuntu: "
            f"apt-get install python{version}-venv; elsewhere: use a Python from python.org or uv"
        ) from None
    say(f"making {venv} with {sys.executable}")
    code = subprocess.call([sys.executable, "-m", "venv", str(venv)])
    if code != 0:
        raise SetupError(f"could not make {venv} (see the messages above)")
    return python


def installed_torch(python):
    """The version of the torch in the environment, such as "2.13.0+cpu", or None."""
    code = "from importlib.metadata import version; print(version('torch'))"
    done = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.decode().strip() or None


def install_torch(python):
    """Install torch if it is missing; return its version."""
    version = installed_torch(python)
    if version:
        say(f"keeping torch {version}")
        return version
    attempts = torch_attempts(sys.platform, has_nvidia_driver())
    for number, attempt in enumerate(attempts, 1):
        say(f"installing {' '.join(attempt)}")
        if subprocess.call(pip_install(python) + attempt) == 0:
            return installed_torch(python)
        if number < len(attempts):
            say("not to be had from the configured index; trying PyTorch's own")
    raise SetupError(
        f"could not install torch (see pip's messages above). Install any {TORCH_ANY} with {python} -m pip "
        "and run make again: it will be kept"
    )


def install_liushui(python, extras, torch_version):
    """Install this checkout, editable, with `extras`; torch is held at `torch_version`."""
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    say(f"installing {target}")
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder) / "torch.txt"
        constraint.write_text(f"torch=={torch_version}\n")
        env = dict(os.environ, PIP_CONSTRAINT=str(constraint))  # holds in pip's build environment too
        if subprocess.call([*pip_install(python), "-e", target], env=env) != 0:
            raise SetupError("could not install liushui (see pip's messages above)")


def pip_install(python):
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    return command if sys.stderr.isatty() else [*command, "--quiet"]


def say(text):
    print(f"setup: {text}", file=sys.stderr, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make a virtual environment with liushui in it.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="", help="comma-separated, as in pyproject.toml")
    parser.add_argument("--stamp", type=Path, action="append", default=[], help="file to touch at the end")
    args = parser.parse_args(argv)
    try:
        check_python(sys.version_info)
        python = make_venv(args.venv)
        version = install_torch(python)
        install_liushui(python, args.extras, version)
    except SetupError as error:
        say(str(error))
        return 1
    for stamp in args.stamp:
        stamp.touch()
    say(f"done: torch {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

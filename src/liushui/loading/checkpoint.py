"""A model on disk, whatever its format: configuration, tensors, tokenizer, chat template."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from liushui.errors import ModelError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from liushui.kernels.quantised import Quantised, QuantisedRows


class Checkpoint(Protocol):
    """One opened model. Names, shapes and values of tensors are those of Hugging Face's implementation.

    Every method raises `ModelError` (`WeightError` for a tensor) when the files do not hold what they should.
    """

    path: Path
    format: Literal["safetensors", "gguf"]
    config: dict[str, Any]
    """As in Hugging Face's config.json; from GGUF, the metadata translated to those keys.

    `rope_freq_factors` (GGUF only): True when the tensor `rope_freqs.weight`, [head_dim / 2], divides the rotary
    frequencies (how llama.cpp stores Llama 3's scaling)."""

    def names(self) -> list[str]:
        """The tensors' names, as in Hugging Face's implementation."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def load(self, name: str, dtype: "torch.dtype") -> "torch.Tensor":
        """The tensor `name`, [*shape(name)], dequantised and converted to `dtype`, on the CPU."""

    def block_types(self) -> frozenset[str]:
        """GGUF's names of the quantised types of this checkpoint's matrices; empty where none is quantised."""

    def load_blocks(self, name: str) -> "Quantised | None":
        """A quantised matrix as the file holds it, not dequantised; None for all other tensors."""

    def load_rows(self, name: str) -> "QuantisedRows | None":
        """A matrix, or a vector as one row, of any type as the file holds it, rows in `load`'s order, without torch;
        None where the file holds other values or another order."""

    def tokenizer(self) -> "Tokenizer":
        """Without truncation and padding. Encode with `add_special_tokens=False` and see `special["add_bos"]`."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source, or None when the model brings no template."""

    @property
    def special(self) -> dict[str, Any]:
        """`bos_token`, `eos_token`, `unk_token`, `pad_token` (str | None), `bos_token_id` (int | None),
        `eos_token_ids` (list of int: every token that ends an answer) and `add_bos` (prompts begin with BOS)."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """Sampling defaults the model's files recommend, under Hugging Face's names; empty when there are none."""

    def describe(self) -> str:
        """One line for people: format, type of the weights, size."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a GGUF file, or a folder with safetensors files (or with a single GGUF file).

    Only headers are read. Raises `ModelError` when there is nothing to open, or the files are unsound.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ModelError(f"{path}: there is no such file or folder")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        path = _only_gguf(path)
    if path.is_dir():
        from liushui.loading.safetensors_files import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    if path.suffix.lower() == ".safetensors":
        raise ModelError(f"{path}: give the folder it lies in, which also holds config.json and tokenizer.json")
    from liushui.loading.gguf_file import GgufCheckpoint

    return GgufCheckpoint(path)


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(f"{folder}: holds several GGUF files; give one: {', '.join(f.name for f in found)}")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{folder}: holds only pickled weights, which can run code and are never read; "
            "get the model as safetensors or GGUF"
        )
    raise ModelError(f"{folder}: holds neither safetensors nor GGUF files")

"""Hugging Face transformers as the other side of a comparison (`liushui[oracle]`)."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from liushui.errors import LiushuiError


class Transformers:
    """The same files, read and run by transformers in float32. No code from model repositories is run."""

    def __init__(self, path: Path) -> None:
        """`path`: a folder or a GGUF file. Raises `LiushuiError` if transformers is missing or cannot read it."""
        try:
            import torch
            import transformers
        except ImportError:
            raise LiushuiError("diff needs transformers: pip install 'liushui[oracle]'") from None
        log: Any = transformers.logging
        log.set_verbosity_error()
        log.disable_progress_bar()
        where, more = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        try:
            with redirect_stderr(io.StringIO()):  # progress bars that no setting turns off
                self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(where, **more)
                model: Any = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **more)
        except Exception as error:  # whatever it raises for files that it does not know
            raise LiushuiError(f"transformers cannot read {path}: {type(error).__name__}: {error}") from None
        self.model = model.eval()
        self.name = f"transformers {transformers.__version__}"

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        except Exception as error:  # Jinja's, the template's own, transformers'
            raise LiushuiError(f"{type(error).__name__}: {error}") from None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def logits(self, ids: Sequence[int], first: int) -> Any:
        """[len(ids) - first, vocab] float32."""
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([list(ids)])).logits[0, first:].float()

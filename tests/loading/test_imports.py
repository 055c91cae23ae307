"""Start-up time: what is slow to import comes only when it is needed."""

import subprocess
import sys

import pytest

SLOW = {"torch", "numpy", "huggingface_hub", "gguf", "tokenizers", "safetensors", "jinja2"}


@pytest.mark.parametrize("module", ["liushui.loading", "liushui.engine.tokenizer"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    assert not SLOW & set(loaded)


def test_a_gguf_file_needs_neither_gguf_nor_the_hub(tmp_path: object) -> None:
    from tests.loading.test_gguf_header import write_small

    path = write_small(tmp_path / "m.gguf")  # type: ignore[operator]
    code = f"""
import sys, torch
from liushui.loading import open_checkpoint
checkpoint = open_checkpoint({str(path)!r})
for name in checkpoint.names():
    checkpoint.load(name, torch.float32)
checkpoint.tokenizer()
print(*sys.modules)
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"gguf", "huggingface_hub", "safetensors", "jinja2", "transformers"} & set(loaded)

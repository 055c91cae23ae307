"""A tiny random Llama in a folder, and the command as a person calls it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 32, 4, 2, 64, 2
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


def byte_tokenizer() -> Tokenizer:
    """One token per byte, then <bos> and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return tokenizer


def make_model(folder: Path, *, template: str | None = TEMPLATE, architecture: str = "LlamaForCausalLM") -> Path:
    """Write a random model with a vocabulary of bytes."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    size = tokenizer.get_vocab_size()
    config = {
        "architectures": [architecture],
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    save_file(_weights(size), folder / "model.safetensors")
    return folder


def _weights(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    kv = HIDDEN // HEADS * KV_HEADS
    tensors = {"model.embed_tokens.weight": random(size, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        tensors |= {
            f"model.layers.{layer}.{name}": tensor
            for name, tensor in {
                "input_layernorm.weight": torch.ones(HIDDEN),
                "post_attention_layernorm.weight": torch.ones(HIDDEN),
                "self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
                "self_attn.k_proj.weight": random(kv, HIDDEN),
                "self_attn.v_proj.weight": random(kv, HIDDEN),
                "self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
                "mlp.gate_proj.weight": random(FFN, HIDDEN),
                "mlp.up_proj.weight": random(FFN, HIDDEN),
                "mlp.down_proj.weight": random(HIDDEN, FFN),
            }.items()
        }
    return tensors


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def engine_flags(model: Path) -> list[str]:
    """Flags that make the command quick on the tiny model."""
    return ["--model", str(model), "--dtype", "float32", "--kv-cache-gib", "0.01", "--threads", "1"]


@pytest.fixture
def liushui(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command in this process: no second import of torch."""

    def call(*args: Any) -> Done:
        from liushui.cli.main import main

        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["liushui", *map(str, args)])
        with pytest.raises(SystemExit) as ending:
            main()
        out, err = capfd.readouterr()
        return Done(int(ending.value.code or 0), out, err)

    return call


def start(*args: Any, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "liushui.cli", *map(str, args)], text=True, **(pipes | options))


def finish(process: subprocess.Popen[str], text: str | None = None) -> Done:
    out, err = process.communicate(text, timeout=120)
    return Done(process.returncode, out or "", err or "")

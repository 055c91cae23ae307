"""Tiny random models of every family, as Hugging Face makes them, and as checkpoints for the runner."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from liushui.config import EngineConfig
from liushui.core.plan import NewSequence, PlanItem, StepPlan, StepResult
from liushui.core.request import SamplingParams
from liushui.kernels.ops import load_native
from liushui.runner.runner import Runner

COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 1.7,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 12}


def _configs() -> dict[str, transformers.PretrainedConfig]:
    t = transformers
    return {
        "llama": t.LlamaConfig(**COMMON, tie_word_embeddings=False),
        "llama-tied": t.LlamaConfig(**COMMON, tie_word_embeddings=True),
        "llama-bias": t.LlamaConfig(**COMMON, attention_bias=True),
        "llama3-rope": t.LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE),
        "llama-linear-rope": t.LlamaConfig(**COMMON, rope_parameters=LINEAR_ROPE),
        "llama-yarn-rope": t.LlamaConfig(**COMMON, rope_parameters=YARN_ROPE),
        "mistral": t.MistralConfig(**COMMON, sliding_window=None),
        "mistral-window": t.MistralConfig(**COMMON, sliding_window=24),
        "gpt2": t.GPT2Config(
            vocab_size=211, n_embd=48, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
        ),
        "qwen2": t.Qwen2Config(**COMMON),
        "qwen2-window": t.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        "qwen3": t.Qwen3Config(**COMMON, head_dim=20),
        "gemma3": t.Gemma3TextConfig(
            **COMMON,
            head_dim=12,
            sliding_window=16,
            query_pre_attn_scalar=20,
            layer_types=GEMMA3_LAYERS,
            rope_parameters=GEMMA3_ROPE,
            pad_token_id=0,
        ),
        "phi3": t.Phi3Config(**COMMON, pad_token_id=0, sliding_window=40),
        "phi3-partial-rope": t.Phi3Config(
            **COMMON | {"num_attention_heads": 4}, pad_token_id=0, rope_parameters=PARTIAL_ROPE
        ),
        "granite": t.GraniteConfig(**COMMON, **GRANITE, tie_word_embeddings=True),
        "olmo2": t.Olmo2Config(**COMMON),
        "mixtral": t.MixtralConfig(**COMMON, num_local_experts=5, num_experts_per_tok=2),
        "qwen3-moe": t.Qwen3MoeConfig(**COMMON, **EXPERTS, norm_topk_prob=True),
        "qwen3-moe-mixed": t.Qwen3MoeConfig(
            **COMMON, **EXPERTS, norm_topk_prob=False, mlp_only_layers=[1], use_sliding_window=True, sliding_window=16
        ),
    }


FAMILIES = tuple(_configs())


@dataclass
class DictCheckpoint:
    """A checkpoint held in memory."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.tensors[name].detach().clone().to(dtype)


def oracle(family: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A random Hugging Face model in float32; weights large enough that answers differ."""
    config = _configs()[family]
    for key, value in changes.items():
        setattr(config, key, value)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def checkpoint(model: transformers.PreTrainedModel) -> DictCheckpoint:
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    tensors = revert_weight_conversion(model, model.state_dict())  # names and shapes of the files
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return DictCheckpoint(config, tensors)


def runner(model: transformers.PreTrainedModel, **settings: Any) -> Runner:
    settings = {"device": "cpu", "dtype": "float32", "kv_cache_gib": 0.02, "threads": 1} | settings
    return Runner.load(EngineConfig(**settings).validate(), checkpoint(model))


class Listening:
    """A model that notes every row of logits it makes: a runner given it goes operation by operation."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.logits_made: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        made = self._model.logits(hidden)
        self.logits_made.append(made.clone())
        return made


class Driver:
    """Feeds a runner by hand: any cut of any sequences into steps, blocks taken in any order."""

    def __init__(self, runner: Runner, blocks: list[int] | None = None) -> None:
        self.runner = runner
        self.free = list(blocks if blocks is not None else range(runner.num_blocks))
        self.tables: dict[str, list[int]] = {}
        self.ids: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.steps = 0
        self.fresh: list[NewSequence] = []

    def add(
        self, name: str, ids: list[int], sampling: SamplingParams | None = None, seed: int = 0, logprobs_from: int = 0
    ) -> None:
        self.ids[name], self.tables[name], self.computed[name] = list(ids), [], 0
        sampling = sampling or SamplingParams(temperature=0, logprobs=0)
        self.fresh.append(NewSequence(name, tuple(ids), sampling, seed, frozenset(), logprobs_from))

    def forget_cache(self, name: str) -> None:
        """Preempt: the sequence must be computed again, in other blocks."""
        self.free.extend(self.tables[name])
        self.tables[name], self.computed[name] = [], 0

    def step(self, counts: dict[str, int]) -> StepResult:
        """Feed `counts[name]` tokens of each; what reaches the end of the known tokens is sampled."""
        items = []
        for name, count in counts.items():
            start, table = self.computed[name], self.tables[name]
            while len(table) * self.runner.block_size < start + count:
                table.append(self.free.pop())
            ids = tuple(self.ids[name][start : start + count])
            samples = start + count == len(self.ids[name])
            items.append(PlanItem(name, len(items), start, count, ids, tuple(table), samples))
            self.computed[name] += count
        plan = StepPlan(self.steps, tuple(items), new=tuple(self.fresh))
        self.fresh, self.steps = [], self.steps + 1
        result = self.runner.execute(plan).result()
        for name, tokens in result.tokens.items():
            self.ids[name].extend(tokens)
        return result


def check_logprobs(runner: Runner, model: transformers.PreTrainedModel, length: int = 50) -> None:
    """Every token of a random prompt is as likely as Hugging Face's `model` says."""
    driver = Driver(runner)
    prompt = torch.randint(3, 211, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    driver.add("a", prompt, SamplingParams(temperature=0, prompt_logprobs=0))
    found = [entry.logprob for _, entry in driver.step({"a": length}).prompt_logprobs["a"]]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
    theirs = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), theirs, rtol=0, atol=1e-4)


def native_is_built() -> bool:
    """Whether the native library is there."""
    return load_native(1) is not None

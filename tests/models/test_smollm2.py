"""The default model itself: the tokens of Hugging Face in float32 from the same file, and the same bits in company."""

from pathlib import Path
from typing import Any

import pytest

from liushui import LLM, SamplingParams

pytestmark = pytest.mark.real_model

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue?",
    "Write one sentence about a river.",
    "What is 12 times 3?",
    "Translate 'good morning' into French.",
    "Who wrote Hamlet?",
    "Give me a synonym for 'quick'.",
    "What does a compiler do?",
    "List two animals that can fly.",
    "In which season do leaves fall?",
    "What is the opposite of 'hot'?",
    "Explain gravity to a child in one sentence.",
    "中国的首都是哪里?",
    "How many legs does a spider have?",
    "Say hello in Spanish.",
]
NEW = 20


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> LLM:
    return LLM(str(smollm2), dtype="float32", kv_cache_gib=0.5)


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    texts = [llm.tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [llm.tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()


def _answers(llm: LLM, theirs: Any, prompts: list[list[int]]) -> list[tuple[list[int], Any]]:
    """Greedy answers with the peer's logits [NEW, vocabulary] at each of their places, in one pass a prompt."""
    import torch

    ours = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True), use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in ours]
    with torch.inference_mode():
        return [
            (answer, theirs(torch.tensor([prompt + answer[:-1]]), logits_to_keep=NEW).logits[0])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def test_greedy_tokens_are_hugging_faces(smollm2: Path, theirs: Any, prompts: list[list[int]]) -> None:
    """With exact weights, each token is the peer's most likely one after those before it: its own greedy answer."""
    llm = LLM(str(smollm2), dtype="float32", weights="float32", kv_cache_gib=0.5)
    for answer, logits in _answers(llm, theirs, prompts):
        assert answer == logits.argmax(dim=-1).tolist()


def test_the_default_chooses_otherwise_only_in_a_tie(llm: LLM, theirs: Any, prompts: list[list[int]]) -> None:
    """Multiplying the file's blocks rounds activations to 16 bits: a tie may then fall differently."""
    for answer, logits in _answers(llm, theirs, prompts):
        chosen = logits.gather(1, logits.new_tensor(answer).long()[:, None])[:, 0]
        assert float((logits.max(dim=-1).values - chosen).max()) < 0.005


def test_company_changes_no_bit(llm: LLM, prompts: list[list[int]]) -> None:
    params = [SamplingParams(temperature=t, max_tokens=12, logprobs=1, seed=5) for t in (0, 0.8)] * 8
    together = llm.generate(prompts, params, use_tqdm=False)
    for i in (0, 3, 7, 13):
        alone = llm.generate([prompts[i]], params[i], use_tqdm=False)[0]
        assert alone.outputs[0].token_ids == together[i].outputs[0].token_ids
        assert alone.outputs[0].logprobs == together[i].outputs[0].logprobs

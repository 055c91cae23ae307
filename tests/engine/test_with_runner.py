"""The whole engine around a tiny random Llama: an answer is a pure function of its request."""

from dataclasses import replace
from typing import Any

import pytest

from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.engine.llm import LLM
from liushui.engine.outputs import CompletionOutput
from liushui.engine.startup import join
from tests.engine.scripted import RAW, VOCAB_SIZE, assert_clean, tiny_tokenizer
from tests.support import tiny

PROMPTS = ["the quick brown fox", "你好", "the quick brown fox jumps over", "a", "two  spaces and the lazy dog"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, logprobs=2),
    SamplingParams(temperature=0.9, seed=3, max_tokens=14, logprobs=0, n=2, repetition_penalty=1.2),
    SamplingParams(temperature=0.7, seed=4, top_p=0.9, max_tokens=9, prompt_logprobs=1),
    SamplingParams(temperature=1.2, seed=5, top_k=20, max_tokens=15, stop=["a", "the"]),
    SamplingParams(temperature=1.0, seed=6, max_tokens=11, min_tokens=5, presence_penalty=0.5),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.oracle("llama", vocab_size=VOCAB_SIZE)


def make(model: Any, *, tight: bool = False, **settings: Any) -> LLM:
    """`tight`: so few KV blocks that sequences are preempted."""
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "block_size": 4}
    config = EngineConfig(**(sizes | settings))
    runner = tiny.runner(model, **{name: getattr(config, name) for name in sizes})
    if tight:
        runner.num_blocks = 18
    return LLM.from_engine(join(config, runner, tiny_tokenizer()), tiny_tokenizer(), config)


def test_the_prefix_cache_has_the_room_that_the_runner_names(model: Any) -> None:
    llm = make(model)
    assert llm.engine.scheduler.pool.cache_room == llm.engine.executor.cache_room > 0


def answers(llm: LLM) -> list[tuple[list[CompletionOutput], Any]]:
    outputs = llm.generate(PROMPTS, PARAMS)
    assert_clean(llm.engine)
    assert all(output.error is None for output in outputs)
    return [(output.outputs, output.prompt_logprobs) for output in outputs]


@pytest.fixture(scope="module")
def alone(model: Any) -> list[tuple[list[CompletionOutput], Any]]:
    llm = make(model, prefix_caching=False, max_num_batched_tokens=64)
    outputs = [llm.generate(prompt, params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    return [(output.outputs, output.prompt_logprobs) for output in outputs]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 4},
        {"max_num_seqs": 2},
        {"policy": "static"},
        {"tight": True, "prefix_caching": False},
        {"tight": True},
    ],
    ids=["batched", "chunked", "queued", "static", "preempted", "preempted-cached"],
)
def test_alone_is_batched_bit_for_bit(model: Any, alone: Any, settings: dict[str, Any]) -> None:
    llm = make(model, **settings)
    assert answers(llm) == alone
    assert answers(llm) == alone  # now with a warm prefix cache
    if "tight" in settings:
        assert llm.engine.scheduler.num_preemptions > 0


def test_streamed_is_unstreamed(model: Any, alone: Any) -> None:
    llm = make(model)
    for prompt, params, (outputs, _) in zip(PROMPTS, PARAMS, alone, strict=True):
        deltas = list(llm.generate_stream(prompt, params))
        for output in outputs:
            mine = [delta for delta in deltas if delta.output_index == output.index]
            assert "".join(delta.text for delta in mine) == output.text
            assert [token for delta in mine for token in delta.token_ids] == output.token_ids


def test_logprobs_agree_with_hugging_face(model: Any) -> None:
    import torch

    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, prompt_logprobs=0)
    output = make(model).generate("the quick brown fox", params)[0]
    answer = output.outputs[0]
    ids = output.prompt_token_ids + answer.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    expected = torch.log_softmax(logits, dim=-1)
    assert output.prompt_logprobs is not None
    assert answer.logprobs is not None
    entries = [*output.prompt_logprobs[1:], *answer.logprobs]
    for position, (token, entry) in enumerate(zip(ids[1:], entries, strict=True)):
        assert entry is not None
        assert entry[token].logprob == pytest.approx(expected[position, token].item(), abs=1e-4)
    assert answer.token_ids == expected.argmax(-1)[len(output.prompt_token_ids) - 1 : -1].tolist()
    assert answer.text == RAW.decode(answer.token_ids)


def test_a_prompt_longer_than_a_step_and_the_longest_that_fits(model: Any) -> None:
    llm = make(model)
    params = replace(PARAMS[0], max_tokens=1)
    (output,) = llm.generate([[5] * 63], params)
    assert len(output.outputs[0].token_ids) == 1
    assert output.timings is not None
    assert output.timings.steps == 4

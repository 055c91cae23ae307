"""`LLM.score`: Hugging Face's log-likelihoods, the same bits in any company, and contexts computed once."""

import math
from typing import Any

import pytest
import torch

from liushui.engine.llm import LLM
from liushui.engine.score import Score
from liushui.errors import CapacityError, ParameterError
from tests.engine.scripted import BOS, EOS, VOCAB_SIZE, assert_clean, tiny_tokenizer
from tests.engine.test_with_runner import make
from tests.support import tiny

CONTEXT = "the quick brown fox jumps over"
PAIRS = [
    (CONTEXT, " the lazy dog"),
    (CONTEXT, " the moon"),
    ("你好", ",世界"),
    ("a", "b"),
    (CONTEXT + " the", " lazy"),
    ("", "the lazy dog"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.oracle("llama", vocab_size=VOCAB_SIZE)


def scores(llm: LLM) -> list[Score]:
    made = llm.score([left for left, _ in PAIRS], [right for _, right in PAIRS], use_tqdm=False)
    assert_clean(llm.engine)
    return made


def values(made: list[Score]) -> list[Any]:
    return [(score.logprob.hex(), score.token_logprobs, score.is_greedy, score.token_ids) for score in made]


def test_equal_to_hugging_face(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    for (left, right), score in zip(PAIRS, scores(make(model)), strict=True):
        context = tokenizer.encode(left) if left else [BOS]
        ids = context + list(score.token_ids)
        assert tokenizer.decode(ids[len(context) if not left else 0 :]) == left + right
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        rows = range(len(context) - 1, len(ids) - 1)
        assert score.num_context_tokens == len(context)
        assert score.token_logprobs == pytest.approx(
            [expected[row, ids[row + 1]].item() for row in rows], abs=1e-3
        )  # fmt: skip
        assert score.logprob == pytest.approx(sum(expected[row, ids[row + 1]].item() for row in rows), abs=1e-3)
        assert score.is_greedy == all(int(expected[row].argmax()) == ids[row + 1] for row in rows)
        assert score.error is None


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 4}, {"max_num_seqs": 1}, {"policy": "static"}, {"tight": True}],
    ids=["batched", "chunked", "alone", "static", "preempted"],
)
def test_the_same_bits_in_any_batch_and_from_the_cache(model: Any, settings: dict[str, Any]) -> None:
    expected = values(scores(make(model, prefix_caching=False, max_num_batched_tokens=64)))
    llm = make(model, **settings)
    assert values(scores(llm)) == expected
    again = scores(llm)
    assert values(again) == expected
    if not settings:
        assert again[0].num_cached_tokens == (again[0].num_context_tokens - 1) // 4 * 4 > 0
        assert llm.engine.scheduler.num_hit_tokens > 0


@pytest.mark.parametrize("budget", [64, 7])
def test_only_the_continuation_becomes_logits(model: Any, budget: int) -> None:
    """A row of logits costs as much as a layer or ten: none is computed for the context."""
    llm = make(model, max_num_batched_tokens=budget, prefix_caching=False)
    runner: Any = llm.engine.executor
    runner.model = watched = tiny.Listening(runner.model)
    (score,) = llm.score([[5] * 40], [[6, 7, 8]], use_tqdm=False)
    assert len(score.token_logprobs) == 3
    assert sum(map(len, watched.logits_made)) == 3 + 1  # and the row after the last token, which the scheduler samples


def test_greedy_is_what_the_model_would_say(model: Any) -> None:
    from liushui.core.request import SamplingParams

    llm = make(model)
    answer = llm.generate(CONTEXT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)[0]
    said = answer.outputs[0].token_ids
    right, wrong = llm.score(
        [answer.prompt_token_ids] * 2, [said, [*said[:3], (said[3] + 1) % VOCAB_SIZE]], use_tqdm=False
    )  # fmt: skip
    assert right.is_greedy
    assert not wrong.is_greedy
    assert wrong.logprob < 0
    assert right.token_ids == tuple(said)


def test_one_context_for_several_continuations(model: Any) -> None:
    llm = make(model)
    both = llm.score(CONTEXT, [" the lazy dog", " the moon"], use_tqdm=False)
    each = scores(llm)[:2]
    assert values(both) == values(each)


def test_spaces_between_the_two_belong_to_the_continuation(model: Any) -> None:
    llm = make(model)
    here = llm.score("the quick ", "brown", use_tqdm=False)
    there = llm.score("the quick", " brown", use_tqdm=False)
    assert values(here) == values(there)


def test_a_seam_that_would_vanish_in_a_token_stays(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer.encode("ab")) == 1
    (score,) = make(model).score("a", "b", use_tqdm=False)
    assert list(score.token_ids) == tokenizer.encode("b")


def test_refusals(model: Any) -> None:
    llm = make(model)
    with pytest.raises(ParameterError, match="contexts: 2 given for 1"):
        llm.score(["a", "b"], ["c"])
    with pytest.raises(ParameterError, match=r"continuations\[0\]: has no tokens"):
        llm.score("a", [""])
    with pytest.raises(ParameterError, match="text after text"):
        llm.score("a", [[3, 4]])
    with pytest.raises(ParameterError, match="list of integers"):
        llm.score([[3]], [3, 4])
    with pytest.raises(ParameterError, match=r"prompts\[1\].*vocabulary"):
        llm.score([[3], [4]], [[5], [10**6]])
    with pytest.raises(CapacityError, match="max_model_len is 64"):
        llm.score("a" * 60, ["b" * 20])
    assert llm.score([], []) == []
    assert EOS != BOS


def test_an_error_is_in_the_score(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make(model)

    def broken(plan: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(llm.engine.executor, "execute", broken)
    (score,) = llm.score("a", "b", use_tqdm=False)
    assert math.isnan(score.logprob)
    assert score.error is not None
    assert "the device is gone" in score.error

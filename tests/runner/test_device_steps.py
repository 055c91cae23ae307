"""The device's path of the runner: staged steps, tokens fed on the device, the same answers as the CPU's path.

Without a GPU it runs on the CPU in Triton's interpreter, without graphs.
"""

import threading
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from liushui.core.plan import PlanItem, StepPlan
from liushui.core.request import SamplingParams
from liushui.errors import ParameterError
from liushui.runner.noise import row_key, row_keys
from liushui.runner.staging import StepShape
from tests.kernels.triton_support import COMPILED, MARK
from tests.support import tiny

pytestmark = MARK
# The interpreter takes a millisecond for what a GPU does in a nanosecond: there, one small model.
FAMILIES = ["llama", "qwen3", "gpt2"] if COMPILED else ["qwen3"]
SIZES = {"num_hidden_layers": 2 if COMPILED else 1, "vocab_size": 67}
AHEAD = 5 if COMPILED else 1
PARAMS = [
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=1.0, logprobs=0),
    SamplingParams(temperature=0.8, top_p=0.8, top_k=20),
    SamplingParams(temperature=0, repetition_penalty=1.5, logit_bias={5: 2.0}, prompt_logprobs=1),
]


def _runner(family: str, **settings: Any) -> Any:
    device = {"device": "cuda"} if COMPILED else {"device": "cpu", "kernels": "triton"}
    return tiny.runner(tiny.oracle(family, 3, **SIZES), block_size=16, max_num_seqs=8, **(device | settings))


def _prompts(count: int) -> list[list[int]]:
    return [torch.randint(3, 67, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 9, 33, 20)][
        :count
    ]


def _answers(runner: Any, steps: int) -> tuple[dict, list]:
    """Four mixed requests, prompts in chunks beside decoding."""
    driver = tiny.Driver(runner)
    for i, (prompt, params) in enumerate(zip(_prompts(4), PARAMS, strict=True)):
        driver.add(str(i), prompt, params, seed=i, logprobs_from=i * 2)
    results = [driver.step({"0": 1, "1": 9, "2": 20}), driver.step({"0": 1, "1": 1, "2": 13, "3": 20})]
    results += [driver.step({str(i): 1 for i in range(4)}) for _ in range(steps)]
    return driver.ids, results


@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers_as_the_processor(family: str) -> None:
    steps = 6 if COMPILED else 1
    mine, results = _answers(_runner(family), steps)
    theirs, expected = _answers(tiny.runner(tiny.oracle(family, 3, **SIZES), device="cpu", block_size=16), steps)
    assert mine == theirs
    for got, wanted in zip(results, expected, strict=True):
        assert got.errors == wanted.errors
        assert got.logprobs.keys() == wanted.logprobs.keys()
        for seq_id, found in wanted.logprobs.items():
            assert got.logprobs[seq_id][0].logprob == pytest.approx(found[0].logprob, abs=2e-3)
            assert got.logprobs[seq_id][0].rank == found[0].rank
        assert got.prompt_logprobs.keys() == wanted.prompt_logprobs.keys()
        assert all(position >= 6 for pairs in got.prompt_logprobs.values() for position, _ in pairs)
        for seq_id, pairs in wanted.prompt_logprobs.items():
            assert [position for position, _ in got.prompt_logprobs[seq_id]] == [position for position, _ in pairs]
            for (_, a), (_, b) in zip(got.prompt_logprobs[seq_id], pairs, strict=True):
                assert (a.token_id, a.rank) == (b.token_id, b.rank)
                assert a.logprob == pytest.approx(b.logprob, abs=2e-3)


def test_tokens_in_flight_feed_the_next_step() -> None:
    """Plans made before the last token is known: the device puts it in."""
    known, ahead = _runner("llama"), _runner("llama")
    driver = tiny.Driver(known)
    prompt = _prompts(2)[1]
    driver.add("a", prompt, SamplingParams(temperature=0.9, logprobs=0), seed=5)
    driver.step({"a": len(prompt)})
    for _ in range(AHEAD):
        driver.step({"a": 1})
    first = tiny.Driver(ahead)
    first.add("a", prompt, SamplingParams(temperature=0.9, logprobs=0), seed=5)
    item = PlanItem("a", 0, 0, len(prompt), tuple(prompt), (2,), True)
    pending = [ahead.execute(StepPlan(0, (item,), new=tuple(first.fresh)))]
    for i in range(AHEAD):
        item = PlanItem("a", 0, len(prompt) + i, 1, (), (2,), True)
        pending.append(ahead.execute(StepPlan(i + 1, (item,))))
    assert [step.result().tokens["a"][0] for step in pending] == driver.ids["a"][len(prompt) :]


@pytest.mark.skipif(COMPILED, reason="what stands for graphs is none")
def test_steps_whose_products_changed_are_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, ready, tried = _runner("llama"), threading.Event(), []
    steps = runner.steps
    shapes = [StepShape(rows, sequences, 4, False) for rows, sequences in ((8, 8), (64, 2), (128, 8), (64, 64))]

    def try_forms() -> set[int]:
        tried.append(1)
        return {8, 256} if len(tried) == 2 else set()

    monkeypatch.setattr(steps.ops, "try_forms", try_forms)
    monkeypatch.setattr(steps, "graphs", {shape: object() for shape in shapes})
    steps.settle_once(ready)
    driver = tiny.Driver(runner)
    driver.add("a", [5], SamplingParams(temperature=0))
    driver.step({"a": 1})
    assert not tried, "what the steps themselves need is compiled first"
    ready.set()
    driver.step({"a": 1})
    assert len(steps.graphs) == 4
    driver.step({"a": 1})
    assert list(steps.graphs) == [shapes[1], shapes[3]], "products of a step have its rows, or its sequences"


@pytest.mark.parametrize(("prompts", "before"), [([65], False), ([64], True), ([65, 3], True)])
def test_compiling_goes_on_with_the_first_step_or_before_one_that_needs_more(
    prompts: list[int], before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And until it is done, a step is read before the next one is launched."""
    runner, ready, begun, seen, alone = _runner("llama"), threading.Event(), threading.Event(), [], []
    steps = runner.steps
    run, start = steps._run, steps.start

    def watched_run(shape: StepShape) -> Any:
        seen.append(begun.is_set())
        return run(shape)

    def watched_start(*given: Any) -> Any:
        step = start(*given)
        alone.append(step.alone)
        return step

    monkeypatch.setattr(steps, "_run", watched_run)
    monkeypatch.setattr(steps, "start", watched_start)
    steps.settle_once(ready, begun)
    driver = tiny.Driver(runner)
    for i, length in enumerate(prompts):
        driver.add(str(i), [5] * length, SamplingParams(temperature=0))
    driver.step({str(i): length for i, length in enumerate(prompts)})
    assert seen == [before]
    assert begun.is_set()
    driver.step({"0": 1})
    ready.set()
    driver.step({"0": 1})
    assert alone == [True, True, False]


def test_finishing_leaves_nothing_to_be_compiled_or_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, others, ready = _runner("llama").steps, [True, True, False], threading.Event()
    monkeypatch.setattr(steps.ops, "try_others", lambda: others.pop(0))
    monkeypatch.setattr(steps.ops, "try_forms", lambda: {steps.ops.untried.pop()})
    monkeypatch.setattr(steps.ops, "untried", [1, 2])
    begun = threading.Event()
    steps.settle_once(ready, begun)
    threading.Timer(0.05, ready.set).start()
    steps.finish()
    assert ready.is_set()
    assert begun.is_set()
    assert not others
    assert not steps.ops.untried


def test_fast_numerics_are_refused_where_nothing_shows_that_they_are_faster() -> None:
    device = {"device": "cuda"} if COMPILED else {"device": "cpu", "kernels": "triton"}
    with pytest.raises(ParameterError, match="numerics: fast is for the processor"):
        tiny.runner(tiny.oracle("llama", 3, **SIZES), numerics="fast", **device)


def test_an_id_used_again_has_its_own_parameters() -> None:
    prompt, answers = _prompts(2)[1], []
    for runner in (_runner("llama"), tiny.runner(tiny.oracle("llama", 3, **SIZES), device="cpu", block_size=16)):
        answers.append([])
        for seed in (1, 2, 3):
            driver = tiny.Driver(runner)
            driver.add("again", prompt, SamplingParams(temperature=5.0, top_k=2**31 - 1), seed=seed)
            answers[-1].append(driver.step({"again": len(prompt)}).tokens["again"])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_row_keys_at_once() -> None:
    seeds = [0, 1, 2**63 - 1, -5, 123456789]
    positions = np.array([0, 7, 1000, 3, 2**20])
    words = np.array([seed & (2**64 - 1) for seed in seeds], np.uint64)
    expected = [row_key(seed, int(position)) for seed, position in zip(seeds, positions, strict=True)]
    assert row_keys(words, positions).tolist() == [list(key) for key in expected]


def test_parts_of_the_staged_step_are_aligned_and_apart() -> None:
    shape = StepShape(37, 5, 3, False)
    at = shape.offsets()
    end = 0
    for name, size in shape.parts():
        assert at[name].start % 16 == 0
        assert at[name].start >= end
        assert at[name].stop - at[name].start == size
        end = at[name].stop
    assert at["all"].stop >= end


def test_captures_end_after_a_few_failures_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    never, some = _runner("qwen3").steps, _runner("qwen3").steps
    shapes = [StepShape(rows, rows, 4, False) for rows in (1, 2, 4)]
    some.graphs[shapes[0]] = None
    for steps in (never, some):
        steps._seen |= dict.fromkeys(shapes, 1)
    never._failed(shapes[0], RuntimeError("asks the host\nand more"))
    assert never.graph_failure == "asks the host"
    assert "asks the host" in caplog.text
    for shape in shapes[1:]:
        some._failed(shape, RuntimeError("now and then"))
        assert some.graph_failure is None
        assert shape not in some._seen
    some._failed(shapes[0], RuntimeError("again"))
    assert some.graph_failure == "again"

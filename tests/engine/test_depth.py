"""Steps in flight while the next one is planned: they change no answer, and some are read first."""

import pytest

from liushui.core.request import SamplingParams
from tests.engine.scripted import ScriptedExecutor, assert_clean, make_engine, one, run_all


@pytest.mark.parametrize("policy", ["continuous", "static"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_answers_do_not_depend_on_depth_policy_or_neighbours(depth: int, policy: str) -> None:
    prompts = ["the fox", "你好", "a", "jumps over the lazy dog " * 3, "x y z", "the fox"]
    params = [SamplingParams(seed=i, max_tokens=3 + 5 * i % 11, n=1 + i % 2) for i in range(len(prompts))]
    alone = [one(prompt, p).outputs for prompt, p in zip(prompts, params, strict=True)]
    engine = make_engine(depth=depth, policy=policy, num_blocks=40)
    ids = [engine.add_request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    outputs, _ = run_all(engine)
    assert [outputs[i].outputs for i in ids] == alone
    assert_clean(engine)


@pytest.mark.parametrize("alone", [True, False])
def test_a_step_that_stands_alone_is_read_before_the_next_one(alone: bool) -> None:
    executor = ScriptedExecutor(alone=alone)
    engine = make_engine(executor, depth=1)
    engine.add_request("the fox", SamplingParams(max_tokens=4))
    unread = []
    executor.on_step = lambda plan: unread.append(plan.step_id - engine.num_output_tokens)
    run_all(engine)
    assert unread == ([0, 0, 0, 0] if alone else [0, 1, 1, 1])

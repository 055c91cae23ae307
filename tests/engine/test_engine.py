"""The loop with a scripted model: answers, ends, errors, depth, logs."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.core.request import FinishReason, SamplingParams
from liushui.engine.metrics import request_timings
from liushui.engine.outputs import RequestOutput, StreamDelta
from liushui.errors import CapacityError, ParameterError
from tests.engine.scripted import (
    EOS,
    RAW,
    VOCAB_SIZE,
    ScriptedExecutor,
    assert_clean,
    bytes_as_tokens,
    make_engine,
    one,
    run_all,
    saying,
)

GREEDY = SamplingParams(temperature=0, max_tokens=8)


def test_an_answer_is_the_decoded_tokens() -> None:
    output = one("the quick", GREEDY)
    (answer,) = output.outputs
    assert output.finished
    assert output.error is None
    assert output.prompt == "the quick"
    assert output.prompt_token_ids == RAW.encode("the quick").ids
    assert len(answer.token_ids) == 8
    assert answer.text == RAW.decode(answer.token_ids)
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.LENGTH, None)


def test_eos_ends_without_text_and_stays_in_the_tokens() -> None:
    output = one("a", SamplingParams(max_tokens=20, skip_special_tokens=False), ScriptedExecutor(saying("hi")))
    (answer,) = output.outputs
    assert answer.text == "hi"
    assert answer.token_ids[-1] == EOS
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, None)


def test_ignore_eos_goes_on() -> None:
    output = one("a", SamplingParams(max_tokens=5, ignore_eos=True), ScriptedExecutor(saying("hi")))
    (answer,) = output.outputs
    assert answer.token_ids[2:] == [EOS] * 3
    assert (answer.text, answer.finish_reason) == ("hi", FinishReason.LENGTH)


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_stop_token_is_reported_by_id(include: bool, text: str) -> None:
    stop = RAW.token_to_id("c")
    params = SamplingParams(max_tokens=20, stop_token_ids=[stop], include_stop_str_in_output=include)
    (answer,) = one("a", params, ScriptedExecutor(saying("abcd"))).outputs
    assert (answer.text, answer.token_ids[-1]) == (text, stop)
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, stop)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("policy", ["continuous", "static"])
@pytest.mark.parametrize(("include", "text"), [(False, "你好 "), (True, "你好 stop")])
def test_stop_string_across_tokens(include: bool, text: str, policy: str, depth: int) -> None:
    params = SamplingParams(max_tokens=30, stop=["stop"], include_stop_str_in_output=include)
    output = one("a", params, ScriptedExecutor(saying("你好 stopping")), depth=depth, policy=policy)
    (answer,) = output.outputs
    assert answer.text == text
    assert RAW.decode(answer.token_ids) == "你好 stop"  # with the token that completed it, and none after
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, "stop")


def test_stop_string_in_the_last_token_wins_over_length() -> None:
    (answer,) = one("a", SamplingParams(max_tokens=3, stop="c"), ScriptedExecutor(saying("abc"))).outputs
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("ab", FinishReason.STOP, "c")


def test_unfinished_stop_string_is_released_at_the_end() -> None:
    (answer,) = one("a", SamplingParams(max_tokens=4, stop="cdef"), ScriptedExecutor(saying("abcdef"))).outputs
    assert (answer.text, answer.finish_reason) == ("abcd", FinishReason.LENGTH)


def test_half_a_character_at_the_end_is_shown_as_the_full_decode_shows_it() -> None:
    (answer,) = one("a", SamplingParams(max_tokens=4), ScriptedExecutor(saying("x你好"))).outputs
    assert answer.text == "x你"
    (answer,) = one("a", SamplingParams(max_tokens=6), ScriptedExecutor(saying("x你好"))).outputs
    assert answer.text == RAW.decode(answer.token_ids) == "x你\ufffd"


def test_min_tokens_puts_off_stop_strings() -> None:
    params = SamplingParams(max_tokens=30, min_tokens=4, stop="ab")
    (answer,) = one("a", params, ScriptedExecutor(saying("ab-ab-"))).outputs
    assert (answer.text, answer.finish_reason) == ("ab-", FinishReason.STOP)


def test_static_group_leaves_together_also_after_a_stop_string() -> None:
    engine = make_engine(ScriptedExecutor(saying("ab" * 10)), policy="static", prefix_caching=False)
    stopped = engine.add_request("x", SamplingParams(max_tokens=12, stop="ab"))
    long = engine.add_request("y", SamplingParams(max_tokens=12))
    late = engine.add_request("z", SamplingParams(max_tokens=2), now=engine.clock())
    outputs, _ = run_all(engine)
    first, second = outputs[stopped].timings, outputs[long].timings
    assert first.finished == second.finished
    assert first.last_token < second.last_token
    assert first.steps < second.steps
    assert outputs[late].timings.finished == first.finished
    assert_clean(engine)


@pytest.mark.parametrize("depth", [0, 2])
def test_n_answers_use_seeds_in_order(depth: int) -> None:
    both = one("the", SamplingParams(n=3, seed=7, max_tokens=6), depth=depth)
    assert [answer.index for answer in both.outputs] == [0, 1, 2]
    for i, answer in enumerate(both.outputs):
        single = one("the", SamplingParams(seed=7 + i, max_tokens=6)).outputs[0]
        assert (answer.text, answer.token_ids) == (single.text, single.token_ids)
    assert both.timings.answers == 3
    assert both.timings.output_tokens == 18


def test_drawn_seeds_are_reported_and_reproducible() -> None:
    def seeds(engine_seed: int) -> list[int]:
        engine = make_engine(seed=engine_seed)
        ids = [engine.add_request("a", SamplingParams(max_tokens=2)) for _ in range(3)]
        outputs, _ = run_all(engine)
        return [outputs[i].effective_params["seed"] for i in ids]

    assert seeds(1) == seeds(1)
    assert seeds(1) != seeds(2)
    assert len(set(seeds(1))) == 3
    assert one("a", SamplingParams(seed=5, max_tokens=1)).effective_params["seed"] == 5
    assert one("a", GREEDY).effective_params["seed"] == 0


def test_effective_params_resolve_what_was_left_open() -> None:
    params = SamplingParams(max_tokens=None, stop="zz", ignore_eos=True)
    output = one("the", params, max_model_len=20)
    num_prompt = len(output.prompt_token_ids)
    assert set(output.effective_params) == set(SamplingParams.names())
    assert output.effective_params["max_tokens"] == 20 - num_prompt == len(output.outputs[0].token_ids)
    assert output.effective_params["stop"] == ("zz",)


def test_logprobs_have_the_known_shape() -> None:
    output = one("the quick brown", SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1))
    (answer,) = output.outputs
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids) == 3
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert next(iter(entry)) == token
        assert entry[token].logprob == -2.0
        assert entry[token].rank == 2
        assert entry[token].decoded_token == RAW.decode([token], skip_special_tokens=False)
        assert set(entry) == {token, 10, 11}
    assert answer.cumulative_logprob == -6.0
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]


def test_no_logprobs_unless_asked() -> None:
    output = one("the", GREEDY)
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None
    only_chosen = one("the", SamplingParams(max_tokens=1, logprobs=0)).outputs[0]
    assert [len(entry) for entry in only_chosen.logprobs or []] == [1]


def test_prompt_logprobs_are_complete_behind_a_cached_prefix_and_for_n() -> None:
    engine = make_engine()
    for _ in range(2):
        request_id = engine.add_request(
            "the quick brown fox jumps", SamplingParams(max_tokens=2, n=2, prompt_logprobs=0)
        )
        outputs, _ = run_all(engine)
        found = outputs[request_id].prompt_logprobs
        assert [entry is None for entry in found] == [True] + [False] * (len(found) - 1)


@pytest.mark.parametrize("depth", [0, 1])
def test_deltas_add_up(depth: int) -> None:
    engine = make_engine(ScriptedExecutor(saying("你好 the end")), depth=depth)
    params = SamplingParams(max_tokens=30, n=2, stop="end", logprobs=1)
    request_id = engine.add_request("a", params, stream=True, index=5)
    outputs, deltas = run_all(engine)
    for answer in outputs[request_id].outputs:
        mine: list[StreamDelta] = [d for d in deltas if d.output_index == answer.index]
        assert "".join(d.text for d in mine) == answer.text == "你好 the "
        assert [t for d in mine for t in d.token_ids] == answer.token_ids
        assert [entry for d in mine for entry in d.logprobs or ()] == answer.logprobs
        assert [d.finish_reason for d in mine[:-1]] == [None] * (len(mine) - 1)
        assert (mine[-1].finish_reason, mine[-1].stop_reason, mine[-1].index) == (FinishReason.STOP, "end", 5)


def test_only_streaming_requests_give_deltas() -> None:
    engine = make_engine()
    engine.add_request("a", GREEDY)
    streaming = engine.add_request("b", GREEDY, stream=True)
    _, deltas = run_all(engine)
    assert {d.request_id for d in deltas} == {streaming}


# -- what goes wrong stays where it is


def test_a_failing_row_harms_no_other() -> None:
    bad = RAW.encode("bad").ids
    executor = ScriptedExecutor(
        fail_row=lambda new, n: "not finite" if list(new.prompt_token_ids) == bad and n == 2 else None
    )
    engine = make_engine(executor)
    good_id, bad_id = engine.add_request("good", GREEDY), engine.add_request("bad", GREEDY, stream=True)
    outputs, deltas = run_all(engine)
    assert outputs[bad_id].error == "not finite"
    assert outputs[bad_id].outputs[0].finish_reason is FinishReason.ERROR
    assert len(outputs[bad_id].outputs[0].token_ids) == 2
    assert (deltas[-1].finish_reason, deltas[-1].error) == (FinishReason.ERROR, "not finite")
    assert outputs[good_id].outputs == one("good", GREEDY).outputs
    assert_clean(engine)


def test_a_row_without_its_token_is_an_error_of_that_row() -> None:
    executor = ScriptedExecutor(drop_row=lambda new, n: new.seq_id == "req-1" and n == 1)
    engine = make_engine(executor)
    ids = [engine.add_request("a", GREEDY), engine.add_request("b", GREEDY)]
    outputs, _ = run_all(engine)
    assert outputs[ids[0]].error is None
    assert "0 tokens instead of one" in outputs[ids[1]].error
    assert_clean(engine)


@pytest.mark.parametrize("where", ["fail_start", "fail_step"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("policy", ["continuous", "static"])
def test_a_failing_step_ends_its_sequences_and_the_engine_lives(where: str, depth: int, policy: str) -> None:
    executor = ScriptedExecutor()
    getattr(executor, where)[2] = MemoryError("no room")
    engine = make_engine(executor, depth=depth, max_num_seqs=2, policy=policy)
    ids = [engine.add_request(text, GREEDY) for text in "abcd"]
    outputs, _ = run_all(engine)
    failed = [outputs[i].error is not None for i in ids]
    assert failed == [True, True, False, False]
    assert outputs[ids[0]].error == "MemoryError: no room"
    assert_clean(engine)
    again = engine.add_request("a", GREEDY)
    outputs, _ = run_all(engine)
    assert outputs[again].outputs == one("a", GREEDY).outputs
    assert_clean(engine)


@pytest.mark.parametrize("policy", ["continuous", "static"])
def test_a_text_that_cannot_be_made_is_an_error_of_that_request(policy: str) -> None:
    engine = make_engine(policy=policy)
    ids = [engine.add_request("a", GREEDY), engine.add_request("b", GREEDY, stream=True)]
    live = engine._answers[ids[1]].answer

    class Broken:
        def push(self, token: int) -> str:
            raise ValueError("no such character")

        flush = push

    live._stream = Broken()
    outputs, deltas = run_all(engine)
    assert outputs[ids[0]].outputs == one("a", GREEDY).outputs
    assert "no such character" in outputs[ids[1]].error
    assert deltas[-1].finish_reason is FinishReason.ERROR
    assert_clean(engine)


def test_an_interrupt_leaves_an_engine_that_can_be_cleaned() -> None:
    for where in ("fail_start", "fail_step"):
        executor = ScriptedExecutor()
        getattr(executor, where)[1] = KeyboardInterrupt()
        engine = make_engine(executor, depth=1)
        engine.add_request("a", GREEDY)
        with pytest.raises(KeyboardInterrupt):
            run_all(engine)
        (output,) = engine.abort_all()
        assert output.outputs[0].finish_reason is FinishReason.ABORT
        assert_clean(engine)


def test_a_scheduler_that_is_stuck_is_reported_instead_of_spinning() -> None:
    engine = make_engine()
    request_id = engine.add_request("a", GREEDY)
    engine.scheduler.schedule = lambda now: None  # type: ignore[method-assign]
    outputs, _ = run_all(engine)
    assert "nothing to run" in outputs[request_id].error


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_abort_in_mid_answer(depth: int) -> None:
    engine = make_engine(depth=depth)
    keep, drop = engine.add_request("a", GREEDY), engine.add_request("b", SamplingParams(max_tokens=50, n=2))
    for _ in range(4):
        assert engine.step() == []
    output = engine.abort(drop)
    assert output is not None
    assert [answer.finish_reason for answer in output.outputs] == [FinishReason.ABORT] * 2
    assert engine.abort(drop) is None
    assert engine.abort("unknown") is None
    outputs, _ = run_all(engine)
    assert list(outputs) == [keep]
    assert outputs[keep].outputs == one("a", GREEDY).outputs
    assert_clean(engine)


def test_preemption_is_counted_and_changes_nothing() -> None:
    engine = make_engine(num_blocks=10, max_model_len=40)
    params = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True)
    ids = [engine.add_request(text, params) for text in "abc"]
    outputs, _ = run_all(engine)
    assert sum(outputs[i].timings.preemptions for i in ids) > 0
    assert [outputs[i].outputs for i in ids] == [one(text, params).outputs for text in "abc"]
    assert {i: outputs[i].timings for i in ids} == request_timings(engine.log)


# -- refusals


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ("", {}, ParameterError, "prompt: is empty"),
        ([], {}, ParameterError, "prompt_token_ids: is empty"),
        ([1, VOCAB_SIZE], {}, ParameterError, "prompt_token_ids: must be in 0 .."),
        ([-1], {}, ParameterError, "prompt_token_ids: must be in 0 .."),
        ([1, 2.5], {}, ParameterError, "prompt_token_ids: must hold integers"),
        ([True], {}, ParameterError, "prompt_token_ids: must hold integers"),
        (5, {}, ParameterError, "prompt: must be text"),
        (b"abc", {}, ParameterError, "prompt: must be text"),
        ("\ud800", {}, ParameterError, "prompt: is not valid Unicode"),
        ({"prompt": "a", "prompt_token_ids": [1]}, {}, ParameterError, "exactly one"),
        ({}, {}, ParameterError, "exactly one"),
        ({"promt": "a"}, {}, ParameterError, "unknown key 'promt'"),
        ({"prompt": 3}, {}, ParameterError, "must be text, got int"),
        ("a", {"logit_bias": {VOCAB_SIZE: 1.0}}, ParameterError, "logit_bias: must be in 0 .."),
        ("a", {"stop_token_ids": [VOCAB_SIZE + 7]}, ParameterError, "stop_token_ids: must be in 0 .."),
        ("a", {"seed": 2**63 - 1, "n": 2}, ParameterError, "seed: "),
        ([5] * 200, {}, CapacityError, "prompt: 200 tokens, but max_model_len is 128; shorten it or set"),
        ([5] * 128, {}, CapacityError, "prompt: 128 tokens leave no room for an answer"),
        ([5] * 100, {"max_tokens": 29}, CapacityError, "max_tokens: 29 tokens, but after a prompt of 100"),
        ([5] * 100, {"max_tokens": None, "min_tokens": 29}, CapacityError, "min_tokens: 29 tokens"),
    ],
)
def test_refusals_name_the_field(prompt: Any, params: dict[str, Any], error: type, words: str) -> None:
    engine = make_engine()
    with pytest.raises(error, match=words):
        engine.add_request(prompt, SamplingParams(**params))
    assert_clean(engine)


def test_the_kv_cache_can_be_the_limit() -> None:
    engine = make_engine(num_blocks=5)
    with pytest.raises(CapacityError, match=r"max_tokens: 20 tokens.*KV cache holds 21"):
        engine.add_request([5] * 4, SamplingParams(max_tokens=20))
    engine.add_request([5] * 4, SamplingParams(max_tokens=17, ignore_eos=True))
    outputs, _ = run_all(engine)
    assert len(outputs["req-0"].outputs[0].token_ids) == 17


def test_the_longest_prompt_that_fits() -> None:
    output = one([5] * 127, SamplingParams(max_tokens=1))
    assert len(output.outputs[0].token_ids) == 1


def test_request_ids() -> None:
    engine = make_engine()
    assert engine.add_request("a", GREEDY, request_id="mine") == "mine"
    with pytest.raises(ParameterError, match="in use"):
        engine.add_request("a", GREEDY, request_id="mine")
    with pytest.raises(ParameterError, match="request_id"):
        engine.add_request("a", GREEDY, request_id="a/0")
    with pytest.raises(ParameterError, match="sampling_params"):
        engine.add_request("a", {"n": 1})  # type: ignore[arg-type]
    run_all(engine)
    assert engine.add_request("a", GREEDY, request_id="mine") == "mine"


@pytest.mark.parametrize(("side", "kept"), [("left", [4, 5, 6]), ("right", [1, 2, 3])])
def test_truncation_is_reported(side: str, kept: list[int]) -> None:
    params = SamplingParams(max_tokens=1, truncate_prompt_tokens=3)
    output = one([1, 2, 3, 4, 5, 6], params, truncation_side=side)
    assert (output.prompt_token_ids, output.truncated_tokens) == (kept, 3)
    assert one([1, 2, 3], params).truncated_tokens == 0


def test_truncation_on_the_left_keeps_bos() -> None:
    from tests.engine.scripted import BOS, tiny_tokenizer

    params = SamplingParams(max_tokens=1, truncate_prompt_tokens=3)
    output = one("abcdefgh", params, tokenizer=tiny_tokenizer(add_bos=True))
    ids = RAW.encode("abcdefgh").ids
    assert output.prompt_token_ids == [BOS, *ids[-2:]]
    assert output.truncated_tokens == len(ids) + 1 - 3


# -- random lives


@given(
    requests=st.lists(
        st.tuples(
            st.text("ab你 ", min_size=1, max_size=12),
            st.integers(1, 2),  # n
            st.integers(1, 14),  # max_tokens
            st.sampled_from([None, "a", "e ", "qu"]),
            st.integers(0, 6),  # arrives after so many steps
            st.booleans(),  # streams
            st.sampled_from([None, None, None, 1, 4]),  # aborted after so many steps
        ),
        min_size=1,
        max_size=8,
    ),
    depth=st.integers(0, 2),
    num_blocks=st.integers(10, 24),
    policy=st.sampled_from(["continuous", "static"]),
    failing=st.sets(st.integers(0, 12), max_size=2),
)
@settings(max_examples=150, deadline=None)
def test_random_lives(requests: list[Any], depth: int, num_blocks: int, policy: str, failing: set[int]) -> None:
    """Everything accepted ends exactly once; what neither failed nor was aborted is what it is alone."""
    executor = ScriptedExecutor(fail_step={step: RuntimeError("bad step") for step in failing})
    engine = make_engine(executor, depth=depth, num_blocks=num_blocks, max_model_len=36, policy=policy)
    outputs: dict[str, RequestOutput] = {}
    deltas: list[StreamDelta] = []
    accepted: dict[str, Any] = {}
    clock = 0
    while len(accepted) < len(requests) or engine.has_unfinished:
        for number, request in enumerate(requests):
            request_id = f"r{number}"
            if request_id not in accepted and request[4] <= clock:
                params = SamplingParams(seed=number, n=request[1], max_tokens=request[2], stop=request[3])
                engine.add_request(request[0], params, request_id=request_id, stream=request[5])
                accepted[request_id] = (request[0], params)
            if request[6] is not None and request[4] + request[6] == clock and request_id not in outputs:
                output = engine.abort(request_id)
                if output is not None:
                    outputs[request_id] = output
        for item in engine.step():
            if isinstance(item, RequestOutput):
                assert item.request_id not in outputs
                outputs[item.request_id] = item
            else:
                deltas.append(item)
        clock += 1
        engine.scheduler.check()
        assert clock < 2000
    assert_clean(engine)
    assert set(outputs) == set(accepted)
    for request_id, (prompt, params) in accepted.items():
        output = outputs[request_id]
        reasons = {answer.finish_reason for answer in output.outputs}
        assert None not in reasons
        assert (output.error is not None) == (FinishReason.ERROR in reasons)
        if not reasons & {FinishReason.ERROR, FinishReason.ABORT}:
            assert output.outputs == one(prompt, params, max_model_len=36).outputs
        for answer in output.outputs:
            mine = [d for d in deltas if (d.request_id, d.output_index) == (request_id, answer.index)]
            if mine and mine[-1].finish_reason is not None:
                assert "".join(d.text for d in mine) == answer.text
                assert [t for d in mine for t in d.token_ids] == answer.token_ids
    assert {i: output.timings for i, output in outputs.items()} == request_timings(engine.log)


def test_bytes_as_tokens_is_what_the_tests_think() -> None:
    ids = [RAW.token_to_id(token) for token in bytes_as_tokens("你 a")]
    assert RAW.decode(ids) == "你 a"

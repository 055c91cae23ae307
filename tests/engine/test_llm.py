"""`LLM` as its users see it, over a scripted model."""

import itertools
import signal
import threading
from collections.abc import Iterator

import pytest

from liushui.core.request import FinishReason, SamplingParams
from liushui.engine.interrupts import deferred_interrupt
from liushui.engine.llm import LLM
from liushui.engine.metrics import request_timings
from liushui.engine.outputs import RequestOutput
from liushui.errors import CapacityError, ParameterError
from tests.engine.scripted import RAW, ScriptedExecutor, assert_clean, make_llm, saying

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_outputs_are_in_the_order_of_the_input() -> None:
    llm = make_llm()
    prompts = ["a", RAW.encode("b").ids, {"prompt": "c"}, {"prompt_token_ids": RAW.encode("d").ids}]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 1, 5, 3)]
    outputs = llm.generate(prompts, params)
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 5, 3]
    assert [output.prompt for output in outputs] == ["a", None, "c", None]
    assert len({output.timings.arrival for output in outputs if output.timings}) == 1  # they came together
    assert_clean(llm.engine)


def test_one_prompt_alone() -> None:
    llm = make_llm()
    assert texts(llm.generate("a", GREEDY)) == texts(llm.generate(["a"], GREEDY))
    assert texts(llm.generate({"prompt": "a"}, GREEDY)) == texts(llm.generate(["a"], GREEDY))
    assert llm.generate([], GREEDY) == []
    assert len(llm.generate("a")[0].outputs[0].token_ids) <= 16


def test_a_second_call_loses_nothing() -> None:
    llm = make_llm()
    first = llm.generate(["a", "b", "c"], GREEDY)
    second = llm.generate(["a", "b", "c"], GREEDY)
    assert texts(first) == texts(second)
    assert len({output.request_id for output in first + second}) == 6


def test_many_more_prompts_than_slots() -> None:
    llm = make_llm()
    outputs = llm.generate([f"prompt {i}" for i in range(60)], GREEDY)
    assert [output.prompt for output in outputs] == [f"prompt {i}" for i in range(60)]
    assert max(step.waiting for step in llm.timeline().steps) <= 8  # the window
    assert {o.request_id: o.timings for o in outputs} == request_timings(llm.timeline())


def test_generate_checks_everything_before_it_starts() -> None:
    llm = make_llm()
    with pytest.raises(ParameterError, match=r"prompts\[2\]: prompt: is empty") as caught:
        llm.generate(["a", "b", ""], GREEDY)
    assert caught.value.field == "prompts[2]"
    with pytest.raises(CapacityError, match=r"prompts\[1\]: prompt: 500 tokens"):
        llm.generate([[5], [5] * 500], GREEDY)
    with pytest.raises(ParameterError, match=r"^prompt: is empty"):
        llm.generate("", GREEDY)
    with pytest.raises(ParameterError, match="sampling_params: 1 given for 2"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ParameterError, match=r"prompts: .*give \[\[...\]\]"):
        llm.generate([1, 2, 3], GREEDY)  # type: ignore[list-item]
    with pytest.raises(ParameterError, match="prompts: must be"):
        llm.generate(3, GREEDY)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="sampling_params: must be"):
        llm.generate(["a"], 3)  # type: ignore[arg-type]
    assert not llm.timeline().events
    assert_clean(llm.engine)


def test_a_failing_row_is_in_its_output() -> None:
    llm = make_llm(ScriptedExecutor(fail_row=lambda new, n: "broken" if new.seq_id == "req-1" else None))
    outputs = llm.generate(["a", "b", "c"], GREEDY)
    assert [output.error for output in outputs] == [None, "broken", None]


def test_generate_iter_gives_bad_rows_as_outputs_and_goes_on() -> None:
    llm = make_llm()
    params = [GREEDY, GREEDY, SamplingParams(max_tokens=4000), GREEDY]
    outputs = sorted(llm.generate_iter(["a", "", "c", "d"], params), key=lambda output: output.index)
    assert [output.error is None for output in outputs] == [True, False, False, True]
    assert outputs[1].error == "prompt: is empty; give at least one token"
    assert "max_tokens: 4,000" in (outputs[2].error or "")
    assert len({output.request_id for output in outputs}) == 4
    assert outputs[2].prompt == "c"
    assert_clean(llm.engine)


def test_generate_iter_is_lazy_endless_and_as_they_finish() -> None:
    llm = make_llm(max_num_seqs=2)
    drawn = 0

    def endless() -> Iterator[str]:
        nonlocal drawn
        for i in itertools.count():
            drawn += 1
            yield f"prompt {i}"

    lengths = (SamplingParams(temperature=0, max_tokens=9 if i == 0 else 2) for i in itertools.count())
    outputs = llm.generate_iter(endless(), lengths)
    assert drawn == 0
    first = list(itertools.islice(outputs, 20))
    assert sorted(output.index for output in first)[:5] == [0, 1, 2, 3, 4]
    assert first[0].index == 1  # the short ones did not wait for the long one
    assert drawn <= 20 + 2 + 2 * 4 + 1
    outputs.close()
    assert_clean(llm.engine)


def test_endless_bad_rows_do_not_pile_up() -> None:
    llm = make_llm(max_num_seqs=2)
    outputs = llm.generate_iter("" for _ in itertools.count())
    assert all(output.error for output in itertools.islice(outputs, 50))
    outputs.close()


def test_abandoning_a_generator_aborts_the_rest_and_leaves_the_engine_clean() -> None:
    for depth in (0, 1):
        llm = make_llm(depth=depth)
        outputs = llm.generate_iter(["a"] * 20, SamplingParams(temperature=0, max_tokens=9))
        next(outputs)
        assert llm.engine.has_unfinished
        outputs.close()
        assert_clean(llm.engine)
        assert len(llm.generate(["a"], GREEDY)) == 1


def test_two_calls_share_the_batch_and_each_gets_its_own() -> None:
    llm = make_llm()
    lengths = [SamplingParams(temperature=0, max_tokens=n) for n in (2, 12, 20)]
    left = llm.generate_iter(["a", "b", "c"], lengths)
    right = llm.generate_iter(["x", "y", "z"], lengths)
    pairs = list(zip(left, right, strict=True))
    assert {one.prompt for one, _ in pairs} == {"a", "b", "c"}
    assert {other.prompt for _, other in pairs} == {"x", "y", "z"}
    assert max(len(step.items) for step in llm.timeline().steps) == 4
    assert_clean(llm.engine)


def test_closing_one_call_leaves_the_other_alone() -> None:
    llm = make_llm()
    left = llm.generate_iter(["a", "b", "c"], GREEDY)
    right = llm.generate_iter(["x", "y", "z"], GREEDY)
    next(left), next(right)
    left.close()
    assert len(list(right)) == 2
    assert_clean(llm.engine)


def test_threads_share_one_engine() -> None:
    llm = make_llm()
    expected = texts(llm.generate([f"p{i}" for i in range(12)], GREEDY))
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = texts(llm.generate(f"p{i}", GREEDY))[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [found[i] for i in range(12)] == expected
    assert_clean(llm.engine)


def test_requests_given_to_the_engine_directly_are_not_lost() -> None:
    llm = make_llm()
    request_id = llm.engine.add_request("a", SamplingParams(temperature=0, max_tokens=2))
    llm.generate(["b"], GREEDY)
    assert [output.request_id for output in llm.unclaimed] == [request_id]


def test_what_was_accepted_is_finished_when_the_prompts_break_off() -> None:
    def broken() -> Iterator[str]:
        yield "a"
        yield "b"
        raise OSError("the file is gone")

    llm = make_llm()
    found: list[RequestOutput] = []
    with pytest.raises(OSError, match="gone"):
        found.extend(llm.generate_iter(broken(), GREEDY))
    assert sorted(output.index for output in found) == [0, 1]
    found.clear()
    with pytest.raises(ParameterError, match="exactly one per prompt"):
        found.extend(llm.generate_iter(iter("abc"), iter([GREEDY, GREEDY])))
    assert sorted(output.index for output in found) == [0, 1]
    assert_clean(llm.engine)


def test_an_interrupt_aborts_the_call_and_leaves_the_engine_clean() -> None:
    for depth in (0, 1):
        llm = make_llm(ScriptedExecutor(fail_step={3: KeyboardInterrupt()}), depth=depth)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], SamplingParams(temperature=0, max_tokens=20))
        assert_clean(llm.engine)
        assert len(llm.generate(["a", "b"], GREEDY)) == 2


def test_a_signal_in_the_middle_of_a_step_waits_for_its_end() -> None:
    executor = ScriptedExecutor()
    done: list[int] = []

    def on_step(plan: object) -> None:
        if len(executor.plans) == 3:
            signal.raise_signal(signal.SIGINT)
            done.append(3)

    executor.on_step = on_step
    llm = make_llm(executor)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a"], SamplingParams(temperature=0, max_tokens=20))
    assert done == [3]
    assert len(llm.timeline().steps) == 3  # the third step was taken in
    assert_clean(llm.engine)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_acts_at_once() -> None:
    reached: list[int] = []

    def impatient() -> None:
        with deferred_interrupt():
            for press in (1, 2, 3):
                signal.raise_signal(signal.SIGINT)
                reached.append(press)

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_streams_add_up() -> None:
    llm = make_llm(ScriptedExecutor(saying("你好 👋 end")))
    params = SamplingParams(temperature=0, max_tokens=40, stop="end")
    deltas = list(llm.generate_stream("a", params))
    assert "".join(delta.text for delta in deltas) == llm.generate("a", params)[0].outputs[0].text == "你好 👋 "
    assert deltas[-1].finish_reason is FinishReason.STOP
    with pytest.raises(ParameterError, match="is empty"):
        llm.generate_stream("")


def test_chat_goes_through_the_template() -> None:
    llm = make_llm()
    talk = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(talk, GREEDY)
    assert output.prompt == "user: hi\nassistant: "
    assert output.prompt_token_ids == RAW.encode(output.prompt).ids
    both = llm.chat([talk, [{"role": "user", "content": "ho"}]], [GREEDY, GREEDY], add_generation_prompt=False)
    assert [output.prompt for output in both] == ["user: hi\n", "user: ho\n"]
    streamed = "".join(delta.text for delta in llm.chat_stream(talk, GREEDY))
    assert streamed == output.outputs[0].text
    with pytest.raises(CapacityError, match=r"prompts\[1\]"):
        llm.chat([talk, [{"role": "user", "content": "long " * 200}]], GREEDY)


def test_abandoned_stream_frees_its_blocks() -> None:
    llm = make_llm()
    stream = llm.chat_stream([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert llm.engine.scheduler.pool.num_free < llm.engine.scheduler.pool.num_blocks
    stream.close()
    assert_clean(llm.engine)


def test_settings_are_checked_by_name_before_anything_is_loaded() -> None:
    with pytest.raises(ParameterError, match="max_num_seq: is not a setting; did you mean max_num_seqs"):
        LLM("smollm2", max_num_seq=3)
    with pytest.raises(ParameterError, match="policy: must be one of"):
        LLM("smollm2", policy="rude")


def test_the_report_is_a_copy() -> None:
    llm = make_llm()
    llm.startup_report().append("x")
    assert llm.startup_report() == []

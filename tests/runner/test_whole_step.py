"""A step in one native call: bit for bit what the operations called one by one give, and the same tokens."""

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.core.plan import PlanItem, StepPlan
from liushui.core.request import SamplingParams
from liushui.kernels.native_step import PARTS
from liushui.kernels.ops import load_ops
from liushui.runner.host import whole_step
from liushui.runner.runner import Runner
from tests.support import tiny

PLAIN = [
    "llama", "llama-tied", "llama-bias", "llama3-rope", "mistral-window", "qwen2", "qwen2-window", "qwen3", "phi3",
    "phi3-partial-rope", "granite",
]  # fmt: skip
OTHERS = ["gpt2", "gemma3", "olmo2", "mixtral", "qwen3-moe"]
GREEDY = SamplingParams(temperature=0)


pytestmark = pytest.mark.skipif(not tiny.native_is_built(), reason="the native library is not built")


def _pair(family: str, dtype: str = "float32", threads: int = 1, **settings: int) -> tuple[Runner, Runner]:
    """The same model in one call a step, and operation by operation."""
    model = tiny.oracle(family, 7)
    whole, single = (tiny.runner(model, dtype=dtype, threads=threads, **settings) for _ in range(2))
    single.host.whole = None
    return whole, single


def _prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 200, (length,), generator=generator).tolist()


@pytest.mark.parametrize("family", PLAIN)
def test_plain_decoders_take_the_whole_way(family: str) -> None:
    runner = tiny.runner(tiny.oracle(family))
    assert runner.host.whole is not None


@pytest.mark.parametrize("family", OTHERS)
def test_others_do_not(family: str) -> None:
    assert tiny.runner(tiny.oracle(family)).host.whole is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", PLAIN)
def test_hidden_states_and_cache_bit_for_bit(family: str, dtype: str) -> None:
    """A prompt in chunks, then beside others: the hidden states of all rows, and what lies in the cache."""
    runners = _pair(family, dtype, threads=3)
    drivers = [tiny.Driver(runner) for runner in runners]
    for driver in drivers:
        for name, length in (("a", 5), ("b", 33), ("c", 70)):
            driver.add(name, _prompt(length, length), SamplingParams(temperature=0, prompt_logprobs=2))
    for share in ({"a": 5}, {"a": 1, "b": 33}, {"a": 1, "b": 1, "c": 70}):
        mine, theirs = (driver.step(share) for driver in drivers)
        assert mine.tokens == theirs.tokens
        assert mine.prompt_logprobs == theirs.prompt_logprobs
    for name, table in drivers[0].tables.items():
        mine, theirs = (_written(runner, table, drivers[0].computed[name]) for runner in runners)
        assert torch.equal(mine, theirs)


def _written(runner: Runner, table: list[int], count: int) -> torch.Tensor:
    """Keys and values of a sequence, [2, layers, count, heads, dim]."""
    both = torch.stack([runner.kv.keys[:, table], runner.kv.values[:, table]])
    return both.transpose(3, 4).flatten(2, 3)[:, :, :count]


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(["llama-tied", "qwen3", "granite", "mistral-window"]),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    threads=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    steps=st.integers(1, 4),
)
def test_tokens_and_logprobs_for_every_row_and_thread_count(family, lengths, threads, dtype, steps) -> None:
    """Greedy rows beside such as want log-probabilities, are drawn, or have penalties."""
    kinds = [
        GREEDY, SamplingParams(temperature=0, logprobs=3), SamplingParams(temperature=0.8, seed=5),
        SamplingParams(temperature=0, presence_penalty=1.5),
    ]  # fmt: skip
    answers = []
    for threads_used, whole in ((threads, True), (1, False)):
        runner = _cached(family, dtype, threads_used)
        inner, runner.host.whole = runner.host.whole, runner.host.whole if whole else None
        driver = tiny.Driver(runner)
        for i, length in enumerate(lengths):
            driver.add(str(i), _prompt(length, i), kinds[i % 4], seed=i)
        results = [driver.step({str(i): length for i, length in enumerate(lengths)})]
        results += [driver.step({str(i): 1 for i in range(len(lengths))}) for _ in range(steps)]
        runner.host.whole = inner
        answers.append([(result.tokens, result.logprobs) for result in results])
    assert answers[0] == answers[1]


_RUNNERS: dict[tuple[str, str, int], Runner] = {}


def _cached(family: str, dtype: str, threads: int) -> Runner:
    key = family, dtype, threads
    if key not in _RUNNERS:
        _RUNNERS[key] = tiny.runner(tiny.oracle(family, 7), dtype=dtype, threads=threads)
    _RUNNERS[key].states.clear()
    return _RUNNERS[key]


def test_many_rows_in_blocks() -> None:
    """More rows than a block of the step has."""
    whole, single = _pair("llama-tied", threads=2, max_num_batched_tokens=1024, max_num_seqs=300)
    results = []
    for runner in (whole, single):
        driver = tiny.Driver(runner)
        for i in range(5):
            driver.add(str(i), _prompt(130, i), GREEDY)
        results.append([driver.step({str(i): 130 for i in range(5)}), driver.step({str(i): 1 for i in range(5)})])
    assert [r.tokens for r in results[0]] == [r.tokens for r in results[1]]


def test_sequences_come_and_go_between_steps_of_one_token_each() -> None:
    """Rows change places and tables grow; what was written for one step must not be read as another's."""
    runners = _pair("llama-tied", threads=2)
    assert runners[0].host.decode is not None
    answers = []
    for runner in runners:
        driver, random = tiny.Driver(runner), Random(1)
        for i in range(8):
            driver.add(str(i), _prompt(5 + 9 * i, i), GREEDY)
        answers.append([driver.step({str(i): 5 + 9 * i for i in range(8)}).tokens])
        for _ in range(60):
            names = random.sample(range(8), random.choice((1, 1, 2, 5, 8)))
            answers[-1].append(driver.step({str(i): 1 for i in names}).tokens)
    assert answers[0] == answers[1]


def test_a_step_of_tokens_in_flight_feeds_what_was_chosen_last() -> None:
    runner = tiny.runner(tiny.oracle("llama-tied", 7))
    driver = tiny.Driver(runner)
    driver.add("a", _prompt(9, 1), GREEDY)
    first = driver.step({"a": 9}).tokens["a"][0]
    known = PlanItem("a", 0, 9, 1, (first,), tuple(driver.tables["a"]), True)
    results = [runner.execute(StepPlan(1, (item,))).result().tokens for item in (known._replace(token_ids=()), known)]
    runner.host.last_tokens["a"] = first
    results.append(runner.execute(StepPlan(2, (known._replace(token_ids=()),))).result().tokens)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("token", "start", "table"), [(10**6, 0, (0,)), (-1, 0, (0,)), (1, 16, (0,)), (1, 0, (10**8,)), (1, 10**8, ())]
)
def test_decoding_refuses_what_is_out_of_range(token: int, start: int, table: tuple[int, ...]) -> None:
    runner = tiny.runner(tiny.oracle("llama-tied", 7))
    decode = runner.host.decode
    assert decode is not None
    good = decode([5], [0], [(0,)])
    with pytest.raises(IndexError):
        decode([token], [start], [table])
    assert decode([5], [0], [(0,)]) == good


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_tables_that_are_not_packed_or_scaled_are_looked_up_apart(family: str) -> None:
    assert tiny.runner(tiny.oracle(family)).host.decode is None


def test_the_smallest_of_equal_logits_is_taken_and_spoiled_rows_are_told() -> None:
    runner = tiny.runner(tiny.oracle("llama", 7), threads=2)
    ops = load_ops("native", 2)
    model = runner.model
    hidden = model.config.hidden_size
    flat = torch.zeros(model.config.vocab_size, hidden)
    flat[[40, 90, 170]] = 1.0
    model.head = replace(model.head, packed=ops.pack_linear(flat))
    step = whole_step(model, ops, runner.kv)
    assert step is not None
    index = torch.tensor([0, 1], dtype=torch.int32)
    slots, starts = torch.tensor([0, 17], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    table, positions = torch.tensor([[0], [1]], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    lens = torch.ones(2, dtype=torch.int32)

    def tokens(x: torch.Tensor) -> list[int]:
        got, best = step(x.clone(), positions, slots, starts, lens, table, index, 2)
        logits = model.logits(got).float()
        for row, token in enumerate(best):
            expected = int(logits[row].argmax()) if logits[row].isfinite().all() else -1
            assert token == expected
        return best

    x = torch.randn(2, hidden, generator=torch.Generator().manual_seed(1))
    model.norm.weight.fill_(1.0)
    best = tokens(x)
    assert set(best) <= {0, 40}
    x = torch.randn(2, hidden, generator=torch.Generator().manual_seed(2))
    x[1, 3] = torch.nan
    assert tokens(x)[1] == -1
    assert tokens(torch.randn(2, hidden, generator=torch.Generator().manual_seed(3)))[1] != -1


@pytest.mark.parametrize("wrong", ["slot", "position", "block", "row", "wanted", "length"])
def test_indices_out_of_range_are_refused(wrong: str) -> None:
    runner = tiny.runner(tiny.oracle("llama"), threads=2)
    step = runner.host.whole
    assert step is not None
    positions, slots, wanted = (torch.tensor([value], dtype=torch.int32) for value in (0, 0, 0))
    starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    {"slot": slots, "position": positions, "block": table, "wanted": wanted, "length": lens, "row": starts[1:]}[
        wrong
    ].fill_(10**8 if wrong != "wanted" else -1)
    with pytest.raises(IndexError, match="step"):
        step(torch.zeros(1, 48), positions, slots, starts, lens, table, wanted, 1)


def test_whoever_watches_the_model_sees_it_operation_by_operation() -> None:
    runner = tiny.runner(tiny.oracle("llama"))
    runner.model = watched = tiny.Listening(runner.model)
    driver = tiny.Driver(runner)
    driver.add("a", [5, 6, 7], GREEDY)
    driver.step({"a": 3})
    assert [len(rows) for rows in watched.logits_made] == [1]


def test_a_watched_step_tells_where_its_time_went() -> None:
    """Each part that runs has its time, all together no more than the whole, and looking changes nothing."""
    told = []
    for threads in (1, 2):
        runner = tiny.runner(tiny.oracle("llama-tied", 7), threads=threads)
        step = runner.host.whole
        assert step is not None
        driver = tiny.Driver(runner)
        driver.add("a", _prompt(40, 1), GREEDY)
        unwatched = driver.step({"a": 30})
        assert step.times().steps == 0
        step.watch()
        told.append((unwatched.tokens, driver.step({"a": 10}).tokens, driver.step({"a": 1}).tokens))
        times = step.times()
        assert (times.steps, times.rows) == (2, 11)
        assert [time.part for time in times.parts] == list(PARTS)
        worked = {time.part: time.worked for time in times.parts}
        assert worked.pop("merge of splits") == 0
        assert all(seconds > 0 for seconds in worked.values())
        assert sum(time.worked + time.waited for time in times.parts) <= times.seconds
    assert told[0] == told[1]

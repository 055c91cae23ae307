"""The cost of steps: learned from noisy steps, and turned into chunks that keep the pace."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liushui.core.cost import FACTOR, FLOOR, LEAST, START, Pace, Pacer, StepCost, Work, solve
from tests.core.world import World, make, shape

TRUTH = (0.02, 0.001, 0.0015, 2e-7)


def seconds(work: Work, noise: float = 1.0) -> float:
    return sum(c * x for c, x in zip(TRUTH, (1, *work), strict=True)) * noise


def decodes(count: int, context: int) -> Work:
    work = Work()
    for _ in range(count):
        work = work.plus(context, 1)
    return work


@given(st.integers(0, 500), st.integers(1, 300))
def test_pairs_are_the_keys_of_each_token(start: int, num_tokens: int) -> None:
    assert Work().plus(start, num_tokens).pairs == sum(start + i + 1 for i in range(num_tokens))


@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=3, max_size=3), st.randoms())
def test_solve(rows: list[list[float]], rng: random.Random) -> None:
    matrix = [[sum(row[i] * row[j] for row in rows) + (i == j) for j in range(3)] for i in range(3)]
    x = [rng.uniform(-2, 2) for _ in range(3)]
    right = [sum(matrix[i][j] * x[j] for j in range(3)) for i in range(3)]
    assert solve(matrix, right) == pytest.approx(x, abs=1e-6)


def test_the_fit_predicts_steps_it_has_not_seen() -> None:
    rng, cost = random.Random(1), StepCost()
    for _ in range(200):
        work = decodes(rng.randint(1, 32), rng.randint(10, 2000))
        if rng.random() < 0.3:
            work = work.plus(rng.randint(0, 1500), rng.randint(2, 400))
        cost.observe(work, seconds(work, rng.uniform(0.95, 1.05)))
    for work in (decodes(8, 500).plus(1000, 100), decodes(20, 50), Work().plus(0, 512)):
        assert cost.seconds(work) == pytest.approx(seconds(work), rel=0.1)


def test_the_price_of_prompts_is_not_forgotten_in_a_long_time_without() -> None:
    cost = StepCost()
    for size in (16, 32, 64, 128):
        work = decodes(4, 100).plus(0, size)
        cost.observe(work, seconds(work))
    for i in range(5000):
        work = decodes(1 + i % 6, 100 + i % 500)
        cost.observe(work, seconds(work))
    asked = decodes(4, 100).plus(0, 100)
    assert cost.seconds(asked) == pytest.approx(seconds(asked), rel=0.1)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 300), st.floats(1e-5, 10)), max_size=30))
def test_no_coefficient_is_ever_negative(steps: list[tuple[int, int, float]]) -> None:
    cost = StepCost()
    for num_decodes, chunk, taken in steps:
        work = decodes(num_decodes, 10)
        cost.observe(work.plus(0, chunk) if chunk > 1 else work, taken)
    assert min(cost.coefficients) >= 0


# -- the pace


@given(st.integers(1, 64), st.integers(0, 3000), st.integers(0, 3000), st.floats(0.0, 1.0))
def test_a_chunk_fits_and_one_more_token_does_not(count: int, context: int, start: int, target: float) -> None:
    pace = Pace(TRUTH, target, 1 << 30)
    beside = decodes(count, context)
    chunk = pace.chunk(beside, beside, start)
    if chunk > FLOOR:
        assert seconds(beside.plus(start, chunk)) <= target + 2e-7 * chunk  # half a pair per token is rounded
        assert seconds(beside.plus(start, chunk + 2)) > target
    else:
        assert chunk == FLOOR
        assert seconds(beside.plus(start, FLOOR + 2)) > target


def test_nobody_decodes_so_nobody_is_kept_waiting() -> None:
    assert Pace(TRUTH, 0.001, 16).chunk(Work(), Work(), 0) > 1 << 30


def test_without_experience_it_begins_small_and_grows_with_it() -> None:
    pacer = Pacer(target=1000.0)
    beside = decodes(1, 10)
    assert pacer.pace().chunk(beside, beside, 0) == START
    world = World(pace=pacer.pace(), max_num_batched_tokens=512, num_blocks=512)
    world.add(make("runs", 4, 200))
    world.step()
    world.add(make("long", 600, 2))
    sizes = []
    while "long" not in world.finished:
        world.pace = pacer.pace()
        plan = world.step()
        pacer.observe(plan, seconds(Work.of(plan)))
        sizes += [count for name, _, count in shape(plan) if name == "long" and count > 1]
    assert sum(sizes) == 600
    assert max(sizes[1:-1]) > 4 * START
    assert all(after <= 2 * max(sizes[: i + 1]) for i, after in enumerate(sizes[1:]))
    world.run()


@pytest.mark.parametrize("target", [None, 0.08, 0.2])
def test_steps_beside_decodes_keep_the_target(target: float | None) -> None:
    """A long prompt arrives while eight decode: no step is longer than the target, and the prompt gets through."""
    rng, pacer = random.Random(3), Pacer(target)
    world = World(num_blocks=2048, max_num_seqs=12, max_num_batched_tokens=512, max_model_len=8192)
    world.add(*(make(f"s{i}", 20, 300) for i in range(8)))
    slow = []
    for number in range(300):
        if number in (100, 200):
            world.add(make(f"long{number}", 1200, 2))
        world.pace = pacer.pace()
        plan = world.step()
        work = Work.of(plan)
        taken = seconds(work, rng.uniform(0.97, 1.03))
        if work.prompt_tokens and number >= 100:
            alone = seconds(Work(work.decodes, 0, 8 * 300))
            slow.append(taken / (target or FACTOR * alone))
        pacer.observe(plan, taken)
    assert {"long100", "long200"} <= world.finished.keys()
    assert len(slow) > 10
    assert max(slow) < 1.2
    world.run()


@pytest.mark.parametrize(("slow", "share"), [(1.0, 1.0), (1.75, 0.65), (4.0, 0.5)])
def test_where_steps_are_slow_now_and_then_prompts_take_less(slow: float, share: float) -> None:
    """Three steps of a hundred take `slow` times as long: the slowest with prompts still stay within three times the
    step without, as long as prompts keep the least of their share."""
    rng, pacer, found = random.Random(3), Pacer(), []
    for number in range(3000):
        beside, pace = decodes(8, 100 + number % 500), pacer.pace()
        work = (
            beside.plus(number % 7 * 100, pace.chunk(beside, beside, number % 7 * 100)) if number % 60 > 30 else beside
        )
        taken = seconds(work, slow if rng.random() < 0.03 else rng.uniform(0.95, 1.05))
        if work.prompt_tokens and number >= 600:
            found.append((taken / seconds(beside), pace.factor))
        pacer.learn(beside, work, taken)
    tail = sorted(ratio for ratio, _ in found)[int(0.99 * len(found))]
    mean = sum(factor for _, factor in found) / len(found)
    assert all(LEAST <= factor <= FACTOR for _, factor in found)
    assert (mean - 1) / (FACTOR - 1) == pytest.approx(share, abs=0.1)
    assert tail < 3.0 or mean == pytest.approx(LEAST, abs=0.01)


def test_a_target_that_cannot_be_met_leaves_the_first_prompt_its_floor() -> None:
    world = World(pace=Pace(TRUTH, 0.001, 512), num_blocks=512)
    world.add(make("runs", 4, 50))
    world.step()
    world.add(make("one", 100, 2), make("two", 100, 2))
    plan = world.step()
    assert shape(plan) == [("runs", 4, 1), ("one", 0, FLOOR // 2)]
    world.run()


def test_a_short_prompt_does_not_wait_until_a_long_one_is_done() -> None:
    """Both come while others decode: the short one has its first token long before the long one."""
    world = World(pace=Pace(TRUTH, 0.06, 512), num_blocks=1024, max_num_seqs=12)
    world.add(*(make(f"s{i}", 4, 200) for i in range(4)))
    world.step()
    world.add(make("long", 1500, 2), make("long too", 1500, 2), make("short", 30, 2))
    steps = 0
    while "short" not in world.finished:
        world.step()
        steps += 1
    long = world.sequences["long"]
    assert steps <= 12
    assert steps * FLOOR / 2 <= long.num_computed < 300
    world.run()

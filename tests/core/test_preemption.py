"""Too little memory: who yields, what waits for blocks on their way back, and what returns."""

import pytest

from liushui.core.request import FinishReason
from tests.core.world import World, first_token, make, shape


def crowd(depth: int = 0, max_tokens: int = 3, **keys: object) -> World:
    """A pool of seven blocks, all owned: two each by a and b, three by c, whose prompt was the last to enter.

    Six steps are scheduled. In the next one, a is the first to need a third block; b one step later.
    """
    world = World(num_blocks=7, block_size=4, depth=depth, max_num_batched_tokens=4)
    world.add(make("a", 3, 9), make("b", 3, 9))
    world.step()
    world.add(make("c", 9, max_tokens, **keys))
    for _ in range(5):
        world.step()
    assert [len(world.sequences[name].block_table) for name in "abc"] == [2, 2, 3]
    assert shape(world.plans[-1]) == [("a", 7, 1), ("b", 6, 1), ("c", 7, 2)]
    assert world.pool.num_free == 0
    return world


def preempted(world: World) -> list[tuple[str, ...]]:
    return [plan.preempted for plan in world.plans if plan.preempted]


def test_the_last_in_order_yields() -> None:
    world = crowd()
    assert shape(world.step()) == [("a", 8, 1), ("b", 7, 1)]
    assert world.plans[-1].preempted == ("c",)
    assert world.sequences["c"].num_computed == 0
    assert (world.scheduler.num_waiting, world.scheduler.num_preemptions, world.pool.num_free) == (1, 1, 2)
    world.run()
    assert preempted(world) == [("c",)]


def test_the_last_in_order_itself_waits_and_keeps_what_it_has() -> None:
    world = World(num_blocks=3, block_size=4)
    world.add(make("a", 4, 5), make("b", 3, 3))
    for _ in range(3):
        world.step()
    assert [shape(plan) for plan in world.plans[1:]] == [[("a", 4, 1), ("b", 3, 1)], [("a", 5, 1)]]
    world.run()
    assert world.scheduler.num_preemptions == 0


def test_priority_decides_who_yields() -> None:
    world = World(num_blocks=7, block_size=4, max_num_batched_tokens=4)
    world.add(make("a", 3, 9), make("b", 3, 9))
    world.step()
    world.add(make("c", 9, 3, priority=-1))
    world.run()
    assert preempted(world) == [("b",)]
    assert list(world.finished) == ["c", "a", "b"]


def test_a_preempted_sequence_comes_back_before_later_ones_with_its_own_blocks() -> None:
    world = crowd()
    world.step()
    world.add(make("d", 1, 1))
    world.run()
    back = next(plan for plan in world.plans[6:] if plan.admitted)
    assert back.admitted[0] == ("c", 4)  # of its two published blocks, b took the later
    assert shape(back)[-1] == ("c", 4, 3)
    assert "c" not in {new.seq_id for new in back.new}
    assert world.sequences["c"].num_cached == 0
    entered = [seq_id for plan in world.plans[6:] for seq_id, _ in plan.admitted]
    assert entered == ["c", "d"]


@pytest.mark.parametrize("depth", [1, 2])
def test_blocks_on_their_way_back_preempt_nobody_else(depth: int) -> None:
    """a lacks a block while c's are named by plans in flight: preempting b as well would free nothing sooner."""
    world = crowd(depth)
    assert shape(world.schedule()) == [("b", 7, 1)]
    assert (world.plans[-1].preempted, world.pool.num_free) == (("c",), 0)
    world.run()
    assert preempted(world) == [("c",)]


def test_a_last_token_on_its_way_is_blocks_on_their_way() -> None:
    world = crowd(depth=1, max_tokens=1)
    assert shape(world.schedule()) == [("b", 7, 1)]  # a waits for c to end, which is certain
    world.run()
    assert preempted(world) == []


def test_as_many_yield_as_lack_a_block() -> None:
    """a and b lack a block in the same step: of d alone only one comes back, so c must yield too."""
    world = World(num_blocks=4, block_size=4, depth=1, reckless=True)
    world.add(*(make(name, 4, 5) for name in "abcd"))
    assert len(shape(world.schedule())) == 4
    assert world.schedule() is None
    assert (world.scheduler.num_running, world.pool.num_free) == (2, 0)
    world.update()
    assert shape(world.schedule()) == [("a", 4, 1), ("b", 4, 1)]
    assert world.plans[-1].preempted == ("d", "c")
    world.run()


def test_a_victim_in_flight_keeps_its_pending_tokens() -> None:
    world = crowd(depth=1)
    c = world.sequences["c"]
    world.schedule()
    assert (c.status.value, c.num_pending, c.num_in_flight, world.pool.num_free) == ("waiting", 1, 1, 0)
    world.update()
    assert (c.num_known, c.num_pending, c.num_in_flight, world.pool.num_free) == (10, 0, 0, 3)
    assert world.answers["c"] == c.output_token_ids
    world.run()


def test_a_victim_in_flight_waits_for_its_last_plan_and_finds_what_that_computed() -> None:
    world = World(max_num_batched_tokens=8, depth=1)
    world.add(make("a", 20, 1))
    world.schedule()
    world.scheduler._preempt(world.sequences["a"])
    assert world.schedule() is None
    world.update()
    assert shape(world.schedule()) == [("a", 8, 8)]
    world.run()


def test_who_ends_while_preempted_ends() -> None:
    """c is preempted with a stop token in flight: it ends from the queue and never comes back."""
    world = crowd(depth=1, stop_token_ids=(first_token("c", 9),))
    world.schedule()
    assert world.plans[-1].preempted == ("c",)
    world.update()
    assert world.finished["c"].reason is FinishReason.STOP
    world.run()
    assert [seq_id for plan in world.plans for seq_id, _ in plan.admitted] == ["a", "b", "c"]


def test_a_preempted_sequence_may_be_aborted() -> None:
    world = crowd(depth=1)
    world.schedule()
    world.abort("c")
    world.run()
    assert "c" not in world.finished
    assert [plan.dropped for plan in world.plans if "c" in plan.dropped] == [("c",)]


def test_a_preempted_sequence_may_be_finished() -> None:
    world = crowd()
    world.step()
    world.finish("c")
    assert (world.scheduler.num_waiting, list(world.finished)) == (0, ["c"])
    world.run()


def test_on_return_the_cached_tokens_told_are_those_of_the_prompt() -> None:
    world = World(block_size=4)
    world.add(make("a", 5, 9))
    for _ in range(5):
        world.step()
    world.scheduler._preempt(world.sequences["a"])
    plan = world.step()
    assert plan is not None
    assert (shape(plan), plan.admitted) == ([("a", 8, 2)], (("a", 5),))
    assert world.scheduler.num_hit_tokens == 8
    world.run()

"""The static policy: those who sit down together rise together. The same engine, the same tokens."""

from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.core.request import FinishReason
from liushui.core.sequence import Status
from tests.core.world import World, make, shape


def test_a_group_enters_together_and_leaves_together() -> None:
    world = World(policy="static", max_num_seqs=2)
    world.add(make("a", 2, 1), make("b", 2, 3), make("c", 2, 1))
    assert shape(world.step()) == [("a", 0, 2), ("b", 0, 2)]
    assert world.answers["a"]  # its tokens flow, its end is withheld
    assert not world.finished
    assert shape(world.step()) == [("b", 2, 1)]
    assert world.batch() == ["a", "b"]  # and it keeps its place
    world.step()
    assert list(world.finished) == ["a", "b"]
    assert shape(world.step()) == [("c", 0, 2)]
    world.run()


def test_latecomers_wait_for_the_next_table() -> None:
    world = World(policy="static", max_num_seqs=4)
    world.add(make("a", 2, 3))
    world.step()
    world.add(make("b", 2, 1), make("urgent", 2, 1, priority=-1))
    while "a" not in world.finished:
        assert {item.seq_id for item in (world.step() or world.plans[-1]).items} == {"a"}
    assert shape(world.step()) == [("urgent", 0, 2), ("b", 0, 2)]
    world.run()


def test_all_enter_in_one_step_even_beyond_its_tokens() -> None:
    world = World(policy="static", max_num_batched_tokens=4)
    world.add(make("a", 4, 2), make("b", 4, 2), make("c", 2, 2))
    plan = world.step()
    assert plan is not None
    assert [seq_id for seq_id, _ in plan.admitted] == ["a", "b", "c"]
    assert shape(plan) == [("a", 0, 4)]
    world.run()


def test_those_who_do_not_fit_are_the_next_group() -> None:
    world = World(num_blocks=4, block_size=4, policy="static")
    world.add(make("a", 8, 1), make("b", 8, 1), make("c", 1, 1))
    assert shape(world.step()) == [("a", 0, 8)]
    assert shape(world.step()) == [("b", 0, 8), ("c", 0, 1)]
    world.run()


def test_a_preempted_member_returns_to_its_group() -> None:
    world = World(num_blocks=4, block_size=4, policy="static", reckless=True)
    world.add(make("a", 3, 6), make("b", 3, 6), make("c", 3, 6))
    world.step()
    world.add(make("d", 1, 1, priority=-1))
    world.run()
    assert world.scheduler.num_preemptions == 1
    assert [seq_id for plan in world.plans for seq_id, _ in plan.admitted] == ["a", "b", "c", "c", "d"]
    assert list(world.finished) == ["a", "b", "c", "d"]


def test_who_is_done_waits_for_a_preempted_member_and_nobody_else_comes() -> None:
    world = World(num_blocks=4, block_size=4, policy="static", reckless=True)
    world.add(make("a", 7, 6), make("b", 7, 3))
    world.step()
    world.add(make("c", 1, 1, priority=-1))
    while world.sequences["a"].status is not Status.HELD:
        world.step()
    assert (world.scheduler.num_preemptions, world.scheduler.num_running, world.finished) == (1, 0, {})
    plan = world.step()
    assert plan is not None
    assert [seq_id for seq_id, _ in plan.admitted] == ["b"]
    world.run()
    assert list(world.finished) == ["a", "b", "c"]


def test_the_next_group_has_every_slot_also_after_a_late_stop() -> None:
    world = World(policy="static", depth=2, max_num_seqs=2)
    for i, name in enumerate("abcd"):
        world.add(make(name, 2, 9, stop_token_ids=tuple(range(12)), min_tokens=2 * i))
    world.run()
    groups = [[seq_id for seq_id, _ in plan.admitted] for plan in world.plans if plan.admitted]
    assert groups == [["a", "b"], ["c", "d"]]
    assert world.seen["late stops"] > 0


def test_the_abort_of_the_last_lets_the_others_go() -> None:
    world = World(policy="static")
    world.add(make("a", 2, 1), make("b", 2, 9), make("c", 2, 1))
    world.step()
    assert not world.finished
    events = world.scheduler.abort("b")
    assert [(event.seq_id, event.reason) for event in events] == [
        ("a", FinishReason.LENGTH),
        ("c", FinishReason.LENGTH),
    ]
    assert not world.scheduler.has_work
    assert world.pool.num_free == world.pool.num_blocks


def test_who_is_held_may_be_aborted() -> None:
    world = World(policy="static")
    world.add(make("a", 2, 1), make("b", 2, 3))
    world.step()
    world.abort("a")
    assert world.batch() == ["b"]
    world.run()
    assert list(world.finished) == ["b"]


def test_a_stop_string_ends_one_who_leaves_with_its_group() -> None:
    world = World(policy="static")
    world.add(make("a", 2, 9), make("b", 2, 2))
    world.step()
    world.finish("a")
    assert (world.finished, world.batch()) == ({}, ["a", "b"])
    world.step()
    assert list(world.finished) == ["a", "b"]
    world.run()


def test_the_finish_of_the_last_lets_all_go() -> None:
    world = World(policy="static")
    world.add(make("a", 2, 1), make("b", 2, 9))
    world.step()
    world.finish("b")
    assert list(world.finished) == ["a", "b"]
    world.run()


lengths = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 2), st.integers(5, 12), st.integers(1, 4))
def test_static_and_continuous_give_the_same_tokens(
    sizes: list[tuple[int, int]], depth: int, num_blocks: int, max_num_seqs: int
) -> None:
    answers = []
    for policy in ("static", "continuous"):
        world = World(num_blocks, 4, depth=depth, policy=policy, max_num_seqs=max_num_seqs)
        for i, (prompt, max_tokens) in enumerate(sizes):
            world.add(make(f"{i}", prompt, max_tokens, ignore_eos=bool(i % 2)))
        world.run()
        answers.append(world.answers)
    assert answers[0] == answers[1]

"""The scheduler by example, as integers: a plan is a list of (sequence, start, number of tokens)."""

import pytest

from liushui.core.plan import FinishedEvent, TokensEvent
from liushui.core.request import FinishReason
from liushui.errors import ParameterError
from tests.core.world import World, first_token, make, shape

# -- steps


def test_decodes_go_first_and_prompts_fill_the_step() -> None:
    world = World(max_num_batched_tokens=8)
    world.add(make("a", 3))
    assert shape(world.step()) == [("a", 0, 3)]
    world.add(make("b", 10), make("c", 4))
    assert shape(world.step()) == [("a", 3, 1), ("b", 0, 7)]
    assert shape(world.step()) == [("a", 4, 1), ("b", 7, 3), ("c", 0, 4)]
    assert shape(world.step()) == [("a", 5, 1), ("b", 10, 1), ("c", 4, 1)]
    world.run()


def test_only_the_last_chunk_of_a_prompt_samples() -> None:
    world = World(max_num_batched_tokens=4)
    world.add(make("a", 10, 2))
    plans = [world.step() for _ in range(4)]
    assert [shape(plan) for plan in plans] == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 2)], [("a", 10, 1)]]
    assert [plan.items[0].samples for plan in plans if plan] == [False, False, True, True]
    world.run()


def test_nobody_enters_without_a_token_to_feed() -> None:
    world = World(max_num_batched_tokens=4)
    world.add(make("a", 4), make("b", 4))
    assert shape(world.step()) == [("a", 0, 4)]
    assert world.scheduler.num_waiting == 1
    world.run()


def test_one_more_step_per_token_and_none_after_the_last() -> None:
    world = World()
    world.add(make("a", 5, max_tokens=1))
    world.run()
    assert [shape(plan) for plan in world.plans] == [[("a", 0, 5)]]
    assert world.finished["a"] == FinishedEvent("a", FinishReason.LENGTH)


def test_events_of_a_step() -> None:
    world = World()
    world.add(make("a", 2, 1), make("b", 2, 2))
    plan = world.scheduler.schedule(0.0)
    assert plan is not None
    events = world.scheduler.update(plan, {"a": [7], "b": [8]})
    assert events == [
        TokensEvent("a", (7,)),
        TokensEvent("b", (8,)),
        FinishedEvent("a", FinishReason.LENGTH),
    ]


def test_slots_are_the_lowest_free_and_stay() -> None:
    world = World(max_num_seqs=2)
    world.add(make("a", 2, 2), make("b", 2, 6), make("c", 2, 6))
    world.step()
    assert world.batch() == ["a", "b"]
    world.step()
    world.step()
    assert world.batch() == ["c", "b"]
    assert [item.slot for item in world.plans[-1].items] == [1, 0]
    world.run()


def test_of_several_free_slots_the_lowest_is_taken() -> None:
    world = World(max_num_seqs=3)
    world.add(make("a", 2, 2), make("b", 2, 9), make("c", 2, 1), make("d", 2, 9))
    world.step()
    world.abort("d")
    world.step()
    world.add(make("e", 2, 1))
    world.step()
    assert world.plans[-1].items[-1].seq_id == "e"
    assert world.plans[-1].items[-1].slot == 0
    world.run()


def test_without_budget_nobody_is_preempted_for_a_block() -> None:
    world = World(num_blocks=4, block_size=4, max_num_batched_tokens=4, reckless=True)
    world.add(make("a", 1, 9), make("b", 4, 5), make("c", 4, 5))
    world.scheduler.max_num_batched_tokens = 9
    world.step()
    world.scheduler.max_num_batched_tokens = 1
    assert shape(world.step()) == [("a", 1, 1)]
    assert [len(world.sequences[name].block_table) for name in "abc"] == [1, 1, 1]
    world.run()


def test_the_runner_is_told_once_and_forgets_once() -> None:
    world = World()
    world.add(make("a", 2, 1), make("b", 2, 3))
    first, second, third = world.step(), world.step(), world.step()
    assert first is not None
    assert second is not None
    assert third is not None
    assert [new.seq_id for new in first.new] == ["a", "b"]
    assert (first.dropped, second.dropped, third.dropped) == ((), ("a",), ())
    assert first.admitted == (("a", 0), ("b", 0))
    assert second.new == second.admitted == ()


def test_answers_of_one_request_have_names_and_seeds_of_their_own() -> None:
    world = World()
    request = make("a", 6, n=3).request
    sequences = [type(make("x", 1))(request, index) for index in range(3)]
    assert [seq.seq_id for seq in sequences] == ["a/0", "a/1", "a/2"]
    assert [seq.seed for seq in sequences] == [5, 6, 7]
    world.add(*sequences)
    world.run()


# -- ends


def test_a_stop_token_ends_and_is_told() -> None:
    world = World()
    world.add(make("a", 3, 9, stop_token_ids=(first_token("a", 3),)))
    world.run()
    assert world.finished["a"] == FinishedEvent("a", FinishReason.STOP, first_token("a", 3))
    assert world.answers["a"] == [first_token("a", 3)]


def test_min_tokens_stand_before_a_stop() -> None:
    world = World()
    every = tuple(range(12))
    for least in range(4):
        world.add(make(f"{least}", 3, 4, stop_token_ids=every, min_tokens=least))
    world.run()
    assert [len(world.answers[f"{least}"]) for least in range(4)] == [1, 2, 3, 4]
    assert all(world.finished[f"{least}"].reason is FinishReason.STOP for least in range(4))


def test_ignore_eos_ignores_only_eos() -> None:
    assert make("a", 1, ignore_eos=True, stop_token_ids=(3,)).stop_token_ids == {3}
    assert make("a", 1, ignore_eos=False, stop_token_ids=(3,)).stop_token_ids == {0, 3}


# -- ahead of the results


def test_ahead_the_last_id_is_still_in_flight() -> None:
    world = World(depth=2)
    seq = make("a", 3, 4)
    world.add(seq)
    plans = [world.schedule() for _ in range(3)]
    assert [shape(plan) for plan in plans] == [[("a", 0, 3)], [("a", 3, 1)], [("a", 4, 1)]]
    assert [len(plan.items[0].token_ids) for plan in plans if plan] == [3, 0, 0]
    assert (seq.num_known, seq.num_pending, seq.num_computed, seq.num_left) == (3, 3, 5, 1)
    world.update()
    assert (seq.num_known, seq.num_pending, seq.num_computed, seq.num_left) == (4, 2, 5, 1)
    assert shape(world.schedule()) == [("a", 5, 1)]
    assert seq.num_left == 0
    assert world.schedule() is None  # the last token is in flight already
    world.run()


def test_a_late_stop_discards_what_follows_and_keeps_the_blocks_until_then() -> None:
    world = World(num_blocks=8, depth=2, max_num_seqs=1)
    world.add(make("a", 3, 9, stop_token_ids=(first_token("a", 3),)), make("b", 4, 1))
    for _ in range(3):
        world.schedule()
    world.update()
    assert world.finished["a"].reason is FinishReason.STOP
    assert (world.pool.num_free, world.batch()) == (6, [])
    assert world.schedule() is None  # slot and blocks are named by two plans in flight
    world.update()
    assert world.pool.num_free == 6
    world.update()
    assert world.pool.num_free == 8
    assert world.answers["a"] == [first_token("a", 3)]
    plan = world.schedule()
    assert plan is not None
    assert (plan.dropped, shape(plan)) == (("a",), [("b", 0, 4)])
    world.run()


def test_an_abort_in_flight_is_silent_and_returns_its_blocks_with_the_last_plan() -> None:
    world = World(num_blocks=8, depth=1)
    world.add(make("a", 4, 9), make("b", 4, 9))
    world.schedule()
    world.schedule()
    world.abort("a")
    world.abort("a")
    assert (world.pool.num_free, world.scheduler.num_running) == (4, 1)
    world.update()
    assert world.pool.num_free == 4
    world.update()
    assert world.pool.num_free == 6
    assert world.answers["a"] == []
    plan = world.schedule()
    assert plan is not None
    assert plan.dropped == ("a",)
    world.run()


def test_finish_from_outside_is_told_and_discards_what_is_in_flight() -> None:
    world = World(num_blocks=8, depth=1)
    world.add(make("a", 4, 9), make("b", 4, 9))
    world.schedule()
    world.schedule()
    world.update()
    assert world.scheduler.finish("unknown") == []
    world.finish("a")
    assert world.finished["a"] == FinishedEvent("a", FinishReason.STOP)
    assert len(world.answers["a"]) == 1
    assert world.scheduler.finish("a") == []
    world.run()
    assert len(world.answers["a"]) == 1


def test_an_id_may_come_again_once_it_is_gone() -> None:
    world = World()
    world.add(make("a", 4, 2))
    with pytest.raises(ParameterError, match="request_id: 'a' is in use"):
        world.scheduler.add(make("a", 4))
    world.step()
    world.scheduler.abort("a")
    world.answers["a"] = []
    world.add(make("a", 4, 2))
    plan = world.schedule()
    assert plan is not None
    assert (plan.dropped, [new.seq_id for new in plan.new]) == (("a",), ["a"])
    world.run()


def test_who_waits_leaves_at_once_and_the_runner_never_hears_of_it() -> None:
    world = World(max_num_seqs=1)
    world.add(make("a", 4, 2), make("b", 4, 2), make("c", 4, 2))
    world.step()
    world.abort("b")
    assert world.scheduler.num_waiting == 1
    world.abort("unknown")
    world.run()
    assert "b" not in {seq_id for plan in world.plans for seq_id in plan.dropped}
    assert list(world.finished) == ["a", "c"]


def test_plans_retire_in_order() -> None:
    world = World(depth=1)
    world.add(make("a", 4, 9))
    first, second = world.scheduler.schedule(), world.scheduler.schedule()
    assert first is not None
    assert second is not None
    with pytest.raises(RuntimeError, match="step 1 given, 0 expected"):
        world.scheduler.update(second, {"a": [1]})
    world.scheduler.update(first, {"a": [1]})
    with pytest.raises(RuntimeError, match="step 0 given, 1 expected"):
        world.scheduler.update(first, {"a": [1]})


# -- the self-check


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s._free_slots.append(0), "slots are lost or doubled"),
        (lambda s: s._running.reverse(), "the batch is out of order"),
        (lambda s: s._running.pop(), "running: arrivals"),
        (lambda s: setattr(s._running[0], "num_pending", 0), "awaits 0 tokens, 1 come"),
        (lambda s: setattr(s._running[0], "block_table", ()), "counts 1 references, has 0 owners"),
        (lambda s: setattr(s._running[0], "num_in_flight", 0), "counts 0 plans, named by 1"),
    ],
)
def test_check_finds_what_is_broken(break_it, message: str) -> None:
    world = World(depth=1)
    world.add(make("a", 4), make("b", 4))
    world.schedule()
    break_it(world.scheduler)
    with pytest.raises(AssertionError, match=message):
        world.scheduler.check()

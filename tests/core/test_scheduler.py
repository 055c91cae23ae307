"""The scheduler by example, as integers: a plan is a list of (sequence, start, number of tokens)."""

import pytest

from liushui.core.plan import FinishedEvent, TokensEvent
from liushui.core.request import FinishReason
from liushui.errors import CapacityError, ParameterError
from tests.core.world import World, make, shape, token_at

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


def first_token(name: str, num_prompt: int) -> int:
    return token_at(name, num_prompt)


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


# -- the door


def test_a_prompt_that_fills_the_memory_runs() -> None:
    world = World(num_blocks=4, block_size=4, max_model_len=17)
    world.add(make("a", 16, 1), make("b", 1, 16))
    world.run()
    assert len(world.answers["a"]) == 1
    assert len(world.answers["b"]) == 16


@pytest.mark.parametrize(
    ("num_blocks", "max_model_len", "prompt", "max_tokens", "message"),
    [
        (4, 99, 17, 1, "prompt: has 17 tokens; with one new token, the KV cache holds at most 16"),
        (4, 99, 10, 8, "max_tokens: 8 new tokens after a prompt of 10 .* the KV cache holds; ask for at most 7"),
        (64, 12, 12, 1, "prompt: has 12 tokens; with one new token, max_model_len holds at most 11"),
        (64, 12, 10, 3, "max_tokens: 3 new tokens after a prompt of 10 .* max_model_len holds; ask for at most 2"),
    ],
)
def test_what_never_fits_is_refused_by_name(
    num_blocks: int, max_model_len: int, prompt: int, max_tokens: int, message: str
) -> None:
    world = World(num_blocks, max_model_len=max_model_len)
    world.add(make("neighbour", 4, 8))
    world.step()
    with pytest.raises(CapacityError, match=message):
        world.scheduler.add(make("a", prompt, max_tokens))
    world.scheduler.check()
    world.run()
    assert list(world.finished) == ["neighbour"]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ParameterError, match="prompt: has no tokens"):
        World().scheduler.add(make("a", []))


def test_a_prompt_enters_whole_with_a_watermark_or_not_at_all() -> None:
    world = World(num_blocks=8, block_size=4)
    world.add(make("a", 16, 2), make("b", 13, 2), make("c", 1, 1))
    assert shape(world.step()) == [("a", 0, 16)]  # b's four blocks would leave none
    assert shape(world.step()) == [("a", 16, 1)]  # and c does not overtake
    assert shape(world.step()) == [("b", 0, 13), ("c", 0, 1)]
    world.run()


def test_the_watermark_is_a_hundredth_of_the_pool() -> None:
    assert World(num_blocks=50).scheduler.watermark == 1
    assert World(num_blocks=1000).scheduler.watermark == 10


def test_an_admission_leaves_everybody_who_runs_a_block() -> None:
    world = World(num_blocks=9, block_size=4)
    world.add(*(make(name, 4, 5) for name in "abcdefg"))
    assert [seq_id for seq_id, _ in (world.step() or world.plans[0]).admitted] == ["a", "b", "c", "d", "e"]
    world.run()
    assert world.scheduler.num_preemptions == 0


def test_alone_one_needs_no_watermark() -> None:
    world = World(num_blocks=4, block_size=4)
    world.add(make("a", 16, 1))
    assert shape(world.step()) == [("a", 0, 16)]
    world.run()


# -- order


def test_priority_then_arrival() -> None:
    world = World(max_num_seqs=1)
    world.add(*(make(name, 2, 1, priority=p) for name, p in [("a", 1), ("b", 0), ("c", 1), ("d", -1)]))
    world.run()
    assert list(world.finished) == ["d", "b", "a", "c"]


def test_the_batch_is_in_order_of_arrival_whatever_the_names() -> None:
    names = [f"{n * 7919 % 1000}" for n in range(8)]
    world = World()
    for name in names:
        world.add(make(name, 3, 5))
        world.step()
    assert [item.seq_id for item in world.plans[4].items] == names[:5]
    world.run()


# -- preemption


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


# -- the prefix cache


def test_a_prompt_seen_before_is_read_up_to_its_last_token() -> None:
    prompt = list(range(100, 116))
    world = World(block_size=4)
    world.add(make("a", prompt, 1))
    world.step()
    world.add(make("b", prompt, 2), make("c", prompt[:13], 1), make("d", [*prompt, 7], 1))
    plan = world.step()
    assert plan is not None
    assert plan.admitted == (("b", 12), ("c", 12), ("d", 16))
    assert shape(plan) == [("b", 12, 4), ("c", 12, 1), ("d", 16, 1)]
    assert world.sequences["b"].num_cached == 12
    assert world.scheduler.num_hit_tokens == 40
    world.run()


def test_nothing_is_published_before_its_step_has_run() -> None:
    prompt = list(range(100, 117))
    world = World(depth=1)
    world.add(make("a", prompt))
    world.schedule()
    world.add(make("b", prompt))
    assert shape(world.schedule()) == [("a", 17, 1), ("b", 0, 17)]
    world.update()
    world.add(make("c", prompt))
    assert ("c", 16, 1) in shape(world.schedule())
    world.run()


def test_the_answer_is_cached_too() -> None:
    world = World(block_size=4)
    world.add(make("a", 4, 6))
    world.run()
    a = world.sequences["a"]
    world.add(make("b", [*a.token_ids, 5], 1))
    assert shape(world.step()) == [("b", 8, 3)]
    world.run()


def test_salts_are_worlds_apart() -> None:
    prompt = list(range(100, 110))
    world = World()
    for name, salt in [("a", "x"), ("b", "y"), ("c", "x")]:
        world.add(make(name, prompt, 1, cache_salt=salt))
        world.step()
    assert [plan.admitted[0][1] for plan in world.plans] == [0, 0, 8]


def test_without_prefix_caching_nothing_is_read_or_published() -> None:
    prompt = list(range(100, 110))
    world = World(prefix_caching=False)
    for name in "ab":
        world.add(make(name, prompt, 1))
        world.step()
    assert [shape(plan) for plan in world.plans] == [[("a", 0, 10)], [("b", 0, 10)]]
    assert world.pool.num_cached == 0


def test_prompt_logprobs_compute_every_row_and_still_publish() -> None:
    prompt = list(range(100, 110))
    world = World()
    for name, rows in [("a", 1), ("b", 1), ("c", None)]:
        world.add(make(name, prompt, 1, prompt_logprobs=rows))
        world.step()
    assert [plan.admitted[0][1] for plan in world.plans] == [0, 0, 8]


@pytest.mark.parametrize(("first", "cached"), [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (10, 8)])
def test_prompt_logprobs_from_a_position_on_leave_what_is_before_to_the_cache(first: int, cached: int) -> None:
    """The row before the first position wanted is computed, whatever is cached."""
    prompt = list(range(100, 110))
    world = World()
    for name in "ab":
        world.add(make(name, prompt, 1, prompt_logprobs=0, prompt_logprobs_from=first))
        world.step()
    assert [plan.admitted[0][1] for plan in world.plans] == [0, cached]


# -- the self-check


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s._free_slots.append(0), "slots are lost or doubled"),
        (lambda s: s._running.reverse(), "the batch is out of order"),
        (lambda s: s._running.pop(), "running: arrivals"),
        (lambda s: setattr(s._running[0], "num_pending", 0), "awaits 0 tokens, 1 come"),
        (lambda s: s._running[0].block_table.pop(), "counts 1 references, has 0 owners"),
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

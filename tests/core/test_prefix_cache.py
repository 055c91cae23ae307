"""What a prompt reads from those before it, and when it may."""

from collections import Counter

import pytest

from liushui.core.sequence import Sequence
from tests.core.world import World, make, shape


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


@pytest.mark.parametrize("depth", [0, 1])
def test_answers_of_one_request_compute_its_prompt_once(depth: int) -> None:
    """The others enter when the first has computed it, and compute no more than what is behind its last whole block."""
    world = World(64, 4, depth=depth, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=64)
    first = make("n", 22, 5, n=3)
    world.add(first, *(Sequence(first.request, index) for index in (1, 2)), make("next", 6, 5))
    assert (world.scheduler.num_waiting, [seq.seq_id for seq in world.scheduler.waiting]) == (
        4,
        ["n/0", "n/1", "n/2", "next"],
    )
    world.run()
    fed = Counter(item.seq_id for plan in world.plans for item in plan.items for _ in range(item.num_tokens))
    assert fed == {"n/0": 22 + 4, "n/1": 2 + 4, "n/2": 2 + 4, "next": 6 + 4}


@pytest.mark.parametrize("act", ["abort", "finish"])
@pytest.mark.parametrize("who", [0, 1])
def test_whoever_leaves_the_others_of_the_request_get_their_answers(act: str, who: int) -> None:
    world = World(64, 4, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=64)
    first = make("n", 22, 5, n=3)
    world.add(first, *(Sequence(first.request, index) for index in (1, 2)))
    world.step()
    getattr(world, act)(f"n/{who}")
    world.run()
    whole = {seq_id for seq_id, answer in world.answers.items() if len(answer) == 5}
    assert whole == {"n/0", "n/1", "n/2"} - {f"n/{who}"}


@pytest.mark.parametrize(
    ("prompt", "keys", "settings"),
    [
        (4, {}, {}),
        (22, {"prompt_logprobs": 0}, {}),
        (22, {}, {"prefix_caching": False}),
        (22, {}, {"policy": "static"}),
    ],
    ids=["short", "prompt_logprobs", "no cache", "static"],
)
def test_where_nothing_is_gained_answers_of_one_request_enter_together(prompt: int, keys: dict, settings: dict) -> None:
    world = World(64, 4, max_num_batched_tokens=128, **settings)
    first = make("n", prompt, 5, n=2, **keys)
    world.add(first, Sequence(first.request, 1))
    assert {item.seq_id for item in world.step().items} == {"n/0", "n/1"}
    world.run()

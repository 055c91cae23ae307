"""What a prompt reads from those before it, and when it may."""

import pytest

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

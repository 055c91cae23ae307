"""Random lives: add, abort, finish, schedule and update in any order, at depth 0 to 2, in pools small enough to hurt;
with priorities, ageing, tenants, deadlines and steps bounded in time.

`World` checks every call: books balanced, the right tokens at the right positions in the right blocks, no block
written that another owns, no overtaking; and at the end, everybody's exact answer and an empty house.
"""

import random
from collections import Counter
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liushui.core import blocks
from liushui.core.cost import Pace
from liushui.core.sequence import Sequence
from liushui.errors import CapacityError
from tests.core.world import World, make

PATTERNS = ([1, 2, 3] * 12, [1, 2, 2] * 12)  # prompts begin alike, so that they share and collide

QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}

worlds = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(3, 14),
        "block_size": st.sampled_from([1, 2, 4]),
        "cache_room": st.sampled_from([None, None, 0, 3, 6]),
        "depth": st.integers(0, 2),
        "reckless": st.booleans(),
        "max_num_seqs": st.integers(1, 5),
        "max_num_batched_tokens": st.integers(1, 14),
        "max_model_len": st.integers(12, 40),
        "policy": st.sampled_from(["continuous", "continuous", "static"]),
        "prefix_caching": st.sampled_from([True, True, False]),
        "ageing": st.sampled_from([None, 0.5, 3.0, 100.0]),
        "pace": st.sampled_from([None, Pace((0.0, 0.0, 0.0, 0.0), None, 16), Pace((1.0, 0.1, 0.1, 0.0), None, 20)]),
    }
)
arrivals = st.tuples(
    st.just("add"),
    st.sampled_from(PATTERNS),
    st.integers(0, 20),
    st.lists(st.integers(1, 2), min_size=1, max_size=4),
    st.integers(1, 12),
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 3),
            "priority": st.integers(-1, 1),
            "cache_salt": st.sampled_from(["", "a"]),
            "tenant": st.sampled_from(["", "a", "b", "c"]),
            "wait": st.integers(0, 30),
            "ignore_eos": st.booleans(),
            "min_tokens": st.integers(0, 3),
            "stop_token_ids": st.just((3,)),
            "prompt_logprobs": st.just(0),
            "prompt_logprobs_from": st.integers(0, 20),
        },
    ),
)
lives = st.lists(
    st.one_of(
        arrivals,
        arrivals,
        st.tuples(st.sampled_from(["abort", "finish"]), st.integers(0, 30)),
        st.tuples(st.sampled_from(["schedule", "update", "step", "step", "step"])),
    ),
    max_size=60,
)


def live(world: World, acts: list[tuple]) -> World:
    for act, *arguments in acts:
        if act == "add":
            add(world, *arguments)
        elif act in ("abort", "finish"):
            names = list(world.sequences)
            getattr(world, act)(names[arguments[0]] if arguments[0] < len(names) else "nobody")
        elif act == "update":
            if world.in_flight:
                world.update()
        elif act == "step" or len(world.in_flight) <= world.depth:
            getattr(world, act)()
        else:
            world.update()
    return world.run()


def add(world: World, pattern: list[int], length: int, tail: list[int], max_tokens: int, keys: dict) -> None:
    prompt = [*pattern[:length], *tail]
    keys = dict(keys)
    keys["min_tokens"] = min(keys.get("min_tokens", 0), max_tokens)
    keys["arrival_time"] = float(len(world.plans))
    if (wait := keys.pop("wait", None)) is not None:
        keys["deadline"] = keys["arrival_time"] + wait
    seq = make(str(len(world.sequences)), prompt, max_tokens, **keys)
    limit = min(world.scheduler.max_model_len, world.pool.num_blocks * world.pool.block_size + 1)
    if len(prompt) + max_tokens <= limit:
        world.add(seq, *(Sequence(seq.request, index) for index in range(1, keys.get("n", 1))))
    else:
        with pytest.raises(CapacityError) as refused:
            world.add(seq)
        assert refused.value.field == ("prompt" if len(prompt) + 1 > limit else "max_tokens")


@settings(max_examples=500, **QUIET)
@given(worlds, lives)
def test_any_life_ends_well(world: dict, acts: list[tuple]) -> None:
    done = live(World(**world), acts)
    assert done.finished.keys() | done.aborted == done.sequences.keys()


@settings(max_examples=100, **QUIET)
@given(worlds, lives)
def test_hash_collisions_cost_a_miss_and_no_wrong_answer(world: dict, acts: list[tuple]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "chain_digest", lambda parent, content: bytes([crc32(parent + content) % 3]) * 16)
        done = live(World(**world), acts)
    assert done.pool.num_cached <= 3


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("policy", ["continuous", "static"])
def test_random_walks_under_pressure(depth: int, policy: str) -> None:
    """Long seeded lives, and the proof that these tests do meet what they are about."""
    seen: Counter[str] = Counter()
    for seed in range(12):
        rng = random.Random(seed)
        world = World(
            rng.randint(8, 20),
            rng.choice([1, 2, 4]),
            depth=depth,
            reckless=rng.random() < 0.5,
            max_num_seqs=rng.randint(2, 6),
            max_num_batched_tokens=rng.randint(6, 24),
            max_model_len=64,
            policy=policy,
            cache_room=rng.choice([None, 0, 4, 10]),
        )
        for _ in range(120):
            if rng.random() < 0.4:
                length, tail = rng.randint(0, 12), [rng.randint(1, 2) for _ in range(rng.randint(1, 3))]
                keys = {"ignore_eos": rng.random() < 0.5, "tenant": rng.choice(["", "", "a", "b"])}
                keys["n"] = rng.choice([1, 1, 3])
                add(world, rng.choice(PATTERNS), length, tail, rng.randint(1, 16), keys)
            if rng.random() < 0.05 and world.sequences:
                rng.choice([world.abort, world.finish])(rng.choice(list(world.sequences)))
            world.step()
        world.run()
        seen["preemptions"] += world.scheduler.num_preemptions
        seen["hits"] += world.scheduler.num_hit_tokens
        seen["finished"] += len(world.finished)
        seen.update(world.seen)
    assert seen["finished"] > 100
    assert seen["preemptions"] > 20
    assert seen["hits"] > 100
    assert (seen["late stops"] > 0) == (depth > 0)
    assert (seen["in flight when preempted"] > 0) == (depth > 0)

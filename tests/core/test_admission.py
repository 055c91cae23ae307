"""Who may enter the batch: what is refused at the door, how much room an entry needs, and who is next."""

import pytest

from liushui.errors import CapacityError, ParameterError
from tests.core.world import World, make, shape

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

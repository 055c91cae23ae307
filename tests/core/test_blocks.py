"""`BlockPool` as integers: ownership, eviction order, hits, and books that refuse to be wrong."""

import pytest

from liushui.core.blocks import BlockPool, IntegrityError, Prefix


def published(pool: BlockPool, token_ids: list[int], salt: str = "") -> list[int]:
    """Own and publish blocks that hold `token_ids` (whole blocks)."""
    prefixes = [Prefix.root(salt)]
    table = pool.acquire(len(token_ids) // pool.block_size)
    assert table is not None
    for i, block in enumerate(table):
        pool.publish(block, prefixes, token_ids, i)
    return table


def hits(pool: BlockPool, token_ids: list[int], salt: str = "") -> list[int]:
    return pool.match([Prefix.root(salt)], token_ids)


def test_all_or_nothing() -> None:
    pool = BlockPool(4, 2)
    assert pool.acquire(3) == [0, 1, 2]
    assert pool.acquire(2) is None
    assert pool.acquire(1, spare=1) is None
    assert pool.num_free == 1
    assert pool.acquire(1) == [3]
    pool.check([[0, 1, 2], [3]])


def test_the_least_recently_used_goes_first_and_of_one_sequence_the_tail() -> None:
    pool = BlockPool(6, 2)
    first, second = published(pool, [1, 2, 3, 4]), published(pool, [5, 6, 7, 8])
    assert (first, second) == ([0, 1], [2, 3])
    pool.release(second)
    pool.release(first)
    assert pool.acquire(2) == [4, 5]  # what caches nothing goes before what does
    assert pool.acquire(4) == [3, 2, 1, 0]
    assert pool.num_cached == 0


def test_a_hit_makes_a_block_young_again() -> None:
    pool = BlockPool(4, 2)
    old, young = published(pool, [1, 2, 3, 4]), published(pool, [5, 6, 7, 8])
    pool.release(old)
    pool.release(young)
    again = pool.acquire(0, hits(pool, [1, 2, 3, 4, 9]))
    assert again == old
    pool.release(again)
    assert pool.acquire(2) == [young[1], young[0]]
    assert hits(pool, [1, 2, 3, 4, 9]) == old


def test_blocks_of_uncomputed_content_are_used_first() -> None:
    pool = BlockPool(4, 2)
    cached = published(pool, [1, 2])
    private = pool.acquire(1)
    assert private == [1]
    pool.release(cached)
    pool.release(private)
    assert pool.acquire(1) == private
    assert pool.num_cached == 1


def test_beyond_its_room_the_oldest_entry_makes_way_before_an_unused_block_is_taken() -> None:
    pool = BlockPool(8, 2, cache_room=4)
    old, young = published(pool, [1, 2, 3, 4]), published(pool, [5, 6])
    pool.release(old)
    pool.release(young)
    assert pool.acquire(3) == [3, old[1], old[0]]  # one block of the room was left
    assert (pool.num_used, pool.num_cached, pool.num_free) == (4, 1, 5)
    assert hits(pool, [5, 6, 7]) == young
    assert pool.acquire(3, young) == [*young, 4, 5, 6]  # all that is used is owned
    assert pool.acquire(2) is None
    pool.check([[3, *old], [*young, 4, 5, 6]])


def test_without_cached_content_the_room_makes_no_difference() -> None:
    for room in (None, 0, 3, 8):
        pool = BlockPool(8, 2, cache_room=room)
        assert pool.acquire(3) == [0, 1, 2]
        pool.release([1])
        assert pool.acquire(3) == [1, 3, 4]
        assert (pool.num_used, pool.num_free) == (5, 3)


@pytest.mark.parametrize("room", [None, 0, 6])
def test_a_conversation_finds_its_history_whatever_the_room(room: int | None) -> None:
    """Turn by turn: the blocks of one turn are free when the next comes, and are taken last."""
    pool, history = BlockPool(64, 2, cache_room=room), [1, 2]
    for turn in range(5):
        found = hits(pool, [*history, 9])
        assert len(found) == (0 if turn == 0 else len(history) // 2 - 2)
        table = pool.acquire(len(history) // 2 - len(found), found)
        assert table is not None
        prefixes = [Prefix.root("")]
        for i, block in enumerate(table):
            pool.publish(block, prefixes, history, i)
        pool.release(table)
        history += [10 + 4 * turn, 11 + 4 * turn, 12 + 4 * turn, 13 + 4 * turn]
    assert pool.num_used <= 12


@pytest.mark.parametrize(
    ("length", "blocks"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (8, 3), (9, 4), (10, 4), (12, 4)]
)
def test_the_last_token_is_never_a_hit(length: int, blocks: int) -> None:
    pool = BlockPool(8, 2)
    table = published(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert hits(pool, [*range(1, length + 1)]) == table[:blocks]


def test_shared_blocks_are_free_when_the_last_owner_leaves() -> None:
    pool = BlockPool(4, 2)
    mine = published(pool, [1, 2, 3, 4])
    yours = pool.acquire(1, hits(pool, [1, 2, 3, 4, 5]))
    assert yours == [0, 1, 2]
    pool.check([mine, yours])
    assert pool.num_returning([mine]) == 0
    assert pool.num_returning([yours]) == 1
    assert pool.num_returning([mine, yours]) == 3
    pool.release(mine)
    assert pool.num_free == 1
    pool.release(yours)
    assert pool.num_free == 4
    pool.check([])


def test_of_two_equal_blocks_the_first_keeps_the_name() -> None:
    pool = BlockPool(4, 2)
    first, second = published(pool, [1, 2]), published(pool, [1, 2])
    assert hits(pool, [1, 2, 3]) == first
    pool.release(first)
    pool.release(second)
    pool.check([])
    assert pool.num_cached == 1


def test_what_follows_a_duplicate_is_found_through_the_first() -> None:
    pool = BlockPool(6, 2)
    first, second = published(pool, [1, 2]), published(pool, [1, 2, 3, 4])
    assert hits(pool, [1, 2, 3, 4, 5]) == [*first, second[1]]


def test_a_hit_returns_after_its_beginning_was_evicted_and_computed_again() -> None:
    pool = BlockPool(6, 2)
    short, long = published(pool, [1, 2]), published(pool, [1, 2, 3, 4])
    pool.release(short)
    others = pool.acquire(4)  # evicts the published beginning; [3, 4] is owned and stays
    assert others is not None
    assert hits(pool, [1, 2, 3, 4, 5]) == []
    pool.release(others)
    again = published(pool, [1, 2])
    assert hits(pool, [1, 2, 3, 4, 5]) == [*again, long[1]]
    pool.check([long, again])


def test_salts_do_not_share() -> None:
    pool = BlockPool(4, 2)
    table = published(pool, [1, 2], salt="a")
    assert hits(pool, [1, 2, 3], salt="a") == table
    assert hits(pool, [1, 2, 3], salt="b") == []
    assert hits(pool, [1, 2, 3]) == []


def test_collisions_are_proved_wrong_by_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liushui.core.blocks.chain_digest", lambda parent, content: b"always the same!")
    pool = BlockPool(8, 2)
    table = published(pool, [1, 2])
    assert hits(pool, [1, 2, 3]) == table
    assert hits(pool, [3, 4, 5]) == []
    assert hits(pool, [1, 2, 1, 2, 3]) == table  # equal tokens at another place are another prefix
    assert hits(pool, [1, 2, 3], salt="b") == []
    assert published(pool, [3, 4]) == [1]  # the name is taken: stays private
    assert hits(pool, [3, 4, 5]) == []
    pool.check([table, [1]])


def test_what_follows_a_collision_is_not_taken_for_a_continuation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liushui.core.blocks.chain_digest", lambda parent, content: content[-4:])  # the last token
    pool = BlockPool(8, 2)
    first = published(pool, [1, 9])
    second = published(pool, [2, 9, 3, 4])
    assert hits(pool, [1, 9, 3, 4, 5]) == first
    assert hits(pool, [2, 9, 3, 4, 5]) == []
    pool.check([first, second])


def test_the_seed_and_the_form_of_the_hash_are_fixed() -> None:
    """Replicas may compare prefixes by digest, today and after an upgrade."""
    prefix = Prefix.root("tenant").then([1, 2, 3, 4])
    assert prefix.digest.hex() == "f868d79566dcdaeb6577bca4d290ddf2"
    assert prefix.same_as(Prefix.root("tenant").then([1, 2, 3, 4]))
    assert not prefix.same_as(prefix.then([1]))


def test_a_long_chain_of_prefixes_is_compared_and_freed_without_recursion() -> None:
    one, two = Prefix.root(""), Prefix.root("")
    for _ in range(50_000):
        one, two = one.then([1]), two.then([1])
    assert one.same_as(two)
    del one, two


def test_check_names_what_is_wrong() -> None:
    pool = BlockPool(3, 2)
    table = pool.acquire(2)
    assert table == [0, 1]
    with pytest.raises(IntegrityError, match="block 1 counts 1 references, has 0 owners"):
        pool.check([[0]])
    with pytest.raises(IntegrityError, match="block 0 counts 1 references, has 2 owners"):
        pool.check([[0, 1], [0]])
    pool._free[0] = None
    with pytest.raises(IntegrityError, match="block 0 has 1 owners, free: True"):
        pool.check([[0, 1]])
    del pool._free[0]
    pool._free[2] = None
    with pytest.raises(IntegrityError, match="block 2 was never taken"):
        pool.check([[0, 1]])


def test_a_block_cannot_be_freed_twice() -> None:
    pool = BlockPool(3, 2)
    pool.acquire(1)
    pool.release([0])
    with pytest.raises(IntegrityError, match="block 0 is freed twice"):
        pool.release([0])

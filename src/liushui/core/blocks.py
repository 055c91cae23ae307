"""KV blocks: who owns each one, what it holds, and which is taken next.

A block holds the keys and values of `block_size` consecutive positions of one sequence. Full blocks are
*published* under the hash of everything from the sequence's start to the block's end, so that a later sequence
that begins alike reads them instead of computing them (PagedAttention, Kwon et al. 2023; hashed blocks as in
vLLM's automatic prefix caching).

    owned   references > 0     in the block table of that many sequences
    free    references == 0    in the free list; front = taken next, so the free list *is* the eviction order
    unused  never taken        after all others, in order: most systems give memory only at the first write

A free block may still hold published content: it is a cache entry until somebody takes the block. Up to `cache_room`
used blocks, new content goes to unused ones before it takes a cache entry's; from there on the least recently used
entry makes way, and unused blocks are taken only when no other is free. So memory grows with what runs at once, and by
cached content up to that room and no further.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import chain

SEED = b"liushui/prefix/1"


class IntegrityError(AssertionError):
    """The books do not balance: a bug of this package, never of its user."""


def chain_digest(parent: bytes, content: bytes) -> bytes:
    """BLAKE2b-128 of (digest of all before, content). `parent` has 16 bytes, so the two cannot run together."""
    return hashlib.blake2b(parent + content, digest_size=16).digest()


class Prefix:
    """A sequence from its start to the end of one full block: a linked list, shared between sequences.

    The root carries the tenant's salt, every other node the token ids of one block. `digest` finds a prefix,
    `same_as` proves it: a hash collision costs a miss, never a wrong answer.
    """

    __slots__ = ("content", "digest", "parent")

    def __init__(self, parent: "Prefix | None", content: bytes) -> None:
        self.parent = parent
        self.content = content
        self.digest: bytes = chain_digest(parent.digest if parent else SEED, content)

    @classmethod
    def root(cls, salt: str) -> "Prefix":
        return cls(None, salt.encode())

    def then(self, token_ids: Seq[int]) -> "Prefix":
        """This prefix and one more block."""
        return Prefix(self, array("I", token_ids).tobytes())

    def same_as(self, other: "Prefix") -> bool:
        """Whether both are the same tokens under the same salt. Usually ends at a shared parent at once."""
        a: Prefix | None = self
        b: Prefix | None = other
        while a is not b:
            if a is None or b is None or a.content != b.content:
                return False
            a, b = a.parent, b.parent
        return True


class BlockPool:
    """`num_blocks` blocks of `block_size` positions: ownership, the prefix cache and eviction, as integers."""

    def __init__(self, num_blocks: int, block_size: int, cache_room: int | None = None) -> None:
        """`cache_room`: used blocks up to which nothing cached makes way for new content. Default: all."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.cache_room = num_blocks if cache_room is None else cache_room
        self.num_used = 0
        """Blocks that were ever taken: 0 .. num_used - 1."""
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict()  # of the used ones
        self._published: list[Prefix | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns, those with cached content included."""
        return len(self._free) + self.num_blocks - self.num_used

    @property
    def num_cached(self) -> int:
        """Blocks with published content, owned or free."""
        return len(self._block_of)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- ownership

    def acquire(self, num_new: int, hits: Seq[int] = (), spare: int = 0) -> list[int] | None:
        """Own the cached blocks `hits` and `num_new` others: all of them, or None and nothing is changed.

        None if fewer than `spare` free blocks would remain. New blocks lose what they cached.
        """
        idle = [block for block in hits if not self._references[block]]
        if self.num_free - len(idle) - num_new < spare:
            return None
        for block in idle:
            del self._free[block]
        blocks = [*hits, *(self._take() for _ in range(num_new))]
        for block in blocks:
            self._references[block] += 1
        return blocks

    def _take(self) -> int:
        """The free block that is missed least. There is one."""
        oldest = next(iter(self._free), None)
        prefix = None if oldest is None else self._published[oldest]
        roomy = self.num_used < min(self.cache_room, self.num_blocks)
        if oldest is None or (prefix is not None and roomy):
            self.num_used += 1
            return self.num_used - 1
        del self._free[oldest]
        if prefix is not None:
            self._published[oldest] = None
            del self._block_of[prefix.digest]
        return oldest

    def release(self, blocks: Seq[int]) -> None:
        """Give up one reference to each block of a block table.

        Last block first: of one sequence the tail is evicted before the beginning, which others are likelier
        to share and without which the tail cannot be found. A block that caches nothing goes to the front.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] < 0:
                raise IntegrityError(f"block {block} is freed twice")
            if not self._references[block]:
                self._free[block] = None
                if self._published[block] is None:
                    self._free.move_to_end(block, last=False)

    def num_returning(self, tables: Iterable[Seq[int]]) -> int:
        """How many blocks would become free if the owners of all these block tables released them."""
        held = Counter(chain.from_iterable(tables))
        return sum(self._references[block] == count for block, count in held.items())

    # -- the prefix cache

    def match(self, prefixes: list[Prefix], token_ids: Seq[int]) -> list[int]:
        """Blocks that hold the longest published prefix of `token_ids`, at most `len(token_ids) - 1` tokens:
        the last token is always computed, since its output predicts the next.

        `prefixes[i]` is the prefix of i blocks; the list is extended as far as was looked, and takes over the
        pool's own nodes, so that the next comparison ends at once.
        """
        hits: list[int] = []
        for i in range((len(token_ids) - 1) // self.block_size):
            prefix = self._prefix(prefixes, token_ids, i)
            block = self._block_of.get(prefix.digest)
            published = None if block is None else self._published[block]
            if block is None or published is None or not prefix.same_as(published):
                break
            _adopt(prefixes, i + 1, published)
            hits.append(block)
        return hits

    def publish(self, block: int, prefixes: list[Prefix], token_ids: Seq[int], i: int) -> None:
        """Offer `block`, which holds block `i` of `token_ids` and is computed, to others.

        If the content is published already, the first block keeps the name and this one stays private.
        """
        prefix = self._prefix(prefixes, token_ids, i)
        first = self._block_of.setdefault(prefix.digest, block)
        if first == block:
            self._published[block] = prefix
        elif (published := self._published[first]) is not None and prefix.same_as(published):
            _adopt(prefixes, i + 1, published)

    def _prefix(self, prefixes: list[Prefix], token_ids: Seq[int], i: int) -> Prefix:
        """The prefix that ends with block `i`; each is hashed once in a sequence's life."""
        if len(prefixes) == i + 1:
            prefixes.append(prefixes[i].then(token_ids[i * self.block_size : (i + 1) * self.block_size]))
        return prefixes[i + 1]

    # -- self-check

    def check(self, tables: Iterable[Seq[int]]) -> None:
        """Recount everything from the owners' block tables. Raises `IntegrityError`."""
        owned = Counter(chain.from_iterable(tables))
        for block in range(self.num_blocks):
            if self._references[block] != owned[block]:
                raise IntegrityError(
                    f"block {block} counts {self._references[block]} references, has {owned[block]} owners"
                )
            unused = block >= self.num_used
            if (block in self._free or unused) != (not owned[block]):
                raise IntegrityError(f"block {block} has {owned[block]} owners, free: {block in self._free}")
            prefix = self._published[block]
            if unused and (block in self._free or prefix is not None):
                raise IntegrityError(f"block {block} was never taken, and is in the free list or published")
            if prefix is not None and self._block_of.get(prefix.digest) != block:
                raise IntegrityError(f"block {block} is published but cannot be found by its hash")
        if len(owned) + self.num_free != self.num_blocks:
            raise IntegrityError(f"{len(owned)} owned + {self.num_free} free != {self.num_blocks} blocks")
        if len(self._block_of) != sum(prefix is not None for prefix in self._published):
            raise IntegrityError("a hash leads to a block that is not published")


def _adopt(prefixes: list[Prefix], i: int, published: Prefix) -> None:
    """Replace `prefixes[i]` by an equal node; what was built upon the old one is built again when needed."""
    if prefixes[i] is not published:
        prefixes[i:] = [published]

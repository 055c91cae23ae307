"""Causal attention over the paged cache: one kernel family for decoding and for chunks of prompts.

Keys are cut at absolute positions into splits of SPLIT tokens. A split is summed by online softmax (Milakov and
Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135) in tiles of BN keys from its own start, and splits
are merged in order. That fixes the order of every sum by the query's own position. Free, and chosen by the batch, are:
how many queries share a tile (the query heads of one KV head always do), and whether the splits of a sequence are
walked by one program or by several, whose partial sums the last of them merges, again in order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from liushui.kernels.triton.common import Kernel, begin, options

SPLIT = 512
"""Keys in a split."""
BN = 64
"""Keys in a tile."""
LOG2E = 1.4426950408889634
ROOM = 160 * 2**10
"""Bytes of shared memory for tiles on their way, of 227 KiB on a Hopper."""
PROGRAMS = 264
"""Fewer programs than this (two per multiprocessor of a Hopper) walk a sequence's splits side by side."""
_WAYS = ((1024, 1, 2, 4), (PROGRAMS, 1, 2, 5), (128, 4, 2, 3), (0, 16, 4, 5))
"""Measured on an H100: from so many (sequence, KV head) on, programs that share one, warps of each, stages."""


@triton.jit
def _merge(top, norm, total, m, z, acc):
    """The running (top, norm, total) and one more split. Spelled with fma, so that no compiler choice differs."""
    new_top = tl.maximum(top, m)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    a, b = tl.exp2(top - safe), tl.exp2(m - safe)
    return new_top, tl.fma(norm, a, z * b), tl.fma(total, a[:, None], acc * b[:, None])


@triton.jit
def _load(
    k_cache, v_cache, table, head, start, high,
    HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, TILE: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Keys [DP, TILE] and values [TILE, DP] from position `start`; values from `high` on are zero unless BULK."""
    if BULK:  # a tile lies in one block: one bulk copy each
        row = ((tl.load(table + start // BS) * HK + head) * BS + start % BS).to(tl.int32)
        k, v = k_cache.load([row, 0]).T, v_cache.load([row, 0])
    else:
        cols = tl.arange(0, DP)
        n = start + tl.arange(0, TILE)
        block = tl.load(table + n // BS, mask=n < high, other=0).to(tl.int64)
        at = ((block * HK + head) * BS + n % BS) * D
        real = (n < high)[:, None]
        if DP == D:
            k = tl.load(k_cache + at[None, :] + cols[:, None])
            v = tl.load(v_cache + at[:, None] + cols[None, :], mask=real, other=0.0)
        else:
            k = tl.load(k_cache + at[None, :] + cols[:, None], mask=(cols < D)[:, None], other=0.0)
            v = tl.load(v_cache + at[:, None] + cols[None, :], mask=real & (cols < D)[None, :], other=0.0)
    return k, v


@triton.jit
def _fold(q, k, v, n, positions, window, scale, m, z, acc, WINDOW: tl.constexpr):
    """One tile of keys at positions n into the running maximum, norm and weighted values of each row."""
    s = tl.dot(q, k, input_precision="ieee")
    seen = n[None, :] <= positions[:, None]
    if WINDOW:
        seen &= n[None, :] > positions[:, None] - window
    s = tl.where(seen, s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1) * scale)
    safe = tl.where(new_m == float("-inf"), 0.0, new_m)
    p = tl.exp2(tl.fma(s, scale, -safe[:, None]))
    alpha = tl.exp2(m - safe)
    p = p.to(v.dtype)
    # The norm as a product too: the matrix unit adds in the order of the keys, whatever the tile and the warps.
    ones = tl.full((n.shape[0], 16), 1.0, v.dtype)
    z = tl.dot(p, ones, z * alpha[:, None], input_precision="ieee")
    acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")
    return new_m, z, acc


@triton.jit
def _split(
    q, k_cache, v_cache, k_half, v_half, table, head, low, high, positions, scale, window,
    HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, BULK: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Keys low .. high - 1 of one split (low at a tile's start) -> (maximum, norm, weighted values) of each row."""
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    z = tl.zeros((ROWS, 16), tl.float32)  # the norm, sixteen times
    acc = tl.zeros((ROWS, DP), tl.float32)
    whole = high
    if BULK:
        whole = low + (high - low) // TILE * TILE
    for start in tl.range(low, whole, TILE, num_stages=STAGES):
        k, v = _load(k_cache, v_cache, table, head, start, high, HK, D, DP, BS, TILE, BULK)
        n = start + tl.arange(0, TILE)
        m, z, acc = _fold(q, k, v, n, positions, window, scale, m, z, acc, WINDOW)
    if BULK:  # noqa: SIM102
        if whole < high:  # what lies behind the last key may be anything, NaN too
            if HALVES and high - whole <= TILE // 2:  # half a tile: what is left out would have added zeros
                k_part, v_part = _load(k_half, v_half, table, head, whole, high, HK, D, DP, BS, TILE // 2, BULK)
                part = whole + tl.arange(0, TILE // 2)
                v_part = tl.where((part < high)[:, None], v_part, 0.0)
                m, z, acc = _fold(q, k_part, v_part, part, positions, window, scale, m, z, acc, WINDOW)
            else:
                k, v = _load(k_cache, v_cache, table, head, whole, high, HK, D, DP, BS, TILE, BULK)
                n = whole + tl.arange(0, TILE)
                v = tl.where((n < high)[:, None], v, 0.0)
                m, z, acc = _fold(q, k, v, n, positions, window, scale, m, z, acc, WINDOW)
    return m, tl.max(z, 1), acc


@triton.jit
def _find(query_start, tile, S, BQ: tl.constexpr):
    """The sequence that owns tile number `tile`, where sequence s starts at tile query_start[s] // BQ + s."""
    left, right = 0, S
    while left < right:
        middle = (left + right) // 2
        if tl.load(query_start + middle) // BQ + middle <= tile:
            left = middle + 1
        else:
            right = middle
    return left - 1


@Kernel
@triton.jit(do_not_specialize=["S", "table_stride", "window"])
def _chunks(
    qkv, k_cache, v_cache, out, query_start, seq_lens, block_table, S, table_stride, scale, window,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr, BS: tl.constexpr,
    BQ: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, BULK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of BQ queries of sequences that feed two or more; the last tiles, which see most keys, first."""
    GROUP: tl.constexpr = HQ // HK
    ROWS: tl.constexpr = BQ * GP
    begin(PDL)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    head = tl.program_id(0)
    seq = _find(query_start, tile, S, BQ)
    first_row = tl.load(query_start + seq)
    count = tl.load(query_start + seq + 1) - first_row
    skip = (tile - (first_row // BQ + seq)) * BQ
    if (count > 1) & (skip < count):
        length = tl.load(seq_lens + seq)
        r = tl.arange(0, ROWS)
        token, member = skip + r // GP, r % GP
        real = (token < count) & (member < GROUP)
        positions = tl.where(token < count, length - count + token, -1)
        cols = tl.arange(0, DP)
        row = (first_row + token).to(tl.int64)
        where = row[:, None] * ((HQ + 2 * HK) * D) + (head * GROUP + member)[:, None] * D + cols[None, :]
        q = tl.load(qkv + where, mask=real[:, None] & (cols < D)[None, :], other=0.0)
        low = 0
        if WINDOW:
            low = tl.maximum(0, length - count + skip - window + 1) // TILE * TILE
        high = tl.minimum(length, length - count + skip + BQ)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        norm = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, DP), tl.float32)
        for begin_split in range(low // SPAN * SPAN, high, SPAN):
            m, z, acc = _split(
                q, k_cache, v_cache, k_cache, v_cache, block_table + seq.to(tl.int64) * table_stride, head,
                tl.maximum(low, begin_split), tl.minimum(high, begin_split + SPAN), positions, scale, window,
                HK, D, DP, BS, TILE, WINDOW, ROWS, STAGES, BULK, False,
            )  # fmt: skip
            top, norm, total = _merge(top, norm, total, m, z, acc)
        mixed = total / tl.where(norm == 0.0, 1.0, norm)[:, None]
        place = row[:, None] * (HQ * D) + (head * GROUP + member)[:, None] * D + cols[None, :]
        tl.store(out + place, mixed.to(out.dtype.element_ty), mask=real[:, None] & (cols < D)[None, :])


@Kernel
@triton.jit(do_not_specialize=["table_stride", "max_splits", "window"])
def _decode(
    qkv, k_cache, v_cache, k_half, v_half, out, sums, scales, arrived, query_start, seq_lens, block_table,
    table_stride, max_splits, scale, window,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BS: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr, WINDOW: tl.constexpr, PARALLEL: tl.constexpr, STAGES: tl.constexpr,
    BULK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query: the GROUP query heads of one KV head. PARALLEL programs share its splits."""
    GROUP: tl.constexpr = HQ // HK
    begin(PDL)
    head, seq, turn = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(query_start + seq).to(tl.int64)
    length = tl.load(seq_lens + seq)
    if tl.load(query_start + seq + 1) - row == 1:
        r, cols = tl.arange(0, ROWS), tl.arange(0, DP)
        mask = (r < GROUP)[:, None] & (cols < D)[None, :]
        inner = r[:, None] * D + cols[None, :]
        q = tl.load(qkv + row * ((HQ + 2 * HK) * D) + head * GROUP * D + inner, mask=mask, other=0.0)
        positions = tl.full((ROWS,), 0, tl.int32) + length - 1
        low = 0
        if WINDOW:
            low = tl.maximum(0, length - window) // TILE * TILE
        first = low // SPAN
        number = tl.cdiv(length, SPAN) - first
        table = block_table + seq.to(tl.int64) * table_stride
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        norm = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, DP), tl.float32)
        slot = (seq * HK + head).to(tl.int64) * max_splits
        for i in range(turn, number, PARALLEL):
            start = (first + i) * SPAN
            m, z, acc = _split(
                q, k_cache, v_cache, k_half, v_half, table, head, tl.maximum(low, start),
                tl.minimum(length, start + SPAN), positions, scale, window, HK, D, DP, BS, TILE, WINDOW, ROWS, STAGES,
                BULK, True,
            )  # fmt: skip
            if PARALLEL == 1:
                top, norm, total = _merge(top, norm, total, m, z, acc)
            else:
                tl.store(scales + (slot + i) * 2 * ROWS + r, m)
                tl.store(scales + (slot + i) * 2 * ROWS + ROWS + r, z)
                tl.store(sums + (slot + i) * GROUP * D + inner, acc, mask=mask)
        last = True
        if PARALLEL > 1:
            tl.debug_barrier()  # every thread's partial sums are written before the arrival is counted
            sharers = tl.minimum(tl.maximum(number, 1), PARALLEL)
            last = False
            if turn < sharers:
                last = tl.atomic_add(arrived + seq * HK + head, 1, sem="acq_rel") == sharers - 1
            if last:
                tl.store(arrived + seq * HK + head, 0)
                for i in range(number):
                    m = tl.load(scales + (slot + i) * 2 * ROWS + r)
                    z = tl.load(scales + (slot + i) * 2 * ROWS + ROWS + r)
                    acc = tl.load(sums + (slot + i) * GROUP * D + inner, mask=mask, other=0.0)
                    top, norm, total = _merge(top, norm, total, m, z, acc)
        if last:
            mixed = total / tl.where(norm == 0.0, 1.0, norm)[:, None]
            tl.store(out + row * (HQ * D) + head * GROUP * D + inner, mixed.to(out.dtype.element_ty), mask=mask)


def _bulk(shape: "Shape", cache: torch.Tensor, tile: int = BN) -> TensorDescriptor:
    """The cache as rows of D: the bulk copy engine fetches a tile of keys by its first row."""
    rows = cache.shape[0] * shape.num_kv_heads * shape.block_size
    return TensorDescriptor(cache, [rows, shape.head_dim], [shape.head_dim, 1], [tile, shape.head_dim])


@dataclass(frozen=True, slots=True)
class Shape:
    """What the launches depend on besides the batch."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def bulk(self, chained: bool) -> bool:
        """Whether a tile of keys is one box for the bulk copy engine (Hopper on)."""
        return chained and self.block_size % BN == 0 and self.head_dim in (64, 128)

    def constants(self) -> dict[str, int]:
        return {
            "HQ": self.num_heads, "HK": self.num_kv_heads, "D": self.head_dim,
            "DP": max(16, triton.next_power_of_2(self.head_dim)), "BS": self.block_size, "TILE": BN, "SPAN": SPLIT,
        }  # fmt: skip


def _stages(shape: Shape, dtype: torch.dtype, most: int) -> int:
    """Tiles of keys and values, in use or on their way, that shared memory has room for."""
    return max(2, min(most, 1 + ROOM // (2 * BN * triton.next_power_of_2(shape.head_dim) * dtype.itemsize)))


def decode(
    shape: Shape, qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor,
    query_start: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, scale: float, window: int | None,
    arrived: torch.Tensor, chained: bool, num_warps: int | None = None, num_stages: int | None = None,
    parallel: int | None = None, bulk: bool | None = None,
) -> None:  # fmt: skip
    """Fill `out` for the sequences that feed one token. `arrived` [>= S * Hk] int32 is zero before and after."""
    sequences, width = block_table.shape
    splits = triton.cdiv(width * shape.block_size, SPLIT)
    _, sharers, warps, stages = next(way for way in _WAYS if sequences * shape.num_kv_heads >= way[0])
    if parallel is None:
        parallel = 1 if splits == 1 else sharers
    num_warps = num_warps or (2 if parallel == 1 else warps)
    num_stages = num_stages or stages
    rows = max(16, triton.next_power_of_2(shape.group))
    sums, scales = out, out
    if parallel > 1:
        count = sequences * shape.num_kv_heads * splits
        sums = torch.empty(count * shape.group * shape.head_dim, dtype=torch.float32, device=out.device)
        scales = torch.empty(count * 2 * rows, dtype=torch.float32, device=out.device)
    bulk = shape.bulk(chained) if bulk is None else bulk
    num_stages = _stages(shape, qkv.dtype, num_stages)
    k_half, v_half = k_cache, v_cache
    if bulk:
        k_half, v_half = _bulk(shape, k_cache, BN // 2), _bulk(shape, v_cache, BN // 2)
        k_cache, v_cache = _bulk(shape, k_cache), _bulk(shape, v_cache)
    _decode[(shape.num_kv_heads, sequences, parallel)](
        qkv, k_cache, v_cache, k_half, v_half, out, sums, scales, arrived, query_start, seq_lens, block_table,
        width, splits, scale * LOG2E, window or 0, **shape.constants(), ROWS=rows, WINDOW=window is not None,
        PARALLEL=parallel, STAGES=num_stages, BULK=bulk, **options(chained, num_warps, num_stages),
    )  # fmt: skip


def chunks(
    shape: Shape, qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor,
    query_start: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, scale: float, window: int | None,
    chained: bool, rows: int = 128, num_warps: int = 8, num_stages: int = 5, bulk: bool | None = None,
) -> None:  # fmt: skip
    """Fill `out` for the sequences that feed two tokens or more."""
    sequences, width = block_table.shape
    padded_group = triton.next_power_of_2(shape.group)
    if shape.head_dim * qkv.dtype.itemsize > 256:  # the queries too take twice the room
        rows = min(rows, 64)
    tokens = max(1, rows // padded_group)
    tiles = qkv.shape[0] // tokens + sequences
    bulk = shape.bulk(chained) if bulk is None else bulk
    num_stages = _stages(shape, qkv.dtype, num_stages)
    if bulk:
        k_cache, v_cache = _bulk(shape, k_cache), _bulk(shape, v_cache)
    _chunks[(shape.num_kv_heads, tiles)](
        qkv, k_cache, v_cache, out, query_start, seq_lens, block_table, sequences, width, scale * LOG2E, window or 0,
        **shape.constants(), GP=padded_group, BQ=tokens, WINDOW=window is not None, STAGES=num_stages, BULK=bulk,
        **options(chained, num_warps, num_stages),
    )  # fmt: skip

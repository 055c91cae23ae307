"""Attention of prompts on Hopper: the sums of `attention`, in its order, by warps that have roles.

One warp fetches keys and values with the bulk copy engine, ahead of two groups of four warps that take 64 rows each
(Shah et al. 2024, arXiv:2407.08608). A group multiplies the queries with the next keys while the matrix unit still
weighs the values of those before, so that one group's exponentials hide behind products of its own and the other's.

Written in Gluon, Triton's lower language, which is experimental: `available` names the versions it is written for.
Where it does not serve, `attention.chunks` gives the same bits.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from liushui.kernels.triton import attention
from liushui.kernels.triton.common import Kernel

ROWS = 64
"""Rows of a group: a row is one head of one token."""
STAGES = 4
"""Tiles of keys, and of values, on their way or in use."""
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
NORMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))


@gluon.jit
def _fetch(
    k, v, keys, values, k_full, v_full, k_free, v_free, table, head, high,
    HK: gl.constexpr, BS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The one warp that reads: tiles of keys and values below `high`, as room becomes free."""
    D: gl.constexpr = k.block_type.shape[1]
    for i in range(gl.cdiv(high, TILE)):
        slot = i % STAGES
        turn = (i // STAGES) & 1
        start = i * TILE
        row = (gl.load(table + start // BS) * HK + head) * BS + start % BS
        mbarrier.wait(k_free.index(slot), turn ^ 1)
        mbarrier.expect(k_full.index(slot), TILE * D * 2)
        tma.async_copy_global_to_shared(k, [row, 0], k_full.index(slot), keys.index(slot))
        mbarrier.wait(v_free.index(slot), turn ^ 1)
        mbarrier.expect(v_full.index(slot), TILE * D * 2)
        tma.async_copy_global_to_shared(v, [row, 0], v_full.index(slot), values.index(slot))


@gluon.jit
def _score(q, keys, k_full, i, STAGES: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr):
    """Start the products of the queries with the keys of tile i."""
    mbarrier.wait(k_full.index(i % STAGES), (i // STAGES) & 1)
    empty = gl.zeros([ROWS, TILE], gl.float32, SCORES)
    return warpgroup_mma(q, keys.index(i % STAGES).permute((1, 0)), empty, use_acc=False, is_async=True)


@gluon.jit
def _soften(s, m, start, positions, scale, MASKED: gl.constexpr, TILE: gl.constexpr):
    """Scores -> (running maximum, weights, factor of what was summed before); as in `attention._fold`."""
    if MASKED:
        n = start + gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
        s = gl.where(gl.expand_dims(n, 0) <= gl.expand_dims(positions, 1), s, float("-inf"))
    new_m = gl.maximum(m, gl.max(s, 1) * scale)
    safe = gl.where(new_m == float("-inf"), 0.0, new_m)
    p = gl.exp2(gl.fma(s, gl.full_like(s, 0.0) + scale, gl.expand_dims(-safe, 1) + gl.full_like(s, 0.0)))
    return new_m, p, gl.exp2(m - safe)


@gluon.jit
def _weigh(p, ones, values, v_full, i, acc, z, STAGES: gl.constexpr):
    """Start acc += p values and z += p ones, tile i."""
    mbarrier.wait(v_full.index(i % STAGES), (i // STAGES) & 1)
    left: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    acc = warpgroup_mma(gl.convert_layout(p, left), values.index(i % STAGES), acc, is_async=True)
    z = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, NORMS, 2)), ones.permute((1, 0)), z, is_async=True)
    return acc, z


@gluon.jit
def _walk(
    q, ones, keys, values, k_full, v_full, k_free, v_free, first, last, m, p, acc, z, positions, scale,
    MASKED: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Tiles first .. last - 1. The weights p of tile first - 1 are still to be used, those of last - 1 are left."""
    for i in range(first, last):
        s = _score(q, keys, k_full, i, STAGES, ROWS, TILE)
        acc, z = _weigh(p, ones, values, v_full, i - 1, acc, z, STAGES)
        s = warpgroup_mma_wait(2, deps=[s])
        mbarrier.arrive(k_free.index(i % STAGES))
        m, weights, alpha = _soften(s, m, i * TILE, positions, scale, MASKED, TILE)
        acc, z, p = warpgroup_mma_wait(0, deps=[acc, z, p])
        mbarrier.arrive(v_free.index((i - 1) % STAGES))
        acc *= gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout)), 1)
        z *= gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, NORMS)), 1)
        p = weights.to(p.dtype)
    return m, p, acc, z


@gluon.jit
def _clean(values, v_full, i, high, STAGES: gl.constexpr, TILE: gl.constexpr):
    """Zeros for what lies behind the last key of tile i: it may be anything, NaN too. Both groups write the same."""
    D: gl.constexpr = values.shape[2]
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    mbarrier.wait(v_full.index(i % STAGES), (i // STAGES) & 1)
    n = i * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, L))
    tile = values.index(i % STAGES)
    tile.store(gl.where(gl.expand_dims(n < high, 1), tile.load(L), 0.0))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _ask(part: gl.constexpr, room, qkv, first_row, count, skip, head, HQ, HK, GP, ROWS: gl.constexpr, D: gl.constexpr):
    """A group's queries in shared memory."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    r = part * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    token, member = skip + r // GP, r % GP
    real = (token < count) & (member < HQ // HK)
    row = (first_row + token).to(gl.int64) * ((HQ + 2 * HK) * D) + (head * (HQ // HK) + member) * D
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    q = room.index(part)
    q.store(gl.load(qkv + gl.expand_dims(row, 1) + gl.expand_dims(cols, 0), mask=gl.expand_dims(real, 1), other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    return q


@gluon.jit
def _merge(top, norm, total, m, z, acc):
    """As `attention._merge`, from the layouts that the products leave."""
    L: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    m, z = gl.convert_layout(m, L), gl.convert_layout(gl.max(z, 1), L)
    new_top = gl.maximum(top, m)
    safe = gl.where(new_top == float("-inf"), 0.0, new_top)
    a, b = gl.exp2(top - safe), gl.exp2(m - safe)
    spread = gl.expand_dims(a, 1) + gl.full_like(total, 0.0)
    return new_top, gl.fma(norm, a, z * b), gl.fma(total, spread, acc * gl.expand_dims(b, 1))


@gluon.jit
def _attend(
    PART: gl.constexpr, room, ones, keys, values, k_full, v_full, k_free, v_free, qkv, out, first_row, count, skip,
    length, high, head, scale, HQ: gl.constexpr, HK: gl.constexpr, GP: gl.constexpr, SPAN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One of the two groups: its rows from the first key to the last, split by split."""
    ROWS: gl.constexpr = room.shape[1]
    D: gl.constexpr = room.shape[2]
    TILE: gl.constexpr = keys.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    q = _ask(PART, room, qkv, first_row, count, skip, head, HQ, HK, GP, ROWS, D)
    token = skip + (PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))) // GP
    positions = gl.where(token < count, length - count + token, -1)
    lowest = length - count + skip + PART * ROWS // GP  # what the first row sees, all see
    top = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    norm = gl.zeros([ROWS], gl.float32, ROW)
    total = gl.zeros([ROWS, D], gl.float32, SUMS)
    for begin in range(0, high, SPAN):
        first, last = begin // TILE, gl.cdiv(gl.minimum(high, begin + SPAN), TILE)
        clear = gl.minimum(gl.maximum((lowest + 1) // TILE, first + 1), last)
        s = warpgroup_mma_wait(0, deps=[_score(q, keys, k_full, first, STAGES, ROWS, TILE)])
        mbarrier.arrive(k_free.index(first % STAGES))
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        m, weights, _ = _soften(s, m, first * TILE, positions, scale, True, TILE)
        p = weights.to(out.dtype.element_ty)
        acc = gl.zeros([ROWS, D], gl.float32, SUMS)
        z = gl.zeros([ROWS, 8], gl.float32, NORMS)
        m, p, acc, z = _walk(q, ones, keys, values, k_full, v_full, k_free, v_free, first + 1, clear, m, p, acc, z,
                             positions, scale, False, STAGES, ROWS, TILE)  # fmt: skip
        m, p, acc, z = _walk(q, ones, keys, values, k_full, v_full, k_free, v_free, clear, last, m, p, acc, z,
                             positions, scale, True, STAGES, ROWS, TILE)  # fmt: skip
        if last * TILE > high:
            _clean(values, v_full, last - 1, high, STAGES, TILE)
        acc, z = _weigh(p, ones, values, v_full, last - 1, acc, z, STAGES)
        acc, z, p = warpgroup_mma_wait(0, deps=[acc, z, p])
        mbarrier.arrive(v_free.index((last - 1) % STAGES))
        top, norm, total = _merge(top, norm, total, m, z, acc)
    row = PART * ROWS + gl.arange(0, ROWS, layout=ROW)
    token, member = skip + row // GP, row % GP
    place = (first_row + token).to(gl.int64) * (HQ * D) + (head * (HQ // HK) + member) * D
    mixed = total / gl.expand_dims(gl.where(norm == 0.0, 1.0, norm), 1)
    at = gl.expand_dims(place, 1) + gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, SUMS)), 0)
    real = (token < count) & (member < HQ // HK)
    gl.store(out + at, mixed.to(out.dtype.element_ty), mask=gl.expand_dims(real, 1))


@gluon.jit
def _find(query_start, tile, S, BQ: gl.constexpr):
    """As `attention._find`."""
    left = 0
    right = S
    while left < right:
        middle = (left + right) // 2
        if gl.load(query_start + middle) // BQ + middle <= tile:
            left = middle + 1
        else:
            right = middle
    return left - 1


@gluon.jit
def _barriers(number: gl.constexpr, count: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(made.index(i), count=count)
    return made


@Kernel
@gluon.jit(do_not_specialize=["S", "table_stride"])
def _prefill(
    qkv, k, v, out, query_start, seq_lens, block_table, S, table_stride, scale,
    HQ: gl.constexpr, HK: gl.constexpr, D: gl.constexpr, GP: gl.constexpr, BS: gl.constexpr, BQ: gl.constexpr,
    SPAN: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Tiles of BQ queries of sequences that feed two or more; the last tiles, which see most keys, first."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    head = gl.program_id(0)
    seq = _find(query_start, tile, S, BQ)
    first_row = gl.load(query_start + seq)
    count = gl.load(query_start + seq + 1) - first_row
    skip = (tile - (first_row // BQ + seq)) * BQ
    if (count > 1) & (skip < count):
        length = gl.load(seq_lens + seq)
        high = gl.minimum(length, length - count + skip + BQ)
        table = block_table + seq.to(gl.int64) * table_stride
        TILE: gl.constexpr = k.block_type.shape[0]
        dtype: gl.constexpr = qkv.dtype.element_ty
        SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        room = gl.allocate_shared_memory(dtype, [2, BQ * GP // 2, D], SHARED)
        keys = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], SHARED)
        values = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], SHARED)
        units = gl.full([8, TILE], 1.0, dtype, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
        ones = gl.allocate_shared_memory(dtype, [8, TILE], SHARED, units)
        k_full, v_full = _barriers(STAGES, 1), _barriers(STAGES, 1)
        k_free, v_free = _barriers(STAGES, 2), _barriers(STAGES, 2)
        fence_async_shared()
        gl.warp_specialize(
            [
                (_attend, (0, room, ones, keys, values, k_full, v_full, k_free, v_free, qkv, out, first_row, count,
                           skip, length, high, head, scale, HQ, HK, GP, SPAN, STAGES)),
                (_attend, (1, room, ones, keys, values, k_full, v_full, k_free, v_free, qkv, out, first_row, count,
                           skip, length, high, head, scale, HQ, HK, GP, SPAN, STAGES)),
                (_fetch, (k, v, keys, values, k_full, v_full, k_free, v_free, table, head, high, HK, BS, TILE, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def available(device: torch.device) -> bool:
    """Whether the kernel can be compiled for the device with the Triton that is installed."""
    return triton.__version__.startswith("3.6.") and torch.cuda.get_device_capability(device)[0] == 9


def serves(shape: attention.Shape, dtype: torch.dtype, window: int | None) -> bool:
    return (
        window is None
        and dtype.itemsize == 2
        and shape.head_dim in (64, 128)
        and shape.block_size % attention.BN == 0
        and attention.BN == 64
        and shape.group <= ROWS
    )


def _bulk(shape: attention.Shape, cache: torch.Tensor) -> TensorDescriptor:
    rows = cache.shape[0] * shape.num_kv_heads * shape.block_size
    box, layout = [attention.BN, shape.head_dim], gl.NVMMASharedLayout(128, 16, 2)
    return TensorDescriptor(cache, [rows, shape.head_dim], [shape.head_dim, 1], box, layout)


def prefill(
    shape: attention.Shape, qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor,
    query_start: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, scale: float, chained: bool,
) -> bool:  # fmt: skip
    """`attention.chunks`, where `serves`; False, and nothing done, while the kernel is being compiled."""
    sequences, width = block_table.shape
    padded_group = triton.next_power_of_2(shape.group)
    tokens = 2 * ROWS // padded_group
    constants = {
        "HQ": shape.num_heads, "HK": shape.num_kv_heads, "D": shape.head_dim, "GP": padded_group,
        "BS": shape.block_size, "BQ": tokens, "SPAN": attention.SPLIT, "STAGES": STAGES, "PDL": chained,
        "num_warps": 4, **({"launch_pdl": True} if chained else {}),
    }  # fmt: skip
    k, v = _bulk(shape, k_cache), _bulk(shape, v_cache)
    arguments = (qkv, k, v, out, query_start, seq_lens, block_table, sequences, width, scale * attention.LOG2E)
    if not qkv.is_meta and not _prefill.ready(*arguments, **constants):
        return False
    _prefill[(shape.num_kv_heads, qkv.shape[0] // tokens + sequences)](*arguments, **constants)
    return True

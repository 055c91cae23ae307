"""Choosing tokens on the device: Gumbel-max with stateless noise, exact top-k and top-p without a sort.

The noise is that of `runner.noise`: the same 32-bit integers for (row key, token), turned into float32 here. Every row
is worked on by itself in a fixed order, so that nothing depends on its neighbours.
"""

import torch
import triton
import triton.language as tl

from liushui.kernels.triton.common import Kernel, begin, options, warps_for
from liushui.kernels.triton.launchers import INTERPRETED

_PIECE = 4096
"""Logits of one row that one program looks at at once."""
_BLOCK = 8192
_NONE: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


_PLAIN: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def _log(x):
    """The natural logarithm of normal numbers by the GPU's own base-2 one: within 2^-21 of its size or of 1."""
    if _PLAIN:
        return tl.log(x)
    y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y * 0.6931471805599453


@triton.jit
def gumbel(first, second, tokens):
    """Standard Gumbel numbers, float32, for the two words of a row's key (uint32) and token ids."""
    bits = _mix(_mix(tokens.to(tl.uint32) ^ first) + second)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 1 - u without cancellation
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * 0.2))))  # -log(1 - u) for small u
    return -_log(tl.where(u < 0.015625, series, -_log(rest)))


@Kernel
@triton.jit(do_not_specialize=["pieces"])
def _pick(
    logits, keys, temperatures, limits, scores, tokens, arrived, chosen, feed, places, vocab, pieces,
    LIMITED: tl.constexpr, BLOCK: tl.constexpr, LOOPS: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best token of each piece of one row, and its score; a piece that is not finite says so with token -1.

    The last program of a row settles: the best piece's token, or -1 if the row is not finite, to chosen[row], and to
    feed[place] for the step that follows.
    """
    row, piece = tl.program_id(0), tl.program_id(1)
    begin(PDL)
    temperature = tl.load(temperatures + row)
    first, second = tl.load(keys + 2 * row).to(tl.uint32, bitcast=True), tl.load(keys + 2 * row + 1)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.full((BLOCK,), _NONE, tl.int32)
    spoiled = tl.zeros((BLOCK,), tl.float32)
    for i in range(LOOPS):
        ids = (piece * LOOPS + i) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        spoiled = tl.where(value < float("inf"), spoiled, 1.0)
        if temperature > 0:
            value = value / temperature
            if LIMITED:
                value = tl.where(value >= tl.load(limits + row), value, float("-inf"))
            value += gumbel(first, second.to(tl.uint32, bitcast=True), ids)
        better = value > best  # of equals the first: ids ascend
        best, token = tl.where(better, value, best), tl.where(better, ids, token)
    top = tl.max(best, 0)
    tl.store(scores + row * pieces + piece, top)
    winner = tl.min(tl.where(best == top, token, _NONE), 0)
    tl.store(tokens + row * pieces + piece, tl.where(tl.max(spoiled, 0) > 0, -1, winner))
    tl.debug_barrier()  # written before the arrival is counted
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == pieces - 1:
        tl.store(arrived + row, 0)
        at = tl.arange(0, PIECES)
        score = tl.load(scores + row * pieces + at, mask=at < pieces, other=float("-inf"), cache_modifier=".cg")
        found = tl.load(tokens + row * pieces + at, mask=at < pieces, other=_NONE, cache_modifier=".cg")
        highest = tl.max(score, 0)
        chosen_token = tl.min(tl.where(score == highest, found, _NONE), 0)
        wrong = (tl.min(found, 0) < 0) | (highest == float("-inf"))
        tl.store(chosen + row, tl.where(wrong, -1, chosen_token))
        tl.store(feed + tl.load(places + row), tl.where(wrong, 0, chosen_token))


@triton.jit
def _ordered(x):
    """float32 -> int32 that sorts the same."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _edge(row, vocab, low, target, top, temperature, WEIGHTED: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Largest key t >= low such that the tokens with keys >= t reach `target` (in number, or in weight).

    Found bit by bit. Keys are the logits themselves, so for 16-bit logits the lowest 16 bits need no look.
    """
    t = tl.full((), -(2**31), tl.int32)
    for i in range(32 - LAST):
        bit = 31 - i
        # Setting the sign bit of the smallest integer leads to 0, the first of the non-negative keys.
        trial = tl.where(bit == 31, 0, t | (1 << tl.minimum(bit, 30)))
        mass = 0.0
        for start in range(0, vocab, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            value = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            key = _ordered(value)
            weight = tl.exp(value / temperature - top) if WEIGHTED else tl.full((BLOCK,), 1.0, tl.float32)
            mass += tl.sum(tl.where((key >= trial) & (key >= low) & (ids < vocab), weight, 0.0), 0)
        t = tl.where(mass >= target, trial, t)
    return tl.maximum(t, low)


@Kernel
@triton.jit
def _limits(
    logits, temperatures, top_ks, top_ps, min_ps, limits, vocab,
    LAST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The smallest logit / temperature each row may choose: min_p, then top_k, then top_p among what is left."""
    r = tl.program_id(0)
    begin(PDL)
    temperature, top_k, top_p = tl.load(temperatures + r), tl.load(top_ks + r), tl.load(top_ps + r)
    min_p = tl.load(min_ps + r)
    limit = float("-inf")
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        row = logits + r.to(tl.int64) * vocab
        best = float("-inf")
        for start in range(0, vocab, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            best = tl.maximum(best, tl.max(tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32), 0))
        top = best / temperature
        low = tl.full((), -(2**31), tl.int32)
        if min_p > 0:
            limit = top + tl.log(min_p)
            low = _ordered(limit * temperature)
        if (top_k > 0) & (top_k < vocab):
            low = _edge(row, vocab, low, top_k.to(tl.float32), top, temperature, False, LAST, BLOCK)
        if top_p < 1:
            total = 0.0
            for start in range(0, vocab, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                value = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
                total += tl.sum(tl.where(_ordered(value) >= low, tl.exp(value / temperature - top), 0.0), 0)
            low = _edge(row, vocab, low, total * top_p, top, temperature, True, LAST, BLOCK)
        if low > -(2**31):
            bits = tl.where(low < 0, low ^ 0x7FFFFFFF, low)
            limit = tl.maximum(limit, bits.to(tl.float32, bitcast=True) / temperature)
    tl.store(limits + r, limit)


@Kernel
@triton.jit(do_not_specialize=["WANTED"])
def _logprobs(
    logits, chosen, values, ranks, top_values, top_tokens, vocab, WANTED, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """log softmax of one row at its chosen token, the token's rank, and the WANTED most likely, best first."""
    r = tl.program_id(0)
    begin(PDL)
    row = logits + r.to(tl.int64) * vocab
    top = float("-inf")
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.max(tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32), 0))
    token = tl.load(chosen + r)
    mine = tl.load(row + tl.maximum(token, 0)).to(tl.float32)
    mass, above = 0.0, 0
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        value = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        mass += tl.sum(tl.exp(value - top), 0)
        above += tl.sum((value > mine).to(tl.int32), 0)
    norm = top + tl.log(mass)
    tl.store(values + r, mine - norm)
    tl.store(ranks + r, above + 1)
    last_value, last_token = float("inf"), -1
    for i in range(WANTED):  # the next in order of (value down, token up)
        best, best_token = float("-inf"), _NONE
        for start in range(0, vocab, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            value = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            behind = (value < last_value) | ((value == last_value) & (ids > last_token))
            value = tl.where(behind & (ids < vocab), value, float("-inf"))
            here = tl.max(value, 0)
            here_token = tl.min(tl.where(behind & (ids < vocab) & (value == here), ids, _NONE), 0)
            tied = tl.where(here == best, tl.minimum(best_token, here_token), best_token)
            best_token = tl.where(here > best, here_token, tied)
            best = tl.maximum(best, here)
        tl.store(top_values + r * WANTED + i, best - norm)
        tl.store(top_tokens + r * WANTED + i, best_token)
        last_value, last_token = best, best_token


def pick(
    logits: torch.Tensor, keys: torch.Tensor, temperatures: torch.Tensor, limits: torch.Tensor | None,
    feed: torch.Tensor, places: torch.Tensor, arrived: torch.Tensor, chained: bool,
) -> torch.Tensor:  # fmt: skip
    """logits [R, V] -> tokens [R] int32 (-1: not finite), also to feed[places]. keys [R, 2] int32 words, places [R].

    temperatures [R] float32, 0 for greedy; limits [R] float32: the smallest logit / temperature to choose from.
    arrived [>= R] int32 is zero before and after.
    """
    rows, vocab = logits.shape
    loops = 4 if rows > 32 else 1  # few rows: more programs
    pieces = triton.cdiv(vocab, _PIECE * loops)
    scores = torch.empty(rows * pieces, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows * pieces, dtype=torch.int32, device=logits.device)
    chosen = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _pick[(rows, pieces)](
        logits, keys, temperatures, limits if limits is not None else temperatures, scores, tokens, arrived, chosen,
        feed, places, vocab, pieces, LIMITED=limits is not None, BLOCK=_PIECE, LOOPS=loops,
        PIECES=triton.next_power_of_2(pieces), **options(chained, 8),
    )  # fmt: skip
    return chosen


def limits(
    logits: torch.Tensor, temperatures: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor,
    min_ps: torch.Tensor, chained: bool,
) -> torch.Tensor:  # fmt: skip
    """logits [R, V] and the rows' parameters [R] -> the smallest logit / temperature each may choose, [R] float32."""
    rows, vocab = logits.shape
    found = torch.empty(rows, dtype=torch.float32, device=logits.device)
    last = 16 if logits.dtype == torch.bfloat16 else 13 if logits.dtype == torch.float16 else 0
    _limits[(rows,)](
        logits, temperatures, top_ks, top_ps, min_ps, found, vocab, LAST=last,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)), **options(chained, 16),
    )  # fmt: skip
    return found


def logprobs(
    logits: torch.Tensor, chosen: torch.Tensor, wanted: int, chained: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [R, V], chosen [R] int32 -> (log-probabilities [R], ranks [R], those of the `wanted` most likely
    [R, wanted], their tokens [R, wanted])."""
    rows, vocab = logits.shape
    device = logits.device
    values = torch.empty(rows, dtype=torch.float32, device=device)
    ranks = torch.empty(rows, dtype=torch.int32, device=device)
    top_values = torch.empty(rows, wanted, dtype=torch.float32, device=device)
    top_tokens = torch.empty(rows, wanted, dtype=torch.int32, device=device)
    if rows:
        _logprobs[(rows,)](
            logits, chosen, values, ranks, top_values, top_tokens, vocab, wanted,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)), **options(chained, 16),
        )  # fmt: skip
    return values, ranks, top_values, top_tokens


@Kernel
@triton.jit
def _look_up(ids, feed, table, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    begin(PDL)
    token = tl.load(ids + row)
    if token < 0:
        token = tl.load(feed - 1 - token)
    value = tl.load(table + token.to(tl.int64) * size + cols, mask=cols < size, other=0.0)
    tl.store(out + row * size + cols, value, mask=cols < size)


def look_up(ids: torch.Tensor, feed: torch.Tensor, table: torch.Tensor, chained: bool) -> torch.Tensor:
    """ids [T] int32, where -1 - place stands for the token that feed[place] holds -> rows [T, H] of table [V, H]."""
    size = table.shape[1]
    out = table.new_empty(len(ids), size)
    block = triton.next_power_of_2(size)
    _look_up[(len(ids),)](ids, feed, table, out, size, BLOCK=block, **options(chained, warps_for(block)))
    return out

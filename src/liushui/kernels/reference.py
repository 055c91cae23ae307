"""The operations in plain torch: the reference for the native kernels, and the fallback where there are none.

Vectorised libraries do not compute an element the same way at every place of a tensor (another exp in the tail, another
order of sums for another shape). So only what is exactly rounded wherever it stands is used here: + - * /, rounding,
comparisons, bit patterns; sums in a fixed tree of pairs; and matrix products of integers held in float64, which are
exact in any order as long as they stay below 2^53 (the splitting of Ozaki et al., 2012, with one slice).
"""

import math

import torch
from torch import Tensor

from liushui.kernels.ops import PackedLinear
from liushui.kernels.quantised import Quantised

LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
TAYLOR = [1.0 / math.factorial(n) for n in range(11, -1, -1)]
KEYS = 512
"""Keys whose products are summed exactly, aligned to absolute position; the sums are added in order."""
QUERIES = 128
"""Query tokens handled at once, to bound the memory for scores."""


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last axis, kept as 1, in pairs of neighbours: zeros appended to a row do not change its sum."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], dim=-1)
        x = x[..., 0::2] + x[..., 1::2]
    return x


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exact; int64 exponents in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def exp(x: Tensor) -> Tensor:
    """e^x of float64 within a few units in the last place, the same at every place of a tensor."""
    x = x.clamp(-700.0, 700.0)
    n = torch.round(x * (1.0 / math.log(2.0)))
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = torch.full_like(r, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        p = p * r + coefficient
    return p * power_of_two(n.to(torch.int64))


def fixed_point(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Finite float64 rows as integers of at most 2^bits (held in float64) times a power of two [..., 1]."""
    exponent = torch.frexp(x.abs().amax(dim=-1, keepdim=True)).exponent.to(torch.int64)
    scale = power_of_two((exponent - bits).clamp(-1000, 1000))
    return torch.round(x / scale), scale


def exact_bits(terms: int) -> int:
    """Bits per factor such that a sum of `terms` products stays exact in float64."""
    return (53 - math.ceil(math.log2(max(2, terms)))) // 2


def gelu_tanh(x: Tensor) -> Tensor:
    u = (x + x * x * x * 0.044715) * math.sqrt(2.0 / math.pi)
    return x / (exp(-2.0 * u) + 1.0)


class TorchOps:
    """See `Ops`."""

    name = "torch"

    def __init__(self, threads: int, note: str = "plain torch kernels") -> None:
        self.threads = threads
        self.note = note

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, unit_offset: bool = False
    ) -> Tensor:
        wide = self._with_residual(x, residual)
        factor = weight.double() + (1.0 if unit_offset else 0.0)
        return (self._rms(wide, eps) * factor).to(x.dtype)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        wide = self._with_residual(x, residual)
        wide = wide - tree_sum(wide) / wide.shape[-1]
        return (self._rms(wide, eps) * weight.double() + bias.double()).to(x.dtype)

    @staticmethod
    def _with_residual(x: Tensor, residual: Tensor | None) -> Tensor:
        if residual is None:
            return x.double()
        residual.copy_((residual.float() + x.float()).to(residual.dtype))
        return residual.double()

    @staticmethod
    def _rms(x: Tensor, eps: float) -> Tensor:
        # The mean is rounded to float32 so that its root in float64, whoever computes it, rounds back the same.
        mean = (tree_sum(x * x) / x.shape[-1] + eps).float()
        return x / mean.double().sqrt().float().double()

    def qkv_to_cache(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        positions: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rope: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> None:
        rows = torch.nonzero(slots >= 0).flatten()
        slot, block_size = slots[rows].long(), k_cache.shape[2]
        block, offset = slot // block_size, slot % block_size
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        angles = None if rope is None else rope[positions[rows].long()].double().unsqueeze(1)
        q, k, v = torch.split(heads[rows], [num_heads, num_kv_heads, num_kv_heads], dim=1)
        heads[rows, :num_heads] = self._norm_and_rotate(q, q_norm, angles, eps)
        k_cache[block, :, offset] = self._norm_and_rotate(k, k_norm, angles, eps)
        v_cache[block, :, offset] = v

    def _norm_and_rotate(self, x: Tensor, weight: Tensor | None, angles: Tensor | None, eps: float) -> Tensor:
        wide = x.double()
        if weight is not None:
            wide = self._rms(wide, eps) * weight.double()
        if angles is not None:
            half = angles.shape[-1] // 2
            cos, sin = angles[..., :half], angles[..., half:]
            first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
            wide = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        return wide.to(x.dtype)

    def attention(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        k_cache: Tensor,
        v_cache: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        out = qkv.new_zeros(qkv.shape[0], num_heads, head_dim)
        query = qkv[:, : num_heads * head_dim].reshape(qkv.shape[0], num_kv_heads, -1, head_dim)
        starts, lens, block_size = query_start.tolist(), seq_lens.tolist(), k_cache.shape[2]
        for s, length in enumerate(lens):
            if starts[s] == starts[s + 1]:
                continue
            blocks = block_table[s, : -(-length // block_size)].long()
            keys, values = (c[blocks].transpose(0, 1).flatten(1, 2)[:, :length].double() for c in (k_cache, v_cache))
            for begin in range(starts[s], starts[s + 1], QUERIES):
                end = min(begin + QUERIES, starts[s + 1])
                first = length - (starts[s + 1] - begin)  # position of row `begin`
                seen = first + end - begin
                mixed = _attend(query[begin:end], keys[:, :seen], values[:, :seen], first, scale, window)
                out[begin:end] = mixed.reshape(end - begin, num_heads, head_dim).to(qkv.dtype)
        return out.view(qkv.shape[0], num_heads * head_dim)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.double().chunk(2, dim=-1)
        return (gate / (exp(-gate) + 1.0) * up).to(gate_up.dtype)

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.double().chunk(2, dim=-1)
        return (gelu_tanh(gate) * up).to(gate_up.dtype)

    def gelu_new(self, x: Tensor) -> Tensor:
        return gelu_tanh(x.double()).to(x.dtype)

    def pack_linear(
        self, weight: Tensor | Quantised, bias: Tensor | None = None, form: str | None = None
    ) -> PackedLinear | None:
        """None: torch's own product serves, in the row counts that `kernels.linear` certifies."""
        return None

    def linear(self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
        raise ValueError(f"packed for {packed.kind}, which plain torch cannot read")

    def embed(self, ids: Tensor, packed: PackedLinear, dtype: torch.dtype) -> Tensor:
        raise ValueError(f"packed for {packed.kind}, which plain torch cannot read")


def _attend(query: Tensor, keys: Tensor, values: Tensor, first: int, scale: float, window: int | None) -> Tensor:
    """query [t, Hk, G, D] from position `first`, keys and values [Hk, L, D] in float64 -> [t, Hk, G, D].

    A row that is not finite, or sees a key or value that is not, comes out NaN: it alone.
    """
    tokens, num_kv_heads, group, dim = query.shape
    position = torch.arange(first, first + tokens).repeat_interleave(group).unsqueeze(1)
    key_position = torch.arange(keys.shape[1])
    visible = key_position <= position
    if window is not None:
        visible &= key_position > position - window
    q = query.double().permute(1, 0, 2, 3).reshape(num_kv_heads, tokens * group, dim)
    good = torch.isfinite(keys).all(-1) & torch.isfinite(values).all(-1)
    spoiled = ~torch.isfinite(q).all(-1) | (visible & ~good.unsqueeze(1)).any(-1)
    q = q.masked_fill(~torch.isfinite(q), 0.0)
    keys, values = keys.masked_fill(~good.unsqueeze(-1), 0.0), values.masked_fill(~good.unsqueeze(-1), 0.0)

    q_int, q_scale = fixed_point(q, exact_bits(dim))
    k_int, k_scale = fixed_point(keys, exact_bits(dim))
    scores = torch.bmm(q_int, k_int.transpose(1, 2)) * (q_scale * scale) * k_scale.transpose(1, 2)
    scores = scores.masked_fill(~visible, -math.inf)
    weights = exp(scores - scores.amax(dim=-1, keepdim=True)).masked_fill(~visible, 0.0)

    bits = exact_bits(KEYS)
    v_int, v_scale = fixed_point(values, bits)
    p_int, p_scale = fixed_point(weights * v_scale.transpose(1, 2), bits)
    total = torch.zeros_like(q)
    for start in range(0, keys.shape[1], KEYS):
        total += torch.bmm(p_int[:, :, start : start + KEYS], v_int[:, start : start + KEYS])
    # Integers again: their sum is exact in any order.
    norm, norm_scale = fixed_point(weights, bits)
    mixed = total * p_scale / (norm.sum(dim=-1, keepdim=True) * norm_scale)
    mixed = mixed.masked_fill(spoiled.unsqueeze(-1), math.nan)
    return mixed.reshape(num_kv_heads, tokens, group, dim).permute(1, 0, 2, 3)

"""Norms, activations and the writing of the cache: the right values, and rows that ignore their neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from liushui.kernels.ops import Ops, load_ops
from tests.kernels.conftest import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
WIDTHS = [1, 7, 16, 33, 576, 1001]


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, ulps: float = 8.0) -> None:
    assert got.dtype == dtype
    bound = ULP[dtype] if dtype == torch.bfloat16 else ulps * ULP[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound)


def gelu_new(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


ROW_OPS = {
    "rms_norm": lambda ops, x, w, b: ops.rms_norm(x, w, 1e-5),
    "rms_norm_offset": lambda ops, x, w, b: ops.rms_norm(x, w, 1e-5, unit_offset=True),
    "layer_norm": lambda ops, x, w, b: ops.layer_norm(x, w, b, 1e-5),
    "silu_mul": lambda ops, x, w, b: ops.silu_mul(torch.cat([x, x.flip(1)], 1)),
    "gelu_tanh_mul": lambda ops, x, w, b: ops.gelu_tanh_mul(torch.cat([x, x.flip(1)], 1)),
    "gelu_new": lambda ops, x, w, b: ops.gelu_new(x),
}
TRUTH = {
    "rms_norm": lambda x, w, b: x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * w,
    "rms_norm_offset": lambda x, w, b: x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * (w + 1),
    "layer_norm": lambda x, w, b: torch.nn.functional.layer_norm(x, x.shape[1:], w, b, 1e-5),
    "silu_mul": lambda x, w, b: torch.nn.functional.silu(x) * x.flip(1),
    "gelu_tanh_mul": lambda x, w, b: gelu_new(x) * x.flip(1),
    "gelu_new": lambda x, w, b: gelu_new(x),
}


@pytest.mark.parametrize("name", list(ROW_OPS))
@pytest.mark.parametrize("width", WIDTHS)
def test_matches_float64(ops: Ops, dtype: torch.dtype, name: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, w, b = ((2 * torch.randn(n, width, generator=generator)).to(dtype) for n in (5, 1, 1))
    got = ROW_OPS[name](ops, x, w[0], b[0])
    close(got, TRUTH[name](x.double(), w[0].double(), b[0].double()), dtype)


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("name", list(ROW_OPS))
@settings(max_examples=15, deadline=None)
@given(
    width=st.sampled_from([1, 5, 64, 100, 1001]),
    rows=st.integers(1, 300),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_ignore_their_neighbours(implementation, name, width, rows, seed, dtype) -> None:
    ops = IMPLEMENTATIONS[implementation]
    single = load_ops("torch", 1) if implementation == "torch" else load_ops("native", 1, isa=implementation)
    generator = torch.Generator().manual_seed(seed)
    x, w, b = ((3 * torch.randn(n, width, generator=generator)).to(dtype) for n in (rows, 1, 1))
    together = ROW_OPS[name](ops, x, w[0], b[0])
    for row in {0, rows // 2, rows - 1}:
        alone = ROW_OPS[name](single, x[row : row + 1].clone(), w[0], b[0])
        assert torch.equal(alone[0], together[row])


def test_residual_is_updated_and_normed(ops: Ops, dtype: torch.dtype) -> None:
    x, residual, weight, bias = (torch.randn(3, 50).to(dtype) for _ in range(4))
    weight, bias = weight[0], bias[0]
    total = (x.float() + residual.float()).to(dtype)
    for norm in (lambda x, r: ops.rms_norm(x, weight, 1e-6, r), lambda x, r: ops.layer_norm(x, weight, bias, 1e-6, r)):
        updated = residual.clone()
        got = norm(x, updated)
        assert torch.equal(updated, total)
        assert torch.equal(got, norm(total, None))


def test_activations_at_the_extremes(ops: Ops) -> None:
    x = torch.tensor([[0.0, -0.0, 1e-30, -100.0, -88.0, 100.0, 1e30, -1e30, math.inf, math.nan]])
    silu = ops.silu_mul(torch.cat([x, torch.ones_like(x)], 1))[0]
    gelu = ops.gelu_new(x)[0]
    for got in (silu, gelu):
        assert torch.isnan(got[-1])
        assert got[:3].abs().max() <= 1e-30
        assert got[3:5].abs().max() < 1e-35
        assert got[7].abs() == 0
        assert torch.equal(got[[5, 6, 8]], x[0, [5, 6, 8]])


def test_exponential_within_two_units(ops: Ops) -> None:
    """e^x through silu: x / (1 + e^-x) shows every error of the exponential where e^-x dominates."""
    x = torch.linspace(-87, -20, 20001).view(1, -1)
    got = ops.silu_mul(torch.cat([x, torch.ones_like(x)], 1)).double()
    exact = torch.nn.functional.silu(x.double())
    assert ((got - exact) / exact).abs().max() < 2.5 * 2.0**-23


def test_not_finite_rows_stay_alone(ops: Ops) -> None:
    x = torch.randn(4, 40)
    x[1] = torch.nan
    x[2, 3] = torch.inf
    got = ops.rms_norm(x, torch.ones(40), 1e-6)
    clean = ops.rms_norm(x[[0, 3]].clone(), torch.ones(40), 1e-6)
    assert torch.equal(got[[0, 3]], clean)
    assert torch.isnan(got[1]).all()
    assert torch.isnan(got[2, 3])


def test_no_rows(ops: Ops) -> None:
    assert ops.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert ops.silu_mul(torch.empty(0, 8)).shape == (0, 4)
    assert ops.gelu_new(torch.empty(0, 8)).shape == (0, 8)


def _cache_case(dtype: torch.dtype, heads: int, kv: int, dim: int, rotary: int, normed: bool, tokens: int):
    generator = torch.Generator().manual_seed(dim + tokens)
    qkv = torch.randn(tokens, (heads + 2 * kv) * dim, generator=generator).to(dtype)
    positions = torch.randint(0, 50, (tokens,), generator=generator).int()
    slots = torch.randperm(5 * 8, generator=generator)[:tokens].int()
    slots[1::4] = -1
    angle = torch.outer(torch.arange(50.0), 10000.0 ** -(torch.arange(rotary // 2) / max(1, rotary // 2)))
    rope = torch.cat([angle.cos(), angle.sin()], 1) if rotary else None
    norms = [torch.randn(dim, generator=generator).to(dtype) if normed else None for _ in range(2)]
    return qkv, positions, slots, rope, norms


def _turned(x: Tensor, norm: Tensor | None, rope: Tensor | None, positions: Tensor) -> Tensor:
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
    if rope is None:
        return x
    half = rope.shape[1] // 2
    table = rope[positions.long()].double().unsqueeze(1)
    turn = torch.complex(table[..., :half], table[..., half:])
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)


@pytest.mark.parametrize(
    ("heads", "kv", "dim", "rotary", "normed"),
    [(9, 3, 64, 64, False), (4, 4, 20, 20, True), (2, 1, 80, 32, True), (2, 1, 12, 0, False), (2, 2, 6, 2, True)],
)
def test_qkv_to_cache(ops: Ops, dtype: torch.dtype, heads: int, kv: int, dim: int, rotary: int, normed: bool) -> None:
    tokens, block = 21, 8
    qkv, positions, slots, rope, norms = _cache_case(dtype, heads, kv, dim, rotary, normed, tokens)
    before = qkv.clone()
    k_cache, v_cache = (torch.full((5, kv, block, dim), 7.0, dtype=dtype) for _ in range(2))
    ops.qkv_to_cache(qkv, heads, kv, dim, positions, slots, k_cache, v_cache, rope, *norms, 1e-6)
    q, k, v = before.view(tokens, -1, dim).split([heads, kv, kv], 1)
    written = slots >= 0
    close(qkv[written, : heads * dim], _turned(q, norms[0], rope, positions).flatten(1)[written], dtype)
    assert torch.equal(qkv[:, heads * dim :], before[:, heads * dim :])
    assert torch.equal(qkv[~written], before[~written])
    place = slots[written].long() // block, slots[written].long() % block
    close(k_cache[place[0], :, place[1]], _turned(k, norms[1], rope, positions)[written], dtype)
    assert torch.equal(v_cache[place[0], :, place[1]], v[written])
    for cache in (k_cache, v_cache):
        cache[place[0], :, place[1]] = 7.0
        assert torch.equal(cache, torch.full_like(cache, 7.0))


@pytest.mark.parametrize("name", list(IMPLEMENTATIONS))
def test_cache_rows_ignore_their_neighbours(name: str, dtype: torch.dtype) -> None:
    heads, kv, dim, tokens = 5, 1, 20, 33
    qkv, positions, slots, rope, norms = _cache_case(dtype, heads, kv, dim, 20, True, tokens)
    caches = [torch.zeros(5, kv, 8, dim, dtype=dtype) for _ in range(4)]
    rows = [row.clone() for row in qkv.split(1)]
    IMPLEMENTATIONS[name].qkv_to_cache(qkv, heads, kv, dim, positions, slots, *caches[:2], rope, *norms, 1e-6)
    single = load_ops("torch", 1) if name == "torch" else load_ops("native", 1, isa=name)
    for t, row in enumerate(rows):
        single.qkv_to_cache(
            row, heads, kv, dim, positions[t : t + 1], slots[t : t + 1], *caches[2:], rope, *norms, 1e-6
        )
        assert torch.equal(row[0], qkv[t])
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n != "torch"])
@pytest.mark.parametrize(("slot", "position"), [(16, 0), (0, 4), (0, -1)])
def test_bad_slot_or_position_is_refused(name: str, slot: int, position: int) -> None:
    index = [torch.tensor([i], dtype=torch.int32) for i in (position, slot)]
    cache = torch.zeros(1, 1, 16, 4)
    with pytest.raises(IndexError, match="slot"):
        IMPLEMENTATIONS[name].qkv_to_cache(
            torch.zeros(1, 12), 1, 1, 4, *index, cache, cache, torch.zeros(4, 4), None, None, 1e-6
        )

"""Row-wise Triton kernels against the plain-torch reference, which computes in float64."""

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.reference import TorchOps
from tests.kernels.triton_support import DTYPES, MARK, TOLERANCE, close, fill, on_device, ops

pytestmark = MARK

REFERENCE = TorchOps(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 48), (2, 1000)])
@pytest.mark.parametrize("residual", [False, True])
def test_norms(dtype: torch.dtype, rows: int, size: int, residual: bool) -> None:
    x, weight, bias = fill(rows, size, dtype=dtype), fill(size, dtype=dtype), fill(size, dtype=dtype)
    carried = fill(rows, size, dtype=dtype) if residual else None
    for name, extra in (("rms_norm", (weight,)), ("layer_norm", (weight, bias))):
        mine, theirs = (None if carried is None else carried.clone() for _ in range(2))
        expected = getattr(REFERENCE, name)(x, *extra, 1e-5, theirs)
        moved = None if mine is None else on_device(mine)
        got = getattr(ops(), name)(on_device(x), *map(on_device, extra), 1e-5, moved)
        close(got, expected, TOLERANCE[dtype])
        if moved is not None:
            assert torch.equal(moved.cpu(), theirs)


def test_rms_norm_scales_and_special_values() -> None:
    """Tiny, huge and zero rows are normed as exactly; a row that is not finite is NaN, it alone."""
    x = fill(6, 70, dtype=torch.float32)
    x[0] *= 1e-17
    x[1] *= 1e17
    x[2] = 0
    x[3, 5] = float("inf")
    x[4, 6] = float("nan")
    weight = fill(70, dtype=torch.float32)
    got = ops().rms_norm(on_device(x), on_device(weight), 1e-36, unit_offset=True).cpu()
    expected = REFERENCE.rms_norm(x, weight, 1e-36, unit_offset=True)
    close(got[[0, 1, 2, 5]], expected[[0, 1, 2, 5]], 1e-5)
    assert torch.isnan(got[3:5]).any(dim=1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul", "gelu_new"])
def test_activations(dtype: torch.dtype, name: str) -> None:
    for rows, size in ((1, 2), (3, 70), (2, 2500)):
        x = fill(rows, size, dtype=dtype) * 4
        close(getattr(ops(), name)(on_device(x)), getattr(REFERENCE, name)(x), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary", "normed"),
    [(6, 2, 20, 20, True), (9, 3, 64, 64, False), (4, 4, 16, 8, True), (3, 1, 12, 0, False)],
)
def test_qkv_to_cache(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rotary: int, normed: bool) -> None:
    rows, blocks, size = 5, 4, 8
    qkv = fill(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    positions = torch.tensor([0, 7, 3, 19, 2], dtype=torch.int32)
    slots = torch.tensor([3, -1, 8, 31, 16], dtype=torch.int32)
    rope = torch.rand(20, rotary) if rotary else None
    norms = [fill(dim, dtype=dtype) if normed else None for _ in range(2)]
    caches = [torch.full((blocks, kv_heads, size, dim), 7.0, dtype=dtype) for _ in range(2)]
    mine = [on_device(t) for t in (qkv, *caches)]
    theirs = [t.clone() for t in (qkv, *caches)]
    for implementation, (q, k, v), move in ((ops(), mine, on_device), (REFERENCE, theirs, lambda t: t)):
        implementation.qkv_to_cache(
            q,
            heads,
            kv_heads,
            dim,
            move(positions),
            move(slots),
            k,
            v,
            move(rope),
            move(norms[0]),
            move(norms[1]),
            1e-6,
        )
    # k and v stay in place in qkv for one and not the other: only q and the caches are promised.
    width = heads * dim
    close(mine[0][:, :width], theirs[0][:, :width], TOLERANCE[dtype])
    for got, expected in zip(mine[1:], theirs[1:], strict=True):
        close(got, expected, TOLERANCE[dtype])

"""Queries and keys in halves: the bits of the kernel that turns any part of a head."""

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.triton import cache, rotate
from tests.kernels.triton_support import DTYPES, MARK, fill, on_device, ops, same

pytestmark = MARK


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "normed"),
    [(4, 2, 32, (True, True)), (3, 1, 64, (False, True)), (8, 8, 128, (False, False))],
)
def test_same_as_the_other_kernel(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, normed: tuple[bool, bool]
) -> None:
    rows, blocks, size = 11, 4, 8
    rope = torch.rand(40, dim)
    assert rotate.serves(heads, kv_heads, dim, rope)
    qkv = fill(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    norms = [fill(dim, dtype=dtype) if present else None for present in normed]
    slots = torch.randperm(blocks * size)[:rows].int()
    slots[[2, rows - 1]] = -1  # padding
    rest = [torch.randint(0, 40, (rows,)).int(), slots]
    results = []
    for kernel in (cache.qkv_to_cache, rotate.qkv_to_cache):
        q, *rest_here = map(on_device, (qkv, *rest))
        caches = [torch.full((blocks, kv_heads, size, dim), 7.0, dtype=dtype, device=q.device) for _ in range(2)]
        kernel(
            q, heads, kv_heads, dim, *rest_here, *caches, on_device(rope), *map(on_device, norms), 1e-6, ops().chained
        )
        results.append([q[:, : heads * dim].cpu(), *(part.cpu() for part in caches)])
    for got, expected in zip(results[1], results[0], strict=True):
        same(got, expected, 1e-6)


def test_what_is_left_to_the_other_kernel() -> None:
    assert not rotate.serves(4, 2, 32, None)
    assert not rotate.serves(4, 2, 32, torch.zeros(4, 16))  # a part of each head
    assert not rotate.serves(4, 2, 20, torch.zeros(4, 20))

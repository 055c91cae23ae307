"""The kernel with warp roles: the same bits as the plain kernel, and close to float64. Only a Hopper runs it."""

import random

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.triton import attention
from tests.kernels.paged import Heads, Sequence, Share, attend
from tests.kernels.triton_support import COMPILED, DEVICE, close, on_device, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not COMPILED or ops()._prefill is None, reason="needs a Hopper GPU and its Triton"),
]


class Both:
    """Every row by the plain kernels, and the rows of chunks once more by the one with roles."""

    def attention(self, qkv, hq, hk, d, k, v, starts, lens, table, scale, window):
        qkv, k, v, starts, lens, table = map(on_device, (qkv, k, v, starts, lens, table))
        shape = attention.Shape(hq, hk, d, k.shape[2])
        plain = torch.full((len(qkv), hq * d), torch.nan, dtype=qkv.dtype, device=DEVICE)
        arrived = torch.zeros(len(lens) * hk, dtype=torch.int32, device=DEVICE)
        batch = (qkv, k, v, plain, starts, lens, table, scale)
        attention.decode(shape, *batch, window, arrived, ops().chained)
        roles = plain.clone()
        attention.chunks(shape, *batch, window, ops().chained)
        assert ops()._prefill.serves(shape, qkv.dtype, window)
        ops()._prefill.prefill(shape, qkv, k, v, roles, *batch[4:], ops().chained)
        assert torch.equal(roles, plain)
        return roles


HEADS = [Heads(8, 2, 128), Heads(6, 2, 64), Heads(2, 2, 128), Heads(14, 2, 64)]


@pytest.mark.parametrize(("dtype", "heads"), [(torch.bfloat16, heads) for heads in HEADS] + [(torch.float16, HEADS[1])])
def test_same_bits_as_the_plain_kernel(dtype: torch.dtype, heads: Heads) -> None:
    """Chunks of any length at any place, one-token neighbours, what lies behind the last key anything."""
    luck = random.Random(heads.queries)
    shares = []
    for seed, end in enumerate((1, 2, 65, 700, 1500, 1025, 64, 333)):
        start = luck.choice([0, end - 1, luck.randrange(end)])
        shares.append(Share(Sequence.random(heads, end, dtype, seed), start, end))
    for share, got in zip(shares, attend(Both(), shares, block_size=64), strict=True):
        close(got, share.sequence.expected(0.125, None)[share.start : share.end], 1.6e-2)

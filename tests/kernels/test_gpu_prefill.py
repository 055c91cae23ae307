"""On a Hopper GPU: attention of prompts in CUDA C++ has the bits of Triton's, and is close to float64."""

import random

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.cuda import nvrtc
from liushui.kernels.cuda.prefill import Prefill
from liushui.kernels.triton import attention
from tests.kernels.paged import Heads, Sequence, Share, attend
from tests.kernels.triton_support import DEVICE, close, on_device, ops

_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _HOPPER, reason="needs a Hopper GPU")]


class Both:
    """Every row by Triton's kernels, and the rows of chunks once more by the other, also from a graph."""

    def attention(self, qkv, hq, hk, d, k, v, starts, lens, table, scale, window):
        qkv, k, v, starts, lens, table = map(on_device, (qkv, k, v, starts, lens, table))
        shape = attention.Shape(hq, hk, d, k.shape[2])
        plain = torch.full((len(qkv), hq * d), torch.nan, dtype=qkv.dtype, device=DEVICE)
        arrived = torch.zeros(len(lens) * hk, dtype=torch.int32, device=DEVICE)
        batch = (qkv, k, v, plain, starts, lens, table, scale)
        attention.decode(shape, *batch, window, arrived, ops().chained)
        found = plain.clone()
        attention.chunks(shape, *batch, window, ops().chained)
        form = ops().prompts.form(shape, qkv.dtype, window)
        one = Prefill(form, DEVICE, nvrtc.machine_code("prefill.cu", form.defines(), (9, 0)))
        rest = (*batch[4:-1], scale * attention.LOG2E)
        again, graph = found.clone(), torch.cuda.CUDAGraph()
        one(qkv, k, v, found, *rest)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            one(qkv, k, v, again, *rest)
        for _ in range(3):
            graph.replay()
        assert torch.equal(found, plain)
        assert torch.equal(again, plain)
        return found


HEADS = [Heads(8, 2, 128), Heads(6, 2, 64), Heads(2, 2, 128), Heads(14, 2, 64), Heads(4, 2, 128)]


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

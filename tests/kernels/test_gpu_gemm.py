"""On a Hopper GPU: own products of many rows have the bits of the separate kernels, and serve where they were tried."""

import time

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.cuda import nvrtc
from liushui.kernels.cuda.gemm import Form, Gemm
from liushui.kernels.linear import cancelling
from liushui.kernels.triton import products
from liushui.kernels.triton import rows as row_kernels
from liushui.kernels.triton.ops import TritonOps

_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _HOPPER, reason="needs a Hopper GPU")]
CASES = [
    (Form(256, team=2, down=2), 333, 520, 1096),
    (Form(192, teams=2, tall=2, down=2), 1029, 2056, 200),
    (Form(192, teams=2, tall=2, down=2, gated=True), 1029, 2056, 512),
    (Form(224, team=2, down=2, gated=True), 260, 1064, 4096),
    (Form(48, team=2, gated=True), 77, 520, 1024),
    (Form(224, gated=True), 64, 3072, 1024),
]


@pytest.mark.parametrize(("form", "rows", "columns", "k"), CASES)
def test_bits_of_the_separate_kernels(form: Form, rows: int, columns: int, k: int) -> None:
    """On sums that cancel and on random ones; the output is poisoned, and comes again from a graph."""
    device = torch.device("cuda")
    one = Gemm(form, device, nvrtc.machine_code("gemm.cu", form.defines(), (9, 0)))
    plain = torch.randn(columns * (1 + form.gated), k, device=device).bfloat16() * 0.05
    for x, weight, _ in ((torch.randn(rows, k, device=device).bfloat16(), plain, None), cancelling(rows, plain, None)):
        want = products.product(x, weight, None, False, products.REFERENCE)
        if form.gated:
            want = row_kernels.activate(want, True, "silu", False)
        out, graph = torch.empty_like(want), torch.cuda.CUDAGraph()
        one(x, weight, out.fill_(torch.nan))
        assert torch.equal(out, want)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            one(x, weight, out)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)


def test_what_serves_is_found_beside_the_steps() -> None:
    """Before and after forms are compiled and tried: the same bits, and the report names what serves."""
    ops = TritonOps(torch.device("cuda"))
    weight = torch.randn(6144, 1024, device="cuda").bfloat16() * 0.05
    packed = ops.pack_linear(weight)
    for rows in (64, 128, 256, 2048):
        x = torch.randn(rows, 1024, device="cuda").bfloat16()
        first = ops.linear_then(x, packed, None, ops.silu_mul)
        assert torch.equal(first, ops.silu_mul(ops.linear(x, packed)))
        while ops.untried:
            ops.try_forms()
            time.sleep(0.01)
        assert torch.equal(ops.linear_then(x, packed, None, ops.silu_mul), first)
    assert not ops.forms.note
    assert ops.forms._made
    assert ops.report()

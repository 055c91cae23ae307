"""The ordered product: against float64, the same bits for any rows and tiles, fused forms equal the separate ones."""

import pytest
import torch

pytest.importorskip("triton")

from liushui.kernels.linear import cancelling
from liushui.kernels.triton import products, vendor
from liushui.kernels.triton.products import Tiles, product
from tests.kernels.triton_support import COMPILED, DTYPES, MARK, TOLERANCE, close, fill, on_device, ops, same

pytestmark = MARK

TILES = [Tiles(64, 16, 64, 4, 2), Tiles(32, 16, 128, 4, 3), Tiles(16, 16, 128, 4, 3), Tiles(64, 64, 64, 4, 3)]
TILES += [Tiles(8, 16, 256, 1, 4, True), Tiles(16, 16, 128, 2, 3, True), Tiles(32, 64, 128, 4, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "k"), [(1, 1, 16), (5, 70, 100), (33, 130, 256)])
@pytest.mark.parametrize("biased", [False, True])
def test_against_float64(dtype: torch.dtype, rows: int, outputs: int, k: int, biased: bool) -> None:
    x, weight, bias = fill(rows, k, dtype=dtype), fill(outputs, k, dtype=dtype), fill(outputs, dtype=dtype)
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0)
    got = product(on_device(x), on_device(weight), on_device(bias) if biased else None, ops().chained)
    close(got, expected, TOLERANCE[dtype])


@pytest.mark.skipif(not COMPILED, reason="the interpreter's sums are numpy's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_rows_or_tiles(dtype: torch.dtype) -> None:
    x, weight, _ = cancelling(300, on_device(fill(640, 2048, dtype=dtype)), None)
    whole = product(x, weight, None, ops().chained, products.REFERENCE)
    for tiles in TILES if dtype == torch.bfloat16 else TILES[:2]:  # each takes a second to compile
        for rows in (1, 7, 64, 300):
            assert torch.equal(product(x[:rows], weight, None, ops().chained, tiles), whole[:rows]), tiles


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_forms_equal_the_separate_kernels(dtype: torch.dtype) -> None:
    """norm into product, gate and up into SwiGLU, residual into product: bit for bit."""
    k, inner = 96, 40
    tiles, chained = products.REFERENCE if dtype != torch.float32 else None, ops().chained
    narrow = None if tiles is None else Tiles(8, 16, 32, 1, 3, True)
    factor, weight = on_device(fill(k, dtype=dtype)), on_device(fill(2 * inner, k, dtype=dtype) * 0.2)
    bias = on_device(fill(2 * inner, dtype=dtype))
    for rows, form in ((1, tiles), (3, tiles), (1, narrow), (3, narrow)):
        x, residual = on_device(fill(rows, k, dtype=dtype)), on_device(fill(rows, 2 * inner, dtype=dtype))
        normed = ops().rms_norm(x, factor, 1e-5)
        separate, plain = product(normed, weight, bias, chained, tiles), product(normed, weight, None, chained, tiles)
        inputs = (x, {"norm": factor, "eps": 1e-5}) if rows == 1 else (normed, {})
        same(product(inputs[0], weight, bias, chained, form, **inputs[1]), separate)
        same(product(inputs[0], weight, None, chained, form, gated=True, **inputs[1]), ops().silu_mul(plain))
        added = product(normed, weight, bias, chained, form, residual=residual.clone())
        same(added, (separate.float() + residual.float()).to(dtype))


def test_certificates_are_taken_for_buckets_only() -> None:
    dtype = torch.bfloat16 if COMPILED else torch.float32
    weight = on_device(fill(64, 128, dtype=dtype))
    packed = ops().pack_linear(weight)
    for rows in (1, 16, 50, 81, 128):
        x = fill(rows, 128, dtype=dtype)
        close(ops().linear(on_device(x), packed), x.double() @ weight.cpu().double().T, TOLERANCE[dtype])
    certificate = ops().certificate(weight, None)
    assert set(certificate.choices) == {81, 128}
    assert certificate.choices[81] is None
    assert "own" in certificate.describe()


@pytest.mark.skipif(not COMPILED or not ops().chained, reason="needs the bulk copy engine")
@pytest.mark.parametrize("rows", [65, 100, 128, 192, 224])
def test_tiles_by_bulk_copies_keep_the_order(rows: int) -> None:
    """Products of more than 64 rows that the vendor may not serve: on sums that cancel, bit for bit."""
    for outputs, k in ((200, 3072), (64, 14336)):
        x, weight, bias = cancelling(
            rows, on_device(fill(outputs, k, dtype=torch.bfloat16)), on_device(fill(outputs, dtype=torch.bfloat16))
        )
        for added in (None, bias):
            same(product(x, weight, added, True), product(x, weight, added, False, products.REFERENCE))


def test_the_fastest_that_keeps_the_order_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the vendor offers: a product that sums otherwise does not come to be timed."""
    dtype = torch.bfloat16 if COMPILED else torch.float32
    weight = on_device(fill(64, 256, dtype=dtype))
    kept = []

    def same_order(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return product(x, weight, bias, False, products.reference_tiles(weight))

    def halves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        half = x.shape[1] // 2
        parts = [same_order(x[:, cut].contiguous(), weight[:, cut].contiguous(), None).float()
                 for cut in (slice(half), slice(half, None))]  # fmt: skip
        return (parts[0] + parts[1]).to(dtype)

    def broken(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("cuBLASLt: status 15")

    def last(found: list, *_: object) -> object:
        kept.extend(found)
        return found[-1]

    monkeypatch.setattr(vendor, "_algorithms", lambda *_: [halves, broken, same_order, same_order])
    monkeypatch.setattr(vendor, "_fastest", last)
    assert vendor.choose(80, weight, None) is same_order
    assert halves not in kept
    assert broken not in kept


def test_a_first_use_takes_the_first_choice_and_the_others_are_timed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, timed = on_device(fill(64, 256, dtype=torch.float32)), []

    def choose(rows: int, *_: object) -> None:
        timed.append(rows)

    monkeypatch.setattr(vendor, "choose", choose)
    monkeypatch.setattr(vendor.Trial, "keeps_order", lambda trial, candidate: len(trial.x) != 192)
    found = vendor.Certificate()
    first = torch.nn.functional.linear
    assert [found.product(rows, weight, None) for rows in (128, 256, 192, 64, 100)] == [first, first, None, None, None]
    assert timed == [192, 64], "no first choice that serves; few rows"
    assert [found.try_others() for _ in range(3)] == [True, True, False]
    assert sorted(timed[2:]) == [128, 256]
    assert found.product(256, weight, None) is None


def test_without_the_vendors_library_its_first_choice_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "0.0")
    vendor.library.cache_clear()
    assert vendor.library(0) is None
    vendor.library.cache_clear()


@pytest.mark.skipif(not COMPILED, reason="needs the vendor's library")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_algorithms_that_are_offered(dtype: torch.dtype) -> None:
    """Each gives the product; the one that serves gives the own kernel's bits, also from a graph and unaligned."""
    rows, weight = 96, on_device(fill(512, 4096, dtype=dtype) * 0.1)
    x = on_device(fill(rows, 4096, dtype=dtype))
    expected = product(x, weight, None, False, products.REFERENCE)
    offers = vendor.library(torch.cuda.current_device()).offers(rows, weight)
    assert offers
    for algorithm in offers:
        close(algorithm(x, weight), expected, TOLERANCE[dtype])
    chosen = vendor.choose(rows, weight, None)
    if chosen is None:
        pytest.skip("no product of the vendor's keeps the order here")
    assert torch.equal(chosen(x, weight, None), expected)
    graph, out = torch.cuda.CUDAGraph(), None
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = chosen(x, weight, None)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)
    shifted = torch.empty(rows * 4096 + 8, dtype=dtype, device=x.device)[8:].view(rows, 4096).copy_(x)
    assert torch.equal(chosen(shifted, weight, None), expected)

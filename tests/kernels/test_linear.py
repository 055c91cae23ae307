"""Certified row counts: the vendor's product, only where it keeps the order of sums."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.kernels import linear as linear_module
from liushui.kernels.linear import BUCKETS, CertifiedLinear, RowCertificate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=12)
@given(data=st.data())
def test_rows_are_the_same_bits_in_any_cut(dtype: torch.dtype, data: st.DataObject) -> None:
    n, k = data.draw(st.sampled_from([(37, 48), (96, 40), (65, 130)]))
    generator = torch.Generator().manual_seed(n)
    weight, bias = torch.randn(n, k, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
    product = CertifiedLinear(weight, bias, RowCertificate())
    x = torch.randn(150, k, generator=generator).to(dtype)
    whole = product(x)
    cuts = sorted(data.draw(st.sets(st.integers(1, 149), max_size=5)))
    for start, end in zip([0, *cuts], [*cuts, 150], strict=True):
        assert torch.equal(product(x[start:end]), whole[start:end])
    assert (whole.double() - F.linear(x.double(), weight.double(), bias.double())).abs().max() < (
        1e-4 if dtype == torch.float32 else 0.3
    )


def test_a_product_that_depends_on_the_row_count_is_caught_and_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vendor that sums backwards for one row and for 64: those counts must not be used."""
    used: list[int] = []

    def vendor(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        used.append(len(x))
        order = reversed(range(x.shape[1])) if len(x) in (1, 64) else range(x.shape[1])
        total = torch.zeros(len(x), len(weight))
        for k in order:
            total = total + x[:, k : k + 1] * weight[:, k]
        return total

    monkeypatch.setattr(linear_module.F, "linear", vendor)
    certificate = RowCertificate()
    weight = torch.randn(5, 33)
    product = CertifiedLinear(weight, None, certificate)
    x = torch.randn(200, 33)
    whole, one = product(x), product(x[3:4])
    assert torch.equal(one[0], whole[3])
    assert certificate.verdicts[1] is False
    product(x[:60])
    assert certificate.verdicts[64] is False
    used.clear()
    product(x[:60])
    product(x[:1])
    assert used == [80, 2]


def test_no_rows_and_one_more_than_the_largest_bucket() -> None:
    product = CertifiedLinear(torch.randn(8, 16), None, RowCertificate())
    assert product(torch.empty(0, 16)).shape == (0, 8)
    x = torch.randn(BUCKETS[-1] + 1, 16)
    assert torch.equal(product(x)[-1], product(x[-1:])[0])


@pytest.mark.parametrize("bias", [False, True])
def test_another_order_shows_in_nearly_every_element_also_in_bfloat16(bias: bool) -> None:
    """The certificate's sensitivity: a product that sums from the other end must be seen even in one row."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 96, generator=generator).bfloat16()
    x, paired, small = linear_module.cancelling(1, weight, torch.ones(40).bfloat16() if bias else None)

    def product(order: list[int]) -> torch.Tensor:
        total = torch.zeros(1, 40) if small is None else small.float()[None].clone()
        for k in order:
            total = total + x[:, k : k + 1].float() * paired[:, k].float()
        return total.bfloat16()

    forwards, backwards = product(list(range(96))), product(list(range(95, -1, -1)))
    assert (forwards != backwards).float().mean() > 0.8

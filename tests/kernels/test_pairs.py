"""Products and attention in AVX-512's bfloat16: the order of every sum, and the software that stands in for it."""

from unittest import mock

import pytest
import torch

from liushui.kernels import native
from liushui.kernels.native import NativeOps
from liushui.kernels.native_linear import NativeProducts
from liushui.kernels.ops import load_ops
from tests.kernels import emulated
from tests.kernels.conftest import IMPLEMENTATIONS
from tests.kernels.paged import Heads, Sequence, Share, attend
from tests.kernels.test_native_formats import ops_of

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
NAME = "avx512bf16"
HERE = NAME in IMPLEMENTATIONS
PATHS = [*([NAME] if HERE else []), f"emulated {NAME}"]
needs_the_instruction = pytest.mark.skipif(not HERE, reason="this machine has no AVX512-BF16")


def sums(ops: NativeProducts, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] times weight [N, K] as it is formed: not rounded to bfloat16."""
    packed, out = ops.pack(weight), torch.full((len(x), len(weight)), torch.nan)
    ops._product(ops.threads, packed.address, x.data_ptr(), 1, len(x), out.data_ptr(), 0, 0, len(weight))
    return out


def chained(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Fused operations over K in order, of each pair the odd term first: float64 holds each before it is rounded."""
    total = torch.zeros(len(x), len(weight))
    for k in range(x.shape[1] + x.shape[1] % 2):
        if (term := k ^ 1) < x.shape[1]:
            total = (total.double() + x[:, term, None].double() * weight[None, :, term].double()).float()
    return total


def wide(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Numbers of many magnitudes: every addition has to round."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randint(-3, 4, (rows, columns), generator=generator)
    return (torch.randn(rows, columns, generator=generator) * 2.0**magnitude).bfloat16()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("inputs", [1, 2, 31, 32, 64, 97, 320])
def test_a_sum_is_one_chain_whatever_the_number_of_rows(path: str, inputs: int) -> None:
    """Every height of a block of rows, with rows as they lie (whole chunks of K) and prepared."""
    x, weight = wide(40, inputs, 1), wide(37, inputs, 2)
    expected = chained(x, weight)
    for rows in (*range(1, 20), 31, 32, 33, 40):
        assert torch.equal(sums(ops_of(path, 1 + rows % 3), x[:rows].contiguous(), weight), expected[:rows]), rows


@needs_the_instruction
def test_rows_in_several_blocks() -> None:
    """More than pass over a panel while it is near."""
    x, weight = wide(1050, 96, 3), wide(70, 96, 4)
    ops = ops_of(NAME, 2)
    whole = sums(ops, x, weight)
    for rows in (511, 512, 513, 530, 1024):
        assert torch.equal(sums(ops, x[:rows].contiguous(), weight), whole[:rows])
        assert torch.equal(sums(ops, x[-rows:].contiguous(), weight), whole[-rows:])


def of_any_bits(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Subnormals, infinities and values that are not numbers among them."""
    bits = torch.randint(-(2**15), 2**15, (rows, columns), generator=torch.Generator().manual_seed(seed))
    bits[::3] &= ~0x7F00  # small ones
    bits[1::3] = bits[1::3] & ~0x7800 | 0x3800  # near one
    return bits.to(torch.int16).view(torch.bfloat16)


@needs_the_instruction
@pytest.mark.parametrize("inputs", [1, 2, 64])
def test_the_instruction_does_what_the_software_does(inputs: int) -> None:
    """Bit for bit, for any bits."""
    x, weight = of_any_bits(300, inputs, 5), of_any_bits(120, inputs, 6)
    real, software = (sums(ops_of(path), x, weight) for path in PATHS)
    assert torch.equal(real.isnan(), software.isnan())
    known = ~real.isnan()
    assert known.float().mean() > 0.3
    assert torch.equal(real[known].view(torch.int32), software[known].view(torch.int32))


@needs_the_instruction
@pytest.mark.parametrize("heads", [Heads(3, 1, 64), Heads(8, 1, 40), Heads(9, 1, 48), Heads(2, 2, 33)])
def test_attention_does_what_it_does_in_software(heads: Heads) -> None:
    """A prompt and single rows, of few heads and many."""
    library = native.open_library(emulated.library(("kernels", "linear", "step"), (NAME,)))
    with mock.patch.object(native, "_library", return_value=library):
        software = load_ops("native", 1, isa=NAME)
    sequences = [Sequence.random(heads, length, torch.bfloat16, length) for length in (290, 33)]
    shares = [Share(sequences[0], 0, 290), Share(sequences[0], 289, 290), Share(sequences[1], 30, 33)]
    assert isinstance(software, NativeOps)
    for mine, theirs in zip(attend(IMPLEMENTATIONS[NAME], shares), attend(software, shares), strict=True):
        assert torch.equal(mine, theirs)

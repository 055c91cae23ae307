"""Matrix products whose rows do not depend on the batch, from a vendor library that knows nothing of that.

A vendor's `x @ W.T` picks its kernel by the number of rows M, and kernels may sum over K in different orders:
the bits of a row then depend on how many neighbours it has. For one fixed M they do not depend on the row's
position. So only certain row counts (buckets) are used: those whose rows were seen, on this machine, with this
weight shape and this thread count, to equal bit for bit the product in tiles of `REFERENCE_ROWS`. A smaller M is
padded up to the next certified bucket, a larger one is cut. Certificates are taken at first use of a bucket and
cost about two products.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

REFERENCE_ROWS = 32
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)


@dataclass(slots=True)
class RowCertificate:
    """Which row counts of one weight shape keep the reference order of sums."""

    verdicts: dict[int, bool] = field(default_factory=lambda: {REFERENCE_ROWS: True})

    def allows(self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        if rows not in self.verdicts:
            self.verdicts[rows] = _keeps_reference_order(rows, weight, bias)
        return self.verdicts[rows]

    def bucket(self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> int:
        """The row count to run `rows` rows with: the smallest certified one that holds them, else the largest."""
        for bucket in BUCKETS:
            if bucket >= rows and self.allows(bucket, weight, bias):
                return bucket
        for bucket in reversed(BUCKETS):
            if self.allows(bucket, weight, bias):
                return bucket
        raise AssertionError("the reference row count is always allowed")


class CertifiedLinear:
    """`y = x @ weight.T + bias` in certified row counts. weight [N, K], bias [N] or None."""

    __slots__ = ("bias", "certificate", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, certificate: RowCertificate) -> None:
        self.weight, self.bias, self.certificate = weight, bias, certificate

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] -> [M, N], any M >= 0."""
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty(0, self.weight.shape[0])
        bucket = self.certificate.bucket(rows, self.weight, self.bias)
        if rows == bucket:
            return F.linear(x, self.weight, self.bias)
        if rows < bucket:
            return self._padded(x, bucket)
        return torch.cat([self(x[start : start + bucket]) for start in range(0, rows, bucket)])

    def _padded(self, x: torch.Tensor, bucket: int) -> torch.Tensor:
        padded = x.new_zeros(bucket, x.shape[1])
        padded[: x.shape[0]] = x
        return F.linear(padded, self.weight, self.bias)[: x.shape[0]]


class PlainLinear:
    """`y = x @ weight.T + bias` as the vendor does it: the unconstrained product, kept to measure the difference."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def _keeps_reference_order(rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Compare `rows` rows at once with the same rows in reference tiles; twice, at other places."""
    x, weight, bias = cancelling(rows, weight, bias)
    for shift in (0, rows // 2 + 1):
        moved = x.roll(shift, dims=0)
        got = F.linear(moved, weight, bias)
        for start in range(0, rows, REFERENCE_ROWS):
            part = moved[start : start + REFERENCE_ROWS]
            tile = part.new_zeros(REFERENCE_ROWS, part.shape[1])
            tile[: len(part)] = part
            if not torch.equal(got[start : start + len(part)], F.linear(tile, weight, bias)[: len(part)]):
                return False
    return True


def cancelling(
    rows: int, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Factors whose exact product is 0: for each term of a sum there is its negative, somewhere else.

    What comes out is the rounding of the partial sums alone, so another order shows in nearly every element, also
    in bfloat16, whose own rounding hides most of it in a product of plain random numbers.
    """
    device, inputs = weight.device, weight.shape[1]
    generator = torch.Generator(device).manual_seed(rows)
    first, second = torch.randperm(inputs, generator=generator, device=device)[: inputs // 2 * 2].chunk(2)
    x = torch.zeros(rows, inputs, device=device)
    spread = torch.randint(
        -12, 13, (inputs // 2,), generator=generator, device=device
    )  # so that every addition has to round
    x[:, first] = torch.randn(rows, inputs // 2, generator=generator, device=device) * 2.0**spread
    x[:, second] = -x[:, first]
    paired = weight.clone()
    paired[:, second] = paired[:, first]
    if bias is not None:
        bias = (torch.randn(bias.shape, generator=generator, device=device) * 1e-4).to(bias.dtype)
    return x.to(weight.dtype), paired, bias

"""What the kernels share: launching, exact sums, small helpers."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from liushui.kernels.triton.launchers import INTERPRETED


def pdl(device: torch.device) -> bool:
    """Whether kernels may start before the one ahead of them has drained (programmatic dependent launch)."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def options(chained: bool, num_warps: int, num_stages: int = 2) -> dict[str, Any]:
    """Launch options of one kernel. `chained`: it calls `begin(PDL=True)`."""
    found: dict[str, Any] = {"PDL": chained, "num_warps": num_warps, "num_stages": num_stages}
    if chained:
        found["launch_pdl"] = True
    return found


class Kernel:
    """A kernel to launch as Triton's own, `kernel[grid](...)`; given tensors on the meta device, only compiled."""

    coming: ClassVar[dict[tuple[Any, ...], list[Any]]] = {}
    """Compilations under way on other threads, by `_key`: a launch waits for its own."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def _key(self, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
        """What tells this kernel's compilations apart: the constants, and which integers are 1, where that matters."""
        given = zip(self.function.params, arguments, strict=False)
        ones = tuple(x == 1 for parameter, x in given if type(x) is int and not parameter.do_not_specialize)
        return id(self), tuple(constants.items()), ones

    def ready(self, *arguments: Any, **constants: Any) -> bool:
        """Whether a launch would not have to wait for a compilation under way."""
        return all(kernel.future.done() for kernel in self.coming.get(self._key(arguments, constants), ()))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*arguments: Any, **constants: Any) -> Any:
            if arguments[0].is_meta:
                compiled = self.function.warmup(*arguments, grid=grid, **constants)
                if hasattr(compiled, "result"):
                    self.coming.setdefault(self._key(arguments, constants), []).append(compiled)
                return compiled
            if self.coming:
                for kernel in self.coming.pop(self._key(arguments, constants), ()):
                    with suppress(Exception):  # it comes again, by name, where it is compiled for the launch
                        kernel.result()
            return self.function[grid](*arguments, **constants)

        return launch


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait until the kernels ahead have written their results, then let the next kernel be set up.

    In this order, so that one kernel waits at a time: more would hold multiprocessors, and prefetch too early.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def magnitude(x):
    """The bits of |x|, float32: as integers they sort like the numbers, with infinity and NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scaled_squares(x, top):
    """x * x as integers below 2^42, in units that depend on `top`, the magnitude of the largest x."""
    y = x * (tl.minimum(274 - (top >> 23), 250) << 23).to(tl.float32, bitcast=True)
    return (y * y).to(tl.int64)


@triton.jit
def unscaled(total, top):
    """A sum of `scaled_squares` as float32; NaN if one was not finite."""
    back = ((254 - tl.minimum(274 - (top >> 23), 250)) << 23).to(tl.float32, bitcast=True)
    return tl.where(top < 0x7F800000, total.to(tl.float32) * back * back, float("nan"))


@triton.jit
def row_scale(x, size, eps, axis: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) along an axis, float32, the same bits in any order of elements.

    The squares are scaled by a power of two taken from the largest element, cut to integers and summed as such:
    exact, whatever the layout. What is cut off lies 2^-40 below the largest square.
    """
    top = tl.max(magnitude(x), axis)
    total = tl.sum(scaled_squares(x, tl.expand_dims(top, axis)), axis)
    return tl.rsqrt(unscaled(total, top) / size + eps)


def warps_for(elements: int, per_thread: int = 8) -> int:
    """Warps such that each thread holds `per_thread` elements, 1 to 16."""
    return max(1, min(16, triton.next_power_of_2(elements) // (32 * per_thread)))

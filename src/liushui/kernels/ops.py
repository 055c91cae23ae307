"""The operations of a layer: one interface, a compiled and a plain-torch implementation.

The promise of both: a token's output row depends bit for bit on nothing but its own inputs. Not on how many rows or
sequences share the step, its place among them, where its prompt was cut into chunks, which blocks hold its keys, or
the number of threads.

Shapes: T packed rows of the step (all sequences back to back), S sequences, H hidden, I inner, Hq query heads, Hk
key-value heads, D head dimension. Tensors are contiguous, on the CPU, float32 or bfloat16, all of one type within a
call; indices are int32. Arithmetic is float32 (or better) with one rounding at the end of an operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from liushui.config import Kernels
from liushui.errors import ParameterError
from liushui.kernels.quantised import Quantised

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [N, K] in the layout of one implementation's product."""

    data: Tensor
    out_features: int
    in_features: int
    dtype: torch.dtype
    """Type of the activations it is multiplied with."""
    kind: str
    """The layout's name; only the implementation that packed it can read it."""
    has_bias: bool = False
    """Whether the bias is kept with it: `linear` then adds it without being given it."""


class Ops(Protocol):
    """See the module. Wrong types or shapes raise `ValueError`, indices out of range `IndexError`."""

    name: str
    """native or torch."""
    note: str
    """One line for a person: what runs, or why the native kernels do not."""
    threads: int

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, unit_offset: bool = False
    ) -> Tensor:
        """x [T, H], weight [H] -> x / sqrt(mean(x^2) + eps) * weight, [T, H] (Zhang and Sennrich 2019).

        With `residual` [T, H]: residual += x in place (rounded to its type), and the sum is normed. With
        `unit_offset` the factor is 1 + weight.
        """
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """x [T, H] -> (x - mean) / sqrt(var + eps) * weight + bias, [T, H]; `residual` as in `rms_norm`."""
        ...

    def qkv_to_cache(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        positions: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rope: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> None:
        """Rotates q in place in qkv [T, (Hq + 2 Hk) D] and writes rotated k, and v, to the caches.

        positions, slots [T]; caches [num_blocks, Hk, block_size, D]; slot = block * block_size + offset. A slot
        below 0 marks a padding row, which is left alone. rope [max_position, R] float32 with R <= D even: cosines,
        then sines, of R / 2 angles; dimension i turns with i + R / 2 (NeoX), dimensions from R on do not. With
        q_norm, k_norm [D], each head is first RMS-normed with `eps`.
        """
        ...

    def attention(
        self,
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        k_cache: Tensor,
        v_cache: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Causal attention of q in qkv [T, (Hq + 2 Hk) D] over the cache -> [T, Hq D].

        query_start [S + 1]: sequence s has rows query_start[s] .. query_start[s + 1] - 1, its last tokens;
        seq_lens [S]: its tokens including this step's; block_table [S, max_blocks]. With `window`, the query at
        position p sees the keys above p - window. Rows from query_start[S] on are padding: what comes out is undefined.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 I] -> silu(first half) * second half, [T, I]."""
        ...

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 I] -> gelu_new(first half) * second half, [T, I]."""
        ...

    def gelu_new(self, x: Tensor) -> Tensor:
        """[T, I] -> GELU in its tanh approximation, as GPT-2 has it (Hendrycks and Gimpel 2016), [T, I]."""
        ...

    def pack_linear(
        self, weight: Tensor | Quantised, bias: Tensor | None = None, form: str | None = None
    ) -> PackedLinear | None:
        """weight [N, K] copied into this implementation's layout, or None where it has no product for the type.

        The bias [N] may be kept with it. `form` (int8, int4): a float32 weight is quantised in groups of 32.
        """
        ...

    def linear(self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
        """x [M, K] -> x @ weight.T + bias, [M, N]."""
        ...

    def embed(self, ids: Tensor, packed: PackedLinear, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [T] of a weight [N, K] that this implementation packed, in `dtype`, [T, K]."""
        ...


def load_native(threads: int) -> Ops | None:
    """The native library's operations, if it can serve; without torch."""
    from liushui.kernels.native import NativeOps, NativeUnavailableError

    try:
        return NativeOps(threads)
    except NativeUnavailableError:
        return None


def load_ops(kind: Kernels, threads: int, *, isa: str | None = None) -> Ops:
    """The implementation asked for. `auto` takes plain torch where the native library cannot serve, and notes why.

    `isa` forces an instruction set (amx, avx512bf16, avx512, avx2, generic) of the native library, for tests. Raises
    `ParameterError` for a native library that is asked for and cannot serve, and for an instruction set that this
    machine does not have.
    """
    from liushui.kernels.native import NativeOps, NativeUnavailableError

    if kind == "torch":
        from liushui.kernels.reference import TorchOps

        return TorchOps(threads)
    try:
        return NativeOps(threads, isa)
    except NativeUnavailableError as reason:
        if kind == "auto":
            from liushui.kernels.reference import TorchOps

            return TorchOps(threads, note=f"native kernels: {reason}: using plain torch")
        raise ParameterError(
            "kernels",
            f"the native kernels are not available: {reason}. Install a C++17 compiler (such as g++) and reinstall "
            "liushui with pip, or choose --kernels torch",
        ) from None

"""In which form the weights of products are held: `EngineConfig.weights` put into practice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liushui.config import WeightForm
from liushui.errors import ParameterError
from liushui.kernels.arrays import type_like, type_name
from liushui.kernels.ops import Ops
from liushui.kernels.quantised import Quantised

BETTER_IN_BLOCKS = frozenset({"avx2", "avx512", "avx512bf16", "amx expanded"})
"""Instruction sets on which the file's own blocks were measured to be the better choice (benchmarks/RESULTS.md):
faster for one stream and for many; with AMX where they are expanded to bfloat16; with AVX512-BF16 twice as fast for one
stream, a sixth to a fifth slower for many, in less memory."""


@dataclass(frozen=True, slots=True)
class Form:
    """The choice, for `Weights` and `KernelPolicy`."""

    note: str
    """One line for the start-up report."""
    dtype: Any
    """Of weights that are not held in blocks."""
    quantise: str | None = None
    """int8 or int4: quantised at load."""
    blocks: Callable[[str], Quantised | None] | None = None
    """Matrices as the file holds them."""
    expand: bool = False
    """Whether products with integers are those of the same values in bfloat16."""


def choose(choice: WeightForm, ops: Ops, dtype: Any, checkpoint: Any, numerics: str) -> Form:
    """The form for this machine and file. Raises `ParameterError` for one that cannot be had."""
    kinds: frozenset[str] = getattr(checkpoint, "block_types", frozenset)()
    known: frozenset[str] = getattr(ops, "block_types", frozenset())
    able = bool(known) and numerics == "invariant"
    isa = getattr(ops, "isa", "")
    expand = isa == "amx" and type_name(dtype) == "bfloat16"
    why = f"{ops.name} kernels do not multiply with them" if not known else f"numerics {numerics} uses vendor products"
    if choice in ("int8", "int4"):
        if not able:
            raise ParameterError("weights", f"{choice} needs the native CPU kernels and numerics invariant; {why}")
        note = f"weights: {choice} in groups of 32, quantised at load" + (", multiplied as bfloat16" if expand else "")
        return Form(note, type_like(dtype, "float32"), quantise=choice, expand=expand)
    if choice in ("float32", "bf16"):
        return _dense(choice, ops, dtype)
    held = sorted(kinds & known)
    if not kinds:
        return Form(f"weights: {type_name(dtype)}; the file has no quantised ones", dtype)
    if able and held and (choice == "native" or isa + " expanded" * expand in BETTER_IN_BLOCKS):
        return _native(checkpoint, kinds, known, dtype, expand)
    if choice == "native":
        raise ParameterError(
            "weights", f"the file's {', '.join(sorted(kinds))} blocks cannot be used as they are: {why}"
        )
    if able and held:
        why = f"not known to be slower than blocks with {isa} (--weights native reads fewer bytes)"
    elif able:
        why = f"there are no products for {', '.join(sorted(kinds))}"
    return Form(f"weights: {', '.join(sorted(kinds))} dequantised to {type_name(dtype)}: {why}", dtype)


def _native(checkpoint: Any, kinds: frozenset[str], known: frozenset[str], dtype: Any, expand: bool) -> Form:
    def blocks(name: str) -> Quantised | None:
        found: Quantised | None = checkpoint.load_blocks(name)
        return found if found is not None and known.issuperset(found.kinds) else None

    note = f"weights: {', '.join(sorted(kinds & known))} as the file has them: the fewest bytes to read"
    note += ", multiplied as bfloat16" if expand else ""
    if kinds - known:
        note += f"; {', '.join(sorted(kinds - known))} dequantised to {type_name(dtype)}"
    return Form(note, dtype, blocks=blocks, expand=expand)


def _dense(choice: str, ops: Ops, dtype: Any) -> Form:
    wanted = type_like(dtype, "float32" if choice == "float32" else "bfloat16")
    if wanted == dtype:
        return Form(f"weights: {type_name(wanted)}", wanted)
    if choice == "float32":
        raise ParameterError("weights", "float32 needs dtype float32")
    if ops.name != "native":
        raise ParameterError("weights", "bf16 needs dtype bfloat16 here")
    return Form(f"weights: bf16, arithmetic {type_name(dtype)}", wanted)

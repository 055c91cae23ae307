"""The forms of the weights: what is chosen, what is refused, and that the model stays the same model."""

from typing import Any

import pytest
import torch

from liushui.errors import ParameterError
from liushui.kernels.native_linear import NativeLinear
from liushui.kernels.ops import Ops, load_ops
from liushui.runner import forms
from tests.support import blocks, tiny

needs_native = pytest.mark.skipif(load_ops("auto", 1).name != "native", reason="the native library is not built")


class Kernels:
    """As much of `Ops` as the choice looks at."""

    def __init__(self, name: str, isa: str = "avx2", block_types: frozenset[str] = frozenset()) -> None:
        self.name, self.isa, self.block_types = name, isa, block_types


NATIVE: Any = Kernels("native", block_types=frozenset({"Q4_1", "Q8_0"}))
AMX: Any = Kernels("native", "amx", frozenset({"Q4_1", "Q8_0"}))
PLAIN: Any = Kernels("torch")


class File:
    def __init__(self, *kinds: str) -> None:
        self.kinds = frozenset(kinds)

    def block_types(self) -> frozenset[str]:
        return self.kinds


def choose(choice: Any, ops: Any, *kinds: str, dtype: torch.dtype = torch.float32, **more: Any) -> forms.Form:
    return forms.choose(choice, ops, dtype, File(*kinds), more.pop("numerics", "invariant"), **more)


def test_blocks_are_used_when_asked_for() -> None:
    assert choose("native", NATIVE, "Q4_1").blocks is not None
    assert choose("auto", NATIVE, "Q4_1").blocks is not None  # avx2: measured to be faster
    assert "Q4_1 as the file has them" in choose("native", NATIVE, "Q4_1").note
    for form, why in (
        (choose("auto", PLAIN, "Q4_1"), "torch kernels"),
        (choose("auto", AMX, "Q4_1"), "not known to be slower than blocks with amx"),
        (choose("auto", NATIVE, "Q4_1", numerics="fast"), "fast"),
        (choose("auto", NATIVE, "IQ4_XS"), "no products for IQ4_XS"),
        (choose("auto", NATIVE), "no quantised"),
    ):
        assert form.blocks is None
        assert form.dtype is torch.float32
        assert why in form.note
    assert "IQ4_XS dequantised" in choose("native", NATIVE, "Q4_1", "IQ4_XS").note


def test_bfloat16_weights_with_float32_rows_are_had_with_every_instruction_set() -> None:
    for ops in (NATIVE, AMX):
        assert choose("bf16", ops, "Q4_1").dtype is torch.bfloat16


def test_with_amx_blocks_are_multiplied_as_the_rows_are() -> None:
    form = choose("native", AMX, "Q4_1", dtype=torch.bfloat16)
    assert form.expand
    assert "Q4_1 as the file has them" in form.note
    assert "multiplied as bfloat16" in form.note
    assert choose("int8", AMX, "Q4_1", dtype=torch.bfloat16).expand
    assert choose("auto", AMX, "Q4_1", dtype=torch.bfloat16).expand  # measured to be faster
    assert not choose("native", AMX, "Q4_1").expand
    for isa in ("avx2", "avx512bf16"):  # whose products with integers are the faster ones
        ops: Any = Kernels("native", isa, frozenset({"Q4_1"}))
        assert not choose("native", ops, "Q4_1", dtype=torch.bfloat16).expand


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16"])
def test_blocks_are_the_default_where_they_were_measured_to_be_better(isa: str) -> None:
    ops: Any = Kernels("native", isa, frozenset({"Q4_1"}))
    for dtype in (torch.bfloat16, torch.float32):
        assert ("as the file has them" in choose("auto", ops, "Q4_1", dtype=dtype).note) == (isa != "generic")


@pytest.mark.parametrize(
    ("choice", "ops", "kinds", "more", "words"),
    [
        ("int8", PLAIN, (), {}, "native CPU kernels"),
        ("int4", NATIVE, (), {"numerics": "fast"}, "numerics invariant"),
        ("native", PLAIN, ("Q4_1",), {}, "cannot be used"),
        ("native", NATIVE, ("IQ4_XS",), {}, "cannot be used"),
        ("float32", NATIVE, (), {"dtype": torch.bfloat16}, "dtype float32"),
        ("bf16", PLAIN, (), {}, "dtype bfloat16"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(choice: str, ops: Ops, kinds: Any, more: Any, words: str) -> None:
    with pytest.raises(ParameterError, match=rf"weights: .*{words}"):
        choose(choice, ops, *kinds, **more)


@needs_native
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3"])
def test_the_model_in_blocks_is_close_to_the_dequantised_one(family: str) -> None:
    model = blocks.oracle(family, 5)
    ids = torch.randint(3, 211, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    logprobs = []
    for weights in ("float32", "native"):
        runner = blocks.runner(model, kernels="native", weights=weights)
        driver = tiny.Driver(runner)
        driver.add("one", ids)
        logprobs.append(driver.step({"one": 40}).logprobs["one"][0])
    assert isinstance(runner.model.head.packed, NativeLinear)
    assert runner.model.head.packed.data.dtype is torch.uint8
    kinds = {layer.attention.qkv.packed.kind.partition(": ")[2] for layer in runner.model.layers}
    assert kinds == {"int4+min, int8"}  # q and k, then v
    assert logprobs[0].token_id == logprobs[1].token_id
    assert abs(logprobs[0].logprob - logprobs[1].logprob) < 0.01


@needs_native
@pytest.mark.parametrize("family", ["gemma3", "granite", "olmo2", "phi3", "mixtral", "qwen3-moe-mixed"])
def test_other_families_in_blocks_are_close_too(family: str) -> None:
    model = blocks.oracle(family, 5)
    found = []
    for weights in ("float32", "native"):
        driver = tiny.Driver(blocks.runner(model, kernels="native", weights=weights))
        driver.add("one", list(range(3, 43)))
        found.append(driver.step({"one": 40}).logprobs["one"][0])
    assert found[0].token_id == found[1].token_id
    assert 0 < abs(found[0].logprob - found[1].logprob) < 0.01


@needs_native
def test_quantised_at_load_is_close_too() -> None:
    model = tiny.oracle("llama", 5)
    found = {}
    for weights in ("float32", "int8", "int4"):
        driver = tiny.Driver(tiny.runner(model, kernels="native", weights=weights))
        driver.add("one", list(range(3, 33)))
        found[weights] = driver.step({"one": 30}).logprobs["one"][0].logprob
    assert 0 < abs(found["int8"] - found["float32"]) < 0.1
    assert 0 < abs(found["int4"] - found["float32"]) < 1.0

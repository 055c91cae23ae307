"""An answer is a pure function of its request: tokens and log-probabilities, bit for bit, however it was computed."""

import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.core.request import SamplingParams
from liushui.kernels.ops import load_ops
from tests.support import blocks, tiny

PROMPTS = [torch.randint(3, 211, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 9, 40, 23, 64)]
PARAMS = [
    SamplingParams(temperature=0, logprobs=3),
    SamplingParams(temperature=1.0, logprobs=0),
    SamplingParams(temperature=0.8, top_p=0.9, logprobs=1),
    SamplingParams(temperature=1.2, top_k=20, min_p=0.01, repetition_penalty=1.2, logprobs=0),
    SamplingParams(temperature=0.7, frequency_penalty=0.5, presence_penalty=0.3, logprobs=2),
]
NEW = 8
VARIANTS = [("float32", "torch"), ("bfloat16", "torch"), ("float32", "native"), ("bfloat16", "native")]
FAMILIES = ("llama", "gpt2", "qwen3", "mistral-window")
RELATIVES = ("gemma3", "granite", "olmo2", "phi3", "mixtral", "qwen3-moe-mixed")
CASES = [(family, *variant) for family in FAMILIES for variant in VARIANTS]
CASES += [(family, *variant) for family in RELATIVES for variant in VARIANTS[1:3]]
QUANTISED = [
    ("llama", "float32", "native/native"),
    ("qwen3", "bfloat16", "native/native"),
    ("llama-tied", "float32", "native/int8"),
    ("gpt2", "float32", "native/int8"),
    ("mixtral", "bfloat16", "native/int4"),
    ("llama", "float32", "native/bf16"),
]
"""Kernels and the form of the weights."""
if "native" in load_ops("auto", 1).name:
    CASES += QUANTISED


@cache
def _runner(family: str, dtype: str, kernels: str) -> Any:
    settings: dict[str, Any] = {"dtype": dtype, "kernels": kernels.partition("/")[0], "block_size": 8}
    form = kernels.partition("/")[2] or "auto"
    if form == "native":
        return blocks.runner(blocks.oracle(family, 11), weights=form, **settings)
    return tiny.runner(tiny.oracle(family, 11), weights=form, **settings)


@cache
def _alone(family: str, dtype: str, kernels: str, which: int) -> tuple:
    """Tokens and log-probabilities of one request that runs by itself, its prompt fed whole."""
    driver = tiny.Driver(_runner(family, dtype, kernels))
    driver.add(f"alone{which}", PROMPTS[which], PARAMS[which], seed=which)
    logprobs = []
    for step in range(NEW):
        result = driver.step({f"alone{which}": len(PROMPTS[which]) if step == 0 else 1})
        logprobs += result.logprobs[f"alone{which}"]
    return tuple(driver.ids[f"alone{which}"]), tuple(logprobs)


@pytest.mark.parametrize(("family", "dtype", "kernels"), CASES)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**32))
def test_any_batch_any_chunks_any_preemption(family: str, dtype: str, kernels: str, seed: int) -> None:
    """Random company, random chunk sizes, random preemptions, random physical blocks: the same bits."""
    runner, luck = _runner(family, dtype, kernels), random.Random(seed)
    chosen = luck.sample(range(len(PROMPTS)), luck.randint(1, len(PROMPTS)))
    driver = tiny.Driver(runner, luck.sample(range(runner.num_blocks), runner.num_blocks))
    logprobs: dict[int, list] = {which: [] for which in chosen}
    for which in chosen:
        driver.add(f"r{which}", PROMPTS[which], PARAMS[which], seed=which)
    goal = {which: len(PROMPTS[which]) + NEW for which in chosen}
    while live := [w for w in chosen if len(driver.ids[f"r{w}"]) < goal[w]]:
        if luck.random() < 0.1:
            driver.forget_cache(f"r{luck.choice(live)}")
        left = {w: len(driver.ids[f"r{w}"]) - driver.computed[f"r{w}"] for w in live}
        result = driver.step({f"r{w}": luck.randint(1, n) for w, n in left.items()})
        for which in live:
            logprobs[which] += result.logprobs.get(f"r{which}", ())
    for which in chosen:
        ids, expected = _alone(family, dtype, kernels, which)
        assert tuple(driver.ids[f"r{which}"]) == ids
        assert tuple(logprobs[which]) == expected


def test_shared_prefix_blocks_give_the_same_bits() -> None:
    """A second sequence reads the first one's blocks instead of computing them."""
    runner = _runner("llama", "float32", "torch")
    driver = tiny.Driver(runner)
    driver.add("first", PROMPTS[4], PARAMS[0])
    driver.step({"first": 64})
    driver.add("second", PROMPTS[4], PARAMS[0])
    driver.tables["second"], driver.computed["second"] = driver.tables["first"][:7], 56
    result = driver.step({"second": 8})
    ids, logprobs = _alone("llama", "float32", "torch", 4)[0], result.logprobs["second"]
    alone = tiny.Driver(runner)
    alone.add("alone", PROMPTS[4], PARAMS[0])
    assert alone.step({"alone": 64}).logprobs["alone"] == logprobs
    assert driver.ids["second"] == driver.ids["first"]
    assert len(ids) == 64 + NEW

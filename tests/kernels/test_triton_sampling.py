"""Sampling on the device: the tokens, limits and log-probabilities that the CPU's sampler finds."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from liushui.core.plan import NewSequence
from liushui.core.request import SamplingParams
from liushui.kernels.triton import sampling
from liushui.runner.noise import gumbel, row_key
from liushui.runner.sampler import SampleRow, _thresholds, sample, token_logprobs
from liushui.runner.state import SequenceState
from tests.kernels.triton_support import COMPILED, DEVICE, MARK, on_device, ops

pytestmark = MARK
VOCAB = 5000


def _keys(seeds: list[int]) -> torch.Tensor:
    words = np.array([row_key(seed, 7) for seed in seeds], np.uint32)
    return torch.from_numpy(words.view(np.int32)).to(DEVICE)


def _pick(logits: torch.Tensor, seeds: list[int], temperatures: list[float], limits: torch.Tensor | None) -> list[int]:
    feed = torch.zeros(len(seeds), dtype=torch.int32, device=DEVICE)
    places = torch.arange(len(seeds), dtype=torch.int32, device=DEVICE)
    heat = torch.tensor(temperatures, device=DEVICE)
    chosen = sampling.pick(on_device(logits), _keys(seeds), heat, limits, feed, places, ops().arrived, ops().chained)
    assert torch.equal(feed, chosen.clamp(min=0))
    assert not ops().arrived.any()
    return chosen.tolist()


def test_the_cpus_tokens() -> None:
    temperatures = [0.0, 0.5, 1.0, 1.7, 0.0, 1.0]
    logits = torch.randn(6, VOCAB) * 3
    logits[4, [100, 4999]] = 50.0
    rows = [
        SampleRow(SequenceState(NewSequence("s", (1,), SamplingParams(temperature=t), seed, frozenset())), 7)
        for seed, t in enumerate(temperatures)
    ]
    expected, _ = sample(logits.clone(), rows)
    assert _pick(logits, list(range(6)), temperatures, None) == expected
    assert expected[4] == 100
    alone = [_pick(logits[i : i + 1], [i], temperatures[i : i + 1], None)[0] for i in range(6)]
    assert alone == expected


def test_noise_is_that_of_the_runner() -> None:
    """With equal logits the token with the largest noise wins; it is the same token, for many keys."""
    seeds = list(range(60 if COMPILED else 20))
    got = _pick(torch.zeros(len(seeds), VOCAB), seeds, [1.0] * len(seeds), None)
    for seed, token in zip(seeds, got, strict=True):
        noise = gumbel(*(np.uint32(word) for word in row_key(seed, 7)), np.arange(VOCAB))
        assert noise[token] >= noise.max() - 1e-5


def test_rows_that_are_not_finite() -> None:
    logits = torch.randn(4, VOCAB)
    logits[1, 4321], logits[2, 3], logits[3] = math.nan, math.inf, -math.inf
    got = _pick(logits, [0, 1, 2, 3], [0.0, 0.0, 1.0, 1.0], None)
    assert got[0] == int(logits[0].argmax())
    assert got[1:] == [-1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_are_exact(dtype: torch.dtype) -> None:
    mixes = [(0, 1.0, 0.0), (1, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.3, 0.0), (40, 0.7, 0.0), (0, 1.0, 0.05),
             (20, 0.9, 0.01), (VOCAB, 0.999, 0.0)]  # fmt: skip
    logits = (torch.randn(len(mixes), VOCAB) * 4).to(dtype)
    temperature = 0.5  # the GPU's division is not rounded like the processor's
    params = [SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=m) for k, p, m in mixes]
    scaled = logits.float() / temperature
    expected = _thresholds(scaled, params, scaled.argmax(dim=-1))
    heat = torch.full((len(mixes),), temperature, device=DEVICE)
    columns = [torch.tensor(column, device=DEVICE) for column in zip(*mixes, strict=True)]
    found = sampling.limits(on_device(logits), heat, columns[0].int(), *columns[1:], ops().chained).cpu()
    kept = [(scaled[r] >= limit).sum().item() for r, limit in enumerate(found)]
    wanted = [(scaled[r] >= limit).sum().item() for r, limit in enumerate(expected)]
    assert kept == wanted


def test_logprobs() -> None:
    logits = (torch.randn(3, VOCAB) * 4).to(torch.bfloat16)
    chosen = torch.tensor([5, int(logits[1].argmax()), 4999], dtype=torch.int32)
    found = sampling.logprobs(on_device(logits), on_device(chosen), 6, ops().chained)
    values, ranks, top_values, top_tokens = (part.cpu() for part in found)
    for r in range(3):
        expected = token_logprobs(logits[r], int(chosen[r]), 6)
        assert math.isclose(values[r], expected.logprob, abs_tol=1e-4)
        assert ranks[r] == expected.rank
        assert torch.allclose(top_values[r], torch.tensor([value for _, value in expected.top]), atol=1e-4)
        order = sorted(range(VOCAB), key=lambda token: (-float(logits[r, token]), token))
        assert top_tokens[r].tolist() == order[:6]


def test_ids_in_flight() -> None:
    feed = torch.tensor([7, 8, 9], dtype=torch.int32, device=DEVICE)
    ids = torch.tensor([4, -1, 0, -3, -2], dtype=torch.int32, device=DEVICE)
    table = torch.randn(10, 48)
    rows = sampling.look_up(ids, feed, on_device(table), ops().chained).cpu()
    assert torch.equal(rows, table[[4, 7, 0, 9, 8]])

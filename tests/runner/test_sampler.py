"""Sampling: each row by its own parameters, along the vocabulary axis, wherever the row stands."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liushui.core.plan import NewSequence
from liushui.core.request import LEAST_REPETITION_PENALTY, SamplingParams
from liushui.runner.noise import MAX_GUMBEL, gumbel, row_key
from liushui.runner.sampler import SampleRow, sample, token_logprobs
from liushui.runner.state import SequenceState

VOCAB = 1500


def _row(
    seed: int = 0,
    position: int = 5,
    prompt: tuple[int, ...] = (1, 2),
    stops: frozenset[int] = frozenset(),
    **params: Any,
) -> SampleRow:
    return SampleRow(SequenceState(NewSequence("s", prompt, SamplingParams(**params), seed, stops)), position)


def _logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def test_greedy_picks_each_rows_own_maximum_and_the_first_of_ties() -> None:
    logits = _logits(7)
    logits[3, 40] = logits[3, 900] = 99.0
    expected = logits.argmax(dim=-1).tolist()
    tokens, finite = sample(logits, [_row(temperature=0) for _ in range(7)])
    assert tokens == expected
    assert tokens[3] == 40
    assert finite == [True] * 7


MIXES = st.lists(
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0]),
            "top_p": st.sampled_from([1.0, 0.9, 0.2]),
            "top_k": st.sampled_from([0, 1, 7]),
            "min_p": st.sampled_from([0.0, 0.1]),
            "repetition_penalty": st.sampled_from([1.0, 1.5]),
            "frequency_penalty": st.sampled_from([0.0, 0.7]),
            "seed": st.integers(0, 3),
        }
    ),
    min_size=2,
    max_size=9,
)


@settings(max_examples=40)
@given(mix=MIXES, shuffle=st.randoms(use_true_random=False))
def test_a_rows_token_does_not_depend_on_its_place_or_company(mix: list[dict[str, Any]], shuffle: Any) -> None:
    logits = _logits(len(mix))
    alone = []
    for i, params in enumerate(mix):
        seed = params["seed"]
        alone += sample(logits[i : i + 1].clone(), [_row(seed, i, **{k: v for k, v in params.items() if k != "seed"})])[
            0
        ]
    order = list(range(len(mix)))
    shuffle.shuffle(order)
    rows = [_row(mix[i]["seed"], i, **{k: v for k, v in mix[i].items() if k != "seed"}) for i in order]
    together, _ = sample(logits[order].clone(), rows)
    assert together == [alone[i] for i in order]


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    logits = _logits(3)
    expected = logits.argmax(dim=-1).tolist()
    rows = [_row(1, top_k=1), _row(2, top_p=1e-9), _row(3, min_p=1.0)]
    assert sample(logits, rows)[0] == expected


@pytest.mark.parametrize(
    ("params", "allowed"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0, 1}), ({"top_p": 0.45}, {0}), ({"min_p": 0.35}, {0, 1, 2}),
     ({"top_k": 3, "top_p": 0.6}, {0, 1}), ({}, {0, 1, 2, 3})],
)  # fmt: skip
def test_truncation_keeps_exactly_the_right_tokens(params: dict[str, Any], allowed: set[int]) -> None:
    line = torch.tensor([0.5, 0.25, 0.18, 0.07]).log()
    drawn = {sample(line[None].clone(), [_row(0, position, **params)])[0][0] for position in range(400)}
    assert drawn == allowed


def test_frequencies_follow_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 4000
    tokens = []
    for start in range(0, n, 500):
        rows = [_row(7, start + i) for i in range(500)]
        tokens += sample(probabilities.log().expand(500, 4).clone(), rows)[0]
    counts = np.bincount(tokens, minlength=4)
    expected = probabilities.numpy() * n
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 16.3  # 0.1 % of chance for 3 degrees of freedom; the draw is fixed, so this never flickers


def test_pruned_candidates_give_the_same_as_noise_everywhere() -> None:
    logits = _logits(20, scale=8.0)
    rows = [_row(i, i * 3) for i in range(20)]
    tokens, _ = sample(logits.clone(), rows)
    for i, row in enumerate(rows):
        noise = gumbel(*(np.uint32(k) for k in row_key(row.state.new.seed, row.position)), np.arange(VOCAB))
        assert tokens[i] == int((logits[i].double().numpy() + noise).argmax())


def test_flat_rows_sort_beyond_the_first_nucleus() -> None:
    flat = torch.zeros(1, VOCAB)
    flat[0, :10] -= 5.0  # unlikely: outside a nucleus of 0.99
    drawn = {sample(flat.clone(), [_row(3, p, top_p=0.99)])[0][0] for p in range(300)}
    assert len(drawn) > 200
    assert not drawn & set(range(10))


def test_noise_is_bounded_and_independent_of_array_position() -> None:
    tokens = np.arange(100_000)
    first, second = (np.uint32(k) for k in row_key(123, 456))
    noise = gumbel(first, second, tokens)
    assert noise.max() < MAX_GUMBEL
    assert abs(noise.mean() - 0.5772) < 0.02
    for start, size in ((1, 7), (13, 1), (77_777, 333)):
        assert np.array_equal(gumbel(first, second, tokens[start : start + size]), noise[start : start + size])


def test_penalties_bias_and_banned_stops() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 4, 5]] = torch.tensor([4.0, 3.9, 3.8])
    assert sample(logits.clone(), [_row(temperature=0, prompt=(3,), repetition_penalty=1.1)])[0] == [4]
    assert sample(logits.clone(), [_row(temperature=0, logit_bias={5: 1.0})])[0] == [5]
    assert sample(logits.clone(), [_row(temperature=0, min_tokens=2, stops=frozenset({3, 4}))])[0] == [5]
    row = _row(temperature=0, frequency_penalty=0.1, presence_penalty=0.05)
    row.state.append(3)
    assert sample(logits.clone(), [row])[0] == [4]
    row.state.append(4)
    assert sample(logits.clone(), [row])[0] == [3]


def test_negative_logits_are_penalised_downwards() -> None:
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, [3, 4]] = torch.tensor([-1.0, -1.2])
    assert sample(logits, [_row(temperature=0, prompt=(3,), repetition_penalty=1.5)])[0] == [4]


@pytest.mark.parametrize("penalty", [LEAST_REPETITION_PENALTY, 100.0])
@pytest.mark.parametrize("temperature", [0, 1e-5, 100.0])
def test_the_strongest_penalties_leave_numbers(penalty: float, temperature: float) -> None:
    logits = _logits(1) * 1e4
    row = _row(temperature=temperature, prompt=tuple(range(VOCAB)), repetition_penalty=penalty)
    tokens, finite = sample(logits, [row])
    assert finite == [True]
    assert 0 <= tokens[0] < VOCAB


def test_nan_logits_mark_only_their_row() -> None:
    logits = _logits(3)
    expected = logits.argmax(dim=-1).tolist()
    logits[1, 17] = math.nan
    tokens, finite = sample(logits, [_row(temperature=0), _row(temperature=0.5), _row(temperature=0)])
    assert finite == [True, False, True]
    assert (tokens[0], tokens[2]) == (expected[0], expected[2])


def test_token_logprobs() -> None:
    line = torch.tensor([0.1, 0.6, 0.3]).log()
    got = token_logprobs(line, 2, 2)
    assert (got.token_id, got.rank) == (2, 2)
    assert math.isclose(got.logprob, math.log(0.3), rel_tol=1e-5)
    assert [token for token, _ in got.top] == [1, 2]

"""Logits [rows, vocab] -> one token a row, each row by its own parameters.

The axis matters: for one sequence the logits are [vocab] and `argmax()` has one meaning; for a batch they are
[rows, vocab], and each row must choose along its own vocabulary: `dim=-1`.

Order: logit_bias and min_tokens, penalties, temperature, min_p, top_k, top_p (as vLLM). Every step over many rows at
once is exactly rounded arithmetic, a comparison or integer work, so that a row's bits cannot depend on its
neighbours; transcendental functions, whose vector forms may treat a tensor's last elements differently, are applied
to one row at a time.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from liushui.core.plan import TokenLogprobs
from liushui.core.request import SamplingParams
from liushui.runner.noise import MAX_GUMBEL, gumbel, row_key
from liushui.runner.state import SequenceState

_NUCLEUS = 1024
"""Tokens sorted at first for top_p; a flatter row is sorted whole."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Row r of the logits predicts the token at `position` of this sequence."""

    state: SequenceState
    position: int


def sample(logits: torch.Tensor, rows: list[SampleRow]) -> tuple[list[int], list[bool]]:
    """logits [R, vocab] float32 (adjusted in place), R rows -> (token ids, whether the row's logits were finite)."""
    adjust(logits, rows)
    best = logits.argmax(dim=-1)
    top = logits.gather(1, best[:, None])[:, 0]
    tokens: list[int] = best.tolist()
    finite: list[bool] = torch.isfinite(top).tolist()
    drawn = [r for r, row in enumerate(rows) if not row.state.new.sampling.greedy and finite[r]]
    if drawn:
        picked = _draw(logits[drawn] if len(drawn) < len(rows) else logits, [rows[r] for r in drawn], best[drawn])
        for r, token in zip(drawn, picked, strict=True):
            tokens[r] = token
    return tokens, finite


def adjust(logits: torch.Tensor, rows: list[SampleRow]) -> None:
    """Bias, banned stops and penalties; few rows have any, so each touches only its own tokens."""
    for r, row in enumerate(rows):
        state = row.state
        if not state.adjusts_logits:
            continue
        params, line, device = state.new.sampling, logits[r], logits.device
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=device)
            line[ids] += torch.tensor(list(params.logit_bias.values()), dtype=line.dtype, device=device)
        if state.bans_stops:
            line[torch.tensor(sorted(state.new.stop_token_ids), device=device)] = -math.inf
        if params.repetition_penalty != 1:
            ids = torch.from_numpy(state.seen()).to(device)
            values = line[ids]
            penalty = params.repetition_penalty
            line[ids] = torch.where(values > 0, values / penalty, values * penalty)
        if params.presence_penalty or params.frequency_penalty:
            tokens, counts = (torch.from_numpy(part).to(device) for part in state.generated())
            line[tokens] -= counts * params.frequency_penalty + params.presence_penalty


def _draw(logits: torch.Tensor, rows: list[SampleRow], best: torch.Tensor) -> list[int]:
    """Gumbel-max over each row's kept tokens.

    A token can only win if its scaled logit is within MAX_GUMBEL of what the best token already reaches with its own
    noise, so noise is computed for those alone: the result is exactly that of noise for the whole vocabulary.
    """
    temperature = torch.tensor([row.state.new.sampling.temperature for row in rows], dtype=torch.float32)
    scaled = logits / temperature[:, None]
    keys = np.array([row_key(row.state.new.seed, row.position) for row in rows], np.uint32)
    kept = _thresholds(scaled, [row.state.new.sampling for row in rows], best)
    noise_of_best = gumbel(keys[:, 0], keys[:, 1], best.numpy())
    reached = scaled.gather(1, best[:, None])[:, 0].double().numpy() + noise_of_best
    can_win = torch.from_numpy(reached - MAX_GUMBEL).float()
    candidates = (scaled >= torch.maximum(kept, can_win)[:, None]).nonzero().numpy()
    owner, tokens = candidates[:, 0], candidates[:, 1]
    values = scaled[owner, tokens].double().numpy()
    scores = values + gumbel(keys[owner, 0], keys[owner, 1], tokens)
    bounds = np.searchsorted(owner, np.arange(len(rows) + 1))
    return [
        int(tokens[a + scores[a:b].argmax()]) if b > a else int(best[r])
        for r, (a, b) in enumerate(itertools.pairwise(bounds))
    ]


def _thresholds(scaled: torch.Tensor, params: list[SamplingParams], best: torch.Tensor) -> torch.Tensor:
    """[R] float32: the smallest scaled logit each row may still choose; ties at the edge stay in."""
    vocab = scaled.shape[1]
    limits = torch.full((len(params),), -math.inf)
    top = scaled.gather(1, best[:, None])[:, 0].tolist()
    for r, p in enumerate(params):
        if p.min_p > 0:
            limits[r] = top[r] + math.log(p.min_p)
        if 0 < p.top_k < vocab:
            limits[r] = max(float(limits[r]), float(scaled[r].topk(p.top_k).values[-1]))
        if p.top_p < 1:
            limits[r] = max(float(limits[r]), _nucleus_edge(scaled[r], float(limits[r]), p.top_p))
    return limits


def _nucleus_edge(line: torch.Tensor, limit: float, top_p: float) -> float:
    """Smallest logit of the nucleus (Holtzman et al. 2019, arXiv:1904.09751) among the tokens >= limit."""
    kept = line[line >= limit] if limit > -math.inf else line
    total = float(kept.double().logsumexp(0))
    size = min(_NUCLEUS, len(kept))
    while True:
        ordered = kept.topk(size).values
        mass = (ordered.double() - total).exp().cumsum(0)
        inside = int((mass < top_p).sum())  # tokens before the one that reaches top_p
        if inside < size or size == len(kept):
            return float(ordered[min(inside, size - 1)])
        size = len(kept)


def token_logprobs(line: torch.Tensor, token: int, top: int) -> TokenLogprobs:
    """Log-probabilities of one row [vocab] of unadjusted logits: of `token`, and of the `top` most likely."""
    logprobs = torch.log_softmax(line.float(), dim=-1)
    chosen = logprobs[token]
    rank = int((logprobs > chosen).sum()) + 1
    best = logprobs.topk(top) if top else None
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
    return TokenLogprobs(token, float(chosen), rank, pairs)

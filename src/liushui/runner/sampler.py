"""Logits [rows, vocab] -> one token a row, each row by its own parameters.

The axis matters: for one sequence the logits are [vocab] and `argmax()` has one meaning; for a batch they are
[rows, vocab], and each row must choose along its own vocabulary: `dim=-1`.

Order: logit_bias and min_tokens, penalties, temperature, min_p, top_k, top_p (as vLLM). Every step over many rows at
once is exactly rounded arithmetic, a comparison or integer work, so that a row's bits cannot depend on its
neighbours; transcendental functions, whose vector forms may treat a tensor's last elements differently, are applied
to one row at a time. numpy does it, so that torch need not be loaded for drawing alone.
"""

from __future__ import annotations

import gc
import itertools
import math
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from liushui.core.plan import TokenLogprobs
from liushui.core.request import SamplingParams
from liushui.runner.noise import MAX_GUMBEL, gumbel, row_key
from liushui.runner.state import SequenceState

if TYPE_CHECKING:
    import torch

_NUCLEUS = 1024
"""Tokens sorted at first for top_p; a flatter row is sorted whole."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Row r of the logits predicts the token at `position` of this sequence."""

    state: SequenceState
    position: int


def sample(logits: Any, rows: list[SampleRow]) -> tuple[list[int], list[bool]]:
    """logits [R, vocab] float32 on the host, numpy's or torch's (adjusted in place), R rows -> (token ids, whether the
    row's logits were finite)."""
    logits = np.asarray(logits)
    if any(row.state.adjusts_logits for row in rows):
        adjust(_torch().from_numpy(logits), rows)
    best = logits.argmax(axis=-1)
    top = logits[np.arange(len(rows)), best]
    tokens: list[int] = best.tolist()
    finite: list[bool] = np.isfinite(top).tolist()
    drawn = [r for r, row in enumerate(rows) if not row.state.new.sampling.greedy and finite[r]]
    if drawn:
        picked = _draw(logits[drawn] if len(drawn) < len(rows) else logits, [rows[r] for r in drawn], best[drawn])
        for r, token in zip(drawn, picked, strict=True):
            tokens[r] = token
    return tokens, finite


def adjust(logits: torch.Tensor, rows: list[SampleRow]) -> None:
    """Bias, banned stops and penalties; few rows have any, so each touches only its own tokens."""
    torch = _torch()
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


def _draw(logits: np.ndarray, rows: list[SampleRow], best: np.ndarray) -> list[int]:
    """Gumbel-max over each row's kept tokens.

    A token can only win if its scaled logit is within MAX_GUMBEL of what the best token already reaches with its own
    noise, so noise is computed for those alone: the result is exactly that of noise for the whole vocabulary.
    """
    temperature = np.array([row.state.new.sampling.temperature for row in rows], np.float32)
    scaled = logits / temperature[:, None]
    keys = np.array([row_key(row.state.new.seed, row.position) for row in rows], np.uint32)
    kept = _thresholds(scaled, [row.state.new.sampling for row in rows], best)
    reached = scaled[np.arange(len(rows)), best].astype(np.float64) + gumbel(keys[:, 0], keys[:, 1], best)
    can_win = (reached - MAX_GUMBEL).astype(np.float32)
    owner, tokens = np.nonzero(scaled >= np.maximum(kept, can_win)[:, None])
    scores = scaled[owner, tokens].astype(np.float64) + gumbel(keys[owner, 0], keys[owner, 1], tokens)
    bounds = np.searchsorted(owner, np.arange(len(rows) + 1))
    return [
        int(tokens[a + scores[a:b].argmax()]) if b > a else int(best[r])
        for r, (a, b) in enumerate(itertools.pairwise(bounds))
    ]


def _thresholds(scaled: Any, params: list[SamplingParams], best: Any) -> np.ndarray:
    """[R] float32: the smallest scaled logit each row may still choose; ties at the edge stay in."""
    scaled, best = np.asarray(scaled), np.asarray(best)
    vocab = scaled.shape[1]
    limits = np.full(len(params), -math.inf, np.float32)
    top = scaled[np.arange(len(params)), best].tolist()
    for r, p in enumerate(params):
        if p.min_p > 0:
            limits[r] = top[r] + math.log(p.min_p)
        if 0 < p.top_k < vocab:
            limits[r] = max(float(limits[r]), float(np.partition(scaled[r], vocab - p.top_k)[vocab - p.top_k]))
        if p.top_p < 1:
            limits[r] = max(float(limits[r]), _nucleus_edge(scaled[r], float(limits[r]), p.top_p))
    return limits


def _nucleus_edge(line: np.ndarray, limit: float, top_p: float) -> float:
    """Smallest logit of the nucleus (Holtzman et al. 2019, arXiv:1904.09751) among the tokens >= limit."""
    kept = line[line >= limit] if limit > -math.inf else line
    wide = kept.astype(np.float64)
    highest = wide.max()
    total = highest + np.log(np.exp(wide - highest).sum())
    size = min(_NUCLEUS, len(kept))
    while True:
        ordered = np.sort(np.partition(kept, len(kept) - size)[len(kept) - size :])[::-1]
        mass = np.exp(ordered.astype(np.float64) - total).cumsum()
        inside = int((mass < top_p).sum())  # tokens before the one that reaches top_p
        if inside < size or size == len(kept):
            return float(ordered[min(inside, size - 1)])
        size = len(kept)


def token_logprobs(line: Any, token: int, top: int) -> TokenLogprobs:
    """Log-probabilities of one row [vocab] of unadjusted logits: of `token`, and of the `top` most likely."""
    torch = _torch()
    logprobs = torch.log_softmax(torch.as_tensor(line).float(), dim=-1)
    chosen = logprobs[token]
    rank = int((logprobs > chosen).sum()) + 1
    best = logprobs.topk(top) if top else None
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
    return TokenLogprobs(token, float(chosen), rank, pairs)


def bring_torch() -> None:
    """Load torch on a thread of its own: where many are served, a row that needs it must not hold up the others."""
    if "torch" not in sys.modules:
        threading.Thread(target=_torch_aside, name="liushui-torch", daemon=True).start()


def _torch_aside() -> None:
    _torch()
    gc.freeze()  # a full collection of what the import made takes 0.1 s, amid a step


def _torch() -> Any:
    """torch. Where it comes only now it gets one thread: the native step's have the processors."""
    late = "torch" not in sys.modules
    import torch

    if late:
        torch.set_num_threads(1)
    return torch

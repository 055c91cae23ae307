"""Log-likelihoods: how probable the model finds a text after another. Nothing is sampled."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from liushui.core.request import SamplingParams
from liushui.engine.inputs import Prompt
from liushui.engine.outputs import RequestOutput
from liushui.errors import ParameterError

SCORING = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0).giving(SamplingParams.names())
"""The text is a prompt; the one token that follows it is dropped. The model's own defaults have no say."""


class ScoreTokenizer(Protocol):
    """What turns pairs of texts into token ids."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> Sequence[int]: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Score:
    """A continuation's log-likelihood. The model's own: natural logarithms, no temperature, no penalties."""

    logprob: float
    """Sum over the continuation's tokens; NaN after an error."""
    is_greedy: bool
    """Whether every token of it was the most likely one."""
    token_ids: tuple[int, ...]
    """Of the continuation."""
    token_logprobs: tuple[float, ...]
    """Parallel to `token_ids`."""
    num_context_tokens: int
    num_cached_tokens: int = 0
    """Context tokens found in the prefix cache."""
    error: str | None = None


def score_pairs(
    contexts: Prompt | Sequence[Prompt], continuations: Prompt | Sequence[Prompt], tokenizer: ScoreTokenizer
) -> list[tuple[list[int], list[int]]]:
    """Token ids of (context, continuation), neither empty. Raises `ParameterError` naming the pair."""
    right = _list(continuations)
    left = [contexts] * len(right) if isinstance(contexts, str | Mapping) else _list(contexts)
    if len(left) != len(right):
        raise ParameterError("contexts", f"{len(left):,} given for {len(right):,} continuations; give one, or as many")
    pairs = []
    for index, (context, continuation) in enumerate(zip(left, right, strict=True)):
        pair = _pair(context, continuation, tokenizer, index)
        if not pair[1]:
            raise ParameterError(f"continuations[{index}]", "has no tokens; give at least one")
        pairs.append(pair)
    return pairs


def scored(output: RequestOutput, num_context: int) -> Score:
    """What the prompt log-probabilities say of the tokens from `num_context` on."""
    ids = tuple(output.prompt_token_ids[num_context:])
    if output.error is not None:
        return Score(math.nan, False, ids, (), num_context, output.num_cached_tokens, output.error)
    found = [
        entry[token] for token, entry in zip(ids, (output.prompt_logprobs or [])[num_context:], strict=True) if entry
    ]
    logprobs = tuple(entry.logprob for entry in found)
    greedy = all(entry.rank == 1 for entry in found)
    return Score(math.fsum(logprobs), greedy, ids, logprobs, num_context, output.num_cached_tokens)


def _pair(context: Any, continuation: Any, tokenizer: ScoreTokenizer, index: int) -> tuple[list[int], list[int]]:
    context, continuation = _plain(context), _plain(continuation)
    if isinstance(context, str) != isinstance(continuation, str):
        raise ParameterError(f"continuations[{index}]", "must be text after text, or token ids after token ids")
    if not isinstance(context, str):
        ids, rest = list(context), list(continuation)
    else:
        ids, rest = _split(context, continuation, tokenizer)
    if not ids:
        ids = [_beginning(tokenizer, index)]
        rest = rest[1:] if isinstance(context, str) and rest[:1] == ids else rest  # BOS is the context, not scored
    return ids, rest


def _split(context: str, continuation: str, tokenizer: ScoreTokenizer) -> tuple[list[int], list[int]]:
    """Encoded together and cut, so that the tokens are those of the whole text. Spaces between the two belong to the
    continuation, whose tokens carry them in front (as in EleutherAI's lm-evaluation-harness). Where the seam would
    vanish inside a token, the two are encoded apart."""
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    ids = tokenizer.encode(kept) if kept else []
    whole = tokenizer.encode(kept + continuation)
    if whole[: len(ids)] == ids:
        return ids, whole[len(ids) :]
    return ids, tokenizer.encode(continuation, add_special_tokens=False)


def _beginning(tokenizer: ScoreTokenizer, index: int) -> int:
    """The token before a document's first."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    for token in tokenizer.eos_token_ids:
        return token
    raise ParameterError(f"contexts[{index}]", "is empty, and the model has no token that begins a document")


def _plain(prompt: Any) -> Any:
    """Text or ids of any form of prompt."""
    if isinstance(prompt, Mapping):
        return prompt["prompt"] if "prompt" in prompt else prompt.get("prompt_token_ids", ())
    return prompt


def _list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ParameterError("continuations", f"must be texts or lists of token ids, got {type(prompts).__name__}")
    items = list(prompts)
    if items and isinstance(items[0], int) and not isinstance(items[0], bool):
        raise ParameterError("continuations", "is a list of integers; for one list of token ids give [[...]]")
    return items

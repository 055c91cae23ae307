"""Where this engine and another one part, and why: prompt by prompt, with the margin at the first different token."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from liushui.core.request import SamplingParams
from liushui.engine.llm import LLM
from liushui.engine.outputs import RequestOutput, TokenLogprob
from liushui.errors import LiushuiError
from liushui.kernels.arrays import type_name

Cause = Literal["same", "tie", "numerics", "template", "tokenisation", "bug", "error"]
FAULTS = ("template", "tokenisation", "bug", "error")
"""Causes that somebody must look at; a tie within rounding can go either way, and numerics explain the rest."""


class Peer(Protocol):
    """The other side: text to ids to logits, in float32."""

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt's text for a conversation. Raises `LiushuiError` where its template has none."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def logits(self, ids: Sequence[int], first: int) -> torch.Tensor:
        """[len(ids) - first, vocab] float32: rows that predict positions first + 1 and on."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt: a conversation, a text, or token ids."""

    messages: Sequence[Mapping[str, Any]] | None = None
    text: str | None = None
    ids: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What rounding explains, in logits."""

    tie: float
    """Two tokens closer than this may swap."""
    error: float
    """Log-probabilities further apart than this are no rounding."""


FLOAT32 = Limits(tie=1e-3, error=0.05)
BFLOAT16 = Limits(tie=0.125, error=0.75)
BLOCKS = Limits(tie=0.02, error=0.05)
"""Rows rounded to 16 bits for products with the file's own blocks (seen with the default model: 0.003)."""
QUANTISED = Limits(tie=0.25, error=1.0)
"""Weights that are quantised at load are others than the peer's: what they differ by is mostly their own."""


def limits_of(runner: Any) -> Limits:
    """For what a runner computes with."""
    if getattr(runner, "quantised", False):
        return QUANTISED
    if type_name(runner.dtype) == "bfloat16":
        return BFLOAT16
    return BLOCKS if getattr(runner, "in_blocks", False) else FLOAT32


@dataclass(frozen=True, slots=True)
class Comparison:
    """What became of one prompt."""

    index: int
    cause: Cause
    compared: int = 0
    """Answer tokens that are the same, from the first on."""
    position: int | None = None
    """Of the first difference: in the answer; for `tokenisation` in the prompt, for `template` a character."""
    ours: str = ""
    theirs: str = ""
    margin: float | None = None
    """Their logit of their token less that of ours, at the first different token."""
    error: float | None = None
    """Largest difference of log-probabilities of the answer's tokens up to there."""

    @property
    def passed(self) -> bool:
        return self.cause not in FAULTS


def diff(llm: LLM, peer: Peer, questions: Sequence[Question], max_tokens: int, limits: Limits) -> Iterator[Comparison]:
    """Compare greedy answers, in the order of `questions`. The peer reads each of ours once: up to the first difference
    both would say the same. What one of the two cannot answer is that prompt's `error` and stops no other."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=1).giving(SamplingParams.names())
    prompts = [_prompt(llm, question) for question in questions]
    asked = [index for index, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    answered = llm.generate_iter([prompts[index] for index in asked], params)
    outputs = {asked[output.index]: output for output in answered}
    for index, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        if isinstance(prompt, str):
            yield Comparison(index, "error", ours=prompt)
        elif (error := outputs[index].error) is not None:
            yield Comparison(index, "error", ours=error)
        else:
            output = replace(outputs[index], index=index)
            yield _before(llm, peer, question, output) or _answers(llm, peer, output, limits)


def _prompt(llm: LLM, question: Question) -> list[int] | str:
    """Token ids, or why there are none."""
    try:
        if question.messages is not None:
            return llm.tokenizer.chat(question.messages)[1]
        return list(question.ids) if question.ids is not None else llm.tokenizer.encode(question.text or "")
    except LiushuiError as error:
        return str(error)


def _before(llm: LLM, peer: Peer, question: Question, output: RequestOutput) -> Comparison | None:
    """A difference in the prompt itself."""
    if question.ids is not None:
        return None
    text, special = question.text or "", True
    if question.messages is not None:
        text, special = llm.tokenizer.chat(question.messages)[0], False
        try:
            other = peer.render(question.messages)
        except LiushuiError as error:
            return Comparison(output.index, "template", 0, 0, text[:20], str(error))
        if other != text:
            at = _first(text, other)
            return Comparison(output.index, "template", 0, at, text[at : at + 20], other[at : at + 20])
    theirs = peer.encode(text, special)
    if theirs == output.prompt_token_ids:
        return None
    at = _first(output.prompt_token_ids, theirs)
    ours, others = (" ".join(map(_quoted(llm), ids[at : at + 3])) for ids in (output.prompt_token_ids, theirs))
    return Comparison(output.index, "tokenisation", 0, at, ours, others)


def _answers(llm: LLM, peer: Peer, output: RequestOutput, limits: Limits) -> Comparison:
    """The first token that the peer would have chosen otherwise, and what explains it."""
    answer, num_prompt = output.outputs[0], len(output.prompt_token_ids)
    entries: Sequence[TokenLogprob] = answer.logprobs or ()
    rows = peer.logits([*output.prompt_token_ids, *answer.token_ids[:-1]], num_prompt - 1)
    error = 0.0
    for place, (token, row, entry) in enumerate(zip(answer.token_ids, rows, entries, strict=True)):
        error = max(error, abs(entry[token].logprob - float(row.log_softmax(dim=-1)[token])))
        best = int(row.argmax(dim=-1))
        if best != token:
            margin = float(row[best] - row[token])
            names = _quoted(llm)(token), _quoted(llm)(best)
            return Comparison(output.index, _cause(margin, error, limits), place, place, *names, margin, error)
    cause: Cause = "same" if error <= limits.error else "bug"
    return Comparison(output.index, cause, len(answer.token_ids), error=error)


def _cause(margin: float, error: float, limits: Limits) -> Cause:
    if error > limits.error:
        return "bug"
    if margin <= limits.tie:
        return "tie"
    return "numerics" if margin <= 2 * error else "bug"


def _first(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Index of the first difference."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def _quoted(llm: LLM) -> Any:
    return lambda token: f"{llm.tokenizer.id_to_text(token)!r} ({token})"

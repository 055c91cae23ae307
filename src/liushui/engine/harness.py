"""EleutherAI's lm-evaluation-harness on this engine (`pip install 'liushui[eval]'`).

import lm_eval
from liushui import LLM
from liushui.engine.harness import HarnessLM

lm_eval.simple_evaluate(HarnessLM(LLM("smollm2")), tasks=["arc_easy"], limit=100)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM

from liushui.core.request import SamplingParams
from liushui.engine.llm import LLM
from liushui.errors import LiushuiError, ParameterError

MAX_NEW = 256
"""Tokens of an answer, where the task does not say."""


class HarnessLM(LM):  # type: ignore[misc]  # lm-eval need not be installed
    """Scores are those of `LLM.score`: the same bits whatever is evaluated beside them.

    Nothing is truncated: a text too long for the model raises `CapacityError`, except in `loglikelihood_rolling`, whose
    texts go through in windows.
    """

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm

    @property
    def tokenizer_name(self) -> str:
        return self.llm.config.model.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.llm.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        return self.llm.tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each (context, continuation)."""
        pairs = [request.args for request in requests]
        return self._score([pair[0] for pair in pairs], [pair[1] for pair in pairs], disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text as a document."""
        owners, contexts, continuations = [], [], []
        for number, request in enumerate(requests):
            for context, continuation in self._windows(request.args[0]):
                owners.append(number)
                contexts.append(context)
                continuations.append(continuation)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._score(contexts, continuations, disable_tqdm), strict=True):
            sums[number] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each (context, settings)."""
        prompts = [request.args[0] for request in requests]
        params = [sampling(request.args[1]) for request in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        for output in outputs:
            _raise(output.error)
        return [output.outputs[0].text for output in outputs]

    def _score(self, contexts: list[Any], continuations: list[Any], quiet: bool) -> list[tuple[float, bool]]:
        scores = self.llm.score(contexts, continuations, use_tqdm=not quiet)
        for score in scores:
            _raise(score.error)
        return [(score.logprob, score.is_greedy) for score in scores]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Each token once, as the second part of a pair no longer than the model's context; the first part of a later
        pair is one token, that of the last as many as fit."""
        ids = self.llm.tokenizer.encode(text, add_special_tokens=False)
        longest = self.llm.engine.inputs.limits.longest - 1
        windows: list[tuple[list[int], list[int]]] = [([], ids[: longest - 1])]  # [] is the beginning of a document
        for start in range(longest - 1, len(ids), longest - 1):
            end = min(start + longest - 1, len(ids))
            windows.append((ids[max(end - longest, 0) : start], ids[start:end]))
        return [window for window in windows if window[1]]


def sampling(settings: Mapping[str, Any]) -> SamplingParams:
    """The harness's names. Raises `ParameterError` for a setting that cannot be honoured."""
    left = dict(settings)
    until, drawn = left.pop("until", ()), bool(left.pop("do_sample", False))
    length = left.pop("max_gen_toks", None) or left.pop("max_new_tokens", None) or MAX_NEW
    known = {name: left.pop(name) for name in ("top_p", "top_k", "min_p", "seed") if name in left}
    temperature = left.pop("temperature", 1.0 if drawn else 0.0)
    if left:
        raise ParameterError(next(iter(left)), "is a generation setting that is not supported")
    return SamplingParams(
        temperature=temperature if drawn or temperature else 0.0, stop=until or None, max_tokens=int(length), **known
    )


def _raise(error: str | None) -> None:
    if error is not None:
        raise LiushuiError(error)

"""Sampling defaults that a model's files suggest: generation_config.json, or a GGUF file's `general.sampling.*`.

They are always reported and used only when asked (`EngineConfig.generation_config`), and then only for what a request
leaves open.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liushui.core.request import SamplingParams
from liushui.errors import ModelError, ParameterError

_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
"""transformers' name -> ours, where the two mean the same."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "diversity_penalty": (0.0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({},),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "max_length": (20,),
    "min_length": (0,),
    "mirostat": (0,),
    "xtc_probability": (0.0,),
}
"""What changes answers and is not done here, with the values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class Suggestions:
    """What the files say about sampling."""

    values: Mapping[str, Any]
    """Fields of `SamplingParams`."""
    beyond: Mapping[str, Any]
    """Settings under the files' names that cannot be honoured, and are not."""

    @classmethod
    def read(cls, generation_config: Mapping[str, Any]) -> "Suggestions":
        """Keys as in transformers' GenerationConfig. `do_sample: false` is a temperature of 0."""
        values = {
            name: generation_config[key] for key, name in _FIELDS.items() if generation_config.get(key) is not None
        }
        if generation_config.get("do_sample") is False:
            values["temperature"] = 0.0
        beyond = {
            key: generation_config[key]
            for key, neutral in _NEUTRAL.items()
            if generation_config.get(key) is not None and generation_config[key] not in neutral
        }
        return cls(values, beyond)

    def checked(self) -> Mapping[str, Any]:
        """`values`, if they can be honoured. Raises `ModelError` naming the one that cannot."""
        try:
            SamplingParams(**self.values)
        except ParameterError as error:
            raise ModelError(
                f"generation_config: the model's files suggest what cannot be honoured: {error}; choose none"
            ) from None
        return self.values

    def line(self, choice: str) -> str:
        """For the start-up report. `choice`: `EngineConfig.generation_config`."""
        found, left = _listed(self.values), _listed(self.beyond)
        if choice == "auto":
            used = f"where a request leaves it open, as the model's files suggest: {found}" if found else ""
            used = used or "as given (the model's files suggest nothing that could be used)"
            return f"sampling: {used}" + (f"; not supported and not applied: {left}" if left else "")
        if not found and not left:
            return "sampling: SamplingParams as given (the model's files suggest nothing else)"
        everything = ", ".join(filter(None, (found, left)))
        return (
            f"sampling: SamplingParams as given; not applied, though the model's files suggest it: {everything} "
            "(generation_config auto applies what is supported)"
        )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())

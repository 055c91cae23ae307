"""liushui (流水席, the running banquet): an LLM inference engine.

    from liushui import LLM, SamplingParams

    llm = LLM("smollm2")
    for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8)):
        print(output.outputs[0].text)

Names are imported when first used, so that `import liushui` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LLM": "liushui.engine.llm",
    "SamplingParams": "liushui.core.request",
    "FinishReason": "liushui.core.request",
    "EngineConfig": "liushui.config",
    "RequestOutput": "liushui.engine.outputs",
    "CompletionOutput": "liushui.engine.outputs",
    "RequestTimings": "liushui.engine.outputs",
    "Score": "liushui.engine.score",
    "StreamDelta": "liushui.engine.outputs",
    "Logprob": "liushui.engine.outputs",
    "LiushuiError": "liushui.errors",
    "ParameterError": "liushui.errors",
    "CapacityError": "liushui.errors",
    "ModelError": "liushui.errors",
    "WeightError": "liushui.errors",
}

__all__ = [
    "LLM",
    "CapacityError",
    "CompletionOutput",
    "EngineConfig",
    "FinishReason",
    "LiushuiError",
    "Logprob",
    "ModelError",
    "ParameterError",
    "RequestOutput",
    "RequestTimings",
    "SamplingParams",
    "Score",
    "StreamDelta",
    "WeightError",
]

if TYPE_CHECKING:
    from liushui.config import EngineConfig
    from liushui.core.request import FinishReason, SamplingParams
    from liushui.engine.llm import LLM
    from liushui.engine.outputs import CompletionOutput, Logprob, RequestOutput, RequestTimings, StreamDelta
    from liushui.engine.score import Score
    from liushui.errors import CapacityError, LiushuiError, ModelError, ParameterError, WeightError


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'liushui' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

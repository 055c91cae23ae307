"""The process of one contender: `contender.py MODE JSON`. Started by the benchmarks, not by hand.

probe    what the engine makes of a model name: path, vocabulary, arithmetic
run      load, warm up, serve the workload once, print a Result as JSON
startup  load, answer one prompt, print the first token (the caller holds the clock)
"""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Spec, Workload, make_workload

WARM_UP_REQUESTS = 4
WARM_UP_TOKENS = 4
STARTUP_PROMPT = "The capital of France is"


def main() -> None:
    mode, payload = sys.argv[1], json.loads(sys.argv[2])
    if mode == "probe":
        print(json.dumps(probe(**payload)))
    elif mode == "run":
        spec = Spec(**payload)
        run = run_liushui if spec.kind == "liushui" else run_transformers
        print(json.dumps(run(spec, make_workload(spec.requests, spec.vocab_size))))
    elif mode == "startup":
        (startup_liushui if payload["kind"] == "liushui" else startup_transformers)(payload)
    else:
        raise SystemExit(f"unknown mode {mode!r}: probe, run or startup")


def probe(model: str, dtype: str) -> dict[str, Any]:
    from liushui.loading import open_checkpoint, resolve
    from liushui.runner.hardware import default_threads, pick_dtype

    path = resolve(model)
    checkpoint = open_checkpoint(path)
    return {
        "path": str(path),
        "vocab_size": checkpoint.config["vocab_size"],
        "files": checkpoint.describe(),
        "dtype": str(pick_dtype(dtype)).removeprefix("torch."),
        "threads": default_threads(),
    }


def load_liushui(model: str, dtype: str, **settings: Any) -> Any:
    """The engine on the processor, where the peer runs too."""
    from liushui import LLM, EngineConfig

    if "device" in EngineConfig.names():
        settings["device"] = "cpu"
    return LLM(model, dtype=dtype, **settings)


def run_liushui(spec: Spec, workload: Workload) -> dict[str, Any]:
    from liushui import SamplingParams

    def greedy(count: int) -> SamplingParams:
        return SamplingParams(temperature=0, ignore_eos=True, max_tokens=count)

    llm = load_liushui(spec.model, spec.dtype, policy=spec.policy, numerics=spec.numerics, max_num_seqs=spec.batch)
    warm_up = make_workload(WARM_UP_REQUESTS, spec.vocab_size, seed=1)
    llm.generate(_prompts(warm_up), greedy(WARM_UP_TOKENS), use_tqdm=False)

    clock = llm.engine.clock
    start = clock()
    outputs = llm.generate(_prompts(workload), [greedy(n) for n in workload.output_lengths], use_tqdm=False)
    seconds = clock() - start
    for output in outputs:
        if output.error is not None:
            raise SystemExit(f"request {output.index}: {output.error}")
    return _result(
        seconds,
        [output.outputs[0].token_ids for output in outputs],
        first_token=[output.timings.first_token - start for output in outputs],
        completion=[output.timings.finished - start for output in outputs],
        dtype=str(llm.engine.executor.dtype).removeprefix("torch."),
        notes=llm.startup_report(),
    )


def _prompts(workload: Workload) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": list(prompt)} for prompt in workload.prompts]


def run_transformers(spec: Spec, workload: Workload) -> dict[str, Any]:
    """Static batches in order of arrival: pad on the left, generate as long as the longest answer asks.

    Only the requested tokens count. A streamer notes the time of each batch's first token, which
    flatters `generate`: without one it hands over nothing before the whole batch has ended.
    """
    import torch

    model = load_transformers(spec.model, spec.dtype)
    warm_up = make_workload(min(WARM_UP_REQUESTS, spec.batch), spec.vocab_size, seed=1)
    generate_batch(model, warm_up.prompts, WARM_UP_TOKENS)

    answers: list[Sequence[int]] = []
    first_token: list[float] = []
    completion: list[float] = []
    start = time.monotonic()
    for begin in range(0, len(workload.prompts), spec.batch):
        prompts = workload.prompts[begin : begin + spec.batch]
        lengths = workload.output_lengths[begin : begin + spec.batch]
        tokens, first = generate_batch(model, prompts, max(lengths))
        done = time.monotonic() - start
        answers += [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        first_token += [first - start] * len(prompts)
        completion += [done] * len(prompts)
    seconds = time.monotonic() - start
    notes = [f"{model.config._attn_implementation} attention, {torch.get_num_threads()} threads"]
    return _result(seconds, answers, first_token, completion, spec.dtype, notes)


def load_transformers(model: str, dtype: str) -> Any:
    """A causal language model from a folder or a GGUF file, in dense weights of `dtype`, ready to generate."""
    import torch
    import transformers

    where, options = _source(model)
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)  # packed weights are slower
    loaded = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **options)
    loaded.generation_config.eos_token_id = None
    return loaded.eval()


def _source(model: str) -> tuple[Path, dict[str, Any]]:
    """Where `from_pretrained` finds it, and what else it must be told."""
    path = Path(model)
    return (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})


def generate_batch(model: Any, prompts: Sequence[Sequence[int]], count: int) -> tuple[list[list[int]], float]:
    """`count` greedy tokens for each prompt, and the time (monotonic clock) of the first."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """`generate` puts the prompt first, then the new tokens of each step."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.monotonic())

        def end(self) -> None:
            pass

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    clock = Clock()
    with torch.inference_mode():
        tokens = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, streamer=clock
        )
    return tokens[:, width:].tolist(), clock.times[1]


def startup_liushui(payload: dict[str, Any]) -> None:
    from liushui import SamplingParams

    llm = load_liushui(payload["model"], payload["dtype"])
    [output] = llm.generate([STARTUP_PROMPT], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    print(repr(output.outputs[0].text), flush=True)


def startup_transformers(payload: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    where, options = _source(payload["model"])
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    model = load_transformers(payload["model"], payload["dtype"])
    [tokens], _ = generate_batch(model, [tokenizer(STARTUP_PROMPT)["input_ids"]], 1)
    print(repr(tokenizer.decode(tokens)), flush=True)


def _result(
    seconds: float,
    answers: Sequence[Sequence[int]],
    first_token: list[float],
    completion: list[float],
    dtype: str,
    notes: list[str],
) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "output_tokens": sum(map(len, answers)),
        "first_token": first_token,
        "completion": completion,
        "peak_mib": own_peak_mib(),
        "dtype": dtype,
        "notes": notes,
        "answers": [hashlib.sha256(repr(list(answer)).encode()).hexdigest()[:16] for answer in answers],
    }


def own_peak_mib() -> float:
    """Of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB


if __name__ == "__main__":
    main()

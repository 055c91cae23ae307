"""The process of one contender of cpu.py: `cpu_engines.py JSON`. Loads, warms up, runs the workloads, prints JSON.

    python benchmarks/cpu_engines.py '{"mode": "export", "model": "MODEL.gguf", "folder": "OUT"}'

writes a GGUF file's model as a folder, as optimum-intel's export for OpenVINO wants it.

Every engine is driven the way its own documentation serves many requests; token ids go in and come out, greedy, end
of text ignored. Engines are imported inside their classes, so that a process pays for its own alone.
"""

import hashlib
import json
import mmap
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from common import Workload, make_workload
from contender import generate_batch, load_transformers, own_peak_mib

SINGLE_PROMPT, SINGLE_OUTPUT, PREFILL_TOKENS, COMPANY_TOKENS = 128, 128, 2048, 24
STARTUP_PROMPT = "The capital of France is"

Prompts = Sequence[Sequence[int]]


class Contender(Protocol):
    """An engine that is loaded."""

    notes: list[str]

    def generate(self, prompts: Prompts, lengths: Sequence[int]) -> list[list[int]]:
        """Answers of exactly `lengths` tokens; all prompts arrive at once."""
        ...

    def close(self) -> None: ...

    def peak_mib(self) -> float: ...


def peak_mib_of(pid: int) -> float:
    """Of another process (Linux); 0 of one that has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def descendants(pid: int) -> list[int]:
    """The processes that it has started, and those that they have (Linux; none elsewhere)."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(word) for path in lists for word in path.read_text().split()]
    return children + [far for child in children for far in descendants(child)]


class InProcess:
    """An engine that lives in this process."""

    notes: list[str]

    def close(self) -> None:
        pass

    def peak_mib(self) -> float:
        """Of this process, by its own count, and of those that it has started."""
        return own_peak_mib() + sum(peak_mib_of(pid) for pid in descendants(os.getpid()))


class Liushui(InProcess):
    def __init__(self, model: str, form: str, threads: int) -> None:
        from liushui import LLM

        self.llm = LLM(model, threads=threads, device="cpu", prefix_caching=False, weights=form)
        self.notes = self.llm.startup_report()
        self.gaps: list[float] = []
        self.step = self.llm.engine.executor.host.whole  # type: ignore[attr-defined]

    def profiled(self, work: Callable[[], float]) -> dict[str, Any]:
        """Seconds of `work`, of its steps in the native call, and of their parts: worked, waited."""
        if self.step is None:
            raise SystemExit("--profile: this model does not run in whole native steps")
        self.step.watch()
        seconds, times = work(), self.step.times()
        parts = {time.part: [time.worked, time.waited] for time in times.parts}
        return {"seconds": seconds, "steps": times.steps, "rows": times.rows, "native": times.seconds, "parts": parts}

    def generate(self, prompts: Prompts, lengths: Sequence[int]) -> list[list[int]]:
        from liushui import SamplingParams

        asked = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in lengths]
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], asked, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise SystemExit(f"request {output.index}: {output.error}")
        self.gaps = [output.timings.inter_token for output in outputs if output.timings.inter_token]
        return [list(output.outputs[0].token_ids) for output in outputs]

    def startup(self) -> str:
        from liushui import SamplingParams

        [output] = self.llm.generate([STARTUP_PROMPT], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        return output.outputs[0].text


class Transformers(InProcess):
    """`generate` in static batches in order of arrival, as long as the longest answer asks."""

    batch = 64

    def __init__(self, model: str, form: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.model = load_transformers(model, form)
        self.notes = [f"{self.model.config._attn_implementation} attention, {torch.get_num_threads()} threads"]

    def generate(self, prompts: Prompts, lengths: Sequence[int]) -> list[list[int]]:
        answers: list[list[int]] = []
        for begin in range(0, len(prompts), self.batch):
            wanted = lengths[begin : begin + self.batch]
            tokens, _ = generate_batch(self.model, prompts[begin : begin + self.batch], max(wanted))
            answers += [row[:n] for row, n in zip(tokens, wanted, strict=True)]
        return answers


class LlamaServer:
    """llama.cpp's own server with a slot per request."""

    program = "llama-server"

    slots = 64
    context = 4096
    """Tokens that the slots hold together: `context_for` the workloads."""

    def __init__(self, model: str, form: str, threads: int) -> None:
        options = ["-m", model, "-t", str(threads), "-np", str(self.slots), "-c", str(self.context), "--kv-unified"]
        failures = []
        for extra in ((), ("--no-repack",)):  # its AMX layout ends some builds at the first step (of gcc 12, say)
            failure = self._start([self.program, *options, *extra])
            if failure is None:
                self.notes = [shlex.join(["llama-server", *options[2:], *extra])]
                return
            failures.append(failure)
        raise SystemExit(f"the server did not start: {failures[0]}")

    def _start(self, command: list[str]) -> str | None:
        """None once it answers, or else how it ended."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            host, port = probe.getsockname()
        self.address = f"http://{host}:{port}"
        log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        self.process = subprocess.Popen([*command, "--host", host, "--port", str(port)], stdout=log, stderr=log)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=1).read()  # noqa: S310
                return None
            except OSError:
                time.sleep(0.1)
            if self.process.poll() is not None:
                break
        self.close()
        log.seek(0)
        return f"status {self.process.returncode}\n{log.read()[-1500:].decode(errors='replace')}"

    def _ask(self, prompt: Sequence[int], length: int) -> list[int]:
        body = {"prompt": list(prompt), "n_predict": length, "temperature": 0, "ignore_eos": True}
        body |= {"cache_prompt": False, "return_tokens": True, "top_k": 1}
        request = urllib.request.Request(  # noqa: S310
            f"{self.address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return list(json.load(urllib.request.urlopen(request, timeout=600))["tokens"])  # noqa: S310

    def generate(self, prompts: Prompts, lengths: Sequence[int]) -> list[list[int]]:
        with ThreadPoolExecutor(self.slots) as pool:
            return list(pool.map(self._ask, prompts, lengths))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()

    def peak_mib(self) -> float:
        return peak_mib_of(self.process.pid)


class LlamaPython(InProcess):
    """llama-cpp-python: one request after the other."""

    def __init__(self, model: str, form: str, threads: int) -> None:
        from llama_cpp import Llama

        self.llm = Llama(model, n_ctx=4096, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
        self.notes = ["one request at a time"]

    def generate(self, prompts: Prompts, lengths: Sequence[int]) -> list[list[int]]:
        answers = []
        for prompt, length in zip(prompts, lengths, strict=True):
            self.llm.reset()
            stream = self.llm.generate(list(prompt), temp=0.0, reset=True)
            answers.append([next(stream) for _ in range(length)])
        return answers


class Vllm(InProcess):
    def __init__(self, model: str, form: str, threads: int) -> None:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "-".join(("0", str(threads - 1))) if threads > 1 else "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        from vllm import LLM

        options = {"max_num_seqs": 64, "max_model_len": 4096, "enable_prefix_caching": False}
        self.llm = LLM(model, dtype=form, skip_tokenizer_init=True, **options)
        self.notes = ["max_num_seqs 64, no prefix cache"]

    def generate(self, prompts: Prompts, lengths: Sequence[int]) -> list[list[int]]:
        from vllm import SamplingParams

        asked = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in lengths]
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], asked, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


class OpenVino(InProcess):
    """GenAI's continuous batching on a folder that optimum-intel exported."""

    def __init__(self, model: str, form: str, threads: int) -> None:
        import openvino_genai

        self.genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs, scheduler.enable_prefix_caching = 2, 64, False
        self.pipe = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.notes = ["continuous batching, max_num_seqs 64, no prefix cache"]

    def generate(self, prompts: Prompts, lengths: Sequence[int]) -> list[list[int]]:
        import numpy as np
        import openvino

        asked = []
        for length in lengths:
            config = self.genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
            asked.append(config)
        ids = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        return [list(result.m_generation_ids[0]) for result in self.pipe.generate(ids, asked)]


KINDS: dict[str, Any] = {
    "liushui": Liushui,
    "transformers": Transformers,
    "llama-server": LlamaServer,
    "llama-cpp-python": LlamaPython,
    "vllm": Vllm,
    "openvino": OpenVino,
}


def timed(contender: Contender, prompts: Prompts, lengths: Sequence[int]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    answers = contender.generate(prompts, lengths)
    seconds = time.perf_counter() - start
    short = [i for i, (answer, n) in enumerate(zip(answers, lengths, strict=True)) if len(answer) != n]
    if short:
        raise SystemExit(f"{len(short)} answers have not the length that was asked for")
    return seconds, answers


def prompt_of(length: int, vocab_size: int, seed: int) -> list[int]:
    import random

    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(length)]


def run(contender: Contender, workloads: Sequence[str], load: Workload, vocab_size: int) -> dict[str, Any]:
    """Each workload once; seconds, and what goes with them."""
    found: dict[str, Any] = {}
    timed(contender, [prompt_of(40, vocab_size, seed) for seed in range(4)], [4] * 4)
    if "single" in workloads:
        prompt = prompt_of(SINGLE_PROMPT, vocab_size, 5)
        first = statistics.median(timed(contender, [prompt], [1])[0] for _ in range(3))
        seconds, _ = timed(contender, [prompt], [SINGLE_OUTPUT])
        found["single"] = {"seconds": seconds, "first": first}
    if "prefill" in workloads:
        prompt = prompt_of(PREFILL_TOKENS, vocab_size, 6)
        found["prefill"] = min(timed(contender, [prompt], [1])[0] for _ in range(2))
    if "offline" in workloads:
        seconds, answers = timed(contender, load.prompts, load.output_lengths)
        found["offline"] = seconds
        found["answers"] = [hashlib.sha256(repr(answer).encode()).hexdigest()[:16] for answer in answers]
    if "company" in workloads:
        lengths = [COMPANY_TOKENS] * len(load.prompts)
        together = timed(contender, load.prompts, lengths)[1]
        alone = [timed(contender, [prompt], [COMPANY_TOKENS])[1][0] for prompt in load.prompts]
        found["changed"] = sum(a != b for a, b in zip(alone, together, strict=True))
    return found


def profile(contender: Liushui, workloads: Sequence[str], load: Workload, vocab_size: int) -> dict[str, Any]:
    """Of each workload, once more and watched: where the steps' time goes."""
    single, prefill = [prompt_of(SINGLE_PROMPT, vocab_size, 5)], [prompt_of(PREFILL_TOKENS, vocab_size, 6)]
    works: dict[str, Callable[[], float]] = {
        "single": lambda: timed(contender, single, [SINGLE_OUTPUT])[0],
        "prefill": lambda: timed(contender, prefill, [1])[0],
        "offline": lambda: timed(contender, load.prompts, load.output_lengths)[0],
    }
    return {name: contender.profiled(work) for name, work in works.items() if name in workloads}


def context_for(workloads: Sequence[str], load: Workload) -> int:
    """Tokens that are in the batch at once, at most."""
    together = load.input_tokens + load.output_tokens if {"offline", "company"} & set(workloads) else 0
    return -(-max(together, PREFILL_TOKENS + COMPANY_TOKENS) // 1024) * 1024


def pace(threads: int) -> dict[str, float]:
    """How fast the machine is now: TFLOP/s of a product that stays in caches, GB/s of memory read, both with all
    threads; nanoseconds of an addition in a Python loop."""
    import torch

    from liushui.runner.hardware import has_bfloat16

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    a, b = torch.randn(512, 576).to(dtype), torch.randn(3072, 576).to(dtype)
    pages = mmap.mmap(-1, 256 * 2**20)  # no cache holds them
    if hasattr(mmap, "MADV_HUGEPAGE"):  # with small ones it is the pages' table that is measured
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.float32).fill_(1)

    def best(function: Callable[[], object], seconds: float) -> float:
        least, end = float("inf"), time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            function()
            least = min(least, time.perf_counter() - start)
        return least

    return {
        "product_tflops": 2 * 512 * 576 * 3072 / best(lambda: torch.nn.functional.linear(a, b), 0.2) / 1e12,
        "read_gbs": memory.nbytes / best(memory.max, 0.3) / 1e9,
        "adds_ns": best(lambda: sum(range(10_000)), 0.02) / 10_000 * 1e9,
    }


def startup(payload: dict[str, Any]) -> None:
    """From the start of this process to the first token of a text prompt (the caller holds the clock)."""
    contender = KINDS[payload["kind"]](payload["model"], payload["form"], payload["threads"])
    if payload["kind"] == "liushui":
        print(repr(contender.startup()), flush=True)
    else:
        print(contender.generate([prompt_of(5, payload["vocab_size"], 7)], [1]), flush=True)
    contender.close()


def export(payload: dict[str, Any]) -> None:
    """The model and its tokenizer as a folder in the Hugging Face layout, for engines that read nothing else."""
    from transformers import AutoTokenizer

    file = Path(payload["model"])
    load_transformers(payload["model"], "bfloat16").save_pretrained(payload["folder"])
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(payload["folder"])
    print(payload["folder"])


def main() -> None:
    payload = json.loads(sys.argv[1])
    LlamaServer.program = payload.get("program") or LlamaServer.program
    if payload["mode"] == "startup":
        return startup(payload)
    if payload["mode"] == "export":
        return export(payload)
    if payload["mode"] == "pace":
        return print(json.dumps(pace(payload["threads"])))
    load = make_workload(payload["requests"], payload["vocab_size"])
    LlamaServer.context = context_for(payload["workloads"], load)
    contender = KINDS[payload["kind"]](payload["model"], payload["form"], payload["threads"])
    try:
        found = run(contender, payload["workloads"], load, payload["vocab_size"])
        if payload.get("profile") and isinstance(contender, Liushui):
            found["profile"] = profile(contender, payload["workloads"], load, payload["vocab_size"])
        print(json.dumps(found | {"peak_mib": contender.peak_mib(), "notes": contender.notes}))
    finally:
        contender.close()
    return None


if __name__ == "__main__":
    main()

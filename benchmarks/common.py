"""What every benchmark here shares: the workload, the machine's description, fresh processes, the table.

This module must stay light (standard library only). A child's peak memory, as the kernel reports it,
starts from its parent's: a parent that had loaded torch would be charged to every contender.
"""

import argparse
import fcntl
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

CONTENDER = Path(__file__).with_name("contender.py")
BF16_FLAGS = ("amx_bf16", "avx512_bf16")
SHOWN_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2", "bf16", "asimd")
PROMPT_LENGTHS = (16, 512)
OUTPUT_LENGTHS = (16, 256)
MIN_SAMPLES_FOR_P99 = 100
HF_BATCHES = (8, 16, 32)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that all arrive at time 0: token ids in, a fixed number of tokens out."""

    prompts: tuple[tuple[int, ...], ...]
    output_lengths: tuple[int, ...]

    @property
    def input_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lengths)

    def describe(self) -> str:
        return (
            f"{len(self.prompts)} requests at time 0, {self.input_tokens:,} tokens in "
            f"({PROMPT_LENGTHS[0]} to {PROMPT_LENGTHS[1]} each), {self.output_tokens:,} tokens out "
            f"({OUTPUT_LENGTHS[0]} to {OUTPUT_LENGTHS[1]} each), greedy, end of text ignored"
        )


def make_workload(requests: int, vocab_size: int, seed: int = 0) -> Workload:
    """Draw all prompt lengths, then all output lengths, then the prompts' ids, each uniformly."""
    rng = random.Random(seed)
    prompt_lengths = [rng.randint(*PROMPT_LENGTHS) for _ in range(requests)]
    output_lengths = tuple(rng.randint(*OUTPUT_LENGTHS) for _ in range(requests))
    prompts = tuple(tuple(rng.randrange(vocab_size) for _ in range(length)) for length in prompt_lengths)
    return Workload(prompts, output_lengths)


@dataclass(frozen=True, slots=True)
class Spec:
    """One contender, as its process receives it."""

    label: str
    kind: str
    """liushui | transformers"""
    model: str
    """What `liushui.LLM` is given; for transformers a folder or a GGUF file."""
    dtype: str
    requests: int
    vocab_size: int
    batch: int
    """liushui: max_num_seqs; transformers: requests in a static batch."""
    policy: str = "continuous"
    numerics: str = "invariant"


@dataclass(frozen=True, slots=True)
class Result:
    """What one contender measured in one round. Times are seconds since the requests arrived."""

    seconds: float
    output_tokens: int
    first_token: list[float]
    completion: list[float]
    peak_mib: float
    dtype: str
    answers: list[str]
    """One digest per request, to count equal answers."""
    notes: list[str]
    """What the contender says of itself: kernels, threads, memory."""

    @property
    def rate(self) -> float:
        """Requested output tokens per second."""
        return self.output_tokens / self.seconds


class ChildError(RuntimeError):
    """A contender's process failed; the message carries the end of what it printed."""


def run_child(mode: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Run contender.py in a fresh interpreter and return the JSON object on its last line."""
    command = [sys.executable, str(CONTENDER), mode, json.dumps(payload)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ChildError(f"{mode} {payload} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_spec(spec: Spec) -> Result:
    """One round of one contender, alone in its own process."""
    result = Result(**run_child("run", asdict(spec)))
    expected = make_workload(spec.requests, spec.vocab_size).output_tokens
    if result.output_tokens != expected:
        raise ChildError(f"{spec.label}: {result.output_tokens} tokens came out, {expected} were asked for")
    return result


def time_to_first_line(mode: str, payload: dict[str, Any]) -> float:
    """Seconds from starting a fresh interpreter to its first printed line."""
    command = [sys.executable, str(CONTENDER), mode, json.dumps(payload)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        _, errors = process.communicate()
    if process.returncode != 0 or not line:
        raise ChildError(f"{mode} {payload} ended with status {process.returncode}:\n{errors[-2000:]}")
    return seconds


@contextmanager
def alone(arguments: argparse.Namespace) -> Iterator[None]:
    """Hold the locks asked for, then let the machine rest: others who use it can take turns with the contenders."""
    with ExitStack() as stack:
        for path in arguments.lock:
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
        yield
    time.sleep(arguments.rest)


def interleave(specs: Sequence[Spec], arguments: argparse.Namespace) -> dict[str, list[Result]]:
    """Rounds of A B C, A B C, ...: a slow minute of the machine falls on all contenders alike."""
    rounds = arguments.rounds
    results: dict[str, list[Result]] = {spec.label: [] for spec in specs}
    for number in range(1, rounds + 1):
        for spec in specs:
            with alone(arguments):
                result = run_spec(spec)
            results[spec.label].append(result)
            say(f"round {number}/{rounds}  {spec.label}: {result.rate:.1f} tokens/s, {result.seconds:.1f} s")
    return results


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians over the rounds; p99 is over the requests of all rounds."""

    rate: float
    seconds: float
    mean_first_token: float
    tail_first_token: float
    mean_completion: float
    peak_mib: float
    dtype: str


def summarize(results: Sequence[Result]) -> Summary:
    return Summary(
        rate=median(result.rate for result in results),
        seconds=median(result.seconds for result in results),
        mean_first_token=median(mean(result.first_token) for result in results),
        tail_first_token=tail([value for result in results for value in result.first_token]),
        mean_completion=median(mean(result.completion) for result in results),
        peak_mib=median(result.peak_mib for result in results),
        dtype=results[0].dtype,
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tail(values: Sequence[float]) -> float:
    """p99 by nearest rank; the maximum where fewer than 100 samples would make it a guess."""
    ordered = sorted(values)
    if len(ordered) < MIN_SAMPLES_FOR_P99:
        return ordered[-1]
    return ordered[math.ceil(0.99 * len(ordered)) - 1]


def tail_name(samples: int) -> str:
    return "p99" if samples >= MIN_SAMPLES_FOR_P99 else "max"


def machine() -> dict[str, Any]:
    """The processor and the versions that the figures depend on."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "flags": [flag for flag in SHOWN_FLAGS if flag in flags],
        "bf16_hardware": any(flag in flags for flag in (*BF16_FLAGS, "bf16")),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("liushui", "torch", "transformers")},
    }


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def header(title: str, facts: dict[str, Any]) -> str:
    """Date, command and machine: what a reader needs in order to repeat the run."""
    lines = [
        title,
        f"date      {datetime.now().astimezone().isoformat(timespec='seconds')}",
        f"command   python {shlex.join(sys.argv)}",
        f"machine   {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, "
        f"flags: {' '.join(facts['flags']) or 'none of note'}",
        f"          {facts['system']}, load average at the start {facts['load_average']}",
        f"versions  Python {facts['python']}, liushui {facts['liushui']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}",
    ]
    if facts["load_average"] > facts["cores"] / 4:
        lines.append("BUSY      other work is running here: these figures are not to be quoted")
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text; the first column to the left, figures to the right."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]

    def render(line: Sequence[str]) -> str:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join((line[0].ljust(widths[0]), *cells))

    return "\n".join((render(lines[0]), "  ".join("-" * width for width in widths), *map(render, lines[1:])))


def common_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="smollm2", help="alias, folder or GGUF file (default: %(default)s)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="arithmetic; auto: the engine's own choice (default: %(default)s)",
    )
    add("--requests", type=positive, default=64, help="default: %(default)s")
    add("--rounds", type=positive, default=3, help="default: %(default)s")
    add(
        "--max-num-seqs",
        type=positive,
        default=max(HF_BATCHES),
        help="the engine's widest batch (default: %(default)s, as the widest static batch of the peer)",
    )
    add("--json", type=Path, metavar="OUT", help="also write everything measured to this file")
    add("--lock", type=Path, metavar="FILE", action="append", default=[], help="hold this file's lock while one runs")
    add("--rest", type=float, metavar="S", default=0.0, help="seconds between two runs (default: %(default)s)")


def begin(title: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask the engine about the model, print the report's head; return (machine, what the engine found)."""
    facts = machine()
    say(f"asking the engine about {arguments.model} ...")
    found = run_child("probe", {"model": arguments.model, "dtype": arguments.dtype})
    workload = make_workload(arguments.requests, found["vocab_size"])
    print(header(title, facts))
    print(f"model     {arguments.model}: {found['files']}; engine: {found['dtype']}, {found['threads']} threads")
    print(f"workload  {workload.describe()}")
    print(f"rounds    {arguments.rounds}, interleaved, medians; max_num_seqs {arguments.max_num_seqs}\n", flush=True)
    return facts, found


def engine_spec(label: str, arguments: argparse.Namespace, found: dict[str, Any]) -> Spec:
    """liushui, continuous and invariant."""
    return Spec(
        label=label,
        kind="liushui",
        model=arguments.model,
        dtype=arguments.dtype,
        requests=arguments.requests,
        vocab_size=found["vocab_size"],
        batch=arguments.max_num_seqs,
    )


def notes_of(results: dict[str, list[Result]]) -> str:
    """What each contender said of itself, in its first round."""
    return "\n".join(f"{label}: {note}" for label, rounds in results.items() for note in rounds[0].notes)


def report(
    arguments: argparse.Namespace,
    facts: dict[str, Any],
    found: dict[str, Any],
    results: dict[str, list[Result]],
) -> dict[str, Any]:
    """The JSON document that every benchmark here writes."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "machine": facts,
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "model": found,
        "summaries": {label: asdict(summarize(rounds)) for label, rounds in results.items()},
        "rounds": {label: [asdict(result) for result in rounds] for label, rounds in results.items()},
    }


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def write_json(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        say(f"wrote {path}")


def say(text: str) -> None:
    """Progress, apart from the report on standard output."""
    print(text, file=sys.stderr, flush=True)


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"

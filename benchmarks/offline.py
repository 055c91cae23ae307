"""liushui (continuous and static) beside Hugging Face `generate` in static batches, in one run.

    python benchmarks/offline.py
    python benchmarks/offline.py --requests 8 --rounds 1 --skip-hf      # a first look

Every figure printed is measured in this run. Each contender runs alone, in a fresh process, with its
own peak memory; rounds are interleaved (A B C, A B C, ...) and the table shows medians over them.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from common import (
    HF_BATCHES,
    Result,
    Spec,
    alone,
    begin,
    common_arguments,
    engine_spec,
    interleave,
    notes_of,
    report,
    say,
    summarize,
    table,
    tail_name,
    time_to_first_line,
    write_json,
)

CONTINUOUS, STATIC = "liushui continuous", "liushui static"


def main() -> None:
    arguments = parse()
    facts, found = begin("offline: all requests at once, tokens out per second", arguments)
    specs = contenders(arguments, found, hf_dtypes(found["dtype"], facts["bf16_hardware"]))
    results = interleave(specs, arguments)
    print(throughput_table(results), "\n", flush=True)
    startups = time_startups(specs, arguments)
    print(startup_table(startups), "\n")
    print(notes_of({label: rounds for label, rounds in results.items() if label in (CONTINUOUS, specs[-1].label)}))
    write_json(arguments.json, report(arguments, facts, found, results) | {"startup_seconds": startups})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--skip-hf", action="store_true", help="leave out Hugging Face")
    return parser.parse_args()


def hf_dtypes(engine_dtype: str, bf16_hardware: bool) -> tuple[str, ...]:
    """The engine's dtype; and float32 where bfloat16 would only be emulated, so that the peer is at its best."""
    if engine_dtype == "bfloat16" and not bf16_hardware:
        return ("bfloat16", "float32")
    return (engine_dtype,)


def contenders(arguments: argparse.Namespace, found: Mapping[str, Any], peer_dtypes: Sequence[str]) -> list[Spec]:
    base = engine_spec(CONTINUOUS, arguments, found)
    specs = [base, replace(base, label=STATIC, policy="static")]
    if not arguments.skip_hf:
        specs += [
            replace(
                base,
                label=f"transformers batch {batch}, {dtype}",
                kind="transformers",
                model=found["path"],
                dtype=dtype,
                batch=batch,
            )
            for dtype in peer_dtypes
            for batch in HF_BATCHES
        ]
    return specs


def throughput_table(results: Mapping[str, Sequence[Result]]) -> str:
    """One row per contender; `equal` counts the answers that are liushui continuous's, token for token."""
    summaries = {label: summarize(rounds) for label, rounds in results.items()}
    peers = [summary.rate for label, summary in summaries.items() if label.startswith("transformers")]
    best = max(peers, default=None)
    reference = results[CONTINUOUS][0].answers
    columns = (
        "contender",
        "dtype",
        "tokens/s",
        "/ best HF",
        "first token s",
        f"{tail_name(sum(len(result.first_token) for result in results[CONTINUOUS]))} s",
        "completion s",
        "peak MiB",
        "equal",
    )
    rows = []
    for label, summary in summaries.items():
        equal = sum(a == b for a, b in zip(results[label][0].answers, reference, strict=True))
        rows.append(
            (
                label,
                summary.dtype,
                f"{summary.rate:.1f}",
                f"{summary.rate / best:.2f}" if best else "-",
                f"{summary.mean_first_token:.2f}",
                f"{summary.tail_first_token:.2f}",
                f"{summary.mean_completion:.2f}",
                f"{summary.peak_mib:,.0f}",
                f"{equal}/{len(reference)}",
            )
        )
    return table(columns, rows)


def time_startups(specs: Sequence[Spec], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds from process start to the first token, interleaved; one peer is enough (batch 1)."""
    chosen = [next(spec for spec in specs if spec.kind == "liushui")]
    chosen += [spec for spec in specs if spec.kind == "transformers"][:1]
    seconds: dict[str, list[float]] = {spec.kind: [] for spec in chosen}
    for number in range(1, arguments.rounds + 1):
        for spec in chosen:
            payload = {"kind": spec.kind, "model": spec.model, "dtype": spec.dtype}
            with alone(arguments):
                seconds[spec.kind].append(time_to_first_line("startup", payload))
            say(f"round {number}/{arguments.rounds}  {spec.kind}: first token after {seconds[spec.kind][-1]:.2f} s")
    return seconds


def startup_table(startups: Mapping[str, Sequence[float]]) -> str:
    columns = ("process start to first token", "median s", "least s", "most s")
    rows = [
        (kind, f"{median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}") for kind, values in startups.items()
    ]
    return table(columns, rows)


if __name__ == "__main__":
    main()

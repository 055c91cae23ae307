"""What exactness costs: the engine with numerics="invariant" beside numerics="fast", in one run.

    python benchmarks/invariance_cost.py
    python benchmarks/invariance_cost.py --requests 8 --rounds 1        # a first look

Each contender runs alone, in a fresh process; rounds are interleaved and figures are medians.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace

from common import (
    Result,
    begin,
    common_arguments,
    engine_spec,
    interleave,
    notes_of,
    report,
    summarize,
    table,
    write_json,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    arguments = parser.parse_args()
    facts, found = begin("invariance_cost: answers free of the batch, beside unconstrained products", arguments)
    invariant = engine_spec("invariant", arguments, found)
    results = interleave([invariant, replace(invariant, label="fast", numerics="fast")], arguments)
    print(cost_table(results), "\n")
    print(notes_of(results))
    write_json(arguments.json, report(arguments, facts, found, results))


def cost_table(results: Mapping[str, Sequence[Result]]) -> str:
    summaries = {label: summarize(rounds) for label, rounds in results.items()}
    fast = summaries["fast"].rate
    rows = [
        (
            label,
            summary.dtype,
            f"{summary.rate:.1f}",
            f"{summary.rate / fast:.3f}",
            f"{summary.mean_first_token:.2f}",
            f"{summary.mean_completion:.2f}",
        )
        for label, summary in summaries.items()
    ]
    return table(("numerics", "dtype", "tokens/s", "/ fast", "first token s", "completion s"), rows)


if __name__ == "__main__":
    main()

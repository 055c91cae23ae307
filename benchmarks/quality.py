"""What quantised weights cost in quality: perplexity on shipped texts, beside float32 from the same file.

    python benchmarks/quality.py [--model smollm2] [--forms native int8 int4 bf16] [--threads 2] [--dtype float32]

The texts (src/liushui/data/passages.*.txt) are out of copyright: Melville, Carroll, Austen, Thoreau and Lincoln in
English; Tao Yuanming, the Analects and Lu Xun in Chinese. They are scored in pieces of 256 tokens. Same choice: how
often the most likely next token is that of float32.
"""

import argparse
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from liushui import LLM, SamplingParams
from liushui.config import WeightForm

LANGUAGES = ("en", "zh")
FORMS: tuple[WeightForm, ...] = ("native", "int8", "int4", "bf16")
PIECE = 256


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one text in one form."""

    perplexity: float
    best: tuple[int, ...]
    """The most likely token at each place."""

    def agreement(self, other: "Quality") -> float:
        same = sum(mine == theirs for mine, theirs in zip(self.best, other.best, strict=True))
        return same / len(self.best)


def text(language: str) -> str:
    import liushui

    folder = Path(liushui.__file__).parent / "data"
    return (folder / f"passages.{language}.txt").read_text(encoding="utf-8")


def measure(model: str, form: WeightForm, dtype: str, threads: int | None) -> tuple[dict[str, Quality], list[str]]:
    """The quality for each language, and the start-up report."""
    llm = LLM(model, weights=form, dtype=dtype, threads=threads, kv_cache_gib=0.3, device="cpu")
    found = {}
    for language in LANGUAGES:
        ids = llm.tokenizer.encode(text(language))
        pieces = [ids[start : start + PIECE] for start in range(0, len(ids), PIECE)]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, ignore_eos=True)
        outputs = llm.generate([piece for piece in pieces if len(piece) > 1], params, use_tqdm=False)
        logprobs, best = [], []
        for output in outputs:
            told = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=True)
            for token, place in told:
                logprobs.append(place[token].logprob)
                best.append(min(place, key=lambda candidate: place[candidate].rank))
        found[language] = Quality(math.exp(-math.fsum(logprobs) / len(logprobs)), tuple(best))
    report = llm.startup_report()
    del llm
    gc.collect()
    return found, report


def table(model: str, forms: Sequence[WeightForm], dtype: str, threads: int | None) -> list[str]:
    """Lines of a Markdown table."""
    exact, _ = measure(model, "float32", "float32", threads)
    lines = ["| weights | text | tokens | perplexity | to float32 | same choice |", "|---|---|---|---|---|---|"]
    for form in ("float32", *forms):
        found = exact if form == "float32" else measure(model, form, dtype, threads)[0]
        for language in LANGUAGES:
            mine, theirs = found[language], exact[language]
            change = mine.perplexity / theirs.perplexity - 1
            lines.append(
                f"| {form} | {language} | {len(mine.best)} | {mine.perplexity:.3f} | {change:+.2%} "
                f"| {mine.agreement(theirs):.1%} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--dtype", default="float32", help="of the arithmetic, except for the reference's")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    for line in table(args.model, args.forms, args.dtype, args.threads):
        print(line, flush=True)


if __name__ == "__main__":
    main()

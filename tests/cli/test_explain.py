"""`liushui explain`: what it shows is what the engine did, and the padded way agrees unless a mistake is made."""

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from liushui import LLM, ParameterError, SamplingParams
from liushui.cli.explain_tables import grid
from liushui.cli.explain_words import MISTAKES, NOTES, PADDED_NOTES, WORDS, Words, pick_lang
from liushui.engine.explain import explain
from tests.cli.conftest import Done

TEXTS = ["The sky is", "a", "两个字"]


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), dtype="float32", kv_cache_gib=0.01, threads=1, block_size=4, kernels="torch")


def test_what_is_shown_is_what_happened(llm: LLM) -> None:
    made = explain(llm, TEXTS, max_tokens=6)
    outputs = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=6, logprobs=2), use_tqdm=False)
    for row, output in enumerate(outputs):
        shares = [step.rows for step in made.packed.steps]
        mine = [found for rows in shares for found in rows if found.prompt == row]
        assert [token.id for token in made.packed.answers[row]] == output.outputs[0].token_ids
        fed = [token.id for found in mine for token in found.tokens]
        assert fed == (output.prompt_token_ids + output.outputs[0].token_ids)[: len(fed)]
        assert [place for found in mine for place in found.positions] == list(range(len(fed)))
        for before, after in pairwise(mine):
            assert after.kv_before == before.kv_after
            assert len(after.blocks) == -(-after.kv_after // 4)
        assert output.outputs[0].logprobs is not None
        for found, entry in zip(mine, output.outputs[0].logprobs, strict=True):
            best = list(entry.items())
            assert math.log(found.choice.probability) == pytest.approx(best[0][1].logprob, abs=1e-4)
            assert found.choice.runner_up.id == best[1][0]
    assert made.prompts[2].tokens[0].text == "<E4>"  # half a character is shown by its bytes
    first = made.packed.steps[0]
    assert first.shapes["ids"] == [sum(len(prompt.tokens) for prompt in made.prompts)]
    assert first.shapes["logits"][0] == 3
    assert first.argmax_dim == -1


def test_the_engine_is_left_as_it_was(llm: LLM) -> None:
    runner: Any = llm.engine.executor
    model = runner.model
    explain(llm, ["a"], max_tokens=2, padded=True)
    assert llm.engine.executor is runner
    assert runner.model is model


def test_padded_agrees_and_mistakes_do_not(llm: LLM) -> None:
    right = explain(llm, TEXTS, max_tokens=6, padded=True)
    assert right.same == [True, True, True]
    assert right.padded is not None
    first = right.padded.steps[0]
    assert first.rows[1].mask == [0] * 9 + [1]
    assert first.rows[0].positions == list(range(10))
    assert right.padded.steps[1].rows[1].positions == [1]
    assert right.padded.wasted >= 9 + 1
    for mistake in ("without-positions", "right-pad", "argmax-dim-0"):
        wrong = explain(llm, TEXTS, max_tokens=6, mistake=mistake)
        assert not all(wrong.same), mistake
    flat = explain(llm, TEXTS, max_tokens=2, mistake="argmax-dim-0")
    assert flat.padded is not None
    assert all(token.id < 3 for answer in flat.padded.answers for token in answer)


def test_chunks_are_shown_as_chunks(model: Path) -> None:
    llm = LLM(str(model), kv_cache_gib=0.01, threads=1, max_num_seqs=2, max_num_batched_tokens=4, kernels="torch")
    made = explain(llm, ["The sky is"], max_tokens=1)
    assert [step.rows[0].positions for step in made.packed.steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [step.rows[0].choice is None for step in made.packed.steps] == [True, True, False]


def test_refusals(llm: LLM, liushui: Callable[..., Done], engine_flags: list[str]) -> None:
    with pytest.raises(ParameterError, match="at least one text"):
        explain(llm, [])
    done = liushui("explain", "a", "--right-pad", "--argmax-dim", "0")
    assert done.code == 2
    assert "one mistake at a time" in done.err
    assert liushui("explain", "a", "--html", "/nowhere/x.html", *engine_flags).code == 2


def test_the_command_prints_tables_and_json(liushui: Callable[..., Done], engine_flags: list[str]) -> None:
    done = liushui("explain", *TEXTS, "--padded", "--lang", "en", *engine_flags)
    assert done.code == 0
    for words in ("Step 3", "argmax(dim=-1)", "mask", "positions", "KV 0 → 10", "both ways chose the same tokens"):
        assert words in done.out
    done = liushui("explain", "a", "bc", "--without-positions", "--json", *engine_flags)
    assert done.code == 0
    found = json.loads(done.out)
    assert found["mistake"] == "without-positions"
    assert found["padded"]["steps"][1]["rows"][0]["positions"] == [0]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_page_is_whole_and_needs_nothing(
    lang: str, liushui: Callable[..., Done], engine_flags: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    done = liushui("explain", "a <b>&", "二", "--right-pad", "--html", path, "--lang", lang, *engine_flags)
    assert done.code == 0
    text = path.read_text(encoding="utf-8")
    assert f'lang="{lang}"' in text
    assert "<script" not in text
    assert "http" not in text
    assert ("这个错误" if lang == "zh" else "The mistake") in text
    checker = Balance()
    checker.feed(text)
    assert checker.open == []


class Balance(HTMLParser):
    """Every tag that opens closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_word_is_there_in_both_languages() -> None:
    for pair in (*WORDS.values(), *MISTAKES.values(), *NOTES, *PADDED_NOTES):
        assert all(pair)
        assert pair[1].count("{") == pair[0].count("{")
    assert Words("zh")("yes") == "是"
    assert (pick_lang("zh"), pick_lang("en")) == ("zh", "en")


def test_the_language_is_that_of_the_locale_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert pick_lang(None) == "zh"
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert pick_lang(None) == "en"
    assert pick_lang("zh") == "zh"


def test_everything_at_once(liushui: Callable[..., Done], engine_flags: list[str], tmp_path: Path) -> None:
    """Several prompts, beside the padded way, in Chinese: a page and JSON from one run, which agree."""
    path = tmp_path / "page.html"
    done = liushui(
        "explain",
        "a",
        "bcd",
        "流水",
        "--padded",
        "--html",
        path,
        "--json",
        "--lang",
        "zh",
        "--max-tokens",
        3,
        *engine_flags,
    )
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert [prompt["text"] for prompt in made["prompts"]] == ["a", "bcd", "流水"]
    assert made["same"] == [True, True, True]
    first = made["packed"]["steps"][0]
    fed = sum(len(prompt["tokens"]) for prompt in made["prompts"])
    assert first["shapes"]["ids"] == [fed]
    assert first["shapes"]["logits"] == [3, 258]
    assert first["argmax_dim"] == -1
    row = first["rows"][2]
    assert (row["positions"], row["kv_before"], row["kv_after"]) == (list(range(6)), 0, 6)
    assert row["blocks"]
    assert row["choice"]["probability"] >= row["choice"]["runner_up_probability"] > 0
    beside = made["padded"]["steps"][0]["rows"][0]
    assert (beside["mask"], beside["positions"]) == ([0] * 5 + [1], [0] * 6)
    page = path.read_text()
    assert 'lang="zh"' in page
    assert "流水" in page


def test_a_grid_that_is_too_wide_loses_its_middle() -> None:
    columns = [("", "p")] + [(f"token{i}", str(i)) for i in range(20)]
    lines = grid(columns, 40)
    assert all(len(line) <= 42 for line in lines)
    assert "…" in lines[0]
    assert lines[0].startswith("  token0")
    assert lines[1].endswith("19")
    assert "…" not in grid(columns, 400)[0]

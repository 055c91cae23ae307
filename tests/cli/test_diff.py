"""`liushui diff`: an honest model is the same as in transformers; each kind of difference gets its name."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from liushui import LLM
from liushui.engine.diff import FLOAT32, QUANTISED, Limits, Question, diff, limits_of
from liushui.kernels.reference import TorchOps
from tests.cli.conftest import Done

FLAGS = ["--kv-cache-gib", "0.01", "--threads", "1", "--kernels", "native", "--max-tokens", "6", "--json"]


@pytest.fixture(scope="module")
def readable(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, with what transformers must be told to take the tokenizer as it is."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("models") / "readable")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "The sky is"}, {"prompt": "水"}, {"prompt_token_ids": [5, 6, 7]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_honest_model_is_the_same(liushui: Callable[..., Done], readable: Path, prompts: Path) -> None:
    for template in ("auto", "none"):
        done = liushui("diff", readable, "--prompts", prompts, "--template", template, *FLAGS)
        assert done.code == 0, done.out
        assert [row["cause"] for row in done.rows] == ["same"] * 3
        assert all(row["compared"] == 6 and row["error"] < 1e-3 for row in done.rows)
    assert "beside: transformers" in done.err


def test_bfloat16_has_limits_of_its_own(liushui: Callable[..., Done], readable: Path, prompts: Path) -> None:
    """Rounded to 8 bits: further from the peer than float32 may be, and still no bug."""
    done = liushui("diff", readable, "--prompts", prompts, "--dtype", "bfloat16", *FLAGS)
    assert done.code == 0, done.out
    assert all(row["passed"] and row["cause"] in ("same", "tie", "numerics") for row in done.rows)
    assert max(row["error"] for row in done.rows) > 1e-3
    assert [row["line"] for row in done.rows] == [1, 2, 3]


def test_blocks_of_the_file_have_limits_of_their_own(model: Path) -> None:
    dense, packed = (
        LLM(str(model), dtype="float32", kv_cache_gib=0.01, threads=1, weights=w) for w in ("auto", "int8")
    )
    assert limits_of(dense.engine.executor) is FLOAT32
    assert limits_of(packed.engine.executor) is QUANTISED
    questions = [Question(ids=[5, 6, 7]), Question(text="The sky is")]
    found = list(diff(packed, Mirror(dense), questions, 5, QUANTISED))
    assert [comparison.index for comparison in found] == [0, 1]
    assert all(comparison.passed for comparison in found), found
    assert max(comparison.error or 0.0 for comparison in found) > 1e-4


def test_a_template_of_its_own_is_named(
    liushui: Callable[..., Done], readable: Path, prompts: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0].content }}?")
    done = liushui("diff", readable, "--prompts", prompts, "--chat-template", own, *FLAGS)
    assert done.code == 1
    assert [row["cause"] for row in done.rows] == ["template", "template", "same"]


def test_what_cannot_be_answered_stops_no_other(liushui: Callable[..., Done], readable: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "x" * 600}, {"prompt": "The sky is"}, {"prompt_token_ids": [10**6]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = liushui("diff", readable, "--prompts", path, "--template", "none", *FLAGS)
    assert done.code == 1
    assert [row["cause"] for row in done.rows] == ["error", "same", "error"]
    assert "600 tokens" in done.rows[0]["ours"]


def test_without_transformers(
    liushui: Callable[..., Done], model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = liushui("diff", model, "--prompts", prompts, *FLAGS)
    assert done.code == 2
    assert "pip install 'liushui[oracle]'" in done.err


def test_a_model_that_transformers_cannot_read(
    liushui: Callable[..., Done], model: Path, prompts: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "nobody-knows"}
    (folder / "config.json").write_text(json.dumps(config))
    done = liushui("diff", folder, "--prompts", prompts, *FLAGS)
    assert done.code == 2
    assert "transformers cannot read" in done.err
    assert "Traceback" not in done.err


def test_a_wrong_kernel_is_a_bug(
    liushui: Callable[..., Done], readable: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = TorchOps.silu_mul
    monkeypatch.setattr(TorchOps, "silu_mul", lambda self, x: honest(self, x) * 1.5)
    done = liushui("diff", readable, "--prompts", prompts, *FLAGS[:-1], "--kernels", "torch")
    assert done.code == 1
    assert "bug" in done.out
    assert "FAILED" in done.out


def test_a_line_that_is_no_prompt_is_refused(liushui: Callable[..., Done], readable: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": 3}\n')
    done = liushui("diff", readable, "--prompts", path, *FLAGS)
    assert done.code == 2
    assert "line 1" in done.err


class Mirror:
    """A peer that says what the engine says, except where it is told otherwise."""

    def __init__(self, llm: LLM, *, gap: float = 0.0, template: str = "", extra: int = -1) -> None:
        self.llm, self.gap, self.template, self.extra = llm, gap, template, extra

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return self.llm.tokenizer.chat(messages)[0] + self.template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self.llm.tokenizer.encode(text, add_special_tokens)
        return ids if self.extra < 0 else [*ids[: self.extra], 9, *ids[self.extra :]]

    def logits(self, ids: Sequence[int], first: int) -> torch.Tensor:
        """The engine's own answer has the most likely tokens; another token is ahead by `gap` at the third."""
        from liushui import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=len(ids) - first, logprobs=60)
        answer = self.llm.generate([list(ids[: first + 1])], params, use_tqdm=False)[0].outputs[0]
        rows = torch.full((len(ids) - first, self.llm.engine.inputs.limits.vocab_size), -30.0)
        for row, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs or (), strict=True)):
            for other, found in entry.items():
                rows[row, other] = found.logprob
            left = 1 - rows[row].exp().sum()
            rows[row][rows[row] == -30.0] = float((left.clamp(min=1e-9) / (rows[row] == -30.0).sum()).log())
            if row == 2 and self.gap:
                rows[row, (token + 1) % rows.shape[1]] = rows[row, token] + self.gap
                rows[row] = rows[row].log_softmax(dim=-1)
        return rows


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), dtype="float32", kv_cache_gib=0.01, threads=1, kernels="native")


@pytest.mark.parametrize(
    ("peer", "limits", "cause", "position"),
    [
        ({}, FLOAT32, "same", None),
        ({"gap": 5e-4}, Limits(tie=1e-3, error=5.0), "tie", 2),
        ({"gap": 0.01}, Limits(tie=1e-3, error=5.0), "numerics", 2),
        ({"gap": 3.0}, FLOAT32, "bug", 2),
        ({"template": "!"}, FLOAT32, "template", len("<user>The sky is\n<assistant>")),
        ({"extra": 4}, FLOAT32, "tokenisation", 4),
    ],
    ids=["same", "tie", "numerics", "bug", "template", "tokenisation"],
)
def test_each_cause_has_its_name(llm: LLM, peer: dict[str, Any], limits: Limits, cause: str, position: int) -> None:
    question = Question(messages=[{"role": "user", "content": "The sky is"}])
    (found,) = diff(llm, Mirror(llm, **peer), [question], 5, limits)
    assert found.cause == cause
    assert found.position == position
    assert found.passed == (cause in ("same", "tie", "numerics"))
    if cause in ("tie", "numerics", "bug"):
        assert found.margin == pytest.approx(peer["gap"], rel=0.01)
        assert found.compared == 2

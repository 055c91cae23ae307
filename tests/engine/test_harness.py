"""lm-evaluation-harness on a tiny model: a local task, rolling likelihoods, answers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from liushui.engine.llm import LLM
from liushui.errors import ParameterError
from tests.engine.scripted import BOS, VOCAB_SIZE
from tests.engine.test_with_runner import make
from tests.support import tiny

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

DOCS = [
    {"question": "the quick brown", "choices": [" fox", " dog", " moon"], "answer": 0},
    {"question": "over the lazy", "choices": [" dog", " the", " quick"], "answer": 1},
    {"question": "two  spaces", "choices": [" and", " a"], "answer": 0},
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make(tiny.oracle("llama", vocab_size=VOCAB_SIZE))


def asked(*pairs: Any) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_a_local_task(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval

    from liushui.engine.harness import HarnessLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    task = {
        "task": "tiny_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(HarnessLM(llm), tasks=[task], bootstrap_iters=0)
    right = 0
    for doc in DOCS:
        scores = llm.score(doc["question"], doc["choices"], use_tqdm=False)
        right += max(range(len(scores)), key=lambda i: scores[i].logprob) == doc["answer"]
    assert found["results"]["tiny_choices"]["acc,none"] == pytest.approx(right / len(DOCS))


def test_rolling_scores_every_token_once(llm: LLM) -> None:
    from liushui.engine.harness import HarnessLM

    text = "the quick brown fox jumps over the lazy dog. " * 4
    harness = HarnessLM(llm)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 64
    windows = harness._windows(text)
    assert [token for _, scored in windows for token in scored] == ids
    assert all(len(context) + len(scored) <= 63 for context, scored in windows)
    assert len(windows[-1][0]) + len(windows[-1][1]) == 63
    (value,) = harness.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    parts = llm.score([list(c) or [BOS] for c, _ in windows], [s for _, s in windows], use_tqdm=False)
    assert value == pytest.approx(sum(part.logprob for part in parts))


def test_answers_and_settings(llm: LLM) -> None:
    from liushui.engine.harness import HarnessLM, sampling

    texts = HarnessLM(llm).generate_until(asked(("a", {"until": ["\n"], "max_gen_toks": 5})), disable_tqdm=True)
    assert len(texts) == 1
    assert sampling({"until": "x", "do_sample": False, "temperature": 0}).greedy
    assert sampling({"do_sample": True, "top_p": 0.5}).top_p == 0.5
    with pytest.raises(ParameterError, match="num_beams"):
        sampling({"num_beams": 4})

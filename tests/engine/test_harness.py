"""lm-evaluation-harness on a tiny model: a local task, rolling likelihoods, answers."""

import json
from importlib.resources import files
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


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make(tiny.oracle("llama", vocab_size=VOCAB_SIZE))


def asked(*pairs: Any) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def shipped_docs(count: int) -> list[dict[str, Any]]:
    """Which end belongs to the beginning? Made from the prompts that liushui ships."""
    lines = (files("liushui") / "data" / "prompts.jsonl").read_text("utf-8").splitlines()
    texts = [text for text in (json.loads(line)["prompt"] for line in lines) if text.isascii() and 6 < len(text) < 90]
    halves = [(" ".join(words[: len(words) // 2]), words[len(words) // 2 :]) for words in map(str.split, texts)]
    ends = ["".join(f" {word}" for word in rest) for _, rest in halves]
    docs = []
    for i, (beginning, _) in enumerate(halves[:count]):
        choices = [ends[(i + step * 3) % len(ends)] for step in range(3)]
        docs.append({"question": beginning, "choices": choices[i % 3 :] + choices[: i % 3], "answer": -i % 3})
    return docs


def evaluate(llm: LLM, docs: list[dict[str, Any]], folder: Path) -> float:
    """The accuracy that lm-evaluation-harness finds."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from liushui.engine.harness import HarnessLM

    path = folder / "docs.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": "shipped_halves",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    none = TaskManager(include_defaults=False)  # its own fourteen thousand take long to read
    found = lm_eval.simple_evaluate(HarnessLM(llm), tasks=[task], task_manager=none, bootstrap_iters=0)
    return float(found["results"]["shipped_halves"]["acc,none"])


def test_a_local_task(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    docs = [doc for doc in shipped_docs(12) if max(map(len, [doc["question"], *doc["choices"]])) < 30]
    assert len(docs) >= 3
    right = 0
    for doc in docs:
        scores = llm.score(doc["question"], doc["choices"], use_tqdm=False)
        right += max(range(3), key=lambda i: scores[i].logprob) == doc["answer"]
    assert evaluate(llm, docs, tmp_path) == pytest.approx(right / len(docs))


@pytest.mark.real_model
def test_the_default_model_on_a_local_task(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far above chance, a third: the scores mean something."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    llm = LLM(str(smollm2), dtype="float32", kv_cache_gib=0.1)
    assert evaluate(llm, shipped_docs(20), tmp_path) >= 0.7


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

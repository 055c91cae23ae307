"""Sampling defaults of the model's files: always reported, used when asked, never over what a request names."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from liushui import LLM, SamplingParams
from liushui.engine.suggestions import Suggestions
from liushui.errors import ModelError, ParameterError
from tests.cli.conftest import make_model
from tests.engine.scripted import make_engine, run_all

FILE = {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 5, "num_beams": 4, "typical_p": 1.0}
ENGINE = {"dtype": "float32", "kv_cache_gib": 0.01, "threads": 1}


@pytest.fixture(scope="module")
def opinionated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("models") / "opinionated")
    (folder / "generation_config.json").write_text(json.dumps(FILE))
    return folder


def test_files_are_read_under_our_names() -> None:
    found = Suggestions.read(FILE | {"eos_token_id": 3, "top_p": None, "repetition_penalty": 1.1})
    assert found.values == {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "max_tokens": 5}
    assert found.beyond == {"num_beams": 4}
    assert found.checked() == found.values
    assert Suggestions.read({"do_sample": False, "temperature": 0.6}).values == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("file", "choice", "line"),
    [
        ({}, "none", "SamplingParams as given (the model's files suggest nothing else)"),
        ({}, "auto", "as given (the model's files suggest nothing that could be used)"),
        ({"temperature": None}, "none", "SamplingParams as given (the model's files suggest nothing else)"),
        (FILE, "none", "not applied, though the model's files suggest it: temperature=0.6, top_k=20, max_tokens=5"),
        (FILE, "auto", "leaves it open, as the model's files suggest: temperature=0.6, top_k=20, max_tokens=5"),
        (FILE, "auto", "not supported and not applied: num_beams=4"),
    ],
)
def test_they_are_always_reported(file: dict[str, object], choice: str, line: str) -> None:
    assert line in Suggestions.read(file).line(choice)


@pytest.mark.parametrize("file", [{"temperature": "hot"}, {"top_p": 2.0}, {"top_k": 1.5}, {"max_new_tokens": 0}])
def test_nonsense_is_refused_when_it_would_be_used(file: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="generation_config: the model's files suggest what cannot be honoured"):
        Suggestions.read(file).checked()
    assert "not applied" in Suggestions.read(file).line("none")


def test_used_only_when_asked(opinionated: Path) -> None:
    plain, asked = (LLM(str(opinionated), generation_config=choice, **ENGINE) for choice in ("none", "auto"))
    assert any("not applied" in line and "temperature=0.6" in line for line in plain.startup_report())
    assert any("as the model's files suggest: temperature=0.6" in line for line in asked.startup_report())
    params = SamplingParams(ignore_eos=True, top_k=0, seed=1)
    (before,), (after,) = (llm.generate("abc", params, use_tqdm=False) for llm in (plain, asked))
    assert (before.effective_params["temperature"], after.effective_params["temperature"]) == (1.0, 0.6)
    assert (len(before.outputs[0].token_ids), len(after.outputs[0].token_ids)) == (16, 5)
    assert after.effective_params["top_k"] == 0  # named, though it is the default
    named = SamplingParams(ignore_eos=True, top_k=0, seed=1, temperature=0.6, max_tokens=5)
    assert plain.generate("abc", named, use_tqdm=False)[0].outputs[0].token_ids == after.outputs[0].token_ids
    (score,) = asked.score("abc", "def", use_tqdm=False)
    (same,) = plain.score("abc", "def", use_tqdm=False)
    assert score == same


def test_every_parameter_says_where_it_comes_from() -> None:
    engine = make_engine(sampling_defaults={"temperature": 0.6, "top_k": 20})
    engine.add_request("a", SamplingParams(top_k=5, max_tokens=None), request_id="r")
    effective = run_all(engine)[0]["r"].effective_params
    sources = effective.sources
    assert set(sources) == set(effective) == set(SamplingParams.names())
    assert sources["temperature"] == "generation_config"
    assert sources["top_k"] == "request"
    assert sources["top_p"] == "default"
    assert sources["seed"] == "drawn"
    assert sources["max_tokens"] == "fitted"
    assert effective.explained()["temperature"] == {"value": 0.6, "source": "generation_config"}
    engine.add_request("a", SamplingParams(seed=4, temperature=0), request_id="s")
    sources = run_all(engine)[0]["s"].effective_params.sources
    assert (sources["seed"], sources["temperature"], sources["max_tokens"]) == ("request", "request", "default")


def test_a_conflict_says_who_brought_the_other_half() -> None:
    engine = make_engine(sampling_defaults={"max_tokens": 5})
    with pytest.raises(ParameterError, match=r"^min_tokens: must be at most max_tokens \(5\).*generation_config"):
        engine.add_request("a", SamplingParams(min_tokens=9))


def test_copies_keep_what_was_given() -> None:
    params = SamplingParams(2, temperature=1.0, logit_bias={3: 1})
    assert params.given == {"n", "temperature", "logit_bias"}
    for made in (copy.copy(params), copy.deepcopy(params)):
        assert made == params
        assert made.given == params.given
    assert params.replaced(top_p=0.5).given == params.given | {"top_p"}
    assert replace(params, top_p=0.5).given == set(SamplingParams.names())
    filled = params.filled({"temperature": 0.3, "top_k": 7})
    assert (filled.temperature, filled.top_k, filled.given) == (1.0, 7, params.given)
    with pytest.raises(ParameterError, match="top_p"):
        params.replaced(top_p=3)

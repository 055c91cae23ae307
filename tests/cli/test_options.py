"""Flags come from the settings' fields: all of them, with help, defaults and errors in the flag's words."""

import inspect
from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from liushui.cli.options import engine_group, field_docs, sampling_group, with_flags
from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.errors import LiushuiError

ENGINE, SAMPLING = engine_group(), sampling_group(temperature=0.0)

asked: list[tuple] = []


@with_flags(ENGINE, SAMPLING)
def command(config: EngineConfig, params: SamplingParams, word: str = "none") -> None:
    asked.append((config, params, word))


def parse(*args: str):
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    result = CliRunner().invoke(app, list(args))
    if isinstance(result.exception, LiushuiError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return asked.pop()


@pytest.mark.parametrize("group", [ENGINE, SAMPLING])
def test_every_field_has_one_flag_with_a_help_text(group):
    parameters = {item.name: item for item in group.parameters()}
    assert list(parameters) == [group.keyword(item.name) for item in fields(group.cls)]
    for item in parameters.values():
        assert item.annotation.__metadata__[0].help, item.name


def test_no_two_fields_share_a_flag():
    names = [name for name in inspect.signature(command).parameters if name not in ("word", "_context")]
    assert len(names) == len(set(names)) == len(EngineConfig.names()) + len(SamplingParams.names())


def test_without_flags_the_settings_are_the_classes_own_but_for_the_commands_defaults():
    config, params, word = parse()
    assert config == EngineConfig()
    assert params == SamplingParams(temperature=0.0)
    assert word == "none"


def test_what_is_typed_counts_as_given_also_where_it_is_the_default() -> None:
    seen: list[SamplingParams] = []

    @with_flags(ENGINE, SAMPLING)
    def watch(config: EngineConfig, params: SamplingParams) -> None:
        seen.append(params)

    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(watch)
    assert CliRunner().invoke(app, ["--top-p", "1.0", "--temperature", "0", "--stop", "x"]).exit_code == 0
    assert CliRunner().invoke(app, []).exit_code == 0
    assert [params.given for params in seen] == [{"top_p", "temperature", "stop"}, set()]


def test_values_reach_their_field():
    config, params, word = parse(
        *("--policy", "static", "--kv-cache-gib", "0.5", "-m", "folder", "--no-prefix-caching", "--engine-seed", "3"),
        *("--seed", "4", "--stop", "a", "--stop", "b", "--stop-token-ids", "7", "--logit-bias", '{"5": -2}'),
        *("--ignore-eos", "--no-skip-special-tokens", "--max-tokens", "0", "--word", "x"),
    )
    assert config == EngineConfig(policy="static", kv_cache_gib=0.5, model="folder", prefix_caching=False, seed=3)
    assert params == SamplingParams(
        temperature=0.0,
        seed=4,
        stop=["a", "b"],
        stop_token_ids=[7],
        logit_bias={5: -2.0},
        ignore_eos=True,
        skip_special_tokens=False,
        max_tokens=None,
    )
    assert word == "x"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--top-p", "2"), "--top-p: must be in"),
        (("--logit-bias", "x"), "--logit-bias: must be JSON"),
        (("--logit-bias", "[1]"), "--logit-bias: must be a JSON object"),
        (("--max-tokens", "-3"), "--max-tokens"),
        (("--stop", ""), "--stop"),
    ],
)
def test_errors_name_the_flag(args, words):
    with pytest.raises(LiushuiError, match=words):
        parse(*args)


def test_docstrings_of_fields_are_read_from_the_source():
    assert field_docs(EngineConfig)["prefix_caching"].startswith("Reuse the KV blocks of prompts that begin alike.")
    assert field_docs(SamplingParams)["temperature"] == "0 is greedy."

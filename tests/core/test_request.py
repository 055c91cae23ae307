"""Sampling parameters: what cannot be honoured is refused by name."""

import math
from typing import Any

import pytest

from liushui.core.request import SamplingParams
from liushui.errors import ParameterError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 1000), ("n", True), ("n", 2.0),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
        ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 1.5), ("repetition_penalty", 0),
        ("repetition_penalty", 5e-324), ("repetition_penalty", 100.5),
        ("presence_penalty", 2.5), ("frequency_penalty", -3), ("seed", 2**63), ("seed", 1.5),
        ("min_tokens", -1), ("min_tokens", 17), ("max_tokens", 0), ("max_tokens", 2.5),
        ("logprobs", -1), ("prompt_logprobs", 10**9), ("truncate_prompt_tokens", 0),
        ("stop", False), ("stop", {"a"}), ("stop", [""]), ("stop", [1]), ("stop", ["x"] * 65),
        ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]), ("logit_bias", {1: 101}), ("logit_bias", {-1: 1}),
        ("logit_bias", [1]), ("logit_bias", {"x": 1}), ("ignore_eos", 1), ("skip_special_tokens", "yes"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_forms_people_use_are_understood() -> None:
    params = SamplingParams(stop="x", stop_token_ids=[3], logit_bias={"7": 1}, top_k=-1, max_tokens=None)
    assert params.stop_strings == ("x",)
    assert params.stop_token_ids == (3,)
    assert params.logit_bias == {7: 1.0}
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop=None).stop_strings == ()


def test_greedy_below_what_a_division_can_bear() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=0.01).greedy

"""Rotary tables: the angles of Hugging Face, cosines and sines rounded once."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from liushui.layers.rotary import rope_table

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_frequencies_are_those_of_hugging_face(scaling: dict[str, Any]) -> None:
    rope = {"rope_theta": 10000.0, **scaling}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=512, rope_parameters=rope
    )
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    table = rope_table({"rope_parameters": rope, "max_position_embeddings": 512}, 64, 512)
    angles = torch.outer(torch.arange(512).float(), frequencies).double()
    expected = torch.cat([angles.cos(), angles.sin()], -1) * amplitude
    np.testing.assert_allclose(table, expected.numpy(), rtol=0, atol=3e-5)  # an angle of 500 may be off by half of it


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5])
def test_rounded_once(theta: float) -> None:
    table = rope_table({"rope_theta": theta}, 64, 4096)
    angles = [np.float32(1) / np.float32(theta ** (2 * i / 64)) * np.arange(4096, dtype=np.float32) for i in range(32)]
    columns = [[turn(float(angle)) for angle in column] for turn in (math.cos, math.sin) for column in angles]
    assert table.dtype == np.float32
    differ = table != np.array(columns).T.astype(np.float32)
    assert differ.sum() <= 2  # where another library's float64 is on the other side of a tie

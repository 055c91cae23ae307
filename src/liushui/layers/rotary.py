"""Rotary position embedding tables (Su et al. 2021, arXiv:2104.09864) and their published scalings.

Frequencies are formed in float32, as the models were trained with; powers, cosines and sines in float64 and rounded
once, so that a table has the same bits on every machine.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liushui.errors import ModelError

Floats = NDArray[np.float32]
KNOWN = ("default", "linear", "llama3", "yarn", "longrope")


def rope_table(
    config: Mapping[str, Any], head_dim: int, max_positions: int, freq_factors: Floats | None = None
) -> Floats:
    """[max_positions, rotary_dim] float32: cosines in the first half of a row, sines in the second.

    `config` has the keys of a Hugging Face config: rope_theta, rope_scaling (or rope_parameters, which holds both).
    `freq_factors` [rotary_dim / 2] divide the frequencies (how GGUF files store Llama 3's scaling).
    """
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    rotary_dim = int(head_dim * float(partial))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequencies: Any = np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)
    amplitude = 1.0
    if kind == "linear":
        frequencies = frequencies / np.float32(scaling["factor"])
    elif kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif kind == "yarn":
        frequencies, amplitude = _yarn(frequencies, scaling, theta, rotary_dim, config)
    elif kind in ("longrope", "su"):
        frequencies, amplitude = _longrope(frequencies, scaling, max_positions, config)
    elif kind != "default":
        raise ModelError(f"rope_scaling: type {kind!r} is not supported; known: {', '.join(KNOWN)}")
    if freq_factors is not None:
        frequencies = frequencies / freq_factors.astype(np.float32)
    angles = np.outer(np.arange(max_positions, dtype=np.float32), frequencies.astype(np.float32)).astype(np.float64)
    turns: Floats = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    return turns if amplitude == 1.0 else turns * np.float32(amplitude)


def _llama3(frequencies: Floats, scaling: Mapping[str, Any]) -> Floats:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between are blended."""
    factor, low, high = (np.float32(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = np.float32(scaling["original_max_position_embeddings"])
    wavelength = 1 / frequencies * np.float32(2 * math.pi)
    turns = 1 / wavelength * context
    blend = ((turns - low) / (high - low)).clip(0, 1)
    between = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = np.where(wavelength > context / low, frequencies / factor, frequencies)
    is_between = (wavelength <= context / low) & (wavelength >= context / high)
    return np.where(is_between, between, scaled)


def _yarn(
    frequencies: Floats, scaling: Mapping[str, Any], theta: float, dim: int, config: Mapping[str, Any]
) -> tuple[Floats, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate the low frequencies, keep the high ones."""
    factor = float(scaling["factor"])
    context = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(scaling.get("beta_fast") or 32))
    high = dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(max(high - low, 0.001))
    keep = 1 - ramp.clip(0, 1)
    amplitude = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return frequencies / np.float32(factor) * (1 - keep) + frequencies * keep, float(amplitude)


def _longrope(
    frequencies: Floats, scaling: Mapping[str, Any], max_positions: int, config: Mapping[str, Any]
) -> tuple[Floats, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753), up to the length before it was stretched.

    A sequence that grows beyond has all its positions turned by other factors, those in the cache too: a token's key
    would depend on what comes after it.
    """
    whole = config.get("max_position_embeddings") or 0
    original = int(
        scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or whole
    )
    short = np.array(scaling.get("short_factor") or [], np.float32)
    if max_positions > original or short.shape != frequencies.shape:
        raise ModelError(
            f"rope_scaling: type 'longrope' is supported up to {original:,} positions, with a short_factor for each "
            f"of {len(frequencies)} frequencies: set max_model_len to {original} or less"
        )
    factor = float(scaling.get("factor") or whole / original)
    stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return frequencies / short, float(scaling.get("attention_factor") or stretched)

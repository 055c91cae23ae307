"""Device memory at start: the weights, a step, and what is left for the KV cache."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from liushui.config import EngineConfig
from liushui.errors import CapacityError
from liushui.runner.memory import GIB

if TYPE_CHECKING:
    from liushui.runner.runner import Checkpoint


def step_bytes(config: EngineConfig, model: Mapping[str, Any]) -> int:
    """Device memory to keep for the steps: activations, logits, captured graphs and the vendor's work space.

    Twice what one step holds at once: a step outside the graphs does not share their memory. And room for the trial
    product of the largest weight's certificate, which works on a changed copy.
    """
    rows = max(config.step_tokens, config.seats)
    hidden = int(model.get("hidden_size") or model["n_embd"])
    inner = int(model.get("intermediate_size") or model.get("n_inner") or 4 * hidden)
    vocab = int(model["vocab_size"])
    step = 2 * rows * (3 * inner + 8 * hidden) + 6 * config.seats * vocab
    return 3 * GIB // 2 + 2 * step + 3 * max(vocab, 2 * inner) * hidden


def reserve_for_steps(config: EngineConfig, checkpoint: "Checkpoint", dtype: torch.dtype, free: int) -> int:
    """`step_bytes`, if they and the weights fit into `free` bytes; else `CapacityError` with the sizes that would."""
    weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names()) * dtype.itemsize
    reserve = step_bytes(config, checkpoint.config)
    if weights + reserve <= free:
        return reserve
    raise CapacityError(
        "device",
        f"the weights take {weights / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')} and a step of "
        f"{config.step_tokens:,} tokens {reserve / GIB:.1f} GiB, {free / GIB:.1f} GiB are free on the GPU; "
        f"{_remedy(config, checkpoint.config, free - weights)}",
    )


def _remedy(config: EngineConfig, model: Mapping[str, Any], room: int) -> str:
    """The largest halved step that fits into `room` bytes, if there is one."""
    tokens, seats = config.step_tokens, config.seats
    while tokens > 1:
        tokens //= 2
        seats = min(seats, tokens)
        if step_bytes(replace(config, max_num_batched_tokens=tokens, max_num_seqs=seats), model) <= room:
            return f"a step of max_num_batched_tokens={tokens} and max_num_seqs={seats} would fit"
    return "free memory there, or choose a smaller model or device cpu"


@contextmanager
def named_when_exhausted(device: torch.device) -> Iterator[None]:
    """Torch's own error in the words of the settings: others may take memory while this process starts."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free = torch.cuda.mem_get_info(device)[0]
        raise CapacityError(
            "device",
            f"the GPU's memory ran out while the model was loaded ({str(error).splitlines()[0]}); {free / GIB:.1f} GiB "
            "are free there now: end what else uses it, or set kv_cache_gib below that",
        ) from None

"""The padded way gives Hugging Face's numbers and the packed way's tokens."""

from typing import Any

import pytest
import torch

from liushui.models.padded import PaddedModel, next_positions, pad, prompt_positions
from tests.support import tiny

PROMPTS = [[5, 6, 7], [9] * 9 + [11, 12], [33, 4, 90, 91, 8, 17]]


def test_positions_count_the_tokens_of_the_row() -> None:
    ids, mask = pad([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    positions = prompt_positions(mask)
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert next_positions(positions).tolist() == [[3], [1]]
    assert pad([[5, 6], [8]], 0, right=True)[0].tolist() == [[5, 6], [8, 0]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_against_hugging_face_with_cache(family: str) -> None:
    theirs: Any = tiny.oracle(family, 3)
    ours = PaddedModel(tiny.runner(theirs).model)
    ids, mask = pad(PROMPTS, 0)
    positions, kv, past = prompt_positions(mask), ours.new_kv(3, 16), None
    for _ in range(4):
        expected = theirs(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
        )
        past = expected.past_key_values
        logits = ours.logits(ours.forward(ids, mask, positions, kv)[:, -1])
        assert kv.columns == mask.shape[1]
        torch.testing.assert_close(logits, expected.logits[:, -1].float(), atol=2e-4, rtol=1e-4)
        ids, positions = logits.argmax(dim=-1, keepdim=True), next_positions(positions)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)

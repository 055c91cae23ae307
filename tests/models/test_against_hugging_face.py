"""Every family's logits and greedy tokens equal Hugging Face's, on tiny random models in float32."""

import pytest
import torch

from liushui.core.request import SamplingParams
from liushui.errors import ModelError
from tests.support import tiny

TOLERANCE = 1e-4


def _prompts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 211, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_of_a_ragged_batch_and_cached_decode(family: str, seed: int) -> None:
    model = tiny.oracle(family, seed)
    runner = tiny.runner(model, block_size=4)
    runner.model = watched = tiny.Listening(runner.model)
    seen = watched.logits_made
    driver = tiny.Driver(runner)
    prompts = _prompts(seed, (1, 37, 5, 16, 70))
    for i, prompt in enumerate(prompts):
        driver.add(str(i), prompt)
    # Ragged chunks first, then every sequence decodes beside the others.
    driver.step({"1": 20, "0": 1, "4": 33})
    driver.step({"0": 1, "1": 17, "2": 5, "3": 16, "4": 37})
    seen.clear()
    for _ in range(6):
        driver.step({str(i): 1 for i in range(5)})
    for i, rows in enumerate(zip(*seen, strict=True)):
        with torch.no_grad():
            expected = model(torch.tensor([driver.ids[str(i)][:-1]])).logits[0, -6:]
        assert (torch.stack(rows) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sixty_four_greedy_tokens(family: str) -> None:
    """Each is Hugging Face's most likely one after those before it."""
    model = tiny.oracle(family, seed=3)
    driver = tiny.Driver(tiny.runner(model))
    prompts = _prompts(7, (3, 19, 40))
    for i, prompt in enumerate(prompts):
        driver.add(str(i), prompt)
    driver.step({str(i): len(prompt) for i, prompt in enumerate(prompts)})
    for _ in range(63):
        driver.step({str(i): 1 for i in range(3)})
    for i, prompt in enumerate(prompts):
        answer = driver.ids[str(i)]
        with torch.no_grad():
            best = model(torch.tensor([answer[:-1]])).logits[0].argmax(dim=-1).tolist()
        assert answer == prompt + best[len(prompt) - 1 :]
        assert len(answer) == len(prompt) + 64


def test_prompt_logprobs_equal_hugging_face() -> None:
    model = tiny.oracle("llama", seed=1)
    driver = tiny.Driver(tiny.runner(model))
    prompt = _prompts(5, (90,))[0]
    driver.add("a", prompt, SamplingParams(temperature=0, prompt_logprobs=2))
    found = list(driver.step({"a": 33}).prompt_logprobs["a"])
    found += driver.step({"a": 57}).prompt_logprobs["a"]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
    assert [position for position, _ in found] == list(range(1, 90))
    for position, entry in found:
        row = expected[position - 1]
        assert entry.token_id == prompt[position]
        assert abs(entry.logprob - float(row[prompt[position]])) < 1e-3
        assert entry.rank == int((row > row[prompt[position]]).sum()) + 1
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


def test_longrope_within_the_original_length() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.1, 1.3, 1.7],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    }
    model = tiny.oracle("phi3", seed=4, rope_parameters=rope, original_max_position_embeddings=64)
    with pytest.raises(ModelError, match="type 'longrope' is supported up to 64 positions"):
        tiny.runner(model)
    driver = tiny.Driver(tiny.runner(model, max_model_len=64))
    prompt = _prompts(8, (64,))[0]
    driver.add("a", prompt, SamplingParams(temperature=0, prompt_logprobs=0))
    found = [entry.logprob for _, entry in driver.step({"a": 64}).prompt_logprobs["a"]]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1], dim=-1)
    theirs = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), theirs, rtol=0, atol=TOLERANCE)

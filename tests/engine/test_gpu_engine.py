"""The engine on a GPU as a user meets it: the processor's answers, bit for bit its own in any company."""

from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch

from liushui import LLM, SamplingParams
from liushui.config import EngineConfig
from liushui.engine.startup import join
from liushui.engine.verify import WAYS, verify
from liushui.errors import CapacityError
from tests.cli.conftest import make_model
from tests.engine.scripted import VOCAB_SIZE, assert_clean, tiny_tokenizer
from tests.models.test_smollm2 import NEW, QUESTIONS
from tests.support import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GREEDY = SamplingParams(temperature=0, max_tokens=10, logprobs=1)
PROMPTS = ["the quick brown fox", "你好", "a", "the quick brown fox jumps over the lazy dog, twice and once again"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gpu") / "tiny")


def engine(model: Any, device: str) -> LLM:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128}
    runner, tokenizer = tiny.runner(model, device=device, **sizes), tiny_tokenizer()
    config = EngineConfig(**sizes)
    return LLM.from_engine(join(config, runner, tokenizer), tokenizer, config)


# Tables of angles are made on the processor: one family with other ones is enough.
FAMILIES = [family for family in tiny.FAMILIES if not family.startswith("llama-") or family == "llama-bias"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_on_the_processor_and_as_hugging_face(family: str) -> None:
    model = tiny.oracle(family, 5, vocab_size=VOCAB_SIZE)
    here, there = engine(model, "cpu"), engine(model, "cuda")
    for mine, theirs in zip(there.generate(PROMPTS, GREEDY), here.generate(PROMPTS, GREEDY), strict=True):
        answer, expected = mine.outputs[0], theirs.outputs[0]
        assert answer.token_ids == expected.token_ids
        assert answer.text == expected.text
        ids = mine.prompt_token_ids + answer.token_ids
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        for place, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            position = len(mine.prompt_token_ids) + place - 1
            assert entry[token].logprob == pytest.approx(logprobs[position, token].item(), abs=2e-3)
    assert_clean(there.engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_of_serving_gives_the_same_bits(folder: Path, dtype: str) -> None:
    llm = LLM(str(folder), device="cuda", dtype=dtype, kv_cache_gib=0.05)
    verdicts = list(verify(llm, max_tokens=6))
    assert [verdict.way for verdict in verdicts] == [way.name for way in WAYS]
    assert all(verdict.passed for verdict in verdicts), verdicts


def test_defaults_of_a_gpu_are_said(folder: Path) -> None:
    llm = LLM(str(folder), kv_cache_gib=0.05)
    assert (llm.config.max_num_seqs, llm.config.max_num_batched_tokens) == (256, 8192)
    report = "\n".join(llm.startup_report())
    assert "up to 256 sequences and 8,192 tokens" in report
    assert "kernels of the first steps" in report
    assert "bfloat16" in report


def test_memory_that_is_not_there(folder: Path) -> None:
    with pytest.raises(CapacityError, match="give at most"):
        LLM(str(folder), device="cuda", kv_cache_gib=4000)


def test_command_line(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    if not list(distributions(name="liushui")):
        pytest.skip("the package is not installed")
    from tests.cli.conftest import finish, start

    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    flags = ["--model", folder, "--device", "cuda", "--kv-cache-gib", "0.05", "--temperature", 0, "--max-tokens", 3]
    done = finish(start("generate", tmp_path / "prompts.txt", *flags))
    assert done.code == 0, done.err
    assert len(done.rows) == 3
    assert "triton" in done.err


@pytest.fixture(scope="module")
def smollm2_answers(smollm2: Path) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, greedy answers of the processor in float32)."""
    llm = LLM(str(smollm2), device="cpu", dtype="float32", kv_cache_gib=0.5)
    texts = [llm.tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts = [llm.tokenizer.encode(text) for text in texts]
    return prompts, tokens(llm, prompts)


def tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.real_model
def test_smollm2_answers_as_on_the_processor(smollm2: Path, smollm2_answers: Any) -> None:
    prompts, expected = smollm2_answers
    assert tokens(LLM(str(smollm2), device="cuda", dtype="float32", kv_cache_gib=1), prompts) == expected


@pytest.mark.real_model
def test_smollm2_in_company_by_default(smollm2: Path, smollm2_answers: Any) -> None:
    """bfloat16, graphs, look-ahead: the same tokens alone, at once, in other blocks, and from the prefix cache."""
    prompts, expected = smollm2_answers
    llm = LLM(str(smollm2), device="cuda", kv_cache_gib=1)
    together = tokens(llm, prompts)
    assert [tokens(llm, [prompt])[0] for prompt in prompts] == together
    small = LLM(str(smollm2), device="cuda", kv_cache_gib=1, block_size=16)
    assert tokens(small, prompts) == together
    assert tokens(small, prompts) == together
    assert small.engine.scheduler.num_hit_tokens > 0
    common = [next((i for i, pair in enumerate(zip(*answers, strict=True)) if pair[0] != pair[1]), NEW)
              for answers in zip(together, expected, strict=True)]  # fmt: skip
    assert sum(common) >= NEW * len(prompts) // 4  # roundings of bfloat16 turn an answer somewhere, not everywhere

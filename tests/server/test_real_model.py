"""The default model behind the command, asked by the official client."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_life import address_of, serve_command

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.real_model
QUESTION: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture(scope="module")
def url(smollm2: Path) -> Iterator[str]:
    with serve_command(smollm2, "--served-model-name", "smollm2", "--kv-cache-gib", "0.2") as process:
        yield address_of(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_it_knows_the_capital_of_france(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        fields: Any = {"model": "smollm2", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
        answer = client.chat.completions.create(**fields)
        assert "Paris" in answer.choices[0].message.content
        stream = client.chat.completions.create(**fields, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == answer.choices[0].message.content


def test_company_changes_nothing(url: str) -> None:
    """The same request alone and among others, which come and go: the same answer, to the last bit."""

    async def talk() -> tuple[Any, list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:

            async def ask(text: str, count: int) -> Any:
                answer = await client.completions.create(
                    model="smollm2", prompt=text, max_tokens=count, seed=1, logprobs=1, temperature=0.7
                )
                choice = answer.choices[0]
                return choice.text, choice.logprobs.token_logprobs

            alone = await ask("Once upon a time", 10)
            others = (ask(f"{i} bottles of beer", 3 + i) for i in range(5))
            return alone, await asyncio.gather(ask("Once upon a time", 10), *others, ask("Once upon a time", 10))

    alone, together = asyncio.run(talk())
    assert together[0] == together[-1] == alone

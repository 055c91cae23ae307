"""The clients that people use, unchanged: openai, LangChain, LiteLLM."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.scripted import ScriptedExecutor, saying
from tests.support.serving import Running, running, scripted

openai = pytest.importorskip("openai")
SAID = "Hello, 你好 👋!"
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(parrot: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{parrot.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


def test_openai_chat(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=60)
    assert answer.choices[0].message.content == SAID
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert answer._request_id


def test_openai_chat_with_everything_it_sends(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": "be brief"}, *MESSAGES],
        frequency_penalty=0.5,
        logit_bias={"5": -1},
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=60,
        metadata={"a": "b"},
        modalities=["text"],
        n=2,
        presence_penalty=0.1,
        response_format={"type": "text"},
        safety_identifier="x",
        seed=4,
        service_tier="auto",
        stop=["zzz"],
        store=False,
        temperature=0.3,
        top_p=0.9,
        user="me",
        extra_body={"top_k": 7, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": False},
    )
    assert [choice.message.content for choice in answer.choices] == [SAID, SAID]
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.bytes, len(first.top_logprobs)) == ("H", [72], 2)


def test_openai_stream(client: Any) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == SAID
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == len(SAID.encode()) + 1


def test_openai_stream_helper(client: Any) -> None:
    """The client's own accumulator puts the chunks together again."""
    if not hasattr(client.chat.completions, "stream"):
        pytest.skip("this openai has no stream helper")
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, max_tokens=60, logprobs=True) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == SAID
    assert len(final.choices[0].logprobs.content) == len(SAID.encode()) + 1


def test_openai_completions(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=60, logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["a" + SAID, "b" + SAID]
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    text = "".join(
        c.choices[0].text for c in client.completions.create(model="tiny", prompt="a", max_tokens=60, stream=True)
    )
    assert text == SAID


def test_openai_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "liushui"


def test_openai_async(parrot: Running) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{parrot.url}/v1", api_key="unused", max_retries=0) as client:

            async def one(stream: bool) -> str:
                answer = await client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=60, stream=stream
                )
                if not stream:
                    return str(answer.choices[0].message.content)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            return await asyncio.gather(*(one(i % 2 == 0) for i in range(8)))

    assert asyncio.run(talk()) == [SAID] * 8


def test_openai_errors(client: Any) -> None:
    """The client raises its own classes, with our field and code."""
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert (bad.value.param, bad.value.code, bad.value.status_code) == ("temperature", "invalid_value", 400)
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert (tools.value.param, tools.value.code) == ("tools", "unsupported_field")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"


def test_openai_sees_an_error_inside_a_stream() -> None:
    executor = ScriptedExecutor(fail_row=lambda new, n: "broken" if n == 3 else None)
    with (
        running(scripted(executor)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        with pytest.raises(openai.APIError) as caught:
            list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, stream=True))
        assert caught.value.code == "model_error"
        assert "broken" not in str(caught.value)


def test_openai_with_a_key() -> None:
    engine = scripted(ScriptedExecutor(model=saying(SAID)))
    with running(engine, api_key=("a-good-key",)) as server:
        good = openai.OpenAI(base_url=f"{server.url}/v1", api_key="a-good-key", max_retries=0)
        assert good.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=60).choices
        bad = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another-key", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            bad.models.list()


def test_langchain(parrot: Running) -> None:
    chat_models = pytest.importorskip("langchain_openai")
    model = chat_models.ChatOpenAI(
        model="tiny",
        base_url=f"{parrot.url}/v1",
        api_key="unused",
        max_tokens=60,
        max_retries=0,
        seed=1,
        temperature=0.5,
    )
    answer = model.invoke([("system", "be brief"), ("human", "hi")])
    assert answer.content == SAID
    assert answer.usage_metadata["output_tokens"] == len(SAID.encode()) + 1
    assert answer.response_metadata["finish_reason"] == "stop"
    pieces = list(model.stream("hi", stream_usage=True))
    assert "".join(piece.content for piece in pieces) == SAID
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) > 0
    assert [item.content for item in model.batch(["a", "b", "c"])] == [SAID] * 3
    assert asyncio.run(model.ainvoke("hi")).content == SAID
    legacy = chat_models.OpenAI(
        model="tiny", base_url=f"{parrot.url}/v1", api_key="unused", max_tokens=60, max_retries=0
    )
    assert legacy.invoke("hi") == SAID


def test_lm_eval(server: Running) -> None:
    """Log-likelihoods through HTTP are the engine's own; the tokenizer is asked of the server."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from liushui.config import EngineConfig
    from liushui.engine.llm import LLM
    from liushui.engine.startup import join
    from tests.engine.scripted import VOCAB_SIZE, tiny_tokenizer
    from tests.support import tiny

    model = LocalCompletionsAPI(
        model="tiny", base_url=f"{server.url}/v1/completions", num_concurrent=1, max_length=128, batch_size=2
    )
    assert model.tokenizer_backend == "remote"
    pairs = [("the quick", " brown fox"), ("你", "好"), ("the lazy dog", " jumps over the fox"), ("a", " b")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = model.loglikelihood(asked, disable_tqdm=True)
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, block_size=4)
    runner = tiny.runner(
        tiny.oracle("llama", vocab_size=VOCAB_SIZE),
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_model_len=128,
        block_size=4,
    )
    llm = LLM.from_engine(join(config, runner, tiny_tokenizer()), tiny_tokenizer(), config)
    scores = llm.score([a for a, _ in pairs], [b for _, b in pairs], use_tqdm=False)
    for (logprob, greedy), score in zip(found, scores, strict=True):
        assert logprob == pytest.approx(score.logprob, abs=1e-9)
        assert greedy == score.is_greedy
    until = [Instance("generate_until", {}, ("the fox", {"until": ["zzz"], "max_gen_toks": 5}), 0)]
    said = server.complete("the fox", temperature=0, max_tokens=5).json()["choices"][0]["text"]
    assert model.generate_until(until, disable_tqdm=True) == [said]


def test_litellm(parrot: Running) -> None:
    litellm = pytest.importorskip("litellm")
    where = {"api_base": f"{parrot.url}/v1", "api_key": "unused", "max_retries": 0}
    answer = litellm.completion(model="openai/tiny", messages=MESSAGES, max_tokens=60, temperature=0.2, n=1, **where)
    assert answer.choices[0].message.content == SAID
    assert answer.usage.completion_tokens == len(SAID.encode()) + 1
    stream = litellm.completion(
        model="hosted_vllm/tiny",
        messages=MESSAGES,
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
        **where,
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == SAID
    assert any(getattr(piece, "usage", None) for piece in pieces)
    text = litellm.text_completion(model="text-completion-openai/tiny", prompt="hi", max_tokens=60, **where)
    assert text.choices[0].text == SAID

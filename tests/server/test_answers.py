"""Answers over HTTP: the shapes, and that a stream adds up to the whole."""

import json
import time
from typing import Any

import pytest

from liushui.core.request import SamplingParams
from liushui.server.visit import LOG
from tests.engine.scripted import ScriptedExecutor, saying
from tests.support.serving import Running, events, running, scripted

SAID = "Hello, 你好 👋!"


def test_chat(parrot: Running) -> None:
    answer = parrot.chat("hi", max_tokens=60).json()
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": SAID, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("chatcmpl-")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == len(SAID.encode()) + 1  # a token for each byte, and the end


def test_chat_stream(parrot: Running) -> None:
    fields: dict[str, Any] = {"max_tokens": 60, "stream": True, "stream_options": {"include_usage": True}}
    response = parrot.chat("hi", **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == SAID
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1] if c["choices"][0]["finish_reason"]] == ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == parrot.chat("hi", max_tokens=60).json()["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_adds_up_to_the_whole(server: Running, n: int, logprobs: int | None) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "seed": 5, "n": n, "logprobs": logprobs, "echo": logprobs is None}
    prompts = ["the quick brown fox", "你好"]
    whole = server.complete(prompts, **fields).json()["choices"]
    texts, tokens, offsets, reasons = {}, {}, {}, {}
    for chunk in events(server.complete(prompts, stream=True, **fields).text):
        for choice in chunk["choices"]:
            place = choice["index"]
            texts[place] = texts.get(place, "") + choice["text"]
            reasons[place] = choice["finish_reason"]
            if choice["logprobs"]:
                tokens.setdefault(place, []).extend(choice["logprobs"]["tokens"])
                offsets.setdefault(place, []).extend(choice["logprobs"]["text_offset"])
    assert [choice["index"] for choice in whole] == list(range(2 * n))
    for choice in whole:
        place = choice["index"]
        assert texts[place] == choice["text"]
        assert reasons[place] == choice["finish_reason"] == "length"
        if logprobs is not None:
            assert tokens[place] == choice["logprobs"]["tokens"]
            assert offsets[place] == choice["logprobs"]["text_offset"]


def test_four_shapes_of_a_prompt(server: Running) -> None:
    text = "the quick"
    ids = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    said = server.complete(text, **fields).json()["choices"][0]["text"]
    for prompt in (ids, [text], [ids], [text, text], [ids, ids]):
        choices = server.complete(prompt, **fields).json()["choices"]
        assert [choice["text"] for choice in choices] == [said] * len(choices)


def test_default_length_is_that_of_openai(server: Running) -> None:
    assert server.complete("a", ignore_eos=True).json()["usage"]["completion_tokens"] == 16
    usage = server.chat("a", ignore_eos=True).json()["usage"]
    assert usage["total_tokens"] == 128  # as many as fit


def test_logprobs_of_a_completion(server: Running) -> None:
    answer = server.complete("the fox", logprobs=3, echo=True, max_tokens=4, temperature=0, ignore_eos=True).json()
    choice, logprobs = answer["choices"][0], answer["choices"][0]["logprobs"]
    size = len(logprobs["tokens"])
    assert size == answer["usage"]["total_tokens"]
    assert {len(logprobs[name]) for name in ("token_logprobs", "top_logprobs", "text_offset")} == {size}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for token, logprob, top in zip(
        *(logprobs[n][1:] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top[token] == logprob
        assert 3 <= len(top) <= 4
    for token, top in zip(logprobs["tokens"][-4:], logprobs["top_logprobs"][-4:], strict=True):
        assert max(top, key=top.__getitem__) == token  # greedy
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)


def test_echo_of_nothing_but_the_prompt(server: Running) -> None:
    answer = server.complete("the fox", logprobs=1, echo=True, max_tokens=0, return_token_ids=True).json()
    choice = answer["choices"][0]
    assert choice["text"] == "the fox"
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0
    assert choice["token_ids"] == []


def test_logprobs_of_a_chat(server: Running) -> None:
    choice = server.chat(logprobs=True, top_logprobs=2, max_tokens=5, seed=1, return_token_ids=True).json()["choices"][
        0
    ]
    content = choice["logprobs"]["content"]
    assert len(content) == len(choice["token_ids"]) == 5
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        assert entry["logprob"] <= entry["top_logprobs"][0]["logprob"]
    plain = server.chat(logprobs=True, max_tokens=5, seed=1).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in plain] == [entry["logprob"] for entry in content]
    assert all(entry["top_logprobs"] == [] for entry in plain)


def test_the_answer_is_the_engines(server: Running) -> None:
    """Over HTTP as without: every number of the answer, bit for bit."""
    engine = server.engine.engine
    tokenizer = server.engine.tokenizer
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=9, max_tokens=10, logprobs=2, repetition_penalty=1.1)
    body = {"temperature": 0.8, "top_p": 0.9, "seed": 9, "max_tokens": 10, "logprobs": 2, "repetition_penalty": 1.1}
    choice = server.complete("the lazy dog", **body, return_token_ids=True).json()["choices"][0]
    prepared = engine.prepare(tokenizer.encode("the lazy dog"), params)
    from liushui.engine.serving import ServeRequest

    async def directly() -> Any:
        request = ServeRequest(prompt_token_ids=prepared.request.prompt_token_ids, params=params)
        return [news async for news in await server.engine.submit(request)][-1].outputs[0]

    output = server.call(directly())
    assert choice["token_ids"] == output.token_ids
    assert choice["text"] == output.text
    assert choice["logprobs"]["token_logprobs"] == [
        entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)
    ]


def test_prompt_logprobs(server: Running) -> None:
    found = server.complete("the fox", prompt_logprobs=1, max_tokens=1).json()["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    assert all(1 <= len(entry) <= 2 for entry in found[1:])
    assert "prompt_logprobs" in server.chat(prompt_logprobs=0, max_tokens=1).json()


def test_tokens_as_ids(server: Running) -> None:
    choice = server.complete(
        "a", logprobs=1, max_tokens=3, return_tokens_as_token_ids=True, return_token_ids=True
    ).json()
    choice = choice["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_stops(parrot: Running) -> None:
    for stop in ("你", ["你", "zzz"]):
        choice = parrot.chat(stop=stop, max_tokens=60).json()["choices"][0]
        assert choice["message"]["content"] == "Hello, "
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == "你"
    kept = parrot.chat(stop="你", max_tokens=60, include_stop_str_in_output=True).json()["choices"][0]
    assert kept["message"]["content"] == "Hello, 你"


def test_timings_and_parameters_on_request(server: Running) -> None:
    answer = server.complete("a", max_tokens=3, return_timings=True, return_params=True).json()
    assert answer["timings"]["steps"] == 3
    assert answer["timings"]["total"] >= answer["timings"]["time_to_first_token"] >= answer["timings"]["queued"] >= 0
    assert answer["effective_params"]["truncated_prompt_tokens"] == 0
    assert "seed" in answer["effective_params"]
    plain = server.complete("a", max_tokens=3).json()
    assert not {"timings", "effective_params"} & set(plain)
    by_header = server.post(
        "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2}, headers={"X-Return-Timings": "true"}
    )
    assert len(by_header.json()["timings"]) == 2
    last = events(server.complete("a", max_tokens=3, stream=True, return_timings=True).text)[-1]
    assert last["choices"] == []
    assert last["timings"]["steps"] == 3


def test_cached_tokens_are_told(server: Running) -> None:
    prompt = "the quick brown fox jumps over the lazy dog"
    server.complete(prompt, max_tokens=1)
    usage = server.complete(prompt, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
    salted = server.complete(prompt, max_tokens=1, cache_salt="another").json()["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_truncation(server: Running) -> None:
    long = "the lazy dog " * 60
    refused = server.complete(long, max_tokens=4)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    answer = server.complete(long, max_tokens=4, truncate_prompt_tokens=-1, return_params=True, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 128
    assert answer["effective_params"]["truncated_prompt_tokens"] > 0
    assert server.complete(long, max_tokens=4, truncate_prompt_tokens=9).json()["usage"]["prompt_tokens"] == 9


def test_tokenize_and_back(server: Running) -> None:
    found = server.post("/tokenize", {"prompt": "你好 fox", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 128
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "你好 fox"}
    messages = [{"role": "user", "content": "hi"}]
    ids = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json()["prompt"] == "user: hi\nassistant: "
    answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1, "return_token_ids": True})
    assert answer.json()["prompt_token_ids"] == ids


def test_messages_reach_the_template(parrot: Running) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
    ]
    ids = parrot.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    text = parrot.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert text == "system: be brief\nuser: a\nb\nassistant: c\n"


def test_models(server: Running) -> None:
    listed = server.client.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["tiny"]
    assert listed["data"][0]["max_model_len"] == 128
    assert server.client.get("/v1/models/tiny").json() == listed["data"][0]
    assert server.client.get("/v1/models/other/name").json()["error"]["code"] == "model_not_found"
    assert server.complete("a", model="other").status_code == 404


def test_health_ready_metrics_debug(server: Running) -> None:
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.client.get("/ready").json() == {"ready": True}
    server.complete("a", max_tokens=1)
    text = server.client.get("/metrics").text
    assert 'liushui_http_requests_total{path="/v1/completions",status="200"}' in text
    assert "liushui_requests_running 0.0" in text
    assert "vllm:" not in text
    assert server.client.get("/debug/requests").json()["requests"] == []


def test_debug_names_requests_as_their_clients_did() -> None:
    """Whose X-Request-Id is known finds the request among the unfinished, and its answer's id in both."""
    slow = ScriptedExecutor(model=lambda new, n: 40, on_step=lambda plan: time.sleep(0.005))
    with running(scripted(slow)) as server:
        body = {"prompt": "a", "max_tokens": 200, "n": 2, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body, headers={"X-Request-Id": "mine"}) as answer:
            lines = answer.iter_lines()  # kept: without it the connection is closed
            first = json.loads(next(lines).removeprefix("data: "))
            found = server.client.get("/debug/requests").json()["requests"]
        assert [one["x_request_id"] for one in found] == ["mine", "mine"]
        assert sorted(one["request_id"] for one in found) == [f"{first['id']}/0", f"{first['id']}/1"]
        assert {one["state"] for one in found} == {"running"}


def test_the_log_names_the_answer(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOG, "propagate", True)
    caplog.set_level("INFO", LOG.name)
    with running(scripted()) as server:
        answers = [server.complete(prompt, max_tokens=1).json() for prompt in ("a", ["a", "b"])]
    lines = [record.facts for record in caplog.records if record.getMessage() == "request"]
    assert [(line["id"], line["model"]) for line in lines] == [(answer["id"], "tiny") for answer in answers]


@pytest.mark.parametrize("compat", ["none", "vllm"])
def test_metrics_can_be_read(compat: str) -> None:
    """By Prometheus' own parser; histograms add up, counters agree with what was asked."""
    from prometheus_client.parser import text_string_to_metric_families

    with running(scripted(ScriptedExecutor(model=saying(SAID))), metrics_compat=compat) as server:
        tokens = [server.complete("a", max_tokens=60).json()["usage"] for _ in range(3)]
        families = {f.name: f for f in text_string_to_metric_families(server.client.get("/metrics").text)}
    made = sum(usage["completion_tokens"] for usage in tokens)
    values = {sample.name: sample.value for family in families.values() for sample in family.samples}
    assert values["liushui_output_tokens_total"] == made
    assert values["liushui_requests_total"] == 3
    assert values["liushui_ready"] == 1
    assert values["liushui_time_to_first_token_seconds_count"] == 3
    for family in families.values():
        if family.type == "histogram":
            buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
            assert buckets == sorted(buckets)
            assert buckets[-1] == next(s.value for s in family.samples if s.name.endswith("_count"))
    theirs = {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:generation_tokens_total",
    }
    assert theirs <= set(values) if compat == "vllm" else not any(name.startswith("vllm") for name in values)
    assert compat == "none" or values["vllm:generation_tokens_total"] == made

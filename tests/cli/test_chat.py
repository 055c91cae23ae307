"""`liushui chat` with input from a pipe, on the tiny model and on a scripted one."""

import io
import sys
from types import SimpleNamespace

import pytest

from liushui.cli.chat import Conversation
from liushui.core.request import FinishReason, SamplingParams
from liushui.engine.outputs import StreamDelta
from liushui.errors import CapacityError
from tests.cli.conftest import make_model


class Scripted:
    """Answers from a list: texts to stream, or an exception to raise after them."""

    def __init__(self, *answers: list):
        self.answers = list(answers)
        self.asked: list[list[dict]] = []
        self.tokenizer = SimpleNamespace(template_hash="x")

    def chat_stream(self, messages, params):
        self.asked.append([dict(message) for message in messages])
        for part in self.answers.pop(0):
            if not isinstance(part, str):
                raise part
            yield StreamDelta("r", 0, 0, part, (1,))
        yield StreamDelta("r", 0, 0, "", (2,), finish_reason=FinishReason.STOP)


@pytest.fixture
def talk(monkeypatch, capsys):
    def run(llm: Scripted, text: str, system: str | None = None) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        Conversation(llm, SamplingParams(), system).run()
        return capsys.readouterr()

    return run


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_answers_stream_and_stay_in_the_conversation(talk):
    llm = Scripted(["Hel", "lo"], ["again"])
    out, _ = talk(llm, "hi\n\nonce more\n")
    assert out == "Hello\nagain\n"
    assert llm.asked == [[user("hi")], [user("hi"), assistant("Hello"), user("once more")]]


def test_reset_and_system(talk):
    llm = Scripted(["a"], ["b"], ["c"])
    talk(llm, "one\n/reset\ntwo\n/system Be brief.\nthree\n/exit\nnever\n")
    assert llm.asked == [[user("one")], [user("two")], [{"role": "system", "content": "Be brief."}, user("three")]]


def test_reset_keeps_the_system_message(talk):
    llm = Scripted(["a"], ["b"])
    talk(llm, "one\n/reset\ntwo\n", system="S")
    assert llm.asked[1] == [{"role": "system", "content": "S"}, user("two")]


def test_an_unknown_command_lists_the_known_ones(talk):
    llm = Scripted()
    _, err = talk(llm, "/quit\n")
    assert "no command /quit" in err
    assert "/exit" in err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(talk):
    llm = Scripted(["so fa", KeyboardInterrupt()], ["on"])
    out, err = talk(llm, "one\ntwo\n")
    assert out == "so fa\non\n"
    assert "[interrupted]" in err
    assert llm.asked[1] == [user("one"), assistant("so fa"), user("two")]


def test_a_question_that_does_not_fit_is_taken_back(talk):
    llm = Scripted([CapacityError("prompt", "too long")], ["ok"])
    _, err = talk(llm, "long\nshort\n")
    assert "too long" in err
    assert "/reset" in err
    assert llm.asked[1] == [user("short")]


def test_the_command_with_a_pipe(liushui, engine_flags, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/exit\n"))
    done = liushui("chat", *engine_flags, "--max-tokens", 4, "--ignore-eos", "--temperature", 0)
    assert done.code == 0, done.err
    assert done.out.endswith("\n")
    assert "cut off" in done.err
    assert "temperature 0.0" in done.err


def test_a_model_without_a_chat_template_cannot_chat(liushui, tmp_path):
    done = liushui("chat", "--model", make_model(tmp_path / "plain", template=None), "--kv-cache-gib", "0.01")
    assert done.code == 2
    assert "no chat template" in done.err
    assert "--chat-template" in done.err

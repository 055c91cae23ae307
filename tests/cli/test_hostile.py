"""Bad words on every command line: one clear message that names what is wrong, exit code 2, no trace, nothing done."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Done, make_model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one good file and many bad ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("hi\nyo\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\x00\xff\xfe\x80\n")
    (tmp_path / "utf16.txt").write_text("hi", encoding="utf-16")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "max_tokens": "x"}\n')
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    return tmp_path


GENERATE = [
    (["nope.txt"], "there is no file nope.txt"),
    (["folder"], "folder is a folder"),
    (["empty.txt"], "every line is blank"),
    (["utf16.txt"], "UTF-16"),
    (["p.txt", "-o", "nowhere/x"], "nowhere does not exist"),
    (["p.txt", "-o", "p.txt"], "is the file of prompts"),
    (["p.txt", "-o", "folder"], "is a folder"),
    (["p.txt", "--timeline", "x.bmp"], "must end in .png"),
    (["p.txt", "--timeline", "nowhere/x.png"], "nowhere does not exist"),
    (["p.txt", "--json-report", "folder"], "--json-report folder is a folder"),
    (["p.txt", "--model", ""], "names no model"),
    (["p.txt", "--model", "~nobody-of-that-name/x"], "names no model"),
    (["p.txt", "--model", "a\0b"], "names no model"),
    (["p.txt", "--model", "folder"], "neither safetensors nor GGUF"),
    (["p.txt", "--model", "p.txt"], "not a GGUF file"),
    (["p.txt", "--model", "bad.gguf"], "not a sound GGUF file"),
    (["p.txt", "--dtype", "float64"], "--dtype"),
    (["p.txt", "--max-num-seqs", "0"], "--max-num-seqs: must be a positive integer"),
    (
        ["p.txt", "--max-num-seqs", str(10**9), "--max-num-batched-tokens", str(10**9)],
        "--max-num-seqs: must be at most",
    ),
    (["p.txt", "--max-num-batched-tokens", str(10**30)], "--max-num-batched-tokens: must be at most 1,048,576"),
    (["p.txt", "--max-model-len", str(10**12)], "--max-model-len: must be at most"),
    (["p.txt", "--threads", "100000"], "--threads: must be at most 1,024"),
    (["p.txt", "--kv-cache-gib", "99999"], "GiB asked"),
    (["p.txt", "--kv-cache-gib", "nan"], "--kv-cache-gib"),
    (["p.txt", "--kv-cache-gib", "1e-9"], "hold no block"),
    (["p.txt", "--block-size", "3"], "--block-size: must be a power of two"),
    (["p.txt", "--chat-template", "nope"], "chat_template: cannot be read"),
    (["p.txt", "--temperature", "nan"], "--temperature: must be a finite number"),
    (["p.txt", "--seed", str(2**70)], "--seed"),
    (["p.txt", "--n", "1000"], "--n"),
    (["p.txt", "--stop", "\udcff"], "--stop: must be valid Unicode"),
    (["p.txt", "--logit-bias", '{"5": NaN}'], "--logit-bias"),
    (["p.txt", "--min-tokens", "5", "--max-tokens", "2"], "--min-tokens: must be at most max_tokens"),
    (["p.txt", "--generation-config", "yes"], "--generation-config"),
    (["p.txt", "--no-such-flag"], "No such option"),
]
OTHERS = [
    (["explain", ""], "is empty"),
    (["explain", "x" * 9999], "9,999 tokens, but max_model_len is 512"),
    (["explain", "\udcff"], "not valid Unicode"),
    (["explain", "a", "--html", "folder"], "--html folder is a folder"),
    (["explain", "a", "--max-tokens", str(10**9)], "there is room for 511"),
    (["explain", "a", "--argmax-dim", "5"], "--argmax-dim"),
    (["explain", "a", "--right-pad", "--without-positions"], "one mistake at a time"),
    (["explain", "a", "--lang", "fr"], "--lang"),
    (["verify", "MODEL", "--max-tokens", str(10**6)], "leave no room"),
    (["verify", "folder"], "neither safetensors nor GGUF"),
    (["verify", "MODEL", "--policy", "static"], "No such option"),
    (["diff", "MODEL", "--limit", "0"], "--limit"),
    (["diff", "MODEL", "--prompts", "bad.jsonl"], "line 1: max_tokens: must be an integer"),
    (["diff", "MODEL", "--prompts", "binary.txt"], "line 1: not UTF-8"),
    (["diff", "nope/nope/nope"], "names no model"),
    (["demo", "--prompts", "nope"], "there is no file nope"),
    (["demo", "--out", "p.txt"], "--out p.txt: cannot be a folder"),
    (["demo", "--out", "/dev/null/x"], "cannot be a folder"),
    (["demo", "--max-num-seqs", "0"], "--max-num-seqs"),
    (["chat", "--max-tokens", "-1"], "--max-tokens"),
    (["chat", "--chat-template", "folder"], "chat_template: cannot be read"),
    (["pull", ""], "names no model"),
    (["pull", "a b"], "names no model"),
    (["pull", "folder"], "neither safetensors nor GGUF"),
    (["models", "x"], "unexpected extra argument"),
    (["nonsense"], "No such command"),
]


def refused(done: Done, words: str) -> None:
    assert done.code == 2, done.err
    assert " ".join(words.split()) in " ".join(done.err.split())  # long lines of typer's are wrapped
    assert "Traceback" not in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("args", "words"), GENERATE, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
@pytest.mark.usefixtures("here")
def test_generate(args: list[str], words: str, liushui: Callable[..., Done], engine_flags: list[str]) -> None:
    refused(liushui("generate", *engine_flags, *args), words)


@pytest.mark.parametrize(
    ("args", "words"), OTHERS, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
@pytest.mark.usefixtures("here")
def test_others(
    args: list[str], words: str, liushui: Callable[..., Done], engine_flags: list[str], model: Path
) -> None:
    command, *rest = (str(model) if word == "MODEL" else word for word in args)
    flags = engine_flags if command in ("explain", "demo", "chat") else engine_flags[2:]
    refused(liushui(command, *(flags if command not in ("pull", "models", "nonsense") else []), *rest), words)


def test_a_template_that_cannot_be_parsed_is_in_every_row(
    here: Path, liushui: Callable[..., Done], engine_flags: list[str]
) -> None:
    done = liushui("generate", "p.txt", *engine_flags, "--chat-template", here / "bad.jinja")
    assert done.code == 1
    assert all("is not valid Jinja" in row["error"] for row in done.rows)


def test_chat_from_a_pipe_that_is_not_text(
    liushui: Callable[..., Done], engine_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    done = liushui("chat", *engine_flags)
    assert done.code == 2
    assert "the input is not UTF-8: byte 0xff" in done.err


def test_too_little_memory_is_no_trace(
    liushui: Callable[..., Done], engine_flags: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liushui.runner.runner import Runner

    def load(config: object, checkpoint: object) -> Runner:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 396000262463 bytes")

    monkeypatch.setattr(Runner, "load", load)
    done = liushui("generate", here / "p.txt", *engine_flags)
    assert done.code == 2
    assert "there is not enough memory" in done.err


def test_a_bad_generation_config_is_refused_when_it_is_asked_for(
    here: Path, liushui: Callable[..., Done], engine_flags: list[str]
) -> None:
    folder = make_model(here / "m")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": "hot"}))
    flags = [*engine_flags, "--model", folder, "--max-tokens", 1]
    assert liushui("generate", "p.txt", *flags).code == 0
    done = liushui("generate", "p.txt", *flags, "--generation-config", "auto")
    assert done.code == 2
    assert "temperature: must be a finite number, got 'hot'" in done.err

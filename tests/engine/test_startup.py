"""The start-up report and the progress line."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from liushui.config import EngineConfig
from liushui.core.request import SamplingParams
from liushui.engine.llm import LLM
from liushui.engine.progress import Progress
from liushui.engine.startup import Phases, prompt_line, report
from liushui.errors import ParameterError
from tests.engine.scripted import make_llm, tiny_tokenizer


def test_report_names_everything_that_came_from_somewhere() -> None:
    checkpoint = SimpleNamespace(
        generation_config={"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}, describe=lambda: "GGUF Q4_1, 94 MB"
    )
    runner = SimpleNamespace(notes=["kernels: avx2, 2 threads", "KV cache: 1 GiB"], max_model_len=2048)
    phases = Phases()
    with phases("weights"):
        pass
    phases.close()
    lines = report(EngineConfig(), checkpoint, tiny_tokenizer(add_bos=True), runner, phases)  # type: ignore[arg-type]
    text = "\n".join(lines)
    assert lines[0] == "smollm2: GGUF Q4_1, 94 MB"
    assert "kernels: avx2, 2 threads\nKV cache: 1 GiB" in text
    assert "continuous, up to 64 sequences and 1,024 tokens a step, max_model_len 2,048, prefix caching on" in text
    assert "BOS '<|bos|>' is put in front; answers end with '<|eos|>'; chat template " in text
    assert "not applied, though the model's files suggest it: temperature=0.6, top_p=0.9" in text
    assert lines[-1].startswith("ready after ")


def test_report_says_what_is_not_there() -> None:
    line = prompt_line(tiny_tokenizer(template=None))
    assert line == "prompts: no BOS added; answers end with '<|eos|>'; no chat template"


def test_phases_add_up() -> None:
    phases = Phases()
    for name in ("a", "b", "a"):
        with phases(name):
            sum(range(1000))
    phases.close()
    assert list(phases.seconds) == ["a", "b", "other"]
    assert all(seconds >= 0 for seconds in phases.seconds.values())


def test_a_chat_template_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="chat_template: cannot be read"):
        LLM("smollm2", chat_template=str(tmp_path / "none.jinja"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    llm = make_llm()
    llm.generate(["a", "b"], SamplingParams(max_tokens=3))
    assert "tokens/s" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
    for stream, show in ((Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        llm.generate(["a", "b"], SamplingParams(max_tokens=3), use_tqdm=show)
        assert stream.getvalue() == ""


def test_progress_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress(make_llm().engine, 0, show=True):
        pass
    assert terminal.getvalue() == ""

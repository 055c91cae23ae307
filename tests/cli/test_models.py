"""`liushui`, `liushui models` and `liushui pull`."""

import subprocess
import sys

import pytest


def test_version(liushui):
    done = liushui("--version")
    assert (done.code, done.out) == (0, "liushui 0.1.0\n")


@pytest.mark.parametrize("command", ["generate", "chat", "pull", "models", "demo"])
def test_every_command_has_help(liushui, command):
    done = liushui(command, "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: liushui {command}")


def test_help_does_not_import_torch():
    code = (
        "import sys; import liushui.cli.main; print([m for m in ('torch', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_models_lists_aliases_and_architectures(liushui):
    done = liushui("models")
    assert done.code == 0, done.err
    assert "smollm2" in done.out
    assert "Qwen3ForCausalLM" in done.out


def test_pull_of_what_is_here_prints_its_path(liushui, model):
    done = liushui("pull", model)
    assert done.code == 0, done.err
    assert done.out == f"{model}\n"


def test_pull_of_nonsense_names_the_aliases(liushui):
    done = liushui("pull", "no-such-model")
    assert done.code == 2
    assert "smollm2" in done.err
    assert "Traceback" not in done.err


def test_a_download_is_shown_stage_by_stage(capsys):
    from liushui.cli.progress import Download

    with Download() as bar:
        bar(0, 10_000_000, "downloading x")
        bar(10_000_000, 10_000_000, "downloading x")
        bar(5, 5, "unpacking")
    assert capsys.readouterr().err.splitlines() == ["downloading x (10 MB)", "unpacking (0 MB)"]

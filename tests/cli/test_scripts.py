"""The scripts a clean clone starts with."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.files import module_at

setup, check_source = module_at("scripts/setup.py"), module_at("scripts/check_source.py")


def test_an_old_python_is_told_which_to_use():
    setup.check_python((3, 11, 0))
    with pytest.raises(setup.SetupError, match=r"3\.11 or newer.*is 3\.9\. try: make PYTHON=python3\.12"):
        setup.check_python((3, 9, 1), which=lambda name: name == "python3.12")
    with pytest.raises(setup.SetupError, match="install one"):
        setup.check_python((3, 9, 1), which=lambda name: None)


@pytest.mark.parametrize(
    ("platform", "nvidia", "first"),
    [
        ("linux", False, "torch==2.13.0+cpu"),
        ("linux", True, "torch>=2.11,<2.14"),
        ("darwin", False, "torch>=2.11,<2.14"),
    ],
)
def test_without_a_driver_linux_gets_the_cpu_build(platform, nvidia, first):
    attempts = setup.torch_attempts(platform, nvidia)
    assert attempts[0] == [first]
    assert nvidia or platform == "darwin" or all("+cpu" in attempt[0] for attempt in attempts)


def test_a_driver_is_seen(tmp_path: Path):
    assert not setup.has_nvidia_driver(tmp_path, which=lambda name: None)
    assert setup.has_nvidia_driver(tmp_path, which=lambda name: "/usr/bin/nvidia-smi")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert setup.has_nvidia_driver(tmp_path, which=lambda name: None)


def test_a_torch_that_is_there_is_kept(capsys):
    assert setup.install_torch(Path(sys.executable), []) == setup.installed_torch(Path(sys.executable))
    assert "keeping torch" in capsys.readouterr().err


LISTED = r"""
:env:.find-links='/wheels /more'
:env:.disable-pip-version-check='1'
download.index-url='https://download.example/simple'
global.cert='/a.crt'
global.extra-index-url='\nfile:///one/simple\nfile:///two/simple'
global.find-links='/not/these'
global.index-url='https://global.example/simple'
install.index-url='https://user:word@install.example/simple'
"""


def test_uv_is_told_of_pips_settings():
    made = setup.uv_environment(setup.pip_settings(LISTED))
    assert made == {
        "UV_DEFAULT_INDEX": "https://user:word@install.example/simple",
        "UV_INDEX": "file:///one/simple file:///two/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "/a.crt",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


@pytest.mark.parametrize(
    ("listed", "uv", "commands", "said"),
    [
        (LISTED, True, ["uv", "python"], ""),
        (LISTED, False, ["python"], "uv cannot be had here"),
        ("global.no-binary='numpy'", True, ["python"], "uv has no word for pip's no-binary"),
    ],
)
def test_uv_goes_first_where_it_can(monkeypatch, capsys, tmp_path, listed, uv, commands, said):
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listed.encode()))
    monkeypatch.setattr(setup.subprocess, "call", lambda *_, **__: 0 if uv else 1)
    found = setup.find_installers(tmp_path / "python")
    assert [Path(command[0]).name for command, _ in found] == commands
    assert said in capsys.readouterr().err
    assert ("UV_INDEX" in found[0][1]) == (commands[0] == "uv")


def test_where_uv_fails_pip_goes_on(capfd):
    """Each of the attempts with the one, then with the other; the first that works is the last."""
    code = "import os, sys; print(sys.argv[-1], os.environ['WHO'], os.environ['MORE']); sys.exit({})"
    ends = {"uv": "1", "pip": "sys.argv[-1] == 'a'"}
    tools = [([sys.executable, "-c", code.format(end)], os.environ | {"WHO": who}) for who, end in ends.items()]
    assert setup.install([(["/no/such/uv"], {}), *tools], [["a"], ["b"], ["c"]], {"MORE": "yes"})
    said, told = capfd.readouterr()
    assert told.count("No such file") == 3
    assert said.splitlines() == ["a uv yes", "b uv yes", "c uv yes", "a pip yes", "b pip yes"]
    assert not setup.install(tools[:1], [["a"]], {"MORE": "yes"})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import pickle\n", "imports pickle"),
        ("from dill import x\n", "imports dill"),
        ("import torch\ntorch.load('x')\n", "calls torch.load()"),
        ("import torch as t\nt.load('x')\n", "calls torch.load()"),
        ("from torch import load as read\nread('x')\n", "calls torch.load()"),
        ("import builtins as b\nb.eval('1')\n", "calls eval()"),
        ("from importlib import import_module\nimport_module('pickle')\n", "imports by importlib.import_module()"),
        ("__import__('dill')\n", "imports by __import__()"),
        ("eval('1')\n", "calls eval()"),
        ("f(trust_remote_code=True)\n", "trust_remote_code"),
        ("x = 1\n" * 501, "501 lines in a file"),
        ("def f():\n" + "    x = 1\n" * 60, "61 lines in f()"),
        ("class A:\n" + "".join(f"    x{i}: int\n" for i in range(21)), "21 fields in class A"),
    ],
)
def test_breaches_are_found(source: str, words: str):
    (breach,) = check_source.breaches(Path("x.py"), source)
    assert words in breach[1]


@pytest.mark.parametrize("source", ["import httpx", "from urllib.request import urlopen", "import urllib.request"])
def test_the_server_has_no_http_client(source: str):
    assert list(check_source.breaches(Path("src/liushui/server/x.py"), source))
    assert not list(check_source.breaches(Path("src/liushui/loading/x.py"), source))


def test_native_sources_are_bounded_too():
    assert list(check_source.breaches(Path("x.cu"), "int x;\n" * 501))
    assert not list(check_source.breaches(Path("x.cu"), "int eval(int x);\n"))


def test_what_is_allowed_is_not_a_breach():
    source = "class A:\n    def eval(self): ...\n\nmodel.eval()\nre.compile('x')\nsafetensors.torch.load_file('x')\n"
    assert list(check_source.breaches(Path("x.py"), source)) == []

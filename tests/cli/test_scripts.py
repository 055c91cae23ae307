"""The scripts a clean clone starts with."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup, check_source = script("setup"), script("check_source")


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
    assert setup.install_torch(Path(sys.executable)) == setup.installed_torch(Path(sys.executable))
    assert "keeping torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import pickle\n", "imports pickle"),
        ("from dill import x\n", "imports dill"),
        ("import torch\ntorch.load('x')\n", "calls torch.load()"),
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


def test_what_is_allowed_is_not_a_breach():
    source = "class A:\n    def eval(self): ...\n\nmodel.eval()\nre.compile('x')\nsafetensors.torch.load_file('x')\n"
    assert list(check_source.breaches(Path("x.py"), source)) == []

"""benchmarks/cpu.py: its tables, and llama.cpp's server where one that stands in for it answers."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from types import ModuleType

import pytest

from tests.support.files import ROOT

SERVER = """#!{python}
import http.server, json, sys
if "--no-repack" not in sys.argv:
    sys.exit("dead")
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, found):
        self.send_response(200), self.end_headers(), self.wfile.write(json.dumps(found).encode())
    def do_GET(self):
        self.reply(dict(status="ok"))
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(dict(tokens=[len(asked["prompt"])] * asked["n_predict"]))
    def log_message(self, *_):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("common", "contender", "cpu", "cpu_engines"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def stand_in(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "llama-server"
    program.write_text(script.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_the_server_is_asked_again_without_its_own_layout(
    load: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = load("cpu_engines")
    stand_in(tmp_path, SERVER, monkeypatch)
    server = engines.LlamaServer("a.gguf", "native", 2)
    try:
        assert server.generate([[1, 2, 3], [4]], [2, 3]) == [[3, 3], [1, 1, 1]]
        assert "-c 4096 --kv-unified --no-repack" in server.notes[0]
    finally:
        server.close()


def test_a_server_that_ends_says_how(load: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = load("cpu_engines")
    stand_in(tmp_path, "#!{python}\nraise SystemExit('no such model')", monkeypatch)
    with pytest.raises(SystemExit, match="did not start: status 1\nno such model"):
        engines.LlamaServer("a.gguf", "native", 2)


def test_what_a_process_printed_last(load: ModuleType) -> None:
    cpu = load("cpu")
    script = "import sys; print('{\"a\": 1}'); print('a log', end='\\n\\n'); sys.exit(int(sys.argv[1]))"
    assert cpu.last_line([sys.executable, "-c", script, "0"]) == "a log"
    assert cpu.last_line([sys.executable, "-c", script, "0"], "{") == '{"a": 1}'
    with pytest.raises(cpu.ChildError, match="status 3"):
        cpu.last_line([sys.executable, "-c", script, "3"])
    with pytest.raises(cpu.ChildError, match="status 0"):
        cpu.last_line([sys.executable, "-c", script, "0"], "[")


def test_a_package_is_looked_for_where_it_is_said_to_be(load: ModuleType, tmp_path: Path) -> None:
    home_of = load("cpu").home_of
    assert home_of("json", {}) == sys.executable
    assert home_of("no_such_package", {}) is None
    assert home_of("json", {"json": sys.executable}) == sys.executable
    with pytest.raises(SystemExit, match="has no no_such_package; install it there"):
        home_of("no_such_package", {"no_such_package": sys.executable})
    with pytest.raises(SystemExit, match=r"--python: .*nothing is no Python that runs here"):
        home_of("json", {"json": str(tmp_path / "nothing")})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_memory_of_the_processes_that_a_contender_started(load: ModuleType) -> None:
    engines = load("cpu_engines")
    hold = "held = b'1' * (64 * 2**20); print('ready', flush=True); input()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", nested], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        both = [*engines.descendants(process.pid), process.pid]
        assert len(both) == 2
        assert set(both) <= set(engines.descendants(os.getpid()))
        assert sum(engines.peak_mib_of(pid) for pid in both) > 64
        process.communicate("")


def test_the_context_is_what_the_workloads_need(load: ModuleType) -> None:
    engines, common = load("cpu_engines"), load("common")
    many = common.make_workload(64, 49152)
    assert engines.context_for(["single", "prefill"], many) == 3072
    context = engines.context_for(["single", "offline"], many)
    assert 0 <= context - many.input_tokens - many.output_tokens < 1024


@pytest.mark.parametrize("labels", [["liushui native", "llama.cpp server"], ["llama.cpp server"], ["liushui native"]])
def test_ratios_and_shares_of_whoever_is_there(
    load: ModuleType, labels: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu, common = load("cpu"), load("common")
    model = tmp_path / "a.gguf"
    model.write_bytes(b"0" * 10**6)
    facts = cpu.Facts(str(model), 1000, (64, 2, 64), 10**6, 10**5, 1.0, 0.5, True, ("native",))
    speeds = {"liushui native": (600.0, 400.0), "llama.cpp server": (250.0, 150.0)}
    pace = {"product_tflops": 0.25, "read_gbs": 2.0, "adds_ns": 10.0}
    results = {
        label: [
            {"weight_bytes": 10**6, "single_rate": speeds[label][0], "pace": pace},
            {"weight_bytes": 10**6, "single_rate": speeds[label][1], "pace": {}},
        ]
        for label in labels
    }
    cpu.report(results, facts, common.make_workload(4, 1000))
    lines = capsys.readouterr().out.splitlines()
    assert "memory read 2.0 GB/s, product 0.50 TFLOP/s" in "\n".join(lines)
    for label in labels:
        best, least = speeds[label]
        figures, beside = (line for line in lines if line.startswith(label))
        assert figures.split("  ")[-1].strip() == f"{(best + least) / 2:.1f} ({best:.1f})"
        ratio = f"{(best + least) / 400:.2f}x" if "llama.cpp server" in labels else "-"
        assert beside.removeprefix(label).split() == [ratio, f"{best / 2000:.0%}"]
    assert cpu.in_words(results[labels[0]][0]).endswith("product 0.25 TFLOP/s, memory 2.0 GB/s, an addition 10.0 ns")

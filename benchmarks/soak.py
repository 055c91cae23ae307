"""Soak: a server under everything at once, for as long as you like. Run it by `make soak` (an hour).

    python benchmarks/soak.py --minutes 1

A server on a tiny random model, with so little KV cache that sequences are preempted. Clients ask, stream, read slowly,
leave in the middle, set deadlines that cannot be kept, and send nonsense; and a set of reference requests goes
through again and again. It passes if, at the end,

    every request got exactly one reply: complete, or a refusal that names itself      lost = duplicated = 0
    every reference answer was bit for bit the one that the idle server gave           changed = 0
    nothing is owned or waits                                                          leaked = 0
    the processes have not grown                                                       after a warm-up
    sequences were preempted                                                           or there was no pressure
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CLIENTS = 24
CROWD = 16
"""Long requests sent at once, now and then: together they need more KV cache than there is, however fast the server."""
GROWTH = 64 * 2**20
"""Bytes that the processes may grow after the warm-up: allocators keep some."""
NONSENSE: list[Any] = [
    {"prompt": "a", "temperature": -1},
    {"prompt": "a", "n": 10**6},
    {"prompt": [10**6]},
    {"prompt": "a", "max_tokens": 10**9},
    {"prompt": "a", "no_such_field": 1},
    {"prompt": ""},
    {"prompt": {"a": [1]}},
    [],
    "x",
]


def reference() -> list[dict[str, Any]]:
    """Requests of all kinds whose answers must not change."""
    bodies = []
    for i in range(12):
        body: dict[str, Any] = {"prompt": f"reference {i} " * (1 + i % 4), "max_tokens": 8 + 3 * i, "seed": i}
        body |= [{"temperature": 0}, {"n": 2}, {"logprobs": 3}, {"top_p": 0.8, "stop": ["z"]}][i % 4]
        bodies.append(body)
    return bodies


class Soak:
    """The clients, and what they saw."""

    def __init__(self, url: str, session: Any, seed: int) -> None:
        self.url = url
        self.session = session
        self.rng = random.Random(seed)
        self.count: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.expected: list[str] = []
        self.crowded = asyncio.Lock()

    async def learn(self) -> None:
        """The reference answers, from an idle server."""
        for body in reference():
            self.expected.append(await self._answer(body) or "")

    async def client(self, until: float) -> None:
        """One of many: does one thing after the other."""
        acts = [self.whole, self.stream, self.leave, self.slow, self.nonsense, self.late, self.crowd]
        acts += [self.compare] * 2
        while time.monotonic() < until and len(self.wrong) < 20:
            await self.do(self.rng.choice(acts))

    async def do(self, act: Callable[[], Awaitable[None]]) -> None:
        """One act, counted; what it found wrong is kept."""
        try:
            await act()
            self.count[act.__name__] += 1
        except Exception as error:
            self.wrong.append(f"{act.__name__}: {type(error).__name__}: {error}")

    def body(self) -> dict[str, Any]:
        rng = self.rng
        body: dict[str, Any] = {"prompt": "ab cd " * rng.randint(1, 40), "max_tokens": rng.randint(1, 120)}
        body |= rng.choice([{}, {"n": 3}, {"logprobs": 2}, {"stop": ["q"]}, {"priority": rng.randint(-3, 3)}])
        return body | {"seed": rng.randint(0, 10**9)}

    async def _answer(self, body: Any) -> str | None:
        """The choices of one answer; None if it was refused for want of room."""
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            answer = await response.json()
            if response.status == 503:
                self.count["refused"] += 1
                assert "Retry-After" in response.headers
                return None
            assert response.status == 200, f"{response.status} {answer}"
            assert len(answer["choices"]) == body.get("n", 1), "choices"
            assert all(choice["finish_reason"] in ("stop", "length") for choice in answer["choices"]), "reasons"
            self.count["answers"] += 1
            return json.dumps(answer["choices"])

    async def whole(self) -> None:
        await self._answer(self.body())

    async def crowd(self) -> None:
        """Many long requests at once; one request, if there is such a crowd already."""
        if self.crowded.locked():
            await self.whole()
            return
        async with self.crowded:
            long = {"prompt": "ab cd " * 20, "max_tokens": 200, "ignore_eos": True}
            await asyncio.gather(*(self._answer(self.body() | long) for _ in range(CROWD)))

    async def compare(self) -> None:
        """A reference request, in company."""
        number = self.rng.randrange(len(self.expected))
        found = await self._answer(reference()[number])
        if found is not None:
            self.count["compared"] += 1
            if found != self.expected[number]:
                self.wrong.append(f"reference {number} changed: {found[:200]} was {self.expected[number][:200]}")

    async def stream(self, pause: float = 0.0) -> None:
        """A stream to its end: every choice ends once, and nothing comes behind [DONE]."""
        body = self.body() | {"stream": True, "stream_options": {"include_usage": True}}
        ends: Counter[int] = Counter()
        usage, done = None, 0
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status == 503:
                self.count["refused"] += 1
                return
            assert response.status == 200, response.status
            async for line in response.content:
                if pause:
                    await asyncio.sleep(pause)
                if not line.startswith(b"data: "):
                    continue
                assert not done, "something behind [DONE]"
                if line.strip() == b"data: [DONE]":
                    done += 1
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                usage = event["usage"] or usage
                for choice in event["choices"]:
                    ends[choice["index"]] += choice["finish_reason"] is not None
        assert (done, usage is not None) == (1, True), "the stream broke off"
        assert dict(ends) == dict.fromkeys(range(body.get("n", 1)), 1), f"ends {ends}"
        self.count["answers"] += 1

    async def slow(self) -> None:
        await self.stream(pause=self.rng.uniform(0.01, 0.05))

    async def leave(self) -> None:
        """A client that is gone before its answer."""
        body = self.body() | {"stream": self.rng.random() < 0.5, "max_tokens": 200, "ignore_eos": True}
        try:
            async with asyncio.timeout(self.rng.uniform(0.001, 0.3)):
                async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
                    await response.content.read(100)
                    await response.read()
        except TimeoutError:
            self.count["left"] += 1

    async def late(self) -> None:
        """A deadline that may not be kept: an end that says so."""
        body = self.body() | {"timeout": self.rng.uniform(0.01, 0.3), "max_tokens": 200, "ignore_eos": True}
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status in (200, 503, 504), f"{response.status} {answer}"
            self.count["deadlines missed"] += response.status == 504

    async def nonsense(self) -> None:
        async with self.session.post(f"{self.url}/v1/completions", json=self.rng.choice(NONSENSE)) as response:
            assert response.status == 400, response.status
            assert (await response.json())["error"]["code"]

    async def numbers(self) -> dict[str, float]:
        """/metrics, by name."""
        async with self.session.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    async def idle(self, seconds: float = 30) -> dict[str, float]:
        """The numbers, once nothing is under way; or those of the end of our patience."""
        end = time.monotonic() + seconds
        while True:
            found = await self.numbers()
            if not any(found[f"liushui_requests_{name}"] for name in ("unfinished", "waiting", "running")):
                return found
            if time.monotonic() > end:
                return found
            await asyncio.sleep(0.1)


def resident(pid: int) -> int:
    """Bytes of memory of a process and its children (Linux; 0 elsewhere)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            number, parent = int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if pid in (number, parent):
                total += int((folder / "statm").read_text().split()[1]) * 4096
        except (OSError, ValueError, IndexError):
            continue
    return total


async def soak(url: str, pid: int, minutes: float, seed: int) -> dict[str, Any]:
    """Run all clients, and judge."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        run = Soak(url, session, seed)
        await run.learn()
        start = time.monotonic()
        memory = []
        for share in (0.2, 1.0):  # the warm-up, the rest
            clients = [run.client(start + 60 * minutes * share) for _ in range(CLIENTS)]
            await asyncio.gather(run.do(run.crowd), *clients)
            found = await run.idle()
            memory.append(resident(pid))
        leaked = {
            name: found[f"liushui_{name}"]
            for name in ("requests_unfinished", "requests_waiting", "requests_running", "kv_cache_usage_ratio")
            if found[f"liushui_{name}"]
        }
    failures = {
        "a reply was lost, duplicated or changed": bool(run.wrong),
        "something is still owned or waits": bool(leaked),
        f"memory grew by more than {GROWTH >> 20} MiB": memory[1] - memory[0] > GROWTH,
        "no sequence was preempted: too little pressure to show anything": not found["liushui_preemptions_total"],
    }
    return {
        "minutes": minutes,
        "requests": int(found["liushui_requests_total"]),
        "answers": run.count["answers"],
        "reference_answers_compared": run.count["compared"],
        "clients_that_left": run.count["left"],
        "slow_readers": run.count["slow"],
        "bad_requests": run.count["nonsense"],
        "deadlines_missed": run.count["deadlines missed"],
        "refused_for_want_of_room": run.count["refused"],
        "preemptions": int(found["liushui_preemptions_total"]),
        "output_tokens": int(found["liushui_output_tokens_total"]),
        "wasted_tokens": int(found["liushui_wasted_tokens_total"]),
        "memory_mib": [round(size / 2**20, 1) for size in memory],
        "lost_duplicated_or_changed": run.wrong,
        "leaked": leaked,
        "failed": [name for name, failed in failures.items() if failed],
    }


def serve(folder: Path, kv_gib: float) -> "tuple[subprocess.Popen[str], str]":
    """The server and its address."""
    from tests.cli.conftest import make_model

    model = make_model(folder / "model")
    command = [sys.executable, "-m", "liushui.cli.main", "serve", str(model), "--port", "0", "--threads", "1"]
    command += ["--max-num-seqs", "16", "--max-num-batched-tokens", "64", "--kv-cache-gib", str(kv_gib)]
    log = (folder / "log").open("w+")
    process = subprocess.Popen(command, stderr=log, text=True)
    for _ in range(1200):
        text = (folder / "log").read_text()
        for line in text.splitlines():
            if line.startswith("listening on "):
                return process, line.split()[2]
        if process.poll() is not None:
            raise SystemExit(f"the server did not start:\n{text}")
        time.sleep(0.1)
    raise SystemExit("the server did not start within two minutes")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Soak a server on a tiny model.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-gib", type=float, default=0.00025, help="KV cache; so little that there is preemption")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        process, url = serve(Path(folder), given.kv_gib)
        try:
            verdict = asyncio.run(soak(url, process.pid, given.minutes, given.seed))
        finally:
            process.terminate()
            code = process.wait(60)
        log = (Path(folder) / "log").read_text()
    if code:
        verdict["failed"].append(f"the server ended with {code}")
    if "Traceback" in log:
        verdict["failed"].append("the server's log has a traceback")
    if verdict["failed"]:
        print(log[-5000:], file=sys.stderr, flush=True)
    print(json.dumps(verdict, indent=1))
    return 1 if verdict["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

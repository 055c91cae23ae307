"""The GPU engine against the hardware's limit: `python benchmarks/gpu.py [--shape 0.6b 8b] [--only T1 T2 T3 T4 T5]`.

Random weights at two published shapes; scheduler and runner in the engine's own loop (one step ahead), no text.

T1  256 requests at once, prompts and answers uniform in [100, 1024], temperature 0.6: output tokens per second, the
    median run, and the process's first
T2  one sequence, prompt 128, 256 tokens: milliseconds a step
T3  B sequences, prompt 512: milliseconds a decoding step, greedy and at temperature 0.6
T4  16 prompts of 4,095 tokens: TFLOP/s
T5  64 greedy answers alone, in company, chunked, preempted, from the prefix cache, and their first tokens in 200 steps
    of prompts: how many differ in any bit

Floor of a step: the larger of bytes that must move (weights once, keys and values of every sequence once) over the
measured copy bandwidth, and operations over the measured rate of a bf16 product, both taken in the same run.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from random_checkpoint import SHAPES, RandomCheckpoint

from liushui.config import EngineConfig
from liushui.core.blocks import BlockPool
from liushui.core.plan import StepPlan
from liushui.core.request import Request, SamplingParams
from liushui.core.scheduler import Scheduler
from liushui.core.sequence import Sequence
from liushui.runner.runner import Runner

NAMES = {"0.6b": "qwen3-0.6b", "8b": "llama-3.1-8b"}
MAX_LEN = 4096


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def ceilings(device: torch.device) -> tuple[float, float]:
    """(bytes/s of a device copy, read + written; FLOP/s of an 8192^3 bf16 product): medians."""
    source = torch.randn(2**30, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))

    def median(call: Any, repeats: int = 15) -> float:
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times[3:])

    bandwidth = 2 * source.nbytes / median(lambda: target.copy_(source))
    return bandwidth, 2 * 8192**3 / median(lambda: F.linear(a, b))


@dataclass
class Costs:
    """What a model's step must move and compute."""

    config: dict[str, Any]
    weight_bytes: int
    bandwidth: float
    rate: float

    def __post_init__(self) -> None:
        c = self.config
        self.kv_bytes = 4 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]
        head = c["vocab_size"] * c["hidden_size"]
        self.layer_parameters = self.weight_bytes // 2 - head
        self.head_parameters = head
        self.attention = 4 * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"]

    def flops(self, plan: StepPlan) -> float:
        rows = sum(item.samples for item in plan.items)
        pairs = sum(i.num_tokens * i.start + i.num_tokens * (i.num_tokens + 1) / 2 for i in plan.items)
        return 2 * plan.num_tokens * self.layer_parameters + 2 * rows * self.head_parameters + self.attention * pairs

    def floor(self, plan: StepPlan) -> float:
        """Seconds."""
        keys = sum(item.start + item.num_tokens for item in plan.items)
        return max((self.weight_bytes + keys * self.kv_bytes) / self.bandwidth, self.flops(plan) / self.rate)


@dataclass
class Run:
    """One workload, as it went."""

    seconds: float = 0.0
    floor: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    host: list[float] = field(default_factory=list)
    """Seconds of each step that the host worked: schedule, launch, update."""
    ends: list[tuple[float, bool, int]] = field(default_factory=list)
    """When each step's tokens were there, whether it only decoded, its sequences."""

    def decode_ms(self, skip: int = 8) -> float:
        """Median time between the ends of consecutive decoding steps."""
        pairs = zip(self.ends[skip:], self.ends[skip + 1 :], strict=False)
        return 1e3 * statistics.median(b[0] - a[0] for a, b in pairs if a[1] and b[1])


class Bench:
    """One model on the device; each workload gets a fresh scheduler."""

    def __init__(self, shape: str, bandwidth: float, rate: float, device: torch.device, **settings: Any) -> None:
        started = time.perf_counter()
        config = SHAPES[NAMES[shape]]
        checkpoint = RandomCheckpoint(config, device)
        options = {"max_model_len": MAX_LEN, "max_num_seqs": 256, "max_num_batched_tokens": 8192, "device": "cuda"}
        self.config = EngineConfig(**(options | settings)).validate()
        self.runner = Runner.load(self.config, checkpoint)
        torch.cuda.synchronize()
        self.costs = Costs(config, checkpoint.bytes(), bandwidth, rate)
        self.vocab = config["vocab_size"]
        self.names = 0
        say(shape=shape, load_s=round(time.perf_counter() - started, 2), notes=self.runner.notes)

    def request(self, prompt: Seq[int], new: int, params: SamplingParams, seed: int = 0) -> Request:
        self.names += 1
        return Request(f"r{self.names}", tuple(prompt), params, seed, new)

    def serve(self, requests: Seq[Request], cost: bool = True, **settings: Any) -> tuple[Run, dict[str, Any]]:
        """All requests at once to the end; the engine's loop at depth 1. Also tokens and log-probabilities."""
        options = {
            "max_num_seqs": self.config.max_num_seqs, "max_num_batched_tokens": self.config.max_num_batched_tokens,
            "max_model_len": self.runner.max_model_len, "policy": "continuous", "prefix_caching": False,
        }  # fmt: skip
        blocks = settings.pop("blocks", self.runner.num_blocks)
        depth = settings.pop("depth", 1)
        scheduler = Scheduler(BlockPool(blocks, self.runner.block_size), **(options | settings))
        run, flights = Run(), deque()
        answers: dict[str, Any] = {request.request_id: ([], []) for request in requests}
        for request in requests:
            scheduler.add(Sequence(request))
        if cost and self.runner.steps is not None:  # what is compiled and tried behind earlier steps is not measured
            self.runner.steps.finish()
        torch.cuda.synchronize()
        start = time.perf_counter()
        while scheduler.has_work:
            begin = time.perf_counter()
            plan = scheduler.schedule(begin)
            if plan is not None:
                flights.append((plan, self.runner.execute(plan)))
            waited = self._count(run, plan) if cost and plan is not None else 0.0
            if flights and (plan is None or len(flights) > depth or flights[-1][1].alone):
                done, pending = flights.popleft()
                before = time.perf_counter()
                result = pending.result()
                now = time.perf_counter()
                waited += now - before
                run.ends.append((now, done.num_tokens == len(done.items), len(done.items)))
                scheduler.update(done, result.tokens)
                assert not result.errors, result.errors
                for seq_id, tokens in result.tokens.items():
                    answers[seq_id][0].extend(tokens)
                    run.tokens += len(tokens)
                for seq_id, found in result.logprobs.items():
                    answers[seq_id][1].extend(found)
            run.host.append(time.perf_counter() - begin - waited)
        torch.cuda.synchronize()
        run.seconds = time.perf_counter() - start
        self.preemptions, self.hits = scheduler.num_preemptions, scheduler.num_hit_tokens
        return run, answers

    def _count(self, run: Run, plan: StepPlan) -> float:
        """Add what the plan costs at least; returns the seconds that took, beside the device."""
        begin = time.perf_counter()
        run.floor += self.costs.floor(plan)
        run.flops += self.costs.flops(plan)
        return time.perf_counter() - begin

    def prompt(self, length: int, seed: int) -> list[int]:
        return random.Random(seed).choices(range(self.vocab), k=length)

    def t1(self, repeats: int) -> None:
        rng = random.Random(0)
        sizes = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(256)]
        params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=None)
        runs = []
        for _ in range(repeats):
            requests = [self.request(self.prompt(p, i), n, params, seed=i) for i, (p, n) in enumerate(sizes)]
            runs.append(self.serve(requests)[0])
        rates = [run.tokens / run.seconds for run in runs]
        run = runs[rates.index(statistics.median_low(rates))]
        gaps = sorted(b[0] - a[0] for a, b in zip(run.ends, run.ends[1:], strict=False))
        say(
            T1="tok/s", value=round(run.tokens / run.seconds), of_floor=round(run.floor / run.seconds, 3),
            seconds=round(run.seconds, 2), first=round(rates[0]), all=list(map(round, rates)), steps=len(run.ends),
            host_ms=_ms(statistics.median(run.host)), step_p50_ms=_ms(gaps[len(gaps) // 2]),
            step_p99_ms=_ms(gaps[int(len(gaps) * 0.99)]), graphs=len(self.runner.steps.graphs),
        )  # fmt: skip

    def decode(self, name: str, count: int, prompt: int, new: int, temperature: float) -> None:
        params = SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=None)
        for _ in range(2):  # the first captures the graphs
            requests = [self.request(self.prompt(prompt, i), new, params, seed=i) for i in range(count)]
            run, _ = self.serve(requests)
        ms = run.decode_ms()
        middle = self.costs.weight_bytes + count * (prompt + new / 2) * self.costs.kv_bytes
        floor = 1e3 * middle / self.costs.bandwidth
        say(
            **{name: "ms/step"}, batch=count, temperature=temperature, value=round(ms, 3), floor_ms=round(floor, 3),
            of_floor=round(floor / ms, 3), host_ms=_ms(statistics.median(run.host)),
        )  # fmt: skip

    def t4(self, repeats: int) -> None:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
        rates = []
        for attempt in range(repeats + 2):
            requests = [self.request(self.prompt(4095, 100 * attempt + i), 1, params) for i in range(16)]
            run, _ = self.serve(requests)
            rates.append(run.flops / run.seconds / 1e12)
        value = statistics.median(rates[2:])
        say(T4="TFLOP/s", value=round(value, 1), of_rate=round(value * 1e12 / self.costs.rate, 3), all=_r(rates))

    def t5(self, new: int) -> None:
        """The first 64 answers are the reference: each alone, prompts whole."""
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None, logprobs=2)
        warm = SamplingParams(temperature=0.8, top_p=0.9, ignore_eos=True, max_tokens=None, logprobs=0)
        rng = random.Random(7)
        lengths = [rng.randint(1, 700) for _ in range(64)]
        prompts = [self.prompt(n, 1000 + i) for i, n in enumerate(lengths)]

        def ask(which: Seq[int], new: int = new) -> list[Request]:
            return [self.request(prompts[i], new, warm if i % 4 == 3 else params, seed=i) for i in which]

        def collect(requests: list[Request], answers: dict[str, Any]) -> list[Any]:
            return [tuple(part[:new] for part in answers[request.request_id]) for request in requests]

        reference = []
        for i in range(64):
            requests = ask([i])
            reference += collect(requests, self.serve(requests, cost=False)[1])
        needed = sum(-(-(n + new) // self.runner.block_size) for n in lengths)
        forms: dict[str, dict[str, Any]] = {
            "company": {}, "company again, replayed": {}, "chunks of 100": {"max_num_batched_tokens": 100},
            "chunks of 333, no look-ahead": {"max_num_batched_tokens": 333, "depth": 0},
            "preempted": {"blocks": needed // 6}, "prefix cache": {"prefix_caching": True},
        }  # fmt: skip
        for name, settings in forms.items():
            if "max_num_batched_tokens" in settings:
                settings["max_num_seqs"] = 64
            which = list(range(64)) + (list(range(64)) if name == "prefix cache" else [])
            if name != "prefix cache":
                rng.shuffle(which)
            requests = ask(which, max(new, 160) if name == "preempted" else new)  # growing is what takes the memory
            got = collect(requests, self.serve(requests, cost=False, **settings)[1])
            differ = sum(answer != reference[i] for i, answer in zip(which, got, strict=True))
            tokens = sum(answer[0] != reference[i][0] for i, answer in zip(which, got, strict=True))
            say(T5=name, differ=differ, of=len(which), tokens_differ=tokens, preemptions=self.preemptions,
                hit_tokens=self.hits)  # fmt: skip
        differ, steps, sets = 0, 200, [rng.sample(range(64), 13) for _ in range(3)]  # a race shows in many steps alone
        first = [tuple(part[:1] for part in answer) for answer in reference]
        for step in range(steps):
            which = sets[step % 3]
            requests = ask(which, 1)
            got = collect(requests, self.serve(requests, cost=False)[1])
            differ += sum(answer != first[i] for i, answer in zip(which, got, strict=True))
        say(T5=f"first tokens in {steps} steps of 13 prompts", differ=differ, of=13 * steps)


def load(shape: str) -> Bench:
    """To be answered from, not measured against a floor."""
    return Bench(shape, 1.0, 1.0, torch.device("cuda"))


def first_token(bench: Bench) -> None:
    """Answer one prompt; prints the time of the first of its tokens."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
    run, _ = bench.serve([bench.request(bench.prompt(128, 0), 16, params)], cost=False)
    print(run.ends[0][0] - time.perf_counter() + time.time(), flush=True)


def start_up(shape: str) -> None:
    """Seconds from starting Python to the first token, with nothing compiled and with everything compiled."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("gpu_first_token.py")), shape]
        for state in ("cold", "warm"):
            begin = time.time()
            environment = os.environ | {"TRITON_CACHE_DIR": folder}
            out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            say(start=state, shape=shape, first_token_s=round(float(out.split()[-1]) - begin, 2))


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _r(values: Seq[float]) -> list[float]:
    return [round(value, 1) for value in values]


def kernels(bench: Bench, count: int, new: int) -> tuple[dict[str, tuple[float, int]], float]:
    """{kernel: (microseconds, launches)} of `count` sequences' prompts and `new` tokens; ms of a decoding step."""
    from torch.profiler import ProfilerActivity, profile

    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=None)

    def serve() -> Run:
        return bench.serve([bench.request(bench.prompt(512, i), new, params, seed=i) for i in range(count)])[0]

    for _ in range(2):  # the first captures the graphs
        run = serve()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        serve()
    return {row.key: (row.self_device_time_total, row.count) for row in prof.key_averages()}, run.decode_ms(skip=2)


def profile(bench: Bench, count: int, short: int = 8, long: int = 40) -> None:
    """Where a decoding step's time goes: what `long` answers take more than `short` ones, a step."""
    before, _ = kernels(bench, count, short)
    after, step_ms = kernels(bench, count, long)
    steps, found = long - short, []
    for key, (us, launches) in after.items():
        less_us, less = before.get(key, (0.0, 0))
        if launches > less:
            found.append(((us - less_us) / steps, (launches - less) / steps, key))
    busy, launches = sum(us for us, _, _ in found) / 1e3, sum(n for _, n, _ in found)
    layers = bench.costs.config["num_hidden_layers"]
    say(
        profile=count, step_ms=round(step_ms, 3), busy_ms=round(busy, 3), busy_share=round(busy / step_ms, 3),
        kernels=round(launches, 1), kernels_a_layer=round(sum(n for _, n, _ in found if n >= layers) / layers, 2),
    )  # fmt: skip
    for us, launches, key in sorted(found, reverse=True)[:14]:
        say(us_a_step=round(us, 1), launches=round(launches, 2), mean=round(us / launches, 2), kernel=key[:70])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--only", nargs="+", default=["start", "T2", "T3", "T4", "T5", "T1"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 128, 256])
    options = parser.parse_args()
    if "start" in options.only:
        for shape in options.shape:
            start_up(shape)
    device = torch.device("cuda")
    bandwidth, rate = ceilings(device)
    say(
        device=torch.cuda.get_device_name(), torch=torch.__version__, copy_TB_s=round(bandwidth / 1e12, 3),
        product_TFLOP_s=round(rate / 1e12, 1), date=time.strftime("%F %T", time.gmtime()),
    )  # fmt: skip
    torch.cuda.empty_cache()
    for shape in options.shape:
        bench = Bench(shape, bandwidth, rate, device)
        if "profile" in options.only:
            for count in (1, 256):
                profile(bench, count)
        if "T2" in options.only:
            for temperature in (0.0, 0.6):
                bench.decode("T2", 1, 128, 256, temperature)
        if "T3" in options.only:
            for temperature in (0.0, 0.6):
                for count in options.batches:
                    bench.decode("T3", count, 512, 64, temperature)
        if "T4" in options.only:
            bench.t4(options.repeats)
        if "T5" in options.only:
            bench.t5(160 if shape == "0.6b" else 48)
        if "T1" in options.only:
            bench.t1(options.repeats)
        if bench.runner.steps is not None:
            say(certificates=bench.runner.steps.ops.report())
        del bench
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

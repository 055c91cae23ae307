"""The native products alone, on SmolLM2's shapes, beside torch's: memory speed at few rows, arithmetic at many.

    python benchmarks/cpu_products.py [--threads 1 2] [--rows 1 64 512] [--isa amx avx512] [--seconds 0.05]

Each figure is the median of passes over so many copies of the weight that none is still in a cache; the contenders of
a row of the table take turns. Up to 16 rows: GB/s of packed weight (torch: of its bfloat16 weight), and the time; more
rows: GFLOP/s. `rows` in the first line of a table are rows of x. The first lines say how fast the threads read memory.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from liushui.errors import LiushuiError
from liushui.kernels.native import INSTRUCTION_SETS
from liushui.kernels.native_linear import NativeLinear, Record
from liushui.kernels.ops import load_ops
from liushui.kernels.quantised import AS_BFLOAT16

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what the tests make, too

SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152))
"""SmolLM2-135M: inputs and outputs of its products."""
FORMATS = ("float32", "bfloat16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
COPIES_BYTES, MANY_ROWS_BYTES = 640 * 2**20, 64 * 2**20
"""Of the copies for few rows, more than a large third-level cache; and for many rows, where it matters less."""
FEW_ROWS = 16
PASSES = 5
Run = Callable[[], object]


class Contender:
    """Products with copies of one weight, one after the other."""

    def __init__(self, name: str, weight_bytes: int, runs: list[Run], keep: object = None) -> None:
        """`keep`: what the runs point to."""
        self.name, self.weight_bytes, self.runs, self.keep, self.next = name, weight_bytes, runs, keep, 0
        self.seconds: list[float] = []

    def measure(self, seconds: float) -> None:
        """One pass: about `seconds` of products; keeps the mean time of one."""
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds or count < 2:
            self.runs[self.next]()
            self.next = (self.next + 1) % len(self.runs)
            count += 1
        self.seconds.append(elapsed / count)

    def figure(self, rows: int, inputs: int, outputs: int) -> str:
        took = median(self.seconds)
        if rows <= FEW_ROWS:
            return f"{self.weight_bytes / took / 1e9:5.1f} GB/s {took * 1e6:6.0f} us"
        return f"{2 * rows * inputs * outputs / took / 1e9:8.0f}"


def copies(rows: int, nbytes: int) -> int:
    return max(2, (COPIES_BYTES if rows <= FEW_ROWS else MANY_ROWS_BYTES) // nbytes)


def native(isa: str, threads: int, kind: str, x: torch.Tensor, outputs: int) -> Contender | None:
    from tests.kernels.quant_support import random_rows

    ops = load_ops("native", threads, isa=isa)
    inputs, named = x.shape[1], kind
    kind, _, expanded = kind.partition(":")
    if kind in ("Q4_K", "Q6_K") and inputs % 256:
        return None
    if kind in ("float32", "bfloat16"):
        packed = ops.pack_linear(torch.randn(outputs, inputs).to(getattr(torch, kind)))
    else:
        packed = ops.pack_linear(random_rows(kind, outputs, inputs), None, AS_BFLOAT16 if expanded else None)
    assert isinstance(packed, NativeLinear)
    product = ops.products._product
    x = x.float() if kind == "float32" else x
    out, type_ = x.new_empty(x.shape[0], outputs), int(x.dtype is torch.bfloat16)
    count, size = copies(x.shape[0], packed.nbytes), (packed.nbytes - 1) // 64 * 64
    memory = torch.empty(count * size + 64, dtype=torch.uint8)
    ops.use_huge_pages(memory)  # as the engine has them
    start = memory.data_ptr() + (-memory.data_ptr() % 64)
    keep = []
    runs: list[Run] = []
    for number in range(count):
        record = Record.from_buffer_copy(packed.records[0])
        record.data = start + number * size
        ctypes.memmove(record.data, packed.records[0].data, size)
        keep.append((record, memory, x, out))
        where = (x.data_ptr(), type_, x.shape[0], out.data_ptr(), type_, 0, outputs)
        runs.append(partial(product, threads, ctypes.addressof(record), *where))
    return Contender(f"{isa} {named}", packed.nbytes, runs, keep)


def vendor(x: torch.Tensor, outputs: int) -> Contender:
    weight = torch.randn(outputs, x.shape[1]).bfloat16()
    weights = [weight.clone() for _ in range(copies(x.shape[0], weight.nbytes))]
    return Contender("torch bfloat16", weight.nbytes, [partial(_linear, x, copy) for copy in weights])


def _linear(x: torch.Tensor, weight: torch.Tensor) -> None:
    torch.nn.functional.linear(x, weight)


def read_speed(threads: int) -> float:
    """GB/s of a sum over memory that no cache holds; the best of a few."""
    torch.set_num_threads(threads)
    memory, best = torch.ones(COPIES_BYTES // 4), 0.0
    for _ in range(PASSES):
        started = time.perf_counter()
        memory.sum()
        best = max(best, memory.nbytes / (time.perf_counter() - started) / 1e9)
    return best


def sets(asked: list[str] | None) -> list[str]:
    found = []
    for isa in asked or INSTRUCTION_SETS[:-1]:
        try:
            load_ops("native", 1, isa=isa)
            found.append(isa)
        except LiushuiError as error:
            print(error, flush=True)
    return found if asked else found[:1]


def format_name(text: str) -> str:
    kind, _, expanded = text.partition(":")
    if kind not in FORMATS or (expanded and (expanded != "bf16" or kind in ("float32", "bfloat16"))):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(FORMATS)}, or a quantised one with :bf16")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--isa", nargs="+", help="default: the best this machine has")
    parser.add_argument(
        "--formats", type=format_name, nargs="+", default=list(FORMATS), help="Q4_1:bf16: expanded and multiplied as it"
    )
    parser.add_argument("--shapes", nargs="+", default=[f"{k}x{n}" for k, n in SHAPES], help="inputs x outputs")
    parser.add_argument("--seconds", type=float, default=0.02, help="of one pass")
    args = parser.parse_args()
    isas = sets(args.isa)
    for threads in args.threads:
        print(f"memory, threads {threads}: {read_speed(threads):.1f} GB/s read", flush=True)
    for shape in args.shapes:
        inputs, outputs = map(int, shape.split("x"))
        for rows in args.rows:
            x = torch.randn(rows, inputs).bfloat16()
            for threads in args.threads:
                torch.set_num_threads(threads)
                contenders = [vendor(x, outputs)]
                made = [native(isa, threads, kind, x, outputs) for isa in isas for kind in args.formats]
                contenders += [contender for contender in made if contender is not None]
                for _ in range(PASSES):
                    for contender in contenders:
                        contender.measure(args.seconds)
                        if contender is contenders[0]:
                            time.sleep(0.03)  # torch's threads look for more work for a while, on our cores
                unit = "" if rows <= FEW_ROWS else " GFLOP/s"
                print(f"{shape} rows {rows} threads {threads}{unit}", flush=True)
                for contender in contenders:
                    print(f"    {contender.name:18} {contender.figure(rows, inputs, outputs)}", flush=True)


if __name__ == "__main__":
    main()

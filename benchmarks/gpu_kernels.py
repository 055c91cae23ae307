"""Kernel timings on one GPU: `python benchmarks/gpu_kernels.py [ceilings products decode chunks rows]`.

Medians of CUDA graph replays over rotated inputs; each line is one JSON object.
"""
# ruff: noqa: B023  (every lambda here is called before its loop goes on)

import itertools
import json
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from liushui.kernels.triton import attention, products, vendor
from liushui.kernels.triton.ops import TritonOps
from liushui.kernels.triton.products import Tiles

DEVICE = torch.device("cuda")
SHAPES = {
    "qkv8b": (6144, 4096), "o8b": (4096, 4096), "gateup8b": (28672, 4096), "down8b": (4096, 14336),
    "head8b": (128256, 4096), "qkv06": (4096, 1024), "o06": (1024, 2048), "gateup06": (6144, 1024),
    "down06": (1024, 3072), "head06": (151936, 1024),
}  # fmt: skip
SMALL = (
    *((16, 256, 4, 3), (16, 128, 4, 5), (32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 6), (64, 128, 4, 4)),
    *((128, 64, 4, 4), (128, 128, 8, 3)),
)  # fmt: skip
LARGE = ((64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4))
COMPILE_ONLY = "compile" in sys.argv
HEADS = {"8b": (32, 8, 128), "06": (16, 8, 128)}


def timed(calls: Sequence[Callable[[], object]], repeats: int = 11) -> float:
    """Median milliseconds of one of the calls, captured one after the other."""
    if COMPILE_ONLY:
        calls[0]()
        return 1.0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return sorted(times)[len(times) // 2]


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read + written), read bandwidth, and the rate of a bf16 product."""
    source = torch.randn(2**29, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timed([lambda: target.copy_(source)]) / 1e9
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / timed([lambda: F.linear(a, b)] * 3) / 1e9
    return {"copy_TB_s": round(copy, 3), "product_TFLOP_s": round(rate, 1)}


def measure_products(names: Sequence[str]) -> None:
    for name in names:
        outputs, k = SHAPES[name]
        copies = max(1, min(24, int(400e6 / (outputs * k * 2))))
        weights = [torch.randn(outputs, k, device=DEVICE, dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
        certificate = vendor.Certificate()
        refused = [m for m in (*products.BUCKETS[:30], 2048, 8192) if not certificate.product(m, weights[0], None)]
        x = torch.randn(256, k, device=DEVICE, dtype=torch.bfloat16)
        whole = products.product(x, weights[0], None, False, products.REFERENCE)
        for m in (1, 16, 64):
            first = timed([lambda w=w, m=m: F.linear(x[:m], w) for w in weights])
            best = {}
            for bn, bk, warps, stages in SMALL if m <= 16 else LARGE:
                if bk > k:
                    continue
                tiles = Tiles(bn, max(16, m), bk, warps, stages)
                same = torch.equal(products.product(x[:m], weights[0], None, True, tiles), whole[:m])
                ms = timed([lambda w=w, t=tiles, m=m: products.product(x[:m], w, None, True, t) for w in weights], 5)
                best[tiles] = (ms, same)
            ordered = sorted(best, key=lambda t: best[t][0])[:3]
            gb = outputs * k * 2 / 1e9
            say(
                product=name, m=m, vendor_us=round(first * 1e3, 1), vendor_TB_s=round(gb / first, 2),
                own=[(*(getattr(t, f) for f in t.__slots__), round(best[t][0] * 1e3, 1)) for t in ordered],
                own_TB_s=round(gb / best[ordered[0]][0], 2), all_same=all(s for _, s in best.values()),
                differ=[str(t) for t in best if not best[t][1]][:3],
            )  # fmt: skip
        say(product=name, vendor_refused_at=refused)


def _batch(heads: tuple[int, int, int], lengths: Sequence[int], rows: Sequence[int], size: int) -> tuple:
    hq, hk, d = heads
    blocks = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(blocks)).int()
    table = torch.zeros(len(lengths), max(4096 // size, max(blocks)), dtype=torch.int32)
    at = 0
    for s, count in enumerate(blocks):
        table[s, :count] = order[at : at + count]
        at += count
    copies = max(1, min(4, int(4e8 / (at * hk * size * d * 4))))
    shape = (copies, 2, at, hk, size, d)
    caches = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    starts = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device=DEVICE)
    qkv = torch.randn(sum(rows), (hq + 2 * hk) * d, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty(sum(rows), hq * d, device=DEVICE, dtype=torch.bfloat16)
    lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return caches, qkv, out, starts, lens, table.to(DEVICE)


def measure_decode(kinds: Sequence[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    mixes = {
        "1x256": [256], "8x600": [600] * 8, "32x600": [600] * 32, "256x640": [640] * 256,
        "256 mixed": torch.randint(100, 1600, (256,), generator=generator).tolist(),
    }  # fmt: skip
    for kind, (name, lengths) in itertools.product(kinds, mixes.items()):
        hq, hk, d = HEADS[kind]
        gb = sum(lengths) * hk * d * 4 / 1e9
        arrived = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
        found, outs = [], []
        for size, bulk in ((16, False), (64, True)):
            torch.manual_seed(1)
            caches, qkv, out, starts, lens, table = _batch((hq, hk, d), lengths, [1] * len(lengths), size)
            shape = attention.Shape(hq, hk, d, size)
            for warps, stages, parallel in itertools.product((2, 4), (3, 5), (1, 16)):
                if (parallel == 16) == (len(lengths) == 256):
                    continue
                calls = [
                    lambda c=c, w=warps, s=stages, p=parallel, b=bulk: attention.decode(
                        shape, qkv, c[0], c[1], out, starts, lens, table, 0.08, None, arrived, True, w, s, p, b
                    )
                    for c in caches
                ]
                try:
                    ms = timed(calls, 7)
                except Exception as error:
                    say(decode=kind, mix=name, failed=repr(error)[:200])
                    continue
                found.append((round(ms * 1e3, 1), round(gb / ms, 2), size, bulk, warps, stages, parallel))
                calls[0]()
                outs.append((size, out.clone()))
            del caches
        same = all(torch.equal(o, outs[0][1]) for s, o in outs if s == outs[0][0])
        same &= all(torch.equal(o, outs[-1][1]) for s, o in outs if s == outs[-1][0])
        say(decode=kind, mix=name, same=same, us_TBs_block_bulk_warps_stages_parallel=sorted(found)[:8])


def measure_chunks(kinds: Sequence[str]) -> None:
    for kind, lengths in itertools.product(kinds, ([4096] * 2, [512] * 16)):
        hq, hk, d = HEADS[kind]
        flops = sum(2 * 2 * n * n / 2 * hq * d for n in lengths)
        found, outs = [], []
        for size, bulk in ((16, False), (64, True)):
            torch.manual_seed(1)
            caches, qkv, out, starts, lens, table = _batch((hq, hk, d), lengths, lengths, size)
            shape = attention.Shape(hq, hk, d, size)
            for rows, warps, stages in ((128, 8, 2), (128, 8, 3), (128, 8, 5), (64, 4, 3), (64, 4, 5)):
                call = lambda r=rows, w=warps, s=stages, b=bulk: attention.chunks(  # noqa: E731
                    shape, qkv, caches[0][0], caches[0][1], out, starts, lens, table, 0.08, None, True, r, w, s, b
                )
                try:
                    ms = timed([call], 7)
                except Exception as error:
                    say(chunks=kind, failed=repr(error)[:200])
                    continue
                found.append((round(flops / ms / 1e9), size, bulk, rows, warps, stages))
                outs.append((size, out.clone()))
        same = all(torch.equal(o, outs[0][1]) for s, o in outs if s == outs[0][0])
        same &= all(torch.equal(o, outs[-1][1]) for s, o in outs if s == outs[-1][0])
        # The last row of each sequence once more, decoded alone.
        last = starts[1:].long() - 1
        alone = torch.empty(len(lengths), hq * d, device=DEVICE, dtype=torch.bfloat16)
        single = torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE)
        arrived = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
        attention.decode(
            shape, qkv[last].contiguous(), caches[0][0], caches[0][1], alone, single, lens, table, 0.08, None, arrived,
            True,
        )  # fmt: skip
        say(
            chunks=kind, lengths=lengths[:1], count=len(lengths), same=same, decode_same=torch.equal(alone, out[last]),
            TFLOPs_block_bulk_rows_warps_stages=sorted(found, reverse=True),
        )  # fmt: skip


def measure_rows() -> None:
    ops = TritonOps(DEVICE)
    for hidden, inner, (hq, hk, d), name in ((4096, 14336, HEADS["8b"], "8b"), (1024, 3072, HEADS["06"], "06")):
        for rows in (1, 256, 8192):
            x, residual = (torch.randn(rows, hidden, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
            weight = torch.randn(hidden, device=DEVICE, dtype=torch.bfloat16)
            gate_up = torch.randn(rows, 2 * inner, device=DEVICE, dtype=torch.bfloat16)
            qkv = torch.randn(rows, (hq + 2 * hk) * d, device=DEVICE, dtype=torch.bfloat16)
            caches = torch.empty(2, rows // 16 + 1, hk, 16, d, device=DEVICE, dtype=torch.bfloat16)
            positions = torch.arange(rows, dtype=torch.int32, device=DEVICE)
            rope, norm = torch.rand(8192, d, device=DEVICE), torch.rand(d, device=DEVICE, dtype=torch.bfloat16)
            q_norm = norm if name == "06" else None
            us = {
                "rms_norm": timed([lambda: ops.rms_norm(x, weight, 1e-5, residual)] * 10),
                "silu_mul": timed([lambda: ops.silu_mul(gate_up)] * 10),
                "qkv_to_cache": timed([lambda: ops.qkv_to_cache(
                    qkv, hq, hk, d, positions, positions, caches[0], caches[1], rope, q_norm, q_norm, 1e-6)] * 10),
            }  # fmt: skip
            floor = {"rms_norm": 4 * x.nbytes, "silu_mul": 1.5 * gate_up.nbytes, "qkv_to_cache": 2 * qkv.nbytes}
            say(rows=name, count=rows, us={k: (round(v * 1e3, 1), round(floor[k] / 3e6, 1)) for k, v in us.items()})


def main(parts: Sequence[str]) -> None:
    wanted = parts or ["ceilings", "rows", "decode", "chunks", "products"]
    kinds = [kind for kind in HEADS if kind in wanted] or list(HEADS)
    if "ceilings" in wanted:
        say(device=torch.cuda.get_device_name(), torch=torch.__version__, **ceilings())
    if "rows" in wanted:
        measure_rows()
    if "decode" in wanted:
        measure_decode(kinds)
    if "chunks" in wanted:
        measure_chunks(kinds)
    if "products" in wanted:
        measure_products(list(SHAPES))


if __name__ == "__main__":
    main(sys.argv[1:])

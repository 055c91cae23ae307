"""The vendor's product where it sums in the own kernel's order: its first choice, or a faster one of its algorithms.

cuBLAS picks an algorithm by the number of rows. Its pick may split K, and need not be its fastest. So those it offers
are tried on this machine, for each weight shape and row count: certified are those that give the own kernel's bits on
sums that cancel (`linear.cancelling`), and the fastest of them serves. Which one that is cannot be seen in an answer.

cuBLASLt (https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api) is called by ctypes in the copy that torch has
loaded. Where it cannot be had, there is the first choice alone.
"""

import ctypes
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from liushui.kernels.linear import cancelling
from liushui.kernels.triton import products
from liushui.kernels.triton.common import pdl
from liushui.kernels.triton.rows import rms_norm

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(x [M, K], weight [N, K], bias [N] or None) -> [M, N]."""

OFFERS = 8
"""Algorithms asked for; cuBLASLt sorts them by its own estimate."""
TRIED_OUTPUTS = 2**16
"""Products of more outputs, the heads, run once a step and take the time of their weights: the first choice serves."""
OWN_ROWS = 64
"""Most rows for which the own kernel may be faster than an algorithm that is not the first choice (H100)."""
WORTH = 0.985
"""The share of the first choice's time below which another algorithm is taken."""
_REPEATS = 7
"""Of the likeliest, where they take less than a millisecond."""
_TRIAL_ROWS = 64
"""Different rows in a trial; larger ones repeat them."""
_SAMPLE_ROWS = 256
_CACHE_BYTES = 2**27
"""Read before each timed product, so that its weights come from memory, as they do in a step."""
_HEAD_START = 16
"""Times that it is read, 0.7 ms: the host is to be ahead of the device when kernels of a few microseconds are timed."""
_NEAR_ROWS = 256
"""Most rows of the small kernels around it."""
_ALIGNED = 256
"""Bytes: what cuBLASLt's offers take for granted of addresses; torch's allocations begin so."""
# Of cublasLt.h, library_types.h and cublas_api.h.
_COMPUTE_32F, _R_32F, _TRANSPOSED = 68, 0, 1
_DESC_TRANSA, _PREF_WORKSPACE, _PREF_REDUCTIONS = 3, 1, 3
_TYPES = {torch.bfloat16: 14, torch.float16: 2}


class _Offer(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
        ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4),
    ]  # fmt: skip


class Library:
    """cuBLASLt and a handle of its own on the current device."""

    def __init__(self) -> None:
        """Raises `OSError` where the library cannot be had."""
        if torch.version.cuda is None:
            raise OSError("torch was built without CUDA")
        lib: Any = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")
        pointer = ctypes.c_void_p
        lib.cublasLtMatmul.argtypes = [pointer] * 14 + [ctypes.c_size_t, pointer]
        self.lib, self.matmul = lib, lib.cublasLtMatmul
        self.handle = self._made(lib.cublasLtCreate)
        self.one, self.zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    def _made(self, call: Any, *arguments: Any) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        _check(call(ctypes.byref(found), *arguments))
        return found

    def _matrix(self, kind: int, rows: int, columns: int) -> ctypes.c_void_p:
        """Stored by columns, as this library sees a tensor's rows."""
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        return self._made(self.lib.cublasLtMatrixLayoutCreate, kind, *sizes)

    def offers(self, rows: int, weight: torch.Tensor) -> list["Algorithm"]:
        """For x [rows, K] @ weight.T, those that need no memory and do not add up parts of K, the likeliest first."""
        lib, kind, (n, k) = self.lib, _TYPES[weight.dtype], weight.shape
        how = self._made(lib.cublasLtMatmulDescCreate, _COMPUTE_32F, _R_32F)
        preference = self._made(lib.cublasLtMatmulPreferenceCreate)
        flag, none, room = ctypes.c_int32(_TRANSPOSED), ctypes.c_uint32(0), ctypes.c_uint64(0)
        _check(lib.cublasLtMatmulDescSetAttribute(how, _DESC_TRANSA, ctypes.byref(flag), ctypes.c_size_t(4)))
        set_preference = lib.cublasLtMatmulPreferenceSetAttribute
        _check(set_preference(preference, _PREF_WORKSPACE, ctypes.byref(room), ctypes.c_size_t(8)))
        _check(set_preference(preference, _PREF_REDUCTIONS, ctypes.byref(none), ctypes.c_size_t(4)))
        shapes = self._matrix(kind, k, n), self._matrix(kind, k, rows), self._matrix(kind, n, rows)
        found, count = (_Offer * OFFERS)(), ctypes.c_int()
        status = lib.cublasLtMatmulAlgoGetHeuristic(
            self.handle, how, *shapes, shapes[2], preference, OFFERS, found, ctypes.byref(count)
        )
        lib.cublasLtMatmulPreferenceDestroy(preference)
        if status:
            return []
        return [Algorithm(self, how, shapes, offer.algorithm) for offer in found[: count.value] if offer.state == 0]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """x @ weight.T for one number of rows and one weight shape, without bias."""

    library: Library
    how: ctypes.c_void_p
    shapes: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    words: Any
    """cublasLtMatmulAlgo_t."""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        at, from_x, from_weight = out.data_ptr(), x.data_ptr(), weight.data_ptr()
        if bias is not None or (from_x | from_weight) % _ALIGNED or not (x.is_contiguous() and weight.is_contiguous()):
            return products.product(x.contiguous(), weight.contiguous(), bias, False)
        lib, (left, right, result) = self.library, self.shapes
        status = lib.matmul(
            lib.handle, self.how, ctypes.byref(lib.one), from_weight, left, from_x, right,
            ctypes.byref(lib.zero), at, result, at, result, ctypes.byref(self.words), None, 0,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        _check(status)
        return out


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt: status {status}")


@lru_cache
def library(device: int) -> Library | None:
    """cuBLASLt for device number `device`, which must be the current one; None where it cannot be had."""
    try:
        return Library()
    except (OSError, AttributeError, RuntimeError):
        return None


@dataclass(slots=True)
class Certificate:
    """By which product each row count of one weight shape is served."""

    choices: dict[int, Product | None] = field(default_factory=dict)
    """None: by the own kernel."""
    untried: dict[int, tuple[torch.Tensor, bool]] = field(default_factory=dict)
    """(weight, chained) of row counts whose other algorithms were not timed yet: the first choice serves."""

    def product(
        self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None, chained: bool = False
    ) -> Product | None:
        """The product that serves, chosen at the first use of a row count of `products.BUCKETS`."""
        if rows not in self.choices:
            if rows not in _BUCKETS:
                self.choices[rows] = None
            elif bias is None and first_choice_serves(rows, weight):
                self.choices[rows] = F.linear
                if len(weight) <= TRIED_OUTPUTS:
                    self.untried[rows] = weight, chained
            else:
                self.choices[rows] = choose(rows, weight, bias, chained)
        return self.choices[rows]

    def try_others(self, rows: int | None = None) -> bool:
        """Time what a first use, which somebody waits for, left out: for one row count. False: nothing is left."""
        if not self.untried or (rows is not None and rows not in self.untried):
            return False
        rows = next(reversed(self.untried)) if rows is None else rows
        weight, chained = self.untried.pop(rows)
        self.choices[rows] = choose(rows, weight, None, chained, self.choices[rows])
        return True

    def describe(self) -> str:
        """Row counts seen, as "vendor 96, 256; vendor's other algorithm 128; own 48"."""
        kinds = ("vendor", "vendor's other algorithm", "own for many rows", "own")
        seen = sorted(self.choices.items())
        groups = {name: [rows for rows, choice in seen if _kind(choice) == name] for name in kinds}
        return "; ".join(f"{name} {', '.join(map(str, rows))}" for name, rows in groups.items() if rows)


_BUCKETS = frozenset(products.BUCKETS)


def _kind(choice: Product | None) -> str:
    if isinstance(choice, Algorithm):
        return "vendor's other algorithm"
    return "own" if choice is None else "vendor" if choice is F.linear else "own for many rows"


@dataclass(frozen=True, slots=True)
class Own:
    """The own kernel as a candidate."""

    chained: bool

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return products.product(x, weight, bias, self.chained)


class Trial:
    """Sums that cancel, for one weight shape and row count, and what the own kernel makes of them."""

    def __init__(
        self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None,
        then: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """`then`: of the product, within what is tried. Raises `torch.OutOfMemoryError`."""
        few, self.weight, self.bias = cancelling(min(rows, _TRIAL_ROWS), weight, bias)
        self.x = few.repeat(-(-rows // _TRIAL_ROWS), 1)[:rows].contiguous()
        parts = [slice(start, start + _SAMPLE_ROWS) for start in {0, max(0, rows - _SAMPLE_ROWS)}]
        tiles = products.reference_tiles(weight)
        self.wanted = [(part, products.product(self.x[part], self.weight, self.bias, False, tiles)) for part in parts]
        if then is not None:
            self.wanted = [(part, then(y)) for part, y in self.wanted]

    def keeps_order(self, candidate: Product) -> bool:
        """Of all rows where there are few, of the first and last where many."""
        try:
            got = candidate(self.x, self.weight, self.bias)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an algorithm that does not run here
            return False
        return all(torch.equal(got[part], expected) for part, expected in self.wanted)

    def fastest(self, candidates: list[Product]) -> Product:
        """The fastest on the device; the first, unless another gains something."""
        return _fastest(candidates, self.x, self.weight, self.bias)


def first_choice_serves(rows: int, weight: torch.Tensor) -> bool:
    """Whether the vendor's first choice keeps the order of sums, for a weight whose other products can wait."""
    if rows <= OWN_ROWS:
        return False
    try:
        return Trial(rows, weight, None).keeps_order(F.linear)
    except torch.OutOfMemoryError:
        return False


def better(
    current: Product, others: Sequence[Product], rows: int, weight: torch.Tensor,
    then: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Product:  # fmt: skip
    """The fastest of `current`, which serves, and of `others` that keep the order of sums.

    `then`: of the product, within them. `current` also where there is no memory for the trial.
    """
    try:
        trial = Trial(rows, weight, None, then)
        kept = [candidate for candidate in others if trial.keeps_order(candidate)]
        return trial.fastest([current, *kept]) if kept else current
    except torch.OutOfMemoryError:
        return current


def choose(
    rows: int, weight: torch.Tensor, bias: torch.Tensor | None, chained: bool = False, otherwise: Product | None = None
) -> Product | None:
    """The fastest of the vendor's products that keep the order of sums; None where the own kernel is to serve.

    `otherwise`: where there is no memory for the trial.
    """
    try:
        trial = Trial(rows, weight, bias)
        kept: list[Product] = [F.linear] if trial.keeps_order(F.linear) else []
        kept += [candidate for candidate in _algorithms(rows, weight, bias) if trial.keeps_order(candidate)]
        if kept and F.linear not in kept and rows <= OWN_ROWS:
            kept.insert(0, Own(chained))
        chosen = trial.fastest(kept) if len(kept) > 1 else next(iter(kept), None)
        return None if isinstance(chosen, Own) else chosen
    except torch.OutOfMemoryError:
        return otherwise


def _algorithms(rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> list[Algorithm]:
    """What the vendor offers beside its first choice."""
    (n, k), dtype = weight.shape, weight.dtype
    if weight.device.type != "cuda" or bias is not None or dtype not in _TYPES or n % 8 or k % 8 or n > TRIED_OUTPUTS:
        return []
    found = library(torch.cuda.current_device())
    return found.offers(rows, weight) if found is not None else []


def _fastest(candidates: list[Product], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """The fastest on the device, as it stands in a step; the first, unless another gains something."""
    milliseconds = _Timer(x, weight, bias)
    times = [min(milliseconds(candidate) for _ in range(2)) for candidate in candidates]
    # The likeliest once more: a single time may be off.
    likeliest = sorted(range(len(times)), key=times.__getitem__)[:2]
    repeats = _REPEATS if min(times) < 1 else 3
    again: dict[int, list[float]] = {i: [] for i in {0, *likeliest}}
    for _ in range(repeats):
        for i, found in again.items():
            found.append(milliseconds(candidates[i]))
    best = min(again, key=lambda i: statistics.median(again[i]))
    gains = statistics.median(again[best]) < WORTH * statistics.median(again[0])
    return candidates[best] if gains else candidates[0]


class _Timer:
    """Milliseconds of a product between two small kernels, its weights not in the cache.

    Alone, the vendor's looks better than it is: one that may begin while the kernel before it ends (programmatic
    dependent launch) has its first weights by then.
    """

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        size = min(weight.shape)  # most likely the model's own, whose norm is compiled already
        self.cache = torch.zeros(_CACHE_BYTES // 4, dtype=torch.float32, device=x.device)
        self.near, self.factor = x.new_zeros(min(len(x), _NEAR_ROWS), size), x.new_ones(size)
        self.inputs, self.chained = (x, weight, bias), pdl(x.device)

    def __call__(self, product: Product) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_HEAD_START):
            self.cache.amax()  # not written to: the product would wait for what is to be written back
        start.record()
        rms_norm(self.near, self.factor, 1e-6, None, False, self.chained)
        product(*self.inputs)
        rms_norm(self.near, self.factor, 1e-6, None, False, self.chained)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

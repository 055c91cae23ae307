"""The kernels of a model's steps, compiled side by side while its weights are still being read.

A model of the same sizes is built from tensors that have no storage, and steps of several sizes run through it:
launches become compilations (`kernels.triton.common.Kernel`), which Triton hands to threads. Nothing is computed, and
what was not met here is compiled at its first use, as ever. A model is ready when one sequence can be answered; what
other steps need is compiled beside its first answers, once the first step is on its way: compiling takes the
interpreter, and a step launched beside it many times as long.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from liushui.config import EngineConfig
from liushui.kernels.linear import cancelling
from liushui.kernels.ops import PackedLinear
from liushui.kernels.policy import KernelPolicy
from liushui.kernels.triton import products
from liushui.kernels.triton.common import Kernel
from liushui.kernels.triton.launchers import INTERPRETED
from liushui.kernels.triton.ops import TritonOps
from liushui.layers.batch import KVCache
from liushui.layers.blocks import Then
from liushui.layers.weights import Weights
from liushui.models.registry import ModelSizes, build
from liushui.runner.device import DeviceSteps
from liushui.runner.early import compilers_tools
from liushui.runner.memory import GPU_BLOCK_SIZE
from liushui.runner.staging import StepShape

if TYPE_CHECKING:
    from liushui.runner.runner import Checkpoint

META = torch.device("meta")
_TRIAL_ROWS = 256
_TURN = 0.0005
"""Seconds that a compiling thread keeps the interpreter, a tenth of Python's own: a step gives it up and wants it back
hundreds of times."""
_PATIENCE = 1.0
"""Seconds for the first step to come: who starts an engine to ask something asks at once."""


class Bare(Weights):
    """Tensors of the right shapes without storage; those that are computed with are ones.

    Torch's own operations on such tensors are kept few: the first of most kinds makes it import a computer algebra.
    """

    def __init__(self, checkpoint: "Checkpoint", dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, META
        self._left, self._shape = set(checkpoint.names()), checkpoint.shape

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self._claim(name, shape)
        if dtype not in (None, self.dtype):
            return torch.ones(shape, dtype=dtype)
        return torch.empty(shape, dtype=self.dtype, device=META)

    def take_linear(self, names: Sequence[str], rows: Sequence[int], inputs: int) -> Tensor:
        return self.take_rows(names, rows, inputs)

    def take_rows(self, names: Iterable[str], rows: Iterable[int], *rest: int) -> Tensor:
        counts = list(rows)
        for name, count in zip(names, counts, strict=True):
            self._claim(name, (count, *rest))
        return torch.empty(sum(counts), *rest, dtype=self.dtype, device=META)


class CompileOnly(TritonOps):
    """The operations on tensors without storage. Of a product what a certificate needs, and the own kernel where it is
    the first choice or `refused` says that the vendor's does not serve."""

    refused = False

    def linear(self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
        weight, rows = packed.data, x.shape[0]
        if not self.refused and not products.own_is_faster(rows, *weight.shape):
            products.product(x[:_TRIAL_ROWS], weight, bias, False, products.reference_tiles(weight))
            return x.new_empty(rows, weight.shape[0])
        return products.product(x, weight, bias, self.chained)

    def linear_then(
        self, x: Tensor, packed: PackedLinear, bias: Tensor | None, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return activation(self.linear(x, packed, bias))


def distinct(layers: Sequence[Any]) -> list[Any]:
    """The first of each kind of layer: the others launch the same kernels."""
    kinds: dict[Any, Any] = {}
    for layer in layers:
        kinds.setdefault((innermost(layer.attention).shape, type(getattr(layer, "mlp", None))), layer)
    return list(kinds.values())


def innermost(attention: Any) -> Any:
    """Without what comes after it."""
    while isinstance(attention, Then):
        attention = attention.first
    return attention


def shapes(largest: StepShape) -> list[StepShape]:
    """Steps as they come after a start: a sequence's prompt, then decoding; other prompts; several sequences."""
    width = min(largest.width, 128)
    prompts = [StepShape(rows, 1, width, False) for rows in (256, 1, 64, 32, 16) if rows <= largest.rows]
    return prompts + [StepShape(count, count, width, False) for count in (16, 64, 256) if count <= largest.sequences]


class Compilers(ThreadPoolExecutor):
    """Threads that compile kernels, and also the small library with which Triton launches each."""

    def __init__(self, device: torch.device) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        super().__init__(max(2, cores), initializer=torch.cuda.set_device, initargs=(device,))
        self.futures: list[Future[Any]] = []

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]
        def ready() -> Any:
            if not threading.main_thread().is_alive():
                raise CancelledError("the process ends")
            kernel = compile_kernel()
            if hasattr(kernel, "_init_handles"):
                kernel._init_handles()
            return kernel

        self.futures.append(super().submit(ready))
        return self.futures[-1]


def wake_vendor(device: torch.device, dtype: torch.dtype) -> None:
    """The first use of the vendor's library, and of what a certificate needs of torch, reads them from the disk."""
    x, weight, _ = cancelling(64, torch.zeros(64, 64, dtype=dtype, device=device), None)
    torch.equal(torch.nn.functional.linear(x, weight), x)


class Rehearsal:
    """Compiles in the background from its creation on; `first` waits for what one sequence needs, `finish` for all."""

    def __init__(
        self,
        checkpoint: "Checkpoint",
        sizes: ModelSizes,
        config: EngineConfig,
        dtype: torch.dtype,
        device: torch.device,
        longest: int,
    ) -> None:
        """`longest`: positions of a sequence."""
        self._tools = compilers_tools()
        self._checkpoint, self._sizes, self._longest = checkpoint, sizes, longest
        self._dtype, self._device = dtype, device
        self._block_size = config.block_size or GPU_BLOCK_SIZE
        self._largest = StepShape(config.step_tokens, config.seats, -(-longest // self._block_size), False)
        self.note = ""
        self._first = threading.Event()
        self.finished = threading.Event()
        """Nothing is being compiled any more."""
        self.begun = threading.Event()
        """The first step is on its way, or needs more than what one sequence's prompt does."""
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="liushui-compile")
        self._thread.start()

    def is_ready(self) -> bool:
        """Whether one sequence can be answered."""
        return self._first.is_set()

    def first(self) -> str:
        """Wait until one sequence can be answered; returns a line for the start-up report."""
        self._first.wait()
        return self.note

    def finish(self) -> str:
        """Wait for all; returns the same."""
        self.begun.set()
        self._thread.join()
        return self.note

    def _run(self) -> None:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(_TURN)
        try:
            with torch.inference_mode():
                self._rehearse()
        except Exception as error:  # a model that cannot be played through without values: compiled at first use
            self.note = f"kernels are compiled at first use ({repr(error)[:120]})"
        finally:
            Kernel.coming.clear()
            self._first.set()
            sys.setswitchinterval(usual)
            self.finished.set()

    def _rehearse(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        steps = self.steps()
        if INTERPRETED:
            self._play(steps, shapes(self._largest))
            self._say()
            return
        self._tools.join()
        with Compilers(self._device) as pool:
            pool.submit(partial(wake_vendor, self._device, self._dtype))
            with triton.AsyncCompileMode(pool):
                known, prompts = shapes(self._largest), steps.ops.prompts
                prompts.paused = True  # Triton's kernel, which takes less to compile, serves at first
                self._attend(steps, known[0])
                self._play(steps, known[:1])
                wait(list(pool.futures))
                self._say()
                self._first.set()
                self.begun.wait(_PATIENCE)
                self._play(steps, known[1:2])
                self._play(steps, known[1:])
                steps.ops.refused = True  # type: ignore[attr-defined]
                self._play(steps, known[:1])
            pool.submit(steps.one_row.prepare)
            prompts.paused = False
            self._attend(steps, known[0])

    def _say(self) -> None:
        self.note = f"kernels of the first steps: {time.perf_counter() - self._started:.2f} s, beside the weights"

    def _attend(self, steps: DeviceSteps, shape: StepShape) -> None:
        """Attention's kernels: they take the longest, so they are the first to be compiled."""
        batch, _ = steps.staging.tensors(shape)
        for layer in steps.model.layers:  # type: ignore[attr-defined]
            attention = innermost(layer.attention)
            qkv = torch.empty(shape.rows, sum(attention.shape.qkv_rows), dtype=self._dtype, device=META)
            attention.mix(qkv, 0, steps.kv, batch)

    def _play(self, steps: DeviceSteps, which: Iterable[StepShape]) -> None:
        for shape in which:
            steps.compute(shape)

    def steps(self) -> DeviceSteps:
        """The device's path around a model without storage."""
        source, sizes = self._checkpoint, self._sizes

        ops = CompileOnly(self._device)
        policy = KernelPolicy(ops)
        model = build(source.config, Bare(source, self._dtype), policy, self._longest)
        model.layers = distinct(model.layers)  # type: ignore[attr-defined]
        kv = KVCache.allocate(
            sizes.num_layers, 1, sizes.num_kv_heads, self._block_size, sizes.head_dim, self._dtype, META
        )
        return DeviceSteps(model, ops, kv, META, self._block_size, self._largest)

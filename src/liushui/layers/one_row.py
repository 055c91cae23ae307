"""A decoder of plain layers as one kernel, for steps that feed one token of one sequence."""

from collections.abc import Callable
from typing import Any

import torch

from liushui.kernels.cuda import CudaUnavailableError, decoder, nvrtc
from liushui.layers.batch import BatchTensors, KVCache
from liushui.layers.decoder import Decoder
from liushui.layers.fused import plain, stream

LENGTHS = (1, 700, 200)
"""Of the sequences that try it at load: within a block, over splits of attention, over blocks (this one is timed)."""
_WIDTH = 128
"""Blocks of their tables at most: as of the first steps."""


class OneRow:
    """A `fused.Whole`. `decoder` is None until `certify`, or where steps go kernel by kernel; see `note`."""

    def __init__(self, model: Any, ops: Any, kv: KVCache, width: int) -> None:
        """`width`: most blocks of a sequence."""
        self.note = ""
        self.decoder: decoder.Decoder | None = None
        self._wanted = False
        self._model, self._ops, self._kv, self._width = model, ops, kv, width
        device = kv.keys.device
        if device.type == "cpu" or not torch.cuda.is_available():
            return
        why = _refusal(model, kv) or _gpu_refusal()
        self._say(why)
        self._wanted = why is None
        if self._wanted:
            self.note += ", if that proves to be right and faster"

    def prepare(self) -> None:
        """Compile for a model without storage: whoever builds the real one finds it done."""
        if self._wanted:
            defines = _shape(self._model, self._kv).defines()
            nvrtc.machine_code("decoder.cu", defines, torch.cuda.get_device_capability())

    def _say(self, why: str | None) -> None:
        self.note = "steps of one row: " + ("one kernel" if why is None else f"kernel by kernel ({why})")

    def _build(self) -> decoder.Decoder:
        layers = [_layer(layer, i, self._kv) for i, layer in enumerate(self._model.layers)]
        first, shape = self._model.layers[0], _shape(self._model, self._kv)
        return decoder.Decoder(shape, layers, first.attention_input.eps, first.attention.shape.scale, self._width)

    def __call__(self, x: torch.Tensor, batch: BatchTensors) -> bool:
        """The residual stream x [T, H] after all layers, in place; False where nothing was done."""
        if self.decoder is None or len(batch.ids) != 1:
            return False
        try:
            self.decoder(x, batch.positions, batch.slots, batch.seq_lens, batch.block_table)
        except CudaUnavailableError as error:  # refused: nothing has run
            self.decoder = None
            self._say(str(error))
            return False
        return True

    def certify(self) -> None:
        """Take a few rows through both ways: same bits in less time, or not at all."""
        if self._wanted and self.decoder is None:
            try:
                self.decoder = self._build()
            except CudaUnavailableError as error:
                self._say(str(error).splitlines()[0])
        if self.decoder is None:
            return
        size = self._kv.keys.shape[3]
        room = min(self._width, _WIDTH, self._kv.keys.shape[1]) * size
        used = slice(-(-min(room, max(LENGTHS)) // size))
        caches = self._kv.keys, self._kv.values
        kept = [cache[:, used].clone() for cache in caches]  # somebody's
        try:
            self._compare(room)
        finally:
            for cache, values in zip(caches, kept, strict=True):
                cache[:, used] = values

    def _compare(self, room: int) -> None:
        """In the first blocks, sequences of up to `room` tokens."""
        trials = [self._trial(n) for n in LENGTHS if n <= room]
        wrong = [batch for x, batch in trials if not self._same(x, batch)]
        if self.decoder is None:  # refused on the way
            return
        if wrong:
            self.decoder = None
            self._say(f"at {int(wrong[0].seq_lens)} tokens one kernel gave other bits")
            return
        x, batch = trials[-1]
        whole, parts = (_milliseconds(lambda run=run: run(x, batch)) for run in (self, self._parts))  # type: ignore[misc]
        if whole >= parts:
            self.decoder = None
        taken, left = (whole, parts) if whole < parts else (parts, whole)
        way = "one kernel" if whole < parts else "kernel by kernel"
        self.note = f"steps of one row: {way} ({taken:.2f} ms of layers; the other way {left:.2f})"

    def _parts(self, x: torch.Tensor, batch: BatchTensors) -> None:
        stream(x, self._model.layers, self._ops, self._kv, batch)

    def _trial(self, length: int) -> tuple[torch.Tensor, BatchTensors]:
        """A row that is the last of `length` tokens, and random keys and values before it."""
        size, device = self._kv.keys.shape[3], self._kv.keys.device
        draw = torch.Generator(device).manual_seed(length)
        used = -(-length // size)
        for cache in (self._kv.keys, self._kv.values):
            cache[:, :used].normal_(generator=draw)

        def row(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        table = torch.arange(min(self._width, _WIDTH), dtype=torch.int32, device=device).clamp_(max=used - 1)[None]
        batch = BatchTensors(row(0), row(length - 1), row(length - 1), row(0, 1), row(length), table)
        x = torch.randn(1, self._model.config.hidden_size, device=device, generator=draw)
        return x.to(self._kv.keys.dtype), batch

    def _same(self, x: torch.Tensor, batch: BatchTensors) -> bool:
        kv, size = self._kv, self._kv.keys.shape[3]
        block, offset = divmod(int(batch.slots), size)
        found = []
        for run in (self, self._parts):
            y = x.clone()
            new = [cache[:, block, :, offset] for cache in (kv.keys, kv.values)]
            for part in new:
                part.zero_()
            run(y, batch)
            found.append([y, *(part.clone() for part in new)])
        return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(*found, strict=True))


def _milliseconds(run: Callable[[], object], times: int = 10) -> float:
    """Of a step, as it is served: replayed from a graph."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / times


def _gpu_refusal() -> str | None:
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    if gpu.major != 9:
        return f"compute capability {gpu.major}.{gpu.minor}"
    if gpu.multi_processor_count < decoder.MIN_BLOCKS:
        return f"{gpu.multi_processor_count} multiprocessors"
    return None


def _refusal(model: Any, kv: KVCache) -> str | None:
    """Why the kernel does not compute this model."""
    ours = isinstance(model, Decoder) and type(model).forward is Decoder.forward
    if not ours or not all(map(plain, model.layers)):
        return "layers that are not plain"
    if kv.keys.dtype != torch.bfloat16 or kv.scales is not None:
        return "not in bfloat16"
    attentions = [layer.attention for layer in model.layers]
    products = [p for layer in model.layers for p in (layer.attention.qkv, layer.attention.output, layer.mlp.down)]
    if any(product.bias is not None for product in products):
        return "products with biases"
    if any(attention.shape.window is not None for attention in attentions):
        return "a sliding window"
    if any(a.rope is None or a.rope.shape[1] != model.config.head_dim for a in attentions):
        return "heads that are not rotated as a whole"
    kinds = {(a.shape, a.q_norm is None, a.k_norm is None) for a in attentions}
    eps = {x.eps for layer in model.layers for x in (layer.attention_input, layer.mlp_input, layer.attention)}
    if len(kinds) > 1 or len(eps) > 1 or (attentions[0].q_norm is None) != (attentions[0].k_norm is None):
        return "layers that differ"
    return _shape(model, kv).refusal()


def _shape(model: Any, kv: KVCache) -> decoder.Shape:
    c, normed = model.config, model.layers[0].attention.q_norm is not None
    return decoder.Shape(
        c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, normed, 1, c.num_layers,
        kv.keys.shape[3],
    )  # fmt: skip


def _layer(layer: Any, index: int, kv: KVCache) -> decoder.Layer:
    attention, mlp = layer.attention, layer.mlp
    return decoder.Layer(
        attention.qkv.packed.data, attention.output.packed.data, mlp.gate_up.packed.data, mlp.down.packed.data,
        layer.attention_input.weight, layer.mlp_input.weight, attention.q_norm, attention.k_norm, attention.rope,
        kv.keys[index], kv.values[index],
    )  # fmt: skip

"""`Ops` on an NVIDIA GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from liushui.kernels.ops import PackedLinear
from liushui.kernels.quantised import Quantised
from liushui.kernels.triton import attention, cache, common, products, prompts, rotate, rows, sampling, vendor, wide

_FUSED_NORM = 2048
"""Longest row whose norm is formed within the product: each program forms it again."""


class TritonOps:
    """See `kernels.ops.Ops`. Tensors are on one CUDA device (or, under Triton's interpreter, on the CPU)."""

    name = "triton"
    threads = 1

    def __init__(self, device: torch.device, max_num_seqs: int = 1024) -> None:
        self.device = device
        self.chained = common.pdl(device)
        self.prompts = prompts.Prompts(device)
        self.note = "Triton kernels"
        self.arrived = torch.zeros(max_num_seqs * 256, dtype=torch.int32, device=device)
        """Zero before and after every kernel: where programs that share a result count themselves."""
        self.feed = torch.zeros(1, dtype=torch.int32, device=device)
        """Tokens that the host does not know yet, each at its sequence's place: `DeviceSteps` has its own here."""
        self.weights: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
        """One of each shape, with its bias, but for heads."""
        self.certificates: dict[tuple[int, int, torch.dtype, bool], vendor.Certificate] = {}
        self.forms = wide.Forms(device)
        self.together: dict[tuple[int, int, torch.dtype], dict[int, vendor.Product | None]] = {}
        """What serves each row count of a weight shape with its activation: None, two kernels."""
        self.untried: list[wide.Untried] = []
        """What forms were not tried for yet; the first to be tried at the end."""
        self._changed: set[int] = set()
        # The vendor's products must not round partial sums to 16 bits: the certificates would refuse them all.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, unit_offset: bool = False
    ) -> Tensor:
        return rows.rms_norm(x, weight, eps, residual, unit_offset, self.chained)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        return rows.layer_norm(x, weight, bias, eps, residual, self.chained)

    def qkv_to_cache(
        self, qkv: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, positions: Tensor, slots: Tensor,
        k_cache: Tensor, v_cache: Tensor, rope: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None,
        eps: float,
    ) -> None:  # fmt: skip
        kernel = rotate if rotate.serves(num_heads, num_kv_heads, head_dim, rope) else cache
        kernel.qkv_to_cache(
            qkv, num_heads, num_kv_heads, head_dim, positions, slots, k_cache, v_cache, rope, q_norm, k_norm, eps,
            self.chained,
        )  # fmt: skip

    def attention(
        self, qkv: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, k_cache: Tensor, v_cache: Tensor,
        query_start: Tensor, seq_lens: Tensor, block_table: Tensor, scale: float, window: int | None = None,
    ) -> Tensor:  # fmt: skip
        shape = attention.Shape(num_heads, num_kv_heads, head_dim, k_cache.shape[2])
        out = qkv.new_empty(qkv.shape[0], num_heads * head_dim)
        batch = (qkv, k_cache, v_cache, out, query_start, seq_lens, block_table, scale, window)
        if seq_lens.shape[0]:
            attention.decode(shape, *batch, self.arrived, self.chained)
            if qkv.shape[0] == seq_lens.shape[0]:  # every sequence feeds one token
                return out
            if not self.prompts.attend(shape, *batch):  # not its kind, or still to be compiled
                attention.chunks(shape, *batch, self.chained)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return rows.activate(gate_up, True, "silu", self.chained)

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        return rows.activate(gate_up, True, "gelu", self.chained)

    def gelu_new(self, x: Tensor) -> Tensor:
        return rows.activate(x, False, "gelu", self.chained)

    def pack_linear(
        self, weight: Tensor | Quantised, bias: Tensor | None = None, form: str | None = None
    ) -> PackedLinear:
        """The weight as it is: nothing is copied."""
        if not isinstance(weight, Tensor) or form is not None:
            raise ValueError("triton kernels take float32 or bfloat16 weights")
        if weight.shape[0] <= vendor.TRIED_OUTPUTS:
            self.weights.setdefault((*weight.shape, bias is not None), (weight, bias))
        return PackedLinear(weight, weight.shape[0], weight.shape[1], weight.dtype, "triton")

    def linear(self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
        return self._product(x.shape[0], packed.data, bias)(x, packed.data, bias)

    def _product(self, rows: int, weight: Tensor, bias: Tensor | None) -> vendor.Product:
        """What serves."""
        if not products.own_is_faster(rows, *weight.shape):
            certificate = self.certificate(weight, bias)
            if rows not in certificate.choices and bias is None and self.forms.wanted(rows, weight):
                self.untried.append(wide.Untried(certificate.choices, rows, weight))
            chosen = self.choose(rows, weight, bias)
            if chosen is not None:
                return chosen
        return vendor.Own(self.chained)

    def linear_then(
        self, x: Tensor, packed: PackedLinear, bias: Tensor | None, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`activation(linear(x))`, in one kernel where that is faster."""
        weight, count = packed.data, x.shape[0]
        if bias is None and activation == self.silu_mul:
            choices = self.together.setdefault((*weight.shape, weight.dtype), {})
            if count not in choices:
                choices[count] = None
                if self.forms.wanted(count, weight, True):  # tried after the product alone
                    self.untried.insert(0, wide.Untried(choices, count, weight, True))
            if (one := choices[count]) is not None:
                return one(x, weight, None)
        return activation(self.linear(x, packed, bias))

    def embed(self, ids: Tensor, packed: PackedLinear, dtype: torch.dtype) -> Tensor:
        """Of `dtype`, as the weight is; an id of -1 - place stands for `feed`'s."""
        return sampling.look_up(ids, self.feed, packed.data, self.chained)

    # -- fused forms: the bits are those of the operations one after the other

    def fuses(self, rows: int, hidden: int) -> bool:
        """Whether the fused forms are the faster ones (measured on an H100)."""
        return rows <= 32 or (rows <= 64 and hidden <= 2048)

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, packed: PackedLinear, bias: Tensor | None) -> Tensor:
        """`linear(rms_norm(x))`."""
        if x.shape[0] != 1 or x.shape[1] > _FUSED_NORM:
            return self.linear(self.rms_norm(x, norm, eps), packed, bias)
        return products.product(x, packed.data, bias, self.chained, norm=norm, eps=eps)

    def norm_gated(self, x: Tensor, norm: Tensor, eps: float, packed: PackedLinear) -> Tensor:
        """`silu_mul(linear(rms_norm(x)))`."""
        if x.shape[0] != 1 or x.shape[1] > _FUSED_NORM:
            return products.product(self.rms_norm(x, norm, eps), packed.data, None, self.chained, gated=True)
        return products.product(x, packed.data, None, self.chained, norm=norm, eps=eps, gated=True)

    def linear_add(self, x: Tensor, packed: PackedLinear, bias: Tensor | None, residual: Tensor) -> None:
        """residual += `linear(x)`, in place."""
        products.product(x, packed.data, bias, self.chained, residual=residual)

    def choose(self, rows: int, weight: Tensor, bias: Tensor | None) -> vendor.Product | None:
        """The vendor's product for a number of rows, where it serves."""
        return self.certificate(weight, bias).product(rows, weight, bias, self.chained)

    def certificate(self, weight: Tensor, bias: Tensor | None) -> vendor.Certificate:
        key = (*weight.shape, weight.dtype, bias is not None)
        return self.certificates.setdefault(key, vendor.Certificate())

    def try_others(self) -> bool:
        """Time the vendor's other algorithms where a first use went without: for one weight shape and row count, a
        tenth of a second. False: nothing is left."""
        return any(found.try_others() for found in self.certificates.values())

    def try_forms(self) -> set[int]:
        """Try own products for many rows, once they are compiled, as `try_others` does.

        Returns the row counts that other kernels serve from now on, all together when nothing is left to be tried.
        """
        if not self.untried:
            return set()
        try:
            ready = self._try_form(self.untried[-1])
        except Exception as error:  # a trial ends no step: what serves goes on serving
            self.forms.give_up(error)
            self.untried.clear()
            ready = True
        changed = self._changed if ready and not self.untried else set()
        self._changed = self._changed - changed
        return changed

    def _try_form(self, last: wide.Untried) -> bool:
        """False: its forms are being compiled, or the vendor's other algorithms were timed before them."""
        rows, weight = last.rows, last.weight
        own: vendor.Product = vendor.Own(self.chained)
        found = self.forms.products(rows, weight, wide.Separate(own, self.silu_mul) if last.gated else own, last.gated)
        if found is None or self.certificate(weight, None).try_others(rows):
            return False
        self.untried.pop()
        current, then = self._product(rows, weight, None), self.silu_mul if last.gated else None
        if then is not None:
            current = wide.Separate(current, then)
        chosen = vendor.better(current, found, rows, weight, then) if found else current
        if chosen is not current:
            last.choices[rows] = chosen
            self._changed.add(rows)
        return True

    def report(self) -> list[str]:
        """One line for each weight shape: which row counts the vendor's product serves."""
        lines = [
            f"product {n} x {k}{' + bias' if biased else ''}: {found.describe()}"
            for (n, k, _, biased), found in self.certificates.items()
            if found.choices
        ]
        together = [
            f"product {n} x {k} with its activation in one kernel: {rows}"
            for (n, k, _), choices in self.together.items()
            if (rows := ", ".join(str(count) for count, one in sorted(choices.items()) if one is not None))
        ]  # fmt: skip
        return [*lines, *together, *self.forms.report()]

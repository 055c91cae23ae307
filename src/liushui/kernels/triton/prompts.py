"""Attention of prompts by the kernel of `cuda.prefill`, on Hopper; until it is compiled, `attention.chunks` serves.

It is compiled in a thread of its own at its first use. Without NVRTC, or where it cannot be had, what serves goes on
serving: the bits are the same.
"""

import torch

from liushui.kernels.cuda import CudaUnavailableError
from liushui.kernels.cuda.behind import Behind
from liushui.kernels.cuda.prefill import ROWS, TILE, Form, Prefill
from liushui.kernels.triton import attention

_ALIGNED = 16
"""Bytes: what the copy engine asks of addresses."""


class Prompts(Behind):
    """The kernel on one device, for each shape of heads that came. `note`: why it does not serve."""

    def __init__(self, device: torch.device) -> None:
        super().__init__("prefill.cu", device)
        self.paused = False
        """Nothing is to be compiled yet."""
        self._made: dict[Form, Prefill] = {}
        self._asked: set[Form] = set()

    def form(self, shape: attention.Shape, dtype: torch.dtype, window: int | None) -> Form | None:
        """What serves, once compiled."""
        fits = (
            dtype in (torch.bfloat16, torch.float16)
            and window is None
            and shape.head_dim in (64, 128)
            and shape.block_size % TILE == 0
            and (attention.BN, attention.SPLIT) == (TILE, 512)
            and shape.group <= ROWS
        )
        if not self.possible or self.paused or not fits:
            return None
        sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size)
        workers, stages = (3, (3, 2)) if shape.head_dim == 128 and shape.group > 2 else (2, (4, 4))  # on an H100
        return Form(*sizes, workers, stages, half=dtype == torch.float16)

    @property
    def coming(self) -> bool:
        """Whether a kernel is being compiled, or to be loaded at its next use."""
        return not self.note and len(self._made) < len(self._asked)

    def attend(
        self, shape: attention.Shape, qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
        out: torch.Tensor, query_start: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, scale: float,
        window: int | None,
    ) -> bool:  # fmt: skip
        """`attention.chunks`, or False, and nothing done. Of tensors without storage only compiled for."""
        form = self.form(shape, qkv.dtype, window)
        if form is None or not self._ready(form, qkv.is_meta):
            return qkv.is_meta and form is not None
        if any(x.data_ptr() % _ALIGNED for x in (qkv, k_cache, v_cache, out)):
            return False
        batch = (qkv, k_cache, v_cache, out, query_start, seq_lens, block_table)
        try:
            self._made[form](*batch, scale * attention.LOG2E)
        except CudaUnavailableError as error:
            raise RuntimeError(str(error)) from error
        return True

    def _ready(self, form: Form, bare: bool) -> bool:
        """Whether it can be launched."""
        if form in self._made:
            return True
        self._asked.add(form)
        try:
            code = self.code(form)
            if bare or code is None or torch.cuda.is_current_stream_capturing():
                return False
            self._made[form] = Prefill(form, self.device, code)
        except Exception as error:  # no compiler, no room, the process ends: what serves goes on serving
            self.give_up(error)
            return False
        return True

    def report(self) -> list[str]:
        """A line where it might serve."""
        if self._pool is None:
            return []
        how = f"Triton's ({self.note})" if self.note else "one in CUDA C++, Triton's until that is compiled"
        return [f"attention of prompts: {how}"]

"""Every setting, once. Command-line flags are generated from these fields."""

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from liushui.errors import ParameterError

DType = Literal["auto", "float32", "bfloat16"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "int8"]
Policy = Literal["continuous", "static"]
Kernels = Literal["auto", "native", "torch", "triton"]
Device = Literal["auto", "cpu", "cuda"]
Numerics = Literal["invariant", "fast"]
Side = Literal["left", "right"]
Suggested = Literal["none", "auto"]
WeightForm = Literal["auto", "native", "float32", "bf16", "int8", "int4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. `validate()` raises `ParameterError` naming the field."""

    model: str = "smollm2"
    """Alias (see `liushui models`), Hugging Face name, local folder, or GGUF file."""
    device: Device = "auto"
    """Where the model runs. auto: the first NVIDIA GPU if there is one, else the processor."""
    dtype: DType = "auto"
    """Arithmetic and KV cache: bfloat16 where the hardware has it, else float32."""
    weights: WeightForm = "auto"
    """How the weights of products are held. native: GGUF's quantised blocks as the file has them, all else in `dtype`;
    float32, bf16: dequantised; int8, int4: quantised at load, in groups of 32. The products of native, int8 and int4
    round activations to 16 bits in groups of 32; with AMX and bfloat16 they are those of the same weights in bf16, bit
    for bit. auto: native where that was measured to be better, else dequantised."""
    max_model_len: int | None = None
    """Longest prompt + answer in tokens. Default: what the model and the KV cache allow."""
    max_num_seqs: int | None = None
    """Most sequences in the batch at once. Default: 64, on a GPU 256."""
    max_num_batched_tokens: int | None = None
    """Most tokens fed in one step; longer prompts enter in chunks. Default: 1024, on a GPU 8192."""
    policy: Policy = "continuous"
    """continuous: enter and leave at every step. static: gather, enter together, leave together."""
    kv_cache_gib: float | None = None
    """Memory for the KV cache in GiB. Default: what the batch can use, within half of the free memory."""
    kv_cache_dtype: KVCacheDType = "auto"
    """Type of cached keys and values. auto: that of the arithmetic. int8: half of bfloat16, with a scale for each token
    and head; native CPU kernels only."""
    block_size: int | None = None
    """Tokens in a KV block. Default: 16, on a GPU 64 (what its copy engine fetches at once)."""
    prefix_caching: bool = True
    """Reuse the KV blocks of prompts that begin alike. In one process on a CPU, with the KV cache of default size, what
    is cached takes no new memory beyond 16,384 tokens or two requests of full length; a server's takes all there is."""
    threads: int | None = None
    """Threads of the step. Default: the physical cores this process may use."""
    kernels: Kernels = "auto"
    """native: the compiled CPU kernels; torch: plain torch; triton: the GPU's; auto: the fastest there is."""
    numerics: Numerics = "invariant"
    """invariant: answers do not depend on the batch, bit for bit. fast: vendor products as they come, on a CPU only."""
    seed: int | None = None
    """Makes the seeds drawn for requests that bring none reproducible."""
    truncation_side: Side = "left"
    """The side cut off by truncate_prompt_tokens."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the model's own."""
    generation_config: Suggested = "none"
    """Sampling defaults that the model's files suggest. none: reported only; auto: used where a request is silent."""

    def validate(self) -> "EngineConfig":
        for name, literal in _CHOICES.items():
            if getattr(self, name) not in get_args(literal):
                choices = ", ".join(get_args(literal))
                raise ParameterError(name, f"must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ParameterError(name, f"must be a positive integer, got {value!r}")
            if value is not None and value > (most := _MOST.get(name, 1 << 31)):
                raise ParameterError(name, f"must be at most {most:,}, got {value:,}")
        if not isinstance(self.prefix_caching, bool):
            raise ParameterError("prefix_caching", f"must be true or false, got {self.prefix_caching!r}")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise ParameterError("seed", f"must be an integer, got {self.seed!r}")
        if self.block_size is not None and (self.block_size & (self.block_size - 1) or self.block_size > 256):
            raise ParameterError("block_size", f"must be a power of two up to 256, got {self.block_size}")
        if None not in (self.max_num_seqs, self.max_num_batched_tokens) and self.step_tokens < self.seats:
            raise ParameterError(
                "max_num_batched_tokens",
                f"must be at least max_num_seqs ({self.max_num_seqs}), so that every sequence can advance in "
                f"a step; got {self.max_num_batched_tokens}",
            )
        gib = self.kv_cache_gib
        if gib is not None and not (isinstance(gib, int | float) and 0 < gib < 1e6):
            raise ParameterError("kv_cache_gib", f"must be a positive number of GiB, got {gib!r}")
        return self

    def settled(self, on_gpu: bool) -> "EngineConfig":
        """With the batch's defaults for the device put in; of two sizes, the one given bounds the other."""
        seats, tokens = _GPU_BATCH if on_gpu else _CPU_BATCH
        seats = self.max_num_seqs or min(seats, self.max_num_batched_tokens or seats)
        return replace(
            self, max_num_seqs=seats, max_num_batched_tokens=self.max_num_batched_tokens or max(tokens, seats)
        )

    @property
    def seats(self) -> int:
        """`max_num_seqs`, on a processor if it is not settled yet."""
        return self.max_num_seqs or self.settled(False).max_num_seqs or 0

    @property
    def step_tokens(self) -> int:
        """`max_num_batched_tokens`, on a processor if it is not settled yet."""
        return self.max_num_batched_tokens or self.settled(False).max_num_batched_tokens or 0

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


_MOST = {"max_num_seqs": 1 << 16, "max_num_batched_tokens": 1 << 20, "threads": 1024}
"""Beyond any machine; the work space of a step grows with them."""
_CPU_BATCH, _GPU_BATCH = (64, 1024), (256, 8192)
"""Sequences in a batch, tokens in a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """Settings of an engine behind a server, beside its `EngineConfig`. `validate()` raises `ParameterError`."""

    served_names: tuple[str, ...] = ()
    """Names clients may use for the model, the first is reported. Default: as `EngineConfig.model`."""
    target_itl_ms: float | None = None
    """Longest step, in milliseconds, while answers stream: prompts enter in chunks that keep it. Default: twice
    the measured step without prompts. 0: no limit in time."""
    max_queue_requests: int = 256
    """Most requests that wait; more are refused with 503 and Retry-After."""
    max_queue_tokens: int = 262144
    """Most prompt tokens that wait; more are refused with 503 and Retry-After."""
    timeout: float | None = 600.0
    """Seconds until a request must have ended, unless it asks for less. Default: ten minutes."""
    ageing: float = 10.0
    """Seconds in the queue that count as one step of priority, so that nobody starves."""
    stall: float = 60.0
    """Seconds without a step, though there is work, until the engine calls itself not ready."""
    hang_timeout: float = 120.0
    """Seconds in which an engine process that has work neither finishes a step nor computes, until it is killed and
    started again as if it had died. One that computes may take ten times as long."""

    def validate(self) -> "ServingConfig":
        for name in ("max_queue_requests", "max_queue_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ParameterError(name, f"must be a positive integer, got {value!r}")
        for name in ("timeout", "ageing", "stall", "hang_timeout"):
            value = getattr(self, name)
            none = value is None and name == "timeout"
            if not none and not (isinstance(value, int | float) and 0 < value < 1e9):
                raise ParameterError(name, f"must be a positive number of seconds, got {value!r}")
        itl = self.target_itl_ms
        if itl is not None and not (isinstance(itl, int | float) and 0 <= itl < 1e6):
            raise ParameterError("target_itl_ms", f"must be a number of milliseconds, 0 or more; got {itl!r}")
        return self


_CHOICES = {
    "device": Device,
    "dtype": DType,
    "policy": Policy,
    "kernels": Kernels,
    "numerics": Numerics,
    "weights": WeightForm,
    "kv_cache_dtype": KVCacheDType,
    "truncation_side": Side,
    "generation_config": Suggested,
}

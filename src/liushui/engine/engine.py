"""`Engine`: the token loop with its text beside it, in one thread. For offline work; see `serving` for servers.

Text is made at once from the tokens of a step, so a stop string ends its sequence before the next step is planned.
Not thread-safe.
"""

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, Protocol

from liushui.config import EngineConfig
from liushui.core.plan import Executor, StepPlan, TokenLogprobs
from liushui.core.request import FinishReason, SamplingParams
from liushui.core.scheduler import Scheduler
from liushui.engine.events import EventLog, House
from liushui.engine.inputs import InputProcessor, Limits, Prepared, Prompt, PromptEncoder
from liushui.engine.live import LiveAnswer, LiveRequest
from liushui.engine.loop import TokenLoop, describe
from liushui.engine.messages import SequenceTimes
from liushui.engine.outputs import RequestOutput, StreamDelta
from liushui.engine.text import RawTokenizer, Vocabulary

EngineOutput = StreamDelta | RequestOutput


class EngineTokenizer(PromptEncoder, Protocol):
    """What the engine needs of a model's tokenizer."""

    @property
    def raw(self) -> RawTokenizer: ...

    @property
    def eos_token_ids(self) -> Seq[int]: ...

    @property
    def bos_token_id(self) -> int | None: ...


class Engine:
    """Requests in, deltas and outputs out, one step at a time."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: EngineTokenizer,
        clock: Callable[[], float] = time.monotonic,
        *,
        vocab_size: int,
        depth: int = 0,
        log_limit: int | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """`clock`: seconds, monotonic. `vocab_size`: token ids the model knows. `depth`: steps kept in flight while
        the next one is planned. `log_limit`: events and steps the log keeps; None: all.
        `sampling_defaults`: fields of SamplingParams for requests that leave them open."""
        pool = scheduler.pool
        self.vocab = Vocabulary(tokenizer.raw)
        self.inputs = InputProcessor(
            tokenizer,
            # The last token of an answer is never fed, so it needs no block.
            Limits(scheduler.max_model_len, pool.num_blocks * pool.block_size + 1, vocab_size),
            eos_token_ids=tokenizer.eos_token_ids,
            bos_token_id=tokenizer.bos_token_id,
            truncation_side=config.truncation_side,
            seed=config.seed,
            sampling_defaults=sampling_defaults,
        )
        house = House(config.policy, config.seats, pool.num_blocks, pool.block_size)
        self.log = EventLog(house, limit=log_limit)
        self.loop = TokenLoop(scheduler, executor, self, self.log, clock, depth=depth)
        self._requests: dict[str, LiveRequest] = {}
        self._answers: dict[str, LiveAnswer] = {}
        self._touched: dict[str, LiveAnswer] = {}
        self._finished: list[RequestOutput] = []
        self._outputs: list[EngineOutput] = []

    @property
    def scheduler(self) -> Scheduler:
        return self.loop.scheduler

    @property
    def executor(self) -> Executor:
        return self.loop.executor

    @executor.setter
    def executor(self, executor: Executor) -> None:
        self.loop.executor = executor

    @property
    def clock(self) -> Callable[[], float]:
        return self.loop.clock

    @property
    def depth(self) -> int:
        """Steps kept in flight while the next one is planned."""
        return self.loop.depth

    @depth.setter
    def depth(self, depth: int) -> None:
        self.loop.depth = depth

    @property
    def num_output_tokens(self) -> int:
        """Of all answers since the start."""
        return self.loop.num_output_tokens

    # -- in and out

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, **where: Any) -> Prepared:
        """Check a request without accepting it; keywords as in `InputProcessor.prepare`. Raises `ParameterError`."""
        where.setdefault("now", self.clock())
        return self.inputs.prepare(prompt, params, **where)

    def submit(self, prepared: Prepared) -> str:
        """Accept a prepared request: from now on it ends in exactly one `RequestOutput`. Returns its id."""
        request_id = prepared.request.request_id
        live = LiveRequest(prepared, self.vocab)
        self.loop.submit(prepared.request)
        self._requests[request_id] = live
        self._answers.update((answer.seq_id, answer) for answer in live.answers)
        return request_id

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, **where: Any) -> str:
        """Prepare and submit. Raises `ParameterError` naming what cannot be honoured."""
        return self.submit(self.prepare(prompt, params, **where))

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; its KV blocks return with the last step in flight that names it. Returns what there
        is of it, or None for an id that is unknown or has ended."""
        if request_id not in self._requests:
            return None
        seq_ids = [live.seq_id for live in self._requests[request_id].answers if not live.ended]
        self.loop.end(request_id, FinishReason.ABORT)
        for seq_id in seq_ids:
            self._touched.pop(seq_id, None)
        output = next(output for output in self._finished if output.request_id == request_id)
        self._finished.remove(output)
        self._hand_out()
        return output

    def abort_all(self) -> list[RequestOutput]:
        """End everything and wait for the steps in flight: the engine is empty and usable."""
        outputs = [output for request_id in list(self._requests) if (output := self.abort(request_id)) is not None]
        self.drain()
        return outputs

    def drain(self) -> None:
        """Take in every step in flight without planning another."""
        self.loop.drain()
        self._hand_out()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do or to hand out."""
        return bool(self._requests or self._outputs or self.loop.busy)

    @property
    def num_unfinished(self) -> int:
        """Requests accepted and not yet finished."""
        return len(self._requests)

    # -- the loop

    def step(self) -> list[EngineOutput]:
        """One turn of the loop. Returns new deltas (of streaming requests) and outputs (of finished ones)."""
        self.loop.step()
        if self._touched or self._finished:
            self._hand_out()
        outputs, self._outputs = self._outputs, []
        return outputs

    # -- what the loop tells (`loop.Reader`)

    def tokens(self, seq_id: str, token_ids: Seq[int], logprobs: Seq[TokenLogprobs]) -> bool:
        live = self._answers[seq_id]
        if live.answer.closed:
            return False
        if live.request.prepared.stream:
            self._touched[seq_id] = live
        return live.answer.extend(token_ids, logprobs)

    def prompt_logprobs(self, seq_id: str, found: Seq[tuple[int, TokenLogprobs]]) -> None:
        self._answers[seq_id].request.take_prompt_logprobs(seq_id, found)

    def ended(self, seq_id: str, reason: FinishReason, times: SequenceTimes, error: str | None) -> FinishReason:
        """Complete its answer, and with the last one the request."""
        live = self._answers.pop(seq_id)
        live.end(reason, times, error)
        request = live.request
        if request.prepared.stream:
            self._touched[seq_id] = live
        if request.finished:
            del self._requests[request.request.request_id]
            self._finished.append(request.output(times.finished))
        return live.answer.output.finish_reason or reason

    def planned(self, plan: StepPlan) -> None:
        pass

    def stepped(self, plan: StepPlan, seconds: float) -> None:
        pass

    def _hand_out(self) -> None:
        """One delta per answer that moved and whose request streams; then the outputs of the finished."""
        for live in self._touched.values():
            error = live.request.error if live.answer.output.finish_reason is FinishReason.ERROR else None
            self._outputs.append(live.answer.delta(live.request.prepared.index, error))
        self._touched.clear()
        self._outputs += self._finished
        self._finished.clear()


__all__ = ["Engine", "EngineOutput", "EngineTokenizer", "describe"]

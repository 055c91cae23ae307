"""The serving face around an engine on a thread of this process."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self

from liushui.config import EngineConfig
from liushui.core.request import FinishReason
from liushui.engine.engine import Engine
from liushui.engine.inputs import Prepared
from liushui.engine.outputs import RequestOutput
from liushui.engine.serving import EngineInfo, Gauges, News, Readiness, RequestView, ServeRequest, Stats, salt
from liushui.engine.startup import load
from liushui.engine.tokenizer import Tokenizer
from liushui.errors import LiushuiError, Overloaded


class Stream:
    """`AnswerStream` of one request."""

    def __init__(self, owner: "InProcessEngine", prepared: Prepared) -> None:
        self.prepared = prepared
        self.request_id = prepared.request.request_id
        self._owner = owner
        self._news: deque[News] = deque()
        self._woken = asyncio.Event()
        self._over = False

    def put(self, news: News) -> None:
        self._news.append(news)
        self._woken.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> News:
        while not self._news:
            if self._over:
                raise StopAsyncIteration
            self._woken.clear()
            try:
                await self._woken.wait()
            except asyncio.CancelledError:
                await self.aclose()
                raise
        news = self._news.popleft()
        self._over = isinstance(news, RequestOutput)
        return news

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            await self._owner.abort(self.request_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


class InProcessEngine:
    """`ServingEngine` without a second process."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, info: EngineInfo) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.engine = engine
        self._streams: dict[str, Stream] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False

    @classmethod
    def load(cls, config: EngineConfig, served_names: tuple[str, ...] = ()) -> "InProcessEngine":
        loaded = load(config)
        return cls.around(loaded.engine, loaded.tokenizer, loaded.config, served_names, tuple(loaded.report))

    @classmethod
    def around(
        cls,
        engine: Engine,
        tokenizer: Tokenizer,
        config: EngineConfig,
        served_names: tuple[str, ...] = (),
        report: tuple[str, ...] = (),
    ) -> "InProcessEngine":
        """Around an engine that exists, with any executor."""
        info = EngineInfo(
            model=config.model,
            served_names=served_names or (config.model,),
            limits=engine.inputs.limits,
            max_num_seqs=config.seats,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_ids=tokenizer.eos_token_ids,
            add_bos=tokenizer.add_bos,
            chat_template_hash=tokenizer.template_hash,
            report=report,
        )
        return cls(engine, tokenizer, info)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="liushui-engine", daemon=True)
        self._thread.start()

    async def submit(self, request: ServeRequest) -> Stream:
        if self._draining or self._closed:
            raise Overloaded("draining", "the server is shutting down", 1.0)
        prepared = self.engine.prepare(
            list(request.prompt_token_ids),
            request.params,
            prompt_text=request.prompt,
            request_id=request.request_id,
            index=request.index,
            stream=request.stream,
            priority=request.priority,
            cache_salt=salt(request.tenant, request.cache_salt),
        )
        stream = Stream(self, prepared)
        self._streams[stream.request_id] = stream
        self._do(lambda: self._submit(prepared))
        return stream

    async def abort(self, request_id: str) -> bool:
        if request_id not in self._streams:
            return False
        self._do(lambda: self._abort(request_id))
        return True

    def stats(self) -> Stats:
        scheduler = self.engine.scheduler
        used = 1 - scheduler.pool.num_free / scheduler.pool.num_blocks
        gauges = Gauges(scheduler.num_waiting, 0, scheduler.num_running, used, len(self._streams))
        return Stats(gauges, {"output_tokens": self.engine.num_output_tokens}, {}, {}, {})

    async def requests(self) -> list[RequestView]:
        return [
            RequestView(s.request_id, "", "running", "", len(s.prepared.request.prompt_token_ids), 0, 0, 0.0, None)
            for s in self._streams.values()
        ]

    def ready(self) -> Readiness:
        if self._thread is None:
            return Readiness(False, "the model is being loaded")
        if self._draining or self._closed:
            return Readiness(False, "the server is shutting down")
        return Readiness(True, "")

    async def drain(self, timeout: float | None = None) -> bool:
        self._draining = True
        end = None if timeout is None else time.monotonic() + timeout
        while self._streams and (end is None or time.monotonic() < end):
            await asyncio.sleep(0.01)
        return not self._streams

    async def close(self) -> None:
        self._draining = self._closed = True
        for request_id in list(self._streams):
            await self.abort(request_id)
        with self._wake:
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    # -- on the engine's thread

    def _do(self, act: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(act)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self.engine.has_unfinished or self._closed):
                    self._wake.wait()
                acts = list(self._inbox)
                self._inbox.clear()
                if self._closed and not acts and not self.engine.has_unfinished:
                    return
            for act in acts:
                act()
            if self.engine.has_unfinished:
                for news in self.engine.step():
                    self._tell(news)

    def _tell(self, news: News) -> None:
        self._loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: News) -> None:
        stream = self._streams.get(news.request_id)
        if stream is not None:
            stream.put(news)
            if isinstance(news, RequestOutput):
                del self._streams[news.request_id]

    def _submit(self, prepared: Prepared) -> None:
        try:
            self.engine.submit(prepared)
        except LiushuiError as error:
            self._tell(RequestOutput(prepared.request.request_id, prepared.index, None, [], [], error=str(error)))

    def _abort(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        if output is not None:
            output.error, output.error_code = "the request was aborted", FinishReason.ABORT + "ed"
            self._tell(output)

"""`ProcessEngine`: the serving face with the token loop in a process of its own, started again if it dies."""

from collections.abc import Callable

from liushui.config import EngineConfig, ServingConfig
from liushui.engine.async_engine import AsyncEngine
from liushui.engine.links import ProcessLink
from liushui.engine.startup import TextSide, load_text


class ProcessEngine(AsyncEngine):
    """`ServingEngine` whose steps share no interpreter lock with HTTP, JSON and text."""

    def __init__(
        self,
        config: EngineConfig,
        serving: ServingConfig | None = None,
        *,
        maker: str = "liushui.engine.startup:make_core",
        text: Callable[[], TextSide] | None = None,
    ) -> None:
        """`maker`: module:function that makes the `Core` in that process; `text` makes this side's part. For other
        executors than the runner. Nothing is loaded before `start`."""
        serving = serving or ServingConfig()
        super().__init__(config, serving, ProcessLink(config, serving, maker), text or (lambda: load_text(config)))
        self._process_link: ProcessLink = self._link  # type: ignore[assignment]

    @property
    def engine_pid(self) -> int | None:
        """The process that computes; None while there is none."""
        return self._process_link.pid

"""`InProcessEngine`: the serving face with the token loop on a thread. Simple to use and to debug; no restart."""

from collections.abc import Callable

from liushui.config import EngineConfig, ServingConfig
from liushui.engine.async_engine import AsyncEngine
from liushui.engine.attendant import Core
from liushui.engine.engine import Engine
from liushui.engine.events import House
from liushui.engine.links import ThreadLink
from liushui.engine.startup import TextSide, load_text, make_core
from liushui.engine.tokenizer import Tokenizer


class InProcessEngine(AsyncEngine):
    """`ServingEngine` without a second process."""

    engine: Engine
    """What it was made around, if it was: to be looked at while it is idle."""

    def __init__(
        self,
        config: EngineConfig,
        serving: ServingConfig | None = None,
        *,
        core: Callable[[], Core] | None = None,
        text: Callable[[], TextSide] | None = None,
    ) -> None:
        """`core`, `text`: makers, for other executors than the runner. Nothing is loaded before `start`."""
        serving = serving or ServingConfig()
        link = ThreadLink(core or (lambda: make_core(config, serving)), serving)
        super().__init__(config, serving, link, text or (lambda: load_text(config)))

    @classmethod
    def around(
        cls, engine: Engine, tokenizer: Tokenizer, config: EngineConfig, serving: ServingConfig | None = None
    ) -> "InProcessEngine":
        """Around the scheduler and the executor of an engine that exists, which is not to be used otherwise."""
        pool = engine.scheduler.pool
        house = House(config.policy, config.seats, pool.num_blocks, pool.block_size)
        core = Core(engine.scheduler, engine.executor, engine.inputs.limits.vocab_size, engine.depth, house)
        made = cls(config, serving, core=lambda: core, text=lambda: TextSide(tokenizer))
        made.engine = engine
        return made

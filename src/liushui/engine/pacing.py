"""From the settings to the pace of the loop."""

from liushui.config import ServingConfig
from liushui.core.cost import Pacer


def pacer(serving: ServingConfig) -> Pacer | None:
    """`target_itl_ms`: None bounds steps in proportion, 0 not at all."""
    target = serving.target_itl_ms
    if target == 0:
        return None
    return Pacer(None if target is None else target / 1000)

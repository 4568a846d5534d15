"""r2r_glimp: a small and a large language model write one text together.

A router decides who writes next, per token (R2R, arXiv 2505.21600) or per reasoning step (GlimpRouter,
arXiv 2601.05110). Importing this package is cheap: torch comes with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "r2r_glimp.core": (
        "CheckpointError DataError Decision EngineError Event FinishEvent Model R2RGlimpError RequestOutput "
        "RoutingParams SamplingParams Stats TokenEvent UsageError"
    ),
    "r2r_glimp.engine.engine": "Engine",
    "r2r_glimp.hub": "load_router",
    "r2r_glimp.models": "ModelPair",
    "r2r_glimp.routing.routers": "ReplayRouter Router",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted([*_HOME_OF, "__version__"])  # noqa: PLE0605 - one table names everything once

if TYPE_CHECKING:
    from r2r_glimp.core import (
        CheckpointError,
        DataError,
        Decision,
        EngineError,
        Event,
        FinishEvent,
        Model,
        R2RGlimpError,
        RequestOutput,
        RoutingParams,
        SamplingParams,
        Stats,
        TokenEvent,
        UsageError,
    )
    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.hub import load_router
    from r2r_glimp.models import ModelPair
    from r2r_glimp.routing.routers import ReplayRouter, Router


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)

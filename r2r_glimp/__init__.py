"""r2r_glimp: a small and a large language model write one text together.

A router decides who writes next, per token (R2R, arXiv 2505.21600) or per reasoning step
(GlimpRouter, arXiv 2601.05110). Importing this package is cheap: torch comes with the first name
that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "r2r_glimp.core": (
        "CheckpointError DataError Decision EngineError Event FinishEvent Model R2RGlimpError "
        "RequestOutput RoutingParams SamplingParams Stats TokenEvent UsageError"
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
        CheckpointError as CheckpointError,
    )
    from r2r_glimp.core import (
        DataError as DataError,
    )
    from r2r_glimp.core import (
        Decision as Decision,
    )
    from r2r_glimp.core import (
        EngineError as EngineError,
    )
    from r2r_glimp.core import (
        Event as Event,
    )
    from r2r_glimp.core import (
        FinishEvent as FinishEvent,
    )
    from r2r_glimp.core import (
        Model as Model,
    )
    from r2r_glimp.core import (
        R2RGlimpError as R2RGlimpError,
    )
    from r2r_glimp.core import (
        RequestOutput as RequestOutput,
    )
    from r2r_glimp.core import (
        RoutingParams as RoutingParams,
    )
    from r2r_glimp.core import (
        SamplingParams as SamplingParams,
    )
    from r2r_glimp.core import (
        Stats as Stats,
    )
    from r2r_glimp.core import (
        TokenEvent as TokenEvent,
    )
    from r2r_glimp.core import (
        UsageError as UsageError,
    )
    from r2r_glimp.engine.engine import Engine as Engine
    from r2r_glimp.hub import load_router as load_router
    from r2r_glimp.models import ModelPair as ModelPair
    from r2r_glimp.routing.routers import ReplayRouter as ReplayRouter
    from r2r_glimp.routing.routers import Router as Router


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)

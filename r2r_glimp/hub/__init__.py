"""Router checkpoints: files, cards, publishing.

Importing this package is cheap: torch comes with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME_OF = {
    "RouterCheckpoint": "checkpoint",
    "RouterConfig": "config",
    "load_router": "checkpoint",
    "convert_r2r": "import_r2r",
    "check_repo_id": "publish",
    "publish_dataset": "publish",
    "pull": "publish",
    "push": "publish",
}
__all__ = [
    "RouterCheckpoint",
    "RouterConfig",
    "check_repo_id",
    "convert_r2r",
    "load_router",
    "publish_dataset",
    "pull",
    "push",
]

if TYPE_CHECKING:
    from r2r_glimp.hub.checkpoint import RouterCheckpoint, load_router
    from r2r_glimp.hub.config import RouterConfig
    from r2r_glimp.hub.import_r2r import convert_r2r
    from r2r_glimp.hub.publish import check_repo_id, publish_dataset, pull, push


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)

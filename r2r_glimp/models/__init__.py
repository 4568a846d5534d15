"""Loading a pair of models: where files are, whether they are whole, what they are.

Importing this package is cheap: torch comes with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2r_glimp.models.fingerprint import Fingerprint
    from r2r_glimp.models.pair import LoadedModel, ModelPair
    from r2r_glimp.models.presets import preset_names, read_preset

__all__ = ["Fingerprint", "LoadedModel", "ModelPair", "preset_names", "read_preset"]

_HOME_OF = {
    "Fingerprint": "fingerprint",
    "LoadedModel": "pair",
    "ModelPair": "pair",
    "preset_names": "presets",
    "read_preset": "presets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)

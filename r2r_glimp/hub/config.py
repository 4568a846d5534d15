"""`config.json` of a router checkpoint: what the router is, what it was made for, where it defers.

Its keys:

    format_version  router  granularity  features  network      what to build
    thresholds  default_threshold                               where it defers
    slm  llm                                                    fingerprints of the pair
    trained_on  metrics  versions                               for the card
"""

import math
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from r2r_glimp import __version__
from r2r_glimp.core import CheckpointError, UsageError
from r2r_glimp.models.fingerprint import Fingerprint
from r2r_glimp.routing.mlp import MLPConfig, MLPRouter, Threshold
from r2r_glimp.routing.strict import check_keys, read_fields

FORMAT_VERSION = 1
ROUTERS = {"mlp": MLPRouter}  # registered names; a config never names a class
_CONFIG_KEYS = {
    "format_version", "router", "granularity", "features", "network",
    "thresholds", "default_threshold", "slm", "llm", "trained_on", "metrics", "versions",
}  # fmt: skip


def library_versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    return {
        "r2r_glimp": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def command_line(module: str) -> str:
    """The command that made this, as somebody else would type it."""
    program = Path(sys.argv[0]).name
    words = [program] if program == "r2r-glimp" else ["python", "-m", module]
    return shlex.join([*words, *sys.argv[1:]])


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """What `config.json` holds.

    Args:
        model: granularity, features and size.
        thresholds: calibrated thresholds by name, such as "recall-0.95".
        default_threshold: the one that holds where a request names none.
        slm, llm: the pair it was trained on; None where that was not recorded.
        trained_on: facts about the data, for the card: name, rows, questions, what counted as
            positive.
        metrics: results on the test split, by name.
        versions: of the libraries that made it.

    Raises:
        UsageError: no threshold, the default is not among them, or one is not a probability.
    """

    model: MLPConfig
    thresholds: Mapping[str, Threshold]
    default_threshold: str
    slm: Fingerprint | None = None
    llm: Fingerprint | None = None
    trained_on: Mapping[str, str | int | float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=library_versions)
    router: str = "mlp"

    def __post_init__(self) -> None:
        if self.default_threshold not in self.thresholds:
            raise UsageError(
                f"default threshold {self.default_threshold!r} is not in {list(self.thresholds)}"
            )
        for name, threshold in self.thresholds.items():
            if not 0 <= threshold.value <= 1:
                raise UsageError(f"threshold {name!r} = {threshold.value} is out of range: 0 to 1")

    @property
    def threshold(self) -> Threshold:
        """The default one."""
        return self.thresholds[self.default_threshold]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "format_version": FORMAT_VERSION,
            "router": self.router,
            **self.model.to_dict(),
            "thresholds": {name: t.to_dict() for name, t in self.thresholds.items()},
            "default_threshold": self.default_threshold,
            "slm": self.slm and self.slm.to_dict(),
            "llm": self.llm and self.llm.to_dict(),
            "trained_on": dict(self.trained_on),
            "metrics": dict(self.metrics),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "config.json") -> "RouterConfig":
        """From the JSON form.

        Raises:
            CheckpointError: another format, an unknown router, or anything missing, unknown or of
                the wrong type.
        """
        version = data.get("format_version") if isinstance(data, dict) else None
        if version is None:
            raise CheckpointError(f"{where}: no format_version: this is not a router checkpoint")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{where}: format_version {version!r} is not {FORMAT_VERSION}: update r2r_glimp"
            )
        check_keys(data, _CONFIG_KEYS, where)
        if data["router"] not in list(ROUTERS):
            raise CheckpointError(
                f"{where}: unknown router {data['router']!r}, known: {', '.join(ROUTERS)}"
            )
        shape = {key: data[key] for key in ("granularity", "features", "network")}
        for name in ("thresholds", "trained_on", "metrics", "versions"):
            if not isinstance(data[name], dict):
                raise CheckpointError(f"{where}: {name} is not an object")
        try:
            return cls(
                router=data["router"],
                model=MLPConfig.from_dict(shape, where),
                thresholds={
                    name: read_fields(Threshold, value, f"{where}: threshold {name!r}")
                    for name, value in data["thresholds"].items()
                },
                default_threshold=_scalar(
                    data["default_threshold"], str, f"{where}: default_threshold"
                ),
                slm=_fingerprint(data["slm"], f"{where}: slm"),
                llm=_fingerprint(data["llm"], f"{where}: llm"),
                trained_on=_scalars(data, "trained_on", str | int | float, where),
                metrics=_scalars(data, "metrics", int | float, where),
                versions=_scalars(data, "versions", str, where),
            )
        except UsageError as error:
            raise CheckpointError(f"{where}: {error}") from None


def _fingerprint(data: Any, where: str) -> Fingerprint | None:
    if data is None:
        return None
    try:
        return Fingerprint.from_dict(data)
    except (CheckpointError, UsageError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: not a model's fingerprint: {error}") from None


def _scalars(data: dict[str, Any], name: str, kind: Any, where: str) -> dict[str, Any]:
    return {
        key: _scalar(value, kind, f"{where}: {name}: {key}") for key, value in data[name].items()
    }


def _scalar(value: Any, kind: Any, where: str) -> Any:
    wrong = isinstance(value, bool) or not isinstance(value, kind)
    if wrong or (isinstance(value, float) and not math.isfinite(value)):
        raise CheckpointError(f"{where}={value!r} has the wrong type")
    return value

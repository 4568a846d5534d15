"""Where a calibrated threshold goes: into the router's checkpoint, or, for a router without one,
into a YAML file that `generate --config` takes.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from r2r_glimp.cli.calibration.results import Outcome
from r2r_glimp.core import RoutingParams, UsageError
from r2r_glimp.hub.card import render_card
from r2r_glimp.hub.checkpoint import CARD, CONFIG, RouterCheckpoint
from r2r_glimp.hub.config import RouterConfig
from r2r_glimp.hub.files import check_writable, read_text

_SHARE, _QUALITY = "LLM share: ", "; recall and precision: "
_TABLE = re.compile(r"^## Thresholds\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def check_target(source: Path | None, target: Path, *, overwrite: bool) -> None:
    """Find out before any work whether the result can be stored.

    Args:
        source: the checkpoint that was read, None for a router without one.
        target: a folder for a checkpoint, else a file.

    Raises:
        UsageError: it cannot.
    """
    if source is not None:
        # In its own folder it gains a threshold; anywhere else it is a new router.
        check_writable(target, overwrite or target.resolve() == source.resolve(), is_ours=CONFIG)
    elif target.is_dir():
        raise UsageError(f"--output {target} is a folder: give a YAML file")
    elif target.exists() and not overwrite:
        raise UsageError(f"--output {target} is there already: choose another, or --overwrite")


def store_checkpoint(
    outcome: Outcome, checkpoint: RouterCheckpoint, source: Path, target: Path, *, default: bool
) -> None:
    """Write the checkpoint with its new thresholds, curve and traffic; text in its card stays.

    Args:
        default: the first threshold is to hold where a request names none.

    Raises:
        CheckpointError: it cannot be written.
    """
    config, traffic = checkpoint.config, checkpoint.traffic
    if default:  # what requests that name no threshold will be held against
        traffic = outcome.traffic
    new = {found.name: found.to_threshold(outcome.calibrated_on) for found in outcome.found}
    changed = dataclasses.replace(
        config,
        thresholds={**config.thresholds, **new},
        default_threshold=outcome.found[0].name if default else config.default_threshold,
    )
    card = read_text(source / CARD) if (source / CARD).is_file() else render_card(config.to_dict())
    result = RouterCheckpoint(
        changed,
        checkpoint.tensors,
        merge_curve(outcome, checkpoint),
        checkpoint.training_config,
        traffic,
    )
    result.save_pretrained(target, overwrite=True)
    if card != render_card(config.to_dict()):  # someone has written in it
        (target / CARD).write_text(update_card(card, config, changed), encoding="utf-8")


def merge_curve(outcome: Outcome, checkpoint: RouterCheckpoint) -> dict[str, Any]:
    """The columns of `curve.json`: shares as routed; recall and precision of the labels, or as
    they were. None where a threshold has only one of them."""
    rows: dict[float, list[float | None]] = {}
    quality_of = ""
    if outcome.labels is not None:
        quality_of = outcome.labels.name
        for threshold in outcome.labels.curve_thresholds():
            rows[threshold] = [None, *outcome.labels.quality_at(threshold)]
    elif checkpoint.curve is not None:
        old = checkpoint.curve
        quality_of = str(old["measured_on"]).rpartition(_QUALITY)[2]
        for threshold, recall, precision in zip(
            old["threshold"], old["recall"], old["precision"], strict=True
        ):
            if recall is not None:
                rows[threshold] = [None, recall, precision]
    for point in outcome.curve.points:
        known = rows.get(point.threshold, [None, None, None])
        if outcome.labels is not None:
            known = [None, *outcome.labels.quality_at(point.threshold)]
        rows[point.threshold] = [point.share, *known[1:]]
    ordered = sorted(rows.items())
    names = ("llm_share", "recall", "precision")
    measured_on = _SHARE + outcome.calibrated_on + (quality_of and _QUALITY + quality_of)
    return {
        "measured_on": measured_on,
        "threshold": [threshold for threshold, _ in ordered],
        **{name: [values[i] for _, values in ordered] for i, name in enumerate(names)},
    }


def update_card(card: str, before: RouterConfig, after: RouterConfig) -> str:
    """A card that someone wrote in, with the table of thresholds and the default's name of now."""
    fresh = _TABLE.search(render_card(after.to_dict()))
    assert fresh is not None
    card = _TABLE.sub(lambda _: fresh[0], card, count=1)
    said = "default threshold is `{}`"
    return card.replace(said.format(before.default_threshold), said.format(after.default_threshold))


def generate_config(outcome: Outcome, pair: dict[str, Any], entropy_top_k: int | None) -> str:
    """YAML for `generate --config`: the pair and the routing that this threshold holds for.

    Args:
        pair: options that choose the pair.
        entropy_top_k: of the router, None for the full vocabulary.
    """
    route, found = outcome.route, outcome.found[0]
    defaults = {field.name: field.default for field in dataclasses.fields(RoutingParams)}
    kept = ("delimiter", "max_step_tokens", "max_thinking_tokens", "max_llm_share")
    values: dict[str, Any] = {**pair, "router": route.router.name}
    if entropy_top_k is not None:
        values["entropy_top_k"] = entropy_top_k
    values |= {"granularity": route.granularity, "threshold": found.point.threshold}
    values["answer_by"] = route.answer_by
    for name in (*kept, "repetition_guard"):
        value = getattr(route.params, name)
        if value != defaults[name]:
            values[name] = value
    low, high = found.point.interval
    comments = [
        f"LLM share {found.point.share:.2%} (95%: {low:.2%} to {high:.2%}) on "
        f"{outcome.calibrated_on}.",
        "Holds for this pair and these settings alone: r2r-glimp generate --config THIS_FILE",
    ]
    others = [f"{other.name}: {other.point.threshold!r}" for other in outcome.found[1:]]
    if others:
        comments.append(f"Other thresholds: {', '.join(others)}")
    return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(values, sort_keys=False)


def store_config(text: str, target: Path) -> None:
    """Write the YAML file.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output {target}: {error.strerror}") from None

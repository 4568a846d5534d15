"""What a calibration found, as plain values for programs and as lines for people."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from r2r_glimp.cli.calibration.labels import Labels
from r2r_glimp.evaluation.cost import Parameters
from r2r_glimp.routing.calibration import Measurement, ShareCurve, format_count
from r2r_glimp.routing.drift import Traffic
from r2r_glimp.routing.mixture import Mixture, Scale
from r2r_glimp.routing.mlp import Threshold

if TYPE_CHECKING:
    from r2r_glimp.routing.policy import Route

WANTED_PRECISION = 0.1  # of the share: half the interval; wider ones are worth a note


@dataclass(frozen=True, slots=True)
class Found:
    """A threshold, by what it was found.

    Attributes:
        name: what the checkpoint calls it, such as `share-0.10`.
        target: the wanted LLM share; None where something else was wanted.
        point: what was measured at it.
        recall, precision: on labeled text, None without labels.
        fresh: what was measured on prompts that nothing was chosen by.
    """

    name: str
    target: float | None
    point: Measurement
    recall: float | None = None
    precision: float | None = None
    fresh: Measurement | None = None

    def to_threshold(self, calibrated_on: str) -> Threshold:
        """The form that a checkpoint holds."""
        low, high = self.point.interval
        return Threshold(
            value=self.point.threshold,
            calibrated_on=calibrated_on,
            llm_share=self.point.share,
            llm_share_low=low,
            llm_share_high=high,
            recall=self.recall,
            precision=self.precision,
        )

    @property
    def prompts_wanted(self) -> int | None:
        """How many prompts would make the interval a tenth of the share to either side; None if
        these do."""
        low, high = self.point.interval
        relative = (high - low) / 2 / max(self.point.share, 1e-9)
        if relative <= WANTED_PRECISION or not self.point.share:
            return None
        return int(self.point.num_requests * (relative / WANTED_PRECISION) ** 2)


@dataclass(slots=True)
class Outcome:
    """A whole calibration.

    Attributes:
        route: the resolved routing.
        prompts: what the prompts are called.
        sampling: how tokens were picked, in words.
        parameters: of SLM, router and LLM, as an average token works on them.
        found: at least one.
        curve: every point that was measured.
        mixture: with the scale it was fitted on, where one was asked for.
        fitted_scores: what it was fitted to.
    """

    route: "Route"
    prompts: str
    sampling: str
    parameters: Parameters
    found: list[Found]
    curve: ShareCurve
    labels: Labels | None = None
    mixture: tuple[Mixture, Scale] | None = None
    seconds: float = 0.0
    stored: str = ""
    report: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def calibrated_on(self) -> str:
        """For cards and files."""
        first, route = self.found[0].point, self.route
        return (
            f"{first.num_requests} {self.prompts}, routed per {route.granularity}, "
            f"answer by {route.answer_by}, {self.sampling}"
        )

    @property
    def traffic(self) -> Traffic | None:
        """What requests are like at the first threshold; None if these were too few to tell."""
        point = self.found[0].point
        return Traffic.measure(
            [share for share, _ in point.firsts],
            [scores for _, scores in point.firsts],
            measured_on=self.calibrated_on,
            threshold=point.threshold,
            answer_by=self.route.answer_by,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        route = self.route
        values: dict[str, Any] = {
            "router": route.router.name,
            "granularity": route.granularity,
            "answer_by": route.answer_by,
            "prompts": self.prompts,
            "sampling": self.sampling,
            "calibrated_on": self.calibrated_on,
            "thresholds": [self._found_to_dict(found) for found in self.found],
            "curve": [_point_to_dict(point) for point in self.curve.points],
        }
        if self.labels is not None:
            values["labels"] = self.labels.name
        if self.mixture is not None:
            mixture, scale = self.mixture
            values["mixture"] = asdict(mixture) | {"scale": scale}
        return values | {"seconds": self.seconds, "stored": self.stored, "report": self.report}

    def lines(self) -> list[str]:
        """What people should know at the end."""
        lines = []
        for found in self.found:
            point = found.point
            low, high = point.interval
            wanted = "" if found.target is None else f" for {found.target:.4g}"
            text = (
                f"{found.name:<12} threshold {point.threshold:.6g}: LLM share {point.share:.2%}"
                f"{wanted} (95%: {low:.2%} to {high:.2%}, {point.num_requests:,} prompts), "
                f"{format_count(self.parameters.average(point.share))} parameters on average"
            )
            if found.recall is not None and found.precision is not None:
                text += f"; recall {found.recall:.1%}, precision {found.precision:.1%}"
            lines.append(text)
            if found.fresh is not None:
                fresh, (low, high) = found.fresh, found.fresh.interval
                error = ""
                if found.target is not None:
                    error = f", {fresh.share / found.target - 1:+.1%} off the target"
                lines.append(
                    f"{'':<12} on {fresh.num_requests:,} fresh prompts {fresh.share:.2%} "
                    f"(95%: {low:.2%} to {high:.2%}){error}"
                )
            if (wanted_prompts := found.prompts_wanted) is not None:
                lines.append(
                    f"{'':<12} the interval is wide: some {wanted_prompts:,} prompts would bring "
                    f"it within a tenth of the share (--num_prompts)"
                )
        return [*lines, *self.notes, f"report       {self.report}", f"stored       {self.stored}"]

    def _found_to_dict(self, found: Found) -> dict[str, Any]:
        values = {"name": found.name, "target": found.target, **_point_to_dict(found.point)}
        values["average_parameters"] = self.parameters.average(found.point.share)
        values |= {"recall": found.recall, "precision": found.precision}
        return values | {"fresh": None if found.fresh is None else _point_to_dict(found.fresh)}


def _point_to_dict(point: Measurement) -> dict[str, Any]:
    low, high = point.interval
    return {
        "threshold": point.threshold,
        "llm_share": point.share,
        "llm_share_low": low,
        "llm_share_high": high,
        "num_prompts": point.num_requests,
    }

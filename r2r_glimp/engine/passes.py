"""Passes: one model computes as many sequences as fit; cursors move, who fails is ended."""

import time
from dataclasses import dataclass

import torch

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import EngineError, Model, SamplingParams
from r2r_glimp.engine.cost import PassCost
from r2r_glimp.engine.graphs import Draws, Graphs
from r2r_glimp.engine.runner import ModelRunner, Rows
from r2r_glimp.engine.sampling import Stream, sample, uniform
from r2r_glimp.engine.scheduler import Scheduler
from r2r_glimp.engine.sequence import Sequence
from r2r_glimp.engine.writer import Writer

_NOTHING = Rows(torch.empty(0), torch.empty(0))


@dataclass(frozen=True, slots=True)
class Computed:
    """A sequence that took part in a pass."""

    sequence: Sequence
    row: Row  # the tokens that were computed
    wanted: range  # where its wanted rows stand in what came out


class Passes:
    """Forward passes of both models.

    Args:
        runners: the SLM's and the LLM's.
        scheduler: cuts rows and holds blocks.
        writer: ends sequences that fail.
        graphs: captured passes of each, None where there are none.

    Attributes:
        costs: what each model's passes take.
    """

    def __init__(
        self,
        runners: tuple[ModelRunner, ModelRunner],
        scheduler: Scheduler,
        writer: Writer,
        graphs: tuple[Graphs | None, Graphs | None] = (None, None),
    ) -> None:
        self.runners = runners
        self.scheduler = scheduler
        self.writer = writer
        self.graphs = graphs
        self.costs = (PassCost(), PassCost())

    def run(
        self, model: Model, candidates: list[Sequence], stream: Stream
    ) -> tuple[list[Computed], Rows]:
        """Compute what fits a pass. Who fails is ended and left out.

        Args:
            stream: where a pass that draws takes its random numbers from.
        """
        batch = self.scheduler.schedule(model, candidates)
        if not batch:
            return [], _NOTHING
        wanted = [_num_wanted(sequence, row, model) for sequence, row in batch]
        started = time.perf_counter()
        try:
            rows = self._compute(model, batch, wanted, stream)
        except (RuntimeError, EngineError) as error:
            for sequence, _ in batch:
                self.writer.fail(sequence, f"the {model.name} failed: {error}")
            return [], _NOTHING
        # a maximum with NaN is NaN
        finite = rows.drawn.finite if rows.drawn else (~rows.logits_RV.amax(-1).isnan()).tolist()
        num_tokens = sum(len(row.tokens) for _, row in batch)
        self.costs[model].observe(num_tokens, time.perf_counter() - started)
        offset, computed = 0, []
        for (sequence, row), num_wanted in zip(batch, wanted, strict=True):
            first, offset = offset, offset + num_wanted
            self.scheduler.advance(sequence, row, model)
            if all(finite[first:offset]):
                computed.append(Computed(sequence, row, range(first, offset)))
            else:
                position = len(sequence.tokens)
                self.writer.fail(
                    sequence, f"the {model.name} gave NaN logits at position {position}"
                )
        return computed, rows

    def _compute(
        self, model: Model, batch: list[tuple[Sequence, Row]], wanted: list[int], stream: Stream
    ) -> Rows:
        """By a captured pass where one takes the batch."""
        rows, graphs = [row for _, row in batch], self.graphs[model]
        if graphs is not None:
            sequences = [sequence for sequence, _ in batch]
            draws = Draws(
                params=[s.sampling for s in sequences],
                uniforms=[uniform(s.seed, len(s.tokens) + s.num_drafts, stream) for s in sequences],
                router_uniforms=[uniform(s.seed, len(s.tokens), Stream.ROUTER) for s in sequences],
            )
            done = graphs.run(rows, wanted, draws)
            if done is not None:
                return done
        return self.runners[model].forward(rows, wanted)


def sampled(rows: Rows, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    """The token after each row: drawn in the pass already, or now."""
    return rows.drawn.tokens if rows.drawn else sample(rows.logits_RV, params, uniforms)


def _num_wanted(sequence: Sequence, row: Row, model: Model) -> int:
    """Of how many of a row's last tokens the logits are wanted."""
    timeline = sequence.timelines[model]
    if model is Model.LLM and sequence.traces_llm:
        return max(0, row.end - max(row.start, timeline.num_prompt_tokens - 1))
    if model is Model.LLM:  # the last token, and the drafts after it
        return max(0, row.end - (len(timeline.tokens) - sequence.num_drafts) + 1)
    return int(row.end == len(timeline.tokens))

"""Patience: whether rows that wait for the LLM go now, or wait for more to share the pass.

What waiting can win is the fixed part of LLM passes; what it takes is the time of SLM passes, in
which the waiting rows stand still.

    wait while   waiting x fixed_SLM  <  joining x fixed_LLM      one more tick pays
    and          time waited          <  fixed_LLM                nobody waits longer than a pass

`joining` is the LLM work that the SLM's rows bring in one tick. All of it is learnt from what ran:
it differs between machines by a factor of a hundred. No text depends on it.
"""

from r2r_glimp.core import Model
from r2r_glimp.engine.cost import PassCost
from r2r_glimp.engine.sequence import Sequence

_FADE = 0.995  # weight of a tick when the next one has run: some 200 count


class Patience:
    """Decides when the LLM runs while the SLM has work.

    Args:
        costs: of the SLM's and the LLM's passes.
        min_batch: the LLM runs when this many rows wait; None decides by what passes cost.
        max_wait: with `min_batch`: or when one has waited this many ticks.
    """

    def __init__(
        self, costs: tuple[PassCost, PassCost], min_batch: int | None, max_wait: int
    ) -> None:
        self.costs = costs
        self.min_batch = min_batch
        self.max_wait = max_wait
        self._rows = [0.0, 0.0]  # computed by each model lately
        self._since = 0.0  # the SLM's total seconds when the first of those that wait came

    def count(self, model: Model, sequences: list[Sequence]) -> None:
        """These sequences take part in a model's pass."""
        if model is Model.SLM:
            self._rows = [_FADE * rows for rows in self._rows]
        # Whoever is the LLM's alone says nothing about how much the SLM's rows bring.
        self._rows[model] += sum(s.policy.route.router.constant is not Model.LLM for s in sequences)

    def waits(self, waiting: list[Sequence], num_active: int) -> bool:
        """Whether the rows that wait for the LLM go on waiting.

        Args:
            num_active: rows whose turn is the SLM's.
        """
        if not num_active:
            return False
        ticks = max(s.ticks_waiting for s in waiting)
        if self.min_batch is not None:
            return len(waiting) < self.min_batch and ticks < self.max_wait
        slm, llm = self.costs
        if ticks == 0:
            self._since = slm.total_s
        joining = num_active * self._rows[Model.LLM] / max(1.0, self._rows[Model.SLM])
        return (
            len(waiting) * slm.fixed_s < joining * llm.fixed_s
            and slm.total_s - self._since < llm.fixed_s
        )

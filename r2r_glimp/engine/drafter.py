"""Drafter: the SLM writes ahead where the LLM has more than a token to write, for the LLM to check
in one pass.

    timeline   … confirmed | d d d d      drafts: computed by the SLM, behind the timeline's end
    LLM's own           a    b c x        its choice at every position; the row after a draft counts
                             └─┴─ right   if the draft was that choice

Drafts are drawn with the LLM's own random numbers, so that two models that agree draft what is
accepted. What the LLM would have written alone is what is written: no text changes.
"""

from r2r_glimp.core import Model
from r2r_glimp.engine.passes import Passes, sampled
from r2r_glimp.engine.sampling import Stream, uniform
from r2r_glimp.engine.scheduler import Scheduler
from r2r_glimp.engine.sequence import Sequence

_MAX_PAUSE = 31


class Drafter:
    """Drafts, and learns how many are worth it.

    Args:
        passes: runs the SLM.
        scheduler: whose cursors are clamped after wrong drafts.
        room: tokens a timeline may have, with either model.
    """

    def __init__(self, passes: Passes, scheduler: Scheduler, room: int) -> None:
        self.passes = passes
        self.scheduler = scheduler
        self.room = room

    def draft(self, sequences: list[Sequence]) -> None:
        """Put drafts on the timelines of sequences whose turn is the LLM's."""
        resting = {s for s in sequences if s.draft_pause}
        for sequence in resting:
            sequence.draft_pause -= 1
        # Where the SLM has nothing to compute (its proposal was just deferred) the LLM goes first.
        drafting = [
            s
            for s in sequences
            if s not in resting and self._num_wanted(s) > 0 and s.num_outstanding(Model.SLM)
        ]
        while drafting:
            batch, rows = self.passes.run(Model.SLM, drafting, Stream.LLM)
            batch = [one for one in batch if one.sequence.num_outstanding(Model.SLM) == 0]
            if not batch:
                return
            ready = [one.sequence for one in batch]
            rows = rows.pick([one.wanted[-1] for one in batch])
            tokens = sampled(
                rows,
                [s.sampling for s in ready],
                [uniform(s.seed, len(s.tokens) + s.num_drafts, Stream.LLM) for s in ready],
            )
            for sequence, token in zip(ready, tokens, strict=True):
                sequence.timelines[Model.SLM].tokens.append(token)
                sequence.num_drafts += 1
                sequence.stats.draft_tokens += 1
            drafting = [s for s in ready if s.num_drafts < self._num_wanted(s)]

    def settle(self, sequence: Sequence, start: int, num_right: int, num_written: int) -> None:
        """Count the checked drafts, choose how many to try next, and clamp the cursors.

        Args:
            start: length of the timeline without the drafts and what was written.
            num_right: drafts that were the LLM's own choice.
            num_written: tokens written since.
        """
        sequence.stats.draft_accepted += min(num_right, num_written)
        # One more than was right: as many as are likely to be right again, and a try.
        sequence.draft_length = min(sequence.policy.route.params.speculate, num_right + 1)
        # Where the SLM keeps being wrong it is asked ever less often.
        sequence.draft_misses = 0 if num_right else sequence.draft_misses + 1
        sequence.draft_pause = min(_MAX_PAUSE, max(0, 2**sequence.draft_misses // 2 - 1))
        if sequence.finish_reason is None:
            # The last token stays to be computed, by whoever's turn is next.
            self.scheduler.roll_back(sequence, start, start + min(num_right, num_written - 1))

    def drop(self, sequence: Sequence) -> None:
        """Take off drafts that nobody looked at."""
        if sequence.num_drafts:
            sequence.drop_drafts()
            end = len(sequence.timelines[Model.SLM].tokens)
            self.scheduler.roll_back(sequence, end, end)

    def _num_wanted(self, sequence: Sequence) -> int:
        """Drafts of a sequence whose turn is the LLM's; none where a span is one token."""
        route = sequence.policy.route
        if route.granularity == "token" and route.router.constant is not Model.LLM:
            return 0
        room = self.room - len(sequence.timelines[Model.SLM].tokens) + sequence.num_drafts
        return min(sequence.draft_length, sequence.max_tokens - len(sequence.tokens) - 1, room - 1)

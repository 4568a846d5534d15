"""Turns of models behind servers: asked for at once, written when the answer is there.

    turn ──Ask──▶ server        the tick goes on with everybody else
    tick ◀─Reply── … ──▶ writer: the tokens, one after another, until the span is over

One more way in which "model m computes `tokens[num_computed[m]:]` and says what comes next"; the
server's prefix cache is its KV. A sequence that waits keeps its place and its blocks.
"""

import logging
from collections.abc import Sequence as SequenceABC
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait

import torch

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import EngineError, Model, UsageError
from r2r_glimp.engine.decider import Decider
from r2r_glimp.engine.runner import ModelRunner, Rows
from r2r_glimp.engine.sampling import Stream, uniform
from r2r_glimp.engine.sequence import Pending, Sequence
from r2r_glimp.engine.writer import Writer
from r2r_glimp.models.pair import ModelPair
from r2r_glimp.models.remote import RemoteModel
from r2r_glimp.remote.api import TOP, Ask, Reply
from r2r_glimp.routing.policy import Turn
from r2r_glimp.routing.steps import STOP_STRINGS

log = logging.getLogger(__name__)
CHUNK = (
    128  # tokens asked for at once where a span has no limit of its own: an answer still streams
)
_MOST_STOPS = 4  # strings of the caller's that every server takes
_PROBED = 4
_POLL_S = 0.02  # how long a tick waits for an answer when there is nothing else to do


class RemoteTurns:
    """Asks for the turns of a pair's remote models.

    Args:
        pair: of which at least one model may be remote; with none, nothing is ever asked.
        decider: scores what a remote SLM proposes.
        writer: writes what comes back.
        room: tokens a timeline may have, for each model.
    """

    def __init__(
        self, pair: ModelPair, decider: Decider, writer: Writer, room: SequenceABC[int]
    ) -> None:
        self.models = [
            one if isinstance(one, RemoteModel) else None for one in (pair.slm, pair.llm)
        ]
        self.decider = decider
        self.writer = writer
        self.room = room
        self._warned = False

    def has(self, model: Model) -> bool:
        """Whether a model is remote."""
        return self.models[model] is not None

    def ask(self, model: Model, sequences: SequenceABC[Sequence]) -> None:
        """Ask for the turns of sequences that wait for nothing yet."""
        remote = self.models[model]
        assert remote is not None
        for sequence in sequences:
            self.writer.sync(sequence, model)
            asked = self._make(sequence, model, remote)
            future = remote.submit(asked)
            sequence.pending = Pending(model, sequence.policy.turn, future, asked)

    def write(self, sequences: SequenceABC[Sequence], *, idle: bool) -> None:
        """Write the answers that have come.

        Args:
            idle: nothing else is to be done: wait a moment for the first one.
        """
        asked = [s for s in sequences if s.pending is not None]
        if idle and asked:
            wait([s.pending.future for s in asked if s.pending], _POLL_S, FIRST_COMPLETED)
        for sequence in asked:
            pending = sequence.pending
            if pending is not None and pending.future.done():
                sequence.pending = None
                self._receive(sequence, pending)

    # ------------------------------------------------------------------ asking

    def _make(self, sequence: Sequence, model: Model, remote: RemoteModel) -> Ask:
        policy, tokens = sequence.policy, sequence.timelines[model].tokens
        probes = policy.turn is Turn.DECIDE
        limit = 1 if probes else policy.span_tokens
        stop: tuple[str, ...] = () if limit == 1 else sequence.sampling.stop[:_MOST_STOPS]
        if limit is not None and limit > 1:
            stop += STOP_STRINGS.get(policy.route.params.delimiter, ())
        if probes and not remote.dialect.takes_ids:
            limit = _PROBED  # as text, one token may be less than a character
        left = min(sequence.max_tokens - len(sequence.tokens), self.room[model] - len(tokens))
        draw = uniform(sequence.seed, len(sequence.tokens), Stream(model))
        return Ask(
            tokens=list(tokens),
            text=_text(remote, tokens),
            max_tokens=max(1, min(CHUNK if limit is None else limit, left)),
            stop=stop,
            sampling=sequence.sampling,
            seed=int(draw * 2**31),
            logprobs=probes,
            is_over=policy.ends_span,
        )

    # ------------------------------------------------------------------ writing

    def _receive(self, sequence: Sequence, pending: Pending) -> None:
        model = pending.model
        remote = self.models[model]
        assert remote is not None
        try:
            reply: Reply = pending.future.result()
        except CancelledError:
            return  # asked again at the next tick
        except Exception as error:  # whatever it is, it is this sequence's alone
            known = isinstance(error, EngineError)
            self._give_up(sequence, pending, str(error) if known else repr(error))
            return
        tokens = reply.tokens
        if tokens is None:
            tokens = remote.tokenizer.encode(reply.text, add_special_tokens=False)
        if not tokens and not reply.ended:
            self._give_up(sequence, pending, f"{remote.name} wrote nothing")
            return
        if pending.turn is Turn.DECIDE and self._defers(sequence, tokens, reply):
            return
        num_chars = len(sequence.text)
        num_written, over = self._append(sequence, model, tokens, pending.turn)
        self._count(sequence, model, len(pending.ask.tokens) + max(0, num_written - 1))
        written = sequence.text[num_chars:]
        ended = reply.ended and not any(stop in written for stop in pending.ask.stop)
        if ended and not over and sequence.finish_reason is None:
            self.writer.finish(sequence, "stop")

    def _defers(self, sequence: Sequence, tokens: list[int], reply: Reply) -> bool:
        """Score the first token of a remote SLM by its alternatives (GlimpRouter's top-20 rule):
        outside of them, nothing is known."""
        if not tokens:
            return False  # it ends the text
        top = torch.full((1, TOP), -torch.inf)
        values = torch.tensor(reply.top[:TOP])
        top[0, : len(values)] = values
        rows = Rows(torch.empty(1, 0), top)
        return bool(self.decider.deferred([sequence], tokens[:1], rows))

    def _append(
        self, sequence: Sequence, model: Model, tokens: list[int], turn: Turn
    ) -> tuple[int, bool]:
        """Write tokens until the span is over; how many, and whether it is. The rest is not ours to
        keep."""
        for num_written, token in enumerate(tokens, start=1):
            self.writer.append(sequence, model, token)
            if sequence.policy.close_due and sequence.finish_reason is None:
                self.writer.close_thinking(sequence)
                return num_written, True
            if sequence.finish_reason is not None or sequence.policy.turn is not turn:
                return num_written, True
        return len(tokens), False

    def _count(self, sequence: Sequence, model: Model, computed: int) -> None:
        """What the server has computed, if it remembers what it read before; of what it wrote, not
        yet the last token."""
        num_new = max(0, computed - sequence.num_computed[model])
        sequence.num_computed[model] = computed
        if model is Model.LLM:
            sequence.stats.llm_computed += num_new
        else:
            sequence.stats.slm_computed += num_new

    def _give_up(self, sequence: Sequence, pending: Pending, problem: str) -> None:
        """The server did not write a span: the request ends, or the SLM writes it."""
        remote = self.models[pending.model]
        assert remote is not None
        if pending.model is Model.SLM or remote.spec.on_failure == "fail":
            self.writer.fail(sequence, f"the {pending.model.name} failed: {problem}")
            return
        if not self._warned:
            log.warning("the SLM goes on without the LLM: %s", problem)
        self._warned = True
        sequence.stats.llm_unavailable += 1
        sequence.policy.hand_back()
        if not self.has(Model.SLM):
            # Its row at the decision is gone: it looks at the last token once more.
            last = len(sequence.timelines[Model.SLM].tokens) - 1
            computed = sequence.num_computed[Model.SLM]
            sequence.num_computed[Model.SLM] = min(computed, last)


class RemoteRunner(ModelRunner):
    """Stands where a remote model's runner would: it computes nothing and holds nothing."""

    def __init__(self, remote: RemoteModel) -> None:
        self.remote = remote
        self.paths = f"behind {remote.spec.url}, asked by {remote.dialect.name}"
        self.backend = None

    @property
    def kv_bytes_per_token(self) -> int:
        return 0

    def allocate(self, num_blocks: int) -> None:
        """Nothing: its KV is the server's."""

    def forward(self, rows: list[Row], wanted: list[int]) -> Rows:
        raise UsageError(f"{self.remote.name} is behind a server: its rows cannot be read here")

    def keep_layer(self, layer: int) -> None:
        raise UsageError(
            f"{self.remote.name} is behind a server, and the router looks at its hidden states: "
            "choose entropy, margin or random"
        )


def _text(remote: RemoteModel, tokens: list[int]) -> str:
    """The same as text, where the server wants that; it puts a beginning of its own before it."""
    if remote.dialect.takes_ids:
        return ""
    text = str(remote.tokenizer.decode(tokens, skip_special_tokens=False))
    return text.removeprefix(remote.tokenizer.bos_token or "")

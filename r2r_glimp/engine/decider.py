"""Decider: scores the SLM's proposals where a decision is due, and keeps the routers that do."""

import torch

from r2r_glimp.core import Decision, Model, UsageError
from r2r_glimp.engine.runner import ModelRunner, Rows
from r2r_glimp.engine.sampling import Stream, uniform
from r2r_glimp.engine.sequence import Sequence
from r2r_glimp.models.pair import AnyModel
from r2r_glimp.models.remote import RemoteModel
from r2r_glimp.routing.policy import Turn
from r2r_glimp.routing.routers import Router, named_router
from r2r_glimp.routing.signals import Signals


class Decider:
    """Who goes to the LLM.

    Args:
        slm: whose proposals are scored.
        runner: the SLM's, which keeps the layers that routers look at.
    """

    def __init__(self, slm: AnyModel, runner: ModelRunner) -> None:
        self.slm = slm
        self.runner = runner
        self._named: dict[str, Router] = {}

    def load(self, router: str | Router) -> Router:
        """The router of a request; one object per name, so that requests that name the same are
        scored together.

        Raises:
            UsageError: no router has that name.
            CheckpointError: the router does not fit the SLM.
        """
        if isinstance(router, str):
            if router not in self._named:
                self._named[router] = named_router(router)
            return self._named[router]
        bind = getattr(router, "bind", None)
        if bind is not None:
            if isinstance(self.slm, RemoteModel):
                raise UsageError(
                    f"router {router.name!r} looks inside the SLM, and {self.slm.name} is behind a "
                    "server: choose entropy, margin or random"
                )
            bind(self.slm)
        if router.hidden_layer is not None:
            self.runner.keep_layer(router.hidden_layer)
        return router

    def deferred(self, sequences: list[Sequence], tokens: list[int], rows: Rows) -> set[int]:
        """Score proposals where a decision is due.

        Args:
            sequences: whose turn is not the LLM's.
            tokens: the SLM's proposal for each.
            rows: the row each was sampled from.

        Returns:
            Indices of those that go to the LLM.
        """
        by_router: dict[Router, list[int]] = {}
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            policy = sequence.policy
            if policy.turn is not Turn.DECIDE:
                continue
            if policy.in_opening and policy.is_opening(str(self.slm.tokenizer.decode([token]))):
                continue
            by_router.setdefault(policy.route.router, []).append(i)
        in_pass = rows.drawn.router if rows.drawn else None  # scored with the tokens
        signals = None
        if by_router.keys() - {in_pass}:
            signals = Signals(
                hidden_NH=rows.hidden_RH,
                logits_NV=rows.logits_RV,
                candidates_N=torch.tensor(tokens, device=rows.logits_RV.device),
                positions=[len(s.tokens) for s in sequences],
                uniforms=[uniform(s.seed, len(s.tokens), Stream.ROUTER) for s in sequences],
                layers=rows.layers,
            )
        deferred = set()
        for router, members in by_router.items():
            if rows.drawn is not None and router is in_pass:
                scores = [rows.drawn.scores[i] for i in members]
            else:
                assert signals is not None
                scores = router.score(signals.rows(members)).tolist()
            for i, score in zip(members, scores, strict=True):
                if _decide(sequences[i], score, tokens[i]):
                    deferred.add(i)
        return deferred


def _decide(sequence: Sequence, score: float, token: int) -> bool:
    """Take the decision on a scored proposal and record it."""
    policy = sequence.policy
    deferred = policy.decide(score)
    sequence.score = score
    sequence.stats.decisions += 1
    sequence.stats.deferrals += deferred
    if sequence.trace is not None:
        position = len(sequence.tokens)
        sequence.trace[position] = Decision(
            position=position,
            source=Model(deferred).label,
            token=token,
            score=score,
            threshold=policy.route.threshold,
            deferred=deferred,
            capped=policy.capped,
            slm_token=token,
        )
    return deferred

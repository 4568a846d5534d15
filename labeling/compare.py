"""Stage compare: the SLM reads an answer; its candidate at each position, and what a router may
see there.

Row p - 1 of the text predicts the token at p, so position 0 is seen from the prompt's last row.
"""

from dataclasses import dataclass, fields

import torch

from labeling.batch import Fold, Read, Task
from labeling.respond import Response
from labeling.setting import Setting, seed_of
from labeling.traces import llm_choices
from r2r_glimp.core import EngineError, Model
from r2r_glimp.engine.runner import Rows
from r2r_glimp.engine.sampling import Stream, sample, uniform
from r2r_glimp.routing.features import FeatureSpec, Observation, observe
from r2r_glimp.routing.signals import Signals


@dataclass(slots=True)
class Comparison:
    """What both models would write at each position of an answer.

    Args:
        candidates: the SLM's proposal.
        references: what the LLM would write: the answer itself where it wrote that, else its
            likeliest token; None where a trace does not tell.
        observation: the SLM's rows as the labeled dataset keeps them, on the CPU.
    """

    candidates: list[int]
    references: list[int | None]
    observation: Observation

    @property
    def mismatches(self) -> list[int]:
        """Positions at which the models differ."""
        pairs = zip(self.candidates, self.references, strict=True)
        return [p for p, (slm, llm) in enumerate(pairs) if llm is not None and slm != llm]


def compare(response: Response, setting: Setting) -> Task[Comparison]:
    """Candidates and features at each position, and what the LLM would write there."""
    reads = [_read(Model.SLM, response, _Observer(response, setting))]
    references: list[int | None] = list(response.tokens)
    if setting.on_policy and response.trace is not None:
        references = llm_choices(response.trace)
    elif setting.on_policy:
        reads.append(_read(Model.LLM, response, Choices()))
    (candidates, observation), *chosen = yield list(reads)
    return Comparison(candidates, chosen[0] if chosen else references, observation)


def _read(model: Model, response: Response, fold: Fold) -> Read:
    return Read(
        stage="compare",
        where=response.where,
        model=model,
        tokens=response.prompt + response.tokens[:-1],  # the last one is nobody's context
        first=len(response.prompt) - 1,
        fold=fold,
    )


class Choices:
    """Folds rows into the likeliest token of each."""

    def __init__(self) -> None:
        self._tokens: list[int] = []

    def add(self, rows: Rows) -> None:
        """The next rows; raises EngineError if they are not finite."""
        self._tokens += _checked(rows).logits_RV.argmax(-1).tolist()

    def result(self) -> list[int]:
        """The tokens."""
        return self._tokens


class _Observer:
    """Folds the SLM's rows into candidates and an observation."""

    def __init__(self, response: Response, setting: Setting) -> None:
        candidate = setting.config.candidate
        self._seed = seed_of("candidate", candidate.seed, response.id)
        self._sampling = candidate.sampling(1, self._seed)
        self._spec = FeatureSpec(
            hidden_size=setting.slm.fingerprint.hidden_size,
            top_k_logits=setting.config.top_k_logits,
            hidden_layer=setting.config.hidden_layer,
        )
        self._candidates: list[int] = []
        self._parts: list[Observation] = []

    def add(self, rows: Rows) -> None:
        logits, start = _checked(rows).logits_RV, len(self._candidates)
        positions = list(range(start, start + len(logits)))
        draws = [uniform(self._seed, p, Stream.SLM) for p in positions]
        tokens = sample(logits, [self._sampling] * len(draws), draws)
        chosen = torch.tensor(tokens, device=logits.device)
        signals = Signals(rows.hidden_RH, logits, chosen, positions, draws, rows.layers)
        self._parts.append(observe(signals, self._spec))
        self._candidates += tokens

    def result(self) -> tuple[list[int], Observation]:
        names = [field.name for field in fields(Observation)]
        columns = {n: torch.cat([getattr(part, n) for part in self._parts]).cpu() for n in names}
        return self._candidates, Observation(**columns)


def _checked(rows: Rows) -> Rows:
    """Rows whose numbers are numbers: a NaN would spoil a training run long after."""
    # A masked-out token may have logit -inf, but some token must be possible.
    possible = rows.logits_RV.amax(-1).isfinite().all() and not rows.logits_RV.isnan().any()
    if not (possible and rows.hidden_RH.isfinite().all()):
        raise EngineError("hidden states or logits that are not finite")
    return rows

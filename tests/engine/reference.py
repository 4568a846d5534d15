"""The slow reference: the same rules with no cache, no batch and no state machine.

Every token runs the whole text through a fresh forward pass, and every rule is read off the whole
text again.
"""

import re
from dataclasses import dataclass, field

import torch

from r2r_glimp.core import Model, RoutingParams, SamplingParams
from r2r_glimp.engine.detokenizer import Detokenizer
from r2r_glimp.engine.sampling import Stream, sample, uniform
from r2r_glimp.models import ModelPair
from r2r_glimp.routing.routers import Router
from r2r_glimp.routing.signals import Signals
from r2r_glimp.routing.steps import DELIMITERS

OPEN, CLOSE = "<think>", "</think>"


@dataclass
class Result:
    token_ids: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    decisions: list[tuple[int, float, bool]] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


@dataclass
class View:
    """Where a text stands, read off its tokens from the beginning."""

    section: str = "preamble"
    step: str = ""  # text of the current step, or of the answer
    tokens: int = 0  # tokens of the current step
    start: int = 0  # position of its first token
    thinking: int = 0
    steps: list[str] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)  # positions after which a loop was seen
    opened: int | None = 0  # position after the last tag, None where no opening is possible
    complete: bool = True


def read(pieces: list[tuple[str, bool]], section: str, routing: RoutingParams) -> View:
    """Replay a text given as (readable text, character complete) per token."""
    view = View(section=section)
    for position, (piece, complete) in enumerate(pieces):
        view.complete = complete
        view.step += piece
        if view.section == "answer":
            continue
        if view.section == "preamble":
            text = view.step.lstrip()
            if text.startswith(OPEN):
                view.section, view.step, view.tokens = "thinking", text[len(OPEN) :], 0
                view.start = view.opened = position + 1
                continue
            if OPEN.startswith(text):
                continue
            view.section = "thinking"
        view.thinking += 1
        view.tokens += 1
        if CLOSE in view.step:
            view.section, view.step = "answer", view.step.rpartition(CLOSE)[2]
            view.start = view.opened = position + 1
        elif re.search(DELIMITERS[routing.delimiter], view.step.lstrip()) or (
            complete and view.tokens >= routing.max_step_tokens
        ):
            view.steps.append(view.step.strip())
            view.step, view.tokens, view.start, view.opened = "", 0, position + 1, None
            last = view.steps[-6:]
            if any(len(last) >= 2 * p and last[-p:] == last[-2 * p : -p] for p in (1, 2, 3)):
                view.loops.append(position + 1)
    return view


def generate(
    pair: ModelPair,
    prompt: list[int],
    sampling: SamplingParams,
    routing: RoutingParams,
    router: Router,
    section: str,
    *,
    seed: int,
    room: int,
) -> Result:
    """One completion; `section` is where the prompt leaves the thinking, `room` the timeline's
    longest length."""
    result = Result()
    baseline = router.constant is not None
    granularity = routing.granularity or "token"
    answer_by = routing.answer_by or ("llm" if granularity == "step" and not baseline else "router")
    guard = not baseline if routing.repetition_guard is None else routing.repetition_guard
    threshold = router.threshold(granularity) if routing.threshold is None else routing.threshold
    max_tokens = min(sampling.max_tokens or room, room - len(prompt))
    detokenizer = Detokenizer(pair.slm.tokenizer, prompt)
    pieces: list[tuple[str, bool]] = []
    owners: dict[int, str] = {}  # span start -> who owns it
    forced: list[int] = []
    repeated = False

    def logits(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([prompt + result.token_ids])
        with torch.inference_mode():
            output = pair[model].model(ids, use_cache=False, output_hidden_states=True)
        return output.logits[:, -1], output.hidden_states[-1][:, -1]

    def draw(model: Model, row: torch.Tensor) -> int:
        return sample(row, [sampling], [uniform(seed, len(result.token_ids), Stream(model))])[0]

    def llm_allowed() -> bool:
        written = result.sources.count("llm") + 1
        return routing.max_llm_share is None or written <= routing.max_llm_share * (
            len(result.sources) + 1
        )

    while result.finish_reason is None:
        position = len(result.token_ids)
        view = read(pieces, section, routing)
        loops = view.loops if guard else []
        if not forced and view.section != "answer" and position:
            limit = routing.max_thinking_tokens
            over = limit is not None and view.thinking >= limit and view.complete
            if len(loops) > 1 or over:
                repeated = len(loops) > 1
                gap = "" if not view.step or view.step.endswith("\n") else "\n\n"
                forced = pair.slm.tokenizer.encode(f"{gap}{CLOSE}\n\n", add_special_tokens=False)
        if forced:
            source, token = "slm", forced.pop(0)
        else:
            escalated = len(loops) == 1 and loops[0] == view.start and view.section == "thinking"
            if view.section == "answer" and answer_by != "router":
                owner = owners.setdefault(view.start, answer_by)
            elif escalated:
                owner = owners.setdefault(view.start, "llm")
            elif baseline:
                owner = router.name
            elif granularity == "step":
                owner = owners.get(view.start)
            else:
                owner = None
            token = None
            if owner is None:
                row, hidden = logits(Model.SLM)
                token = draw(Model.SLM, row)
                text = (view.step + pair.slm.tokenizer.decode([token])).lstrip()
                tag = view.section == "preamble" and (
                    OPEN.startswith(text) or text.startswith(OPEN)
                )
                opening = view.opened is not None and position - view.opened < 8
                if (
                    granularity == "step"
                    and opening
                    and (tag or (view.section != "preamble" and not text))
                ):
                    owner = "slm"
                else:
                    score = router.score(
                        Signals(
                            hidden,
                            row,
                            torch.tensor([token]),
                            [position],
                            [uniform(seed, position, Stream.ROUTER)],
                        )
                    ).item()
                    deferred = router.defers(score, threshold) and llm_allowed()
                    result.decisions.append((position, score, deferred))
                    owner = "llm" if deferred else "slm"
                    if granularity == "step":
                        owners[view.start] = owner
            if owner == "llm" and not llm_allowed():
                owner = "slm"
                if view.start in owners:
                    owners[view.start] = "slm"
            if owner == "llm":
                token = draw(Model.LLM, logits(Model.LLM)[0])
            elif token is None:
                token = draw(Model.SLM, logits(Model.SLM)[0])
            source = owner

        result.token_ids.append(token)
        result.sources.append(source)
        eos = pair[Model(source == "llm")].eos_token_ids
        if token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos):
            result.finish_reason = "stop"
            result.text += detokenizer.flush()
        else:
            piece = detokenizer.append(token)
            pieces.append((piece, detokenizer.complete))
            result.text += piece
            stops = [result.text.find(s) for s in sampling.stop if s in result.text]
            if stops:
                result.text, result.finish_reason = result.text[: min(stops)], "stop"
            elif len(result.token_ids) >= max_tokens:
                result.text += detokenizer.flush()
                result.finish_reason = "length"
    if repeated:
        result.finish_reason = "repetition"
    return result

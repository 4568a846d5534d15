"""Step labels: is the SLM's own step, continued by the LLM, still on the path?

    response   step 1 │ step 2            │ step 3 …
                      └ the SLM's step 2 ─┴ the LLM goes on to the answer

Where the SLM agrees with every token of a step, it would write that very step. Else its own step
parts from the answer at its first mismatch, so only what follows from there has to be written.
"""

from dataclasses import dataclass

from labeling.batch import Task, Write
from labeling.compare import Comparison
from labeling.continue_ import Branch, Fork, Start, follow
from labeling.respond import Response
from labeling.schema import Phase
from labeling.setting import Setting, seed_of
from labeling.spans import span_ends, span_length
from r2r_glimp.core import Model, RoutingParams
from r2r_glimp.routing.policy import Policy, Route, Turn
from r2r_glimp.routing.routers import named_router


@dataclass(slots=True)
class Layout:
    """Where the steps of an answer start, and which part each position is in."""

    starts: list[int]
    phases: list[Phase]


@dataclass(slots=True)
class StepForks:
    """Step starts at which the SLM's own step is the LLM's, token for token, and the others."""

    identical: list[int]
    forks: list[Fork]


def find_layout(response: Response, setting: Setting) -> Layout:
    """Replay an answer through the policy that serves: a step starts where a decision is due."""
    params = RoutingParams(
        granularity="step",
        router="entropy",
        answer_by="llm",
        delimiter=setting.config.delimiter,
        max_step_tokens=setting.config.max_step_tokens,
        repetition_guard=False,
    )
    route = Route.resolve(params, named_router("entropy"), shared=True)
    policy = Policy(route, setting.tags, response.section)
    starts, phases = [], []
    for position, piece in enumerate(response.pieces):
        phases.append(Phase.ANSWER if policy.section == "answer" else Phase.THINKING)
        ends_text = response.tokens[position] in setting.eos_ids
        if policy.turn is Turn.DECIDE and not ends_text and not policy.is_opening(piece):
            starts.append(position)
            policy.decide(0.0)
        policy.append(Model.SLM, piece, complete=response.complete[position])
    return Layout(starts, phases)


def continue_steps(
    response: Response,
    comparison: Comparison,
    layout: Layout,
    token_forks: list[Fork],
    setting: Setting,
) -> Task[StepForks]:
    """The SLM's own step at each start, and where the LLM goes on from it.

    Args:
        token_forks: branches that were followed already; a step that one of them repeats is not
            followed again.
    """
    written = {p: _written_step(response, p, setting) for p in layout.starts}
    steps = yield from _own_steps(response, comparison, written, setting)
    references = yield from _references(response, comparison, written, setting)
    identical, forks = [], []
    for position in layout.starts:
        step, reference = steps[position], references[position]
        if step == reference.tokens:
            identical.append(position)
        else:
            forks.append(Fork(position, "", Branch(step, setting.text(step)), reference))
    if setting.config.verifier.kind == "answer":
        yield from _find_answers(response, forks, token_forks, setting)
    return StepForks(identical, forks)


def _written_step(response: Response, start: int, setting: Setting) -> list[int]:
    """The step of the answer that starts at a position."""
    pieces = response.pieces[start : start + setting.config.max_step_tokens]
    length = span_length(pieces, "", setting.step_pattern, setting.close)
    return response.tokens[start : start + length]


def _own_steps(
    response: Response, comparison: Comparison, written: dict[int, list[int]], setting: Setting
) -> Task[dict[int, list[int]]]:
    """The step that the SLM would write at each start, given the answer's own."""
    steps = dict(written)
    writes: dict[int, Write] = {}
    for start, step in written.items():
        candidates = comparison.candidates[start : start + len(step)]
        pairs = enumerate(zip(step, candidates, strict=True))
        same = next((n for n, (token, candidate) in pairs if token != candidate), None)
        if same is not None:
            steps[start] = step[:same] + [candidates[same]]
            write = _step_write(response, start, steps[start], setting)
            if write is not None:
                writes[start] = write
    results = (yield list(writes.values())) if writes else []
    for start, more in zip(writes, results, strict=True):
        steps[start] = steps[start] + more.tokens
    return steps


def _step_write(response: Response, start: int, step: list[int], setting: Setting) -> Write | None:
    """Have the SLM finish a step that has begun; None if it is over."""
    prompt = response.before(start) + step
    pieces, _ = setting.pieces(response.before(start), step)
    lead = "".join(pieces)
    longest = min(setting.config.max_step_tokens - len(step), setting.room - len(prompt))
    over = span_ends(lead, setting.step_pattern, setting.close)
    if over or longest < 1 or step[-1] in setting.eos_ids:
        return None
    seed = seed_of("step", setting.config.candidate.seed, response.id, start)
    return Write(
        stage="continue",
        where=f"{response.where}, step at {start}",
        prompt=prompt,
        sampling=setting.config.candidate.sampling(longest, seed),
        routing=RoutingParams(router="slm"),
        delimiter=setting.step_pattern,
        lead=lead,
        close=setting.close,
    )


def _references(
    response: Response, comparison: Comparison, written: dict[int, list[int]], setting: Setting
) -> Task[dict[int, Branch]]:
    """The LLM's own step at each start, and where its way on ends."""
    if not setting.on_policy:
        return {p: Branch(step, setting.text(step), response.answer) for p, step in written.items()}
    starts = []
    for p in written:
        reference = comparison.references[p]
        starts.append(Start(p, [] if reference is None else [reference], "", to_end=True))
    branches = yield from follow(response, starts, setting)
    references = {}
    for start, branch in zip(starts, branches, strict=True):
        tokens = branch.tokens[: setting.config.max_step_tokens]
        pieces, _ = setting.pieces(response.before(start.position), tokens)
        step = tokens[: span_length(pieces, "", setting.step_pattern, setting.close)]
        references[start.position] = Branch(step, setting.text(step), branch.answer)
    return references


def _find_answers(
    response: Response, forks: list[Fork], token_forks: list[Fork], setting: Setting
) -> Task[None]:
    """Where the LLM ends up when it goes on from the SLM's own steps."""
    known = {fork.position: fork.slm for fork in token_forks}
    unknown = []
    for fork in forks:
        step = fork.slm.tokens
        pairs = zip(step, response.tokens[fork.position :], strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(step))
        branch = known.get(fork.position + same)
        # The same text goes on in the same way, whoever wrote it.
        if branch is not None and branch.tokens[: len(step) - same] == step[same:]:
            fork.slm.answer = branch.answer
        else:
            unknown.append(fork)
    starts = [Start(fork.position, fork.slm.tokens, "", to_end=True) for fork in unknown]
    followed = yield from follow(response, starts, setting)
    for fork, branch in zip(unknown, followed, strict=True):
        fork.slm.answer = branch.answer

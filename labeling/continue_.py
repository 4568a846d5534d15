"""Stage continue: from a difference on, the LLM writes what would follow the SLM's choice.

    response   … = 7, so │cups 7.\\n\\n …                  the LLM's branch: the answer itself
                         └books 7.\\n\\nProduct pens: …    the SLM's branch: its token, then the LLM

All branches of an answer start from its prefix, which the KV manager shares.
"""

from dataclasses import dataclass

from labeling.batch import Task, Write
from labeling.compare import Comparison
from labeling.draft import Path, extend
from labeling.respond import Response
from labeling.setting import Setting
from labeling.spans import span_ends, span_leads, span_length
from r2r_glimp.core import Model, RoutingParams, SamplingParams


@dataclass(slots=True)
class Branch:
    """A way on from a position; `answer` is where it ends, None if nowhere or not followed so
    far."""

    tokens: list[int]
    text: str
    answer: str | None = None


@dataclass(slots=True)
class Fork:
    """The two ways on from a position at which the models differ."""

    position: int
    lead: str  # text of the span before the position
    slm: Branch
    llm: Branch


@dataclass(slots=True)
class Start:
    """A branch to follow: what stands at a position instead of the answer's own text."""

    position: int
    tokens: list[int]
    lead: str
    to_end: bool = False  # whatever `branches.until` says


def continue_(response: Response, comparison: Comparison, setting: Setting) -> Task[list[Fork]]:
    """Both ways on from each mismatch, as far as the configuration says."""
    positions = comparison.mismatches
    leads = span_leads(response.pieces, setting.until, setting.close)
    starts = [Start(p, [comparison.candidates[p]], leads[p]) for p in positions]
    if setting.on_policy:
        # The answer's own text is not the LLM's: its way on is written too.
        for p in positions:
            reference = comparison.references[p]
            assert reference is not None, "a mismatch has a reference"
            starts.append(Start(p, [reference], leads[p]))
    branches = yield from follow(response, starts, setting)
    slm, llm = branches[: len(positions)], branches[len(positions) :]
    if not setting.on_policy:
        llm = [_own(response, p, leads[p], setting) for p in positions]
    return [Fork(p, leads[p], *ways) for p, *ways in zip(positions, slm, llm, strict=True)]


def follow(response: Response, starts: list[Start], setting: Setting) -> Task[list[Branch]]:
    """Have the LLM go on from each start; one that is over already costs nothing."""
    paths = [_path(start, setting, response) for start in starts]
    if setting.config.engine.draft and Model.LLM in setting.engine.pair.local:
        yield from extend(response, [path for path in paths if not path.ended], setting)
        for start, path in zip(starts, paths, strict=True):
            _cut(response, start, path, setting)
    writes = [_write(response, *pair, setting) for pair in zip(starts, paths, strict=True)]
    jobs = [write for write in writes if write is not None]
    written = iter((yield list(jobs)) if jobs else [])
    branches = []
    for start, path, write in zip(starts, paths, writes, strict=True):
        finished = path.ended
        if write is not None:
            more = next(written)
            path.tokens, finished = path.tokens + more.tokens, more.finished
        branch = Branch(path.tokens, setting.text(path.tokens))
        to_end = start.to_end or setting.until is None
        if finished and to_end and setting.extract is not None:
            whole = response.tokens[: start.position] + path.tokens
            branch.answer = setting.extract(setting.text(whole))
        branches.append(branch)
    return branches


def _own(response: Response, position: int, lead: str, setting: Setting) -> Branch:
    """The answer's own way on from a position."""
    length = span_length(response.pieces[position:], lead, setting.until, setting.close)
    tokens = response.tokens[position : position + length]
    answer = response.answer if setting.until is None else None
    return Branch(tokens, setting.text(tokens), answer)


def _path(start: Start, setting: Setting, response: Response) -> Path:
    """A branch that has only its start."""
    room = setting.room - len(response.prompt) - start.position
    longest = min(len(start.tokens) + setting.config.branches.max_tokens, room)
    path = Path(start.position, list(start.tokens), longest)
    path.ended = bool(setting.eos_ids & set(start.tokens))
    if start.tokens:
        _cut(response, start, path, setting)
    return path


def _cut(response: Response, start: Start, path: Path, setting: Setting) -> None:
    """End a path where its span ends."""
    until = None if start.to_end else setting.until
    if until is None or not path.tokens:
        return
    pieces, _ = setting.pieces(response.before(start.position), path.tokens)
    length = span_length(pieces, start.lead, until, setting.close)
    over = span_ends(start.lead + "".join(pieces[:length]), until, setting.close)
    if over:
        path.tokens, path.ended = path.tokens[:length], True


def _write(response: Response, start: Start, path: Path, setting: Setting) -> Write | None:
    """The request that goes on from a path; None where nothing is left to write."""
    if path.ended or len(path.tokens) >= path.longest:
        return None
    before = response.before(start.position)
    pieces, _ = setting.pieces(before, path.tokens)
    return Write(
        stage="continue",
        where=f"{response.where}, position {start.position}",
        prompt=before + path.tokens,
        sampling=SamplingParams(max_tokens=path.longest - len(path.tokens), seed=0),
        routing=RoutingParams(router="llm"),
        delimiter=None if start.to_end else setting.until,
        lead=start.lead + "".join(pieces),
        close=setting.close,
    )

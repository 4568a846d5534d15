"""Drafts: a branch mostly goes on as the answer does, so that is offered to the LLM to be read.

    answer    Sum cups: hats 4 and 3 │=     7 , so cups 7 . …
    branch    Sum cups: hats 4 and 3 │gives 7 , so …       one pass over the answer's own text
    LLM says                         └───── 7 , thus       kept up to here, with the LLM's own token

What is kept is what the LLM would have written token by token: a draft is kept only as far as it is
the LLM's likeliest token. Lossless for greedy continuations, as in speculative decoding.
"""

from dataclasses import dataclass

from labeling.batch import Read, Task
from labeling.compare import Choices
from labeling.respond import Response
from labeling.setting import Setting
from r2r_glimp.core import Model

_MIN_KEPT = 4  # a draft of which less is kept does not pay: the rest is written token by token
_REACH = 8  # how far from its place the answer's text is looked for


@dataclass(slots=True)
class Path:
    """A branch as far as it is known: `tokens` stand at `position` instead of the answer's.

    Args:
        longest: tokens it may have at most.
        ended: nothing follows.
    """

    position: int
    tokens: list[int]
    longest: int
    ended: bool = False


def extend(response: Response, paths: list[Path], setting: Setting) -> Task[None]:
    """Let each path grow by what the LLM keeps of the answer's own text, while that pays."""
    growing = paths
    while growing:
        drafts = [_draft(response, path, setting.config.engine.draft) for path in growing]
        growing = [path for path, draft in zip(growing, drafts, strict=True) if draft]
        drafts = [draft for draft in drafts if draft]
        if not growing:
            return
        choices = yield [_read(response, *pair) for pair in zip(growing, drafts, strict=True)]
        paying = []
        for path, draft, chosen in zip(growing, drafts, choices, strict=True):
            pairs = enumerate(zip(draft, chosen, strict=False))
            kept = next((n for n, (token, choice) in pairs if token != choice), len(draft))
            more = chosen[: kept + 1]  # the LLM's own token after what was kept
            ends = [n for n, token in enumerate(more) if token in setting.eos_ids]
            path.ended = bool(ends)
            path.tokens += more[: ends[0] + 1] if ends else more
            if not path.ended and kept >= _MIN_KEPT:
                paying.append(path)
        growing = paying


def _draft(response: Response, path: Path, size: int) -> list[int]:
    """The answer's text from the place that the path has reached, or from near it where the last
    two tokens are the path's."""
    tokens, place = response.tokens, path.position + len(path.tokens)
    if len(path.tokens) >= 2:
        ends = path.tokens[-2:]
        near = sorted(range(-_REACH, _REACH + 1), key=abs)
        found = (place + n for n in near if place + n >= 2)
        place = next((p for p in found if tokens[p - 2 : p] == ends), place)
    return tokens[place : place + min(size, path.longest - len(path.tokens) - 1)]


def _read(response: Response, path: Path, draft: list[int]) -> Read:
    before = response.before(path.position) + path.tokens
    return Read(
        stage="continue",
        where=f"{response.where}, position {path.position}",
        model=Model.LLM,
        tokens=before + draft,
        first=len(before) - 1,
        fold=Choices(),
    )

"""The prompts a threshold is calibrated on: abacus problems, a file, or a labeled dataset's
questions.
"""

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

from r2r_glimp.abacus.problems import Split, problems
from r2r_glimp.cli.requests import Request, read_batch
from r2r_glimp.core import DataError, Prompt, RoutingParams, SamplingParams, UsageError

ABACUS = "abacus"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """Which prompts.

    Args:
        prompts: abacus (fresh problems), a .jsonl file as generate reads it, a text file with a
            prompt a line, or a labeled dataset for its questions. By default abacus for the
            bundled pair, else the questions of --labels.
        num_prompts: prompts to calibrate on, at most.
        fresh: measure what was found on so many further prompts, which nothing was chosen by.
        split: of abacus problems, train, validation or test.
        problem_seed: of abacus problems.
        raw: send prompts as they are, without the chat template.
    """

    prompts: str | None = None
    num_prompts: int = 1000
    fresh: int = 0
    split: Split = "validation"
    problem_seed: int = 0
    raw: bool = False

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.fresh < 0:
            raise UsageError("--num_prompts must be 1 or more, and --fresh 0 or more")


@dataclasses.dataclass(frozen=True, slots=True)
class Prompts:
    """The requests to calibrate on, the further ones, and what to call them."""

    name: str
    requests: list[Request]
    fresh: list[Request]


def read_prompts(
    options: PromptOptions, labels: str | None, sampling: SamplingParams, routing: RoutingParams
) -> Prompts:
    """The prompts, each with a seed of its own; everything wrong with them is found here.

    Raises:
        UsageError: nothing says which prompts, or there are too few for --fresh.
        DataError: not readable, empty, or a line is not a prompt.
    """
    chosen = options.prompts or labels
    if chosen is None:
        raise UsageError("which prompts? give --prompts FILE, or --labels with a labeled dataset")
    wanted = options.num_prompts + options.fresh
    if chosen == ABACUS:
        name = f"abacus {options.split} problems"
        texts = _abacus(options.split, options.problem_seed, wanted)
        requests = [Request(text, sampling, routing) for text in texts]
    elif Path(chosen).is_dir():
        name = f"questions of {Path(chosen).name}"
        requests = [Request(text, sampling, routing) for text in read_questions(chosen)]
    else:
        name, requests = f"prompts of {Path(chosen).name}", _file(chosen, sampling, routing)
    requests = [_with_seed(r, i, sampling.seed) for i, r in enumerate(requests[:wanted])]
    calibrated = requests[: len(requests) - options.fresh]
    if not calibrated:
        raise UsageError(
            f"--fresh {options.fresh} leaves none of {len(requests)} prompts to calibrate on"
        )
    return Prompts(name, calibrated, requests[len(calibrated) :])


def read_questions(dataset: str) -> list[str]:
    """The questions a labeled dataset was made of, read again from where it had them.

    Raises:
        DataError: the dataset does not say, or its source is gone.
    """
    from labeling.sections import SourceConfig
    from labeling.sources import load_questions

    path = Path(dataset) / "info.json"
    try:
        info = json.loads(path.read_bytes())
        source: dict[str, Any] = info["config"]["source"]
        count = int(info["counts"]["questions"])
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(
            f"{path}: missing, or it does not say where the questions come from: "
            "give --prompts FILE"
        ) from None
    own_count = {"count": count} if source.get("kind") == ABACUS else {}
    questions = load_questions(SourceConfig(**(source | own_count)), limit=count)
    return [question.prompt for question in questions]


def _abacus(split: Split, seed: int, count: int) -> list[str]:
    """Distinct problems, levels in equal parts."""
    drawn = (problem.prompt() for problem in islice(problems(split, seed), 3 * count))
    return list(islice(dict.fromkeys(drawn), count))


def _file(name: str, sampling: SamplingParams, routing: RoutingParams) -> list[Request]:
    path = Path(name).expanduser()
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        batch = read_batch(None, str(path), "jsonl", sampling, routing)
        batch.check(skip_invalid=False)
        return batch.requests
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 (byte {error.start + 1} of the file)") from None
    requests = [
        Request(line, sampling, routing, line=number)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not requests:
        raise DataError(f"{path} is empty")
    return requests


def _with_seed(request: Request, place: int, seed: int | None) -> Request:
    """With one seed for all, all would draw alike."""
    sampling = request.sampling
    if sampling.seed == seed:
        sampling = dataclasses.replace(sampling, seed=(seed or 0) + place)
    id = f"prompt-{place}" if request.id is None and request.line is None else request.id
    return dataclasses.replace(request, sampling=sampling, id=id)


def in_template(request: Request) -> Prompt:
    """A text as a user's message, a last newline being the file's."""
    if not request.is_text:
        return request.prompt
    return [{"role": "user", "content": str(request.prompt).rstrip("\n")}]

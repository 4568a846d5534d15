"""The LLM's responses, as token ids of the pair: from a labeling run, or written now.

folder of a labeling run    questions and responses beside the labels, in the shards' metadata
abacus problems             the engine writes with the LLM alone; kept in a file of the run
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from r2r_glimp.abacus.problems import problems
from r2r_glimp.core import DataError, EngineError, Prompt, RoutingParams, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.prompts import encode_prompt
from r2r_glimp.models.pair import AnyModel, LoadedModel, ModelPair
from r2r_glimp.routing.tags import find_tags

FILE = "responses.jsonl"
_MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class Response:
    """A question as it is put to the models, and what the LLM wrote, its end included."""

    question: str
    prompt: list[int]
    tokens: list[int]

    def place(self, seed: int) -> float:
        """Where the question lies between 0 and 1: a hash of it, for splits."""
        digest = hashlib.sha256(f"{seed}/{self.question}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def read_labeled(path: str, slm: LoadedModel) -> list[Response]:
    """The responses of a labeling run.

    Args:
        path: its folder (`--out`), or the dataset in it.
        slm: whose tokenizer and chat template are used.

    Raises:
        DataError: no labeling run, or a broken one.
        UsageError: its responses are not the LLM's own.
    """
    folder = Path(path)
    folder = folder if (folder / "shards").is_dir() else folder.parent
    shards = sorted((folder / "shards").glob("*.arrow"))
    if not shards:
        raise DataError(f"{path}: no shards: give the folder (--out) of a labeling run")
    _check_writer(folder)
    tokenizer = slm.tokenizer
    responses = []
    for answer in _answers(shards):
        text = str(answer["response"])
        tokens = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        responses.append(Response(answer["question"], _encode(answer["question"], slm), tokens))
    if not responses:
        raise DataError(f"{path}: its shards hold no responses")
    return responses


def write_responses(
    pair: ModelPair, folder: Path, *, count: int, problem_seed: int, max_tokens: int
) -> list[Response]:
    """What the LLM says to abacus problems of the train split; read again where it was written
    before, by the same models.

    Args:
        folder: of the run; the responses are kept there.
        count: problems.
        problem_seed: of the problems.
        max_tokens: longer responses are left out.

    Raises:
        UsageError: the tokenizers differ, or a problem does not fit.
        EngineError: nothing could be written.
    """
    if not pair.same_vocabulary:
        raise UsageError(
            f"the tokenizers of {pair.slm.name} and {pair.llm.name} differ: the SLM cannot be "
            "aligned token by token"
        )
    asked = {
        "llm": pair.llm.fingerprint.weights_sha256,
        "tokenizer": pair.slm.fingerprint.tokenizer_sha256,
        "count": count,
        "problem_seed": problem_seed,
        "max_tokens": max_tokens,
    }
    file = folder / FILE
    known = _read_kept(file, asked)
    if known is not None:
        return known
    print(f"the LLM writes {count:,} responses into {file}", file=sys.stderr)
    drawn = (problem.prompt() for problem in islice(problems("train", problem_seed), 3 * count))
    questions = list(islice(dict.fromkeys(drawn), count))
    engine = Engine(pair, router="llm", kv_memory="512MiB", max_batch=_MAX_BATCH)
    outputs = engine.generate(
        [_as_prompt(question, pair.llm) for question in questions],
        SamplingParams(max_tokens=max_tokens, seed=0),
        RoutingParams(router="llm"),
    )
    responses = [
        Response(question, output.prompt_token_ids, output.token_ids)
        for question, output in zip(questions, outputs, strict=True)
        if output.finish_reason == "stop"
    ]
    if not responses:
        raise EngineError(
            f"none of {count} responses came to an end within {max_tokens} tokens: "
            "raise data.max_tokens"
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    lines = [json.dumps(asked), *(json.dumps(asdict(response)) for response in responses)]
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(file)
    return responses


def _read_kept(file: Path, asked: dict[str, Any]) -> list[Response] | None:
    """What was written before, None if that was something else or is broken."""
    try:
        head, *lines = file.read_text(encoding="utf-8").splitlines()
        if json.loads(head) != asked:
            return None
        return [Response(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError):
        return None


def _check_writer(folder: Path) -> None:
    try:
        run = json.loads((folder / "run.json").read_bytes())
        writer = run["config"]["responses"]["by"]
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(f"{folder / 'run.json'}: missing or broken: label again") from None
    if writer == "pair":
        raise UsageError(
            f"{folder}: its responses were written by the routed pair (responses.by=pair), "
            "the SLM is to learn from the LLM's: label with responses.by=llm"
        )


def _answers(shards: list[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    from labeling.worker import ANSWERS_KEY

    for path in shards:
        try:
            with pa.memory_map(str(path)) as source:
                metadata = pa.ipc.open_stream(source).schema.metadata or {}
            yield from json.loads(metadata[ANSWERS_KEY])
        except (pa.ArrowException, OSError, KeyError, ValueError):
            raise DataError(f"{path}: no whole shard: run the labeling command again") from None


def _encode(question: str, slm: LoadedModel) -> list[int]:
    both = ModelPair(slm=slm, llm=slm)
    tags = find_tags(slm.tokenizer.get_vocab())
    return encode_prompt(_as_prompt(question, slm), both, tags, shared=True)[0]


def _as_prompt(question: str, model: AnyModel) -> Prompt:
    if model.tokenizer.chat_template is None:
        return question
    return [{"role": "user", "content": question}]

"""Sources: questions from the abacus generator, a local file or a dataset of the Hub.

Everything wrong with an input is one `DataError` that names the file, the row and the key.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from labeling.answers import EXTRACTORS, Extract
from labeling.formats import FORMATS, Question, Row, text_of
from labeling.sections import AnswerKind, SourceConfig
from r2r_glimp.abacus.problems import Split, problems
from r2r_glimp.core import DataError, UsageError
from r2r_glimp.models.source import one_line

_LFS = b"version https://git-lfs"


def load_questions(
    config: SourceConfig,
    *,
    limit: int | None = None,
    with_responses: bool = False,
    keep: Sequence[str] = (),
) -> list[Question]:
    """The questions of a source, in its order.

    Args:
        limit: read no more than the first so many.
        with_responses: a row must bring its response along.
        keep: further columns of a row that a question takes along, as they are.

    Raises:
        DataError: the input is missing, empty, broken or of another schema; an id comes twice.
    """
    if config.kind == "abacus":
        if with_responses:
            raise UsageError("abacus problems come without responses: set responses.by to llm")
        return _abacus(config, limit)
    rows = _file_rows(config) if config.kind == "file" else _hub_rows(config)
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        if not _is_wanted(row, config, where):
            continue
        question = _question(row, config, where, with_responses, keep)
        if question.id in seen:
            first = seen[question.id]
            raise DataError(f"{where}: id {question.id!r} was already in {first}: ids must differ")
        seen[question.id] = where
        questions.append(question)
        if len(questions) == limit:
            break
    if not questions:
        what = f"no row has {config.where}" if config.where else "it has no rows"
        raise DataError(f"{config.path}: {what}: there is nothing to ask")
    return questions


def answer_kind(config: SourceConfig) -> AnswerKind | None:
    """How final answers to a source's questions are written; None if that is not known."""
    known = "abacus" if config.kind == "abacus" else FORMATS[config.format].answer
    return config.answer or known


def find_extract(config: SourceConfig) -> Extract | None:
    """How the final answer to a question of this source is found; None if that is not known.

    Raises:
        UsageError: the answer is a program, which is told right or wrong by running it.
    """
    kind = answer_kind(config)
    if kind == "code":
        raise UsageError("source.answer=code: programs are not compared here: let a judge verify")
    return None if kind is None else EXTRACTORS[kind]


def source_name(config: SourceConfig) -> str:
    """What the dataset's column `source` says."""
    if config.name:
        return config.name
    if config.kind == "abacus":
        return "abacus"
    return Path(str(config.path)).stem if config.format == "plain" else config.format


def _abacus(config: SourceConfig, limit: int | None) -> list[Question]:
    count = min(config.count, limit or config.count)
    drawn = problems(cast(Split, config.split), config.seed, tuple(config.levels))
    unique: dict[str, Question] = {}  # two draws can be the same problem
    for problem in islice(drawn, 100 * count):
        text = problem.prompt()
        if text not in unique:
            id = f"{config.split}-{config.seed}-{len(unique)}"
            unique[text] = Question(
                id=id,
                prompt=config.template.replace("{question}", text),
                source=source_name(config),
                where=f"abacus problem {id}",
                answer=str(problem.answer),
            )
        if len(unique) == count:
            return list(unique.values())
    raise DataError(f"source.count={count}: there are only {len(unique)} problems of these levels")


def _question(
    row: Row, config: SourceConfig, where: str, with_response: bool, keep: Sequence[str]
) -> Question:
    id, text, answer = FORMATS[config.format].read(row, config, where)
    return Question(
        id=id or f"{source_name(config)}-{where.rpartition(':')[2]}",
        prompt=config.template.replace("{question}", text),
        source=source_name(config),
        where=where,
        answer=answer,
        response=text_of(row, config.response_key, where) if with_response else None,
        kept={key: row[key] for key in keep if key in row},
    )


def _is_wanted(row: Row, config: SourceConfig, where: str) -> bool:
    for key, values in config.where.items():
        if key not in row:
            raise DataError(f"{where}: key {key!r} of source.where is missing")
        if row[key] not in values:
            return False
    return True


def _file_rows(config: SourceConfig) -> Iterator[tuple[str, Row]]:
    path = Path(str(config.path)).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: give a .jsonl or a .parquet file")
    with path.open("rb") as file:
        head = file.read(len(_LFS))
    if not head:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    if head == _LFS:
        raise DataError(f"{path}: a git-LFS pointer, not the file itself: run `git lfs pull`")
    return _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not line:
                    continue
                row = json.loads(line)
            except UnicodeDecodeError as error:
                at = f"byte {error.start} of the line"
                raise DataError(f"{where}: not UTF-8 ({at}): convert the file") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row is a JSON object, not {type(row).__name__}")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole parquet file: {one_line(error)}") from None


def _hub_rows(config: SourceConfig) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset, load_from_disk

    name = str(config.path)
    dataset: Any
    try:
        if (Path(name) / "state.json").is_file():
            dataset = load_from_disk(name)
        else:
            dataset = load_dataset(
                name,
                config.subset,
                split=config.split,
                revision=config.revision,
                data_files=config.data_files,
            )
    except Exception as error:  # a dozen kinds of error; every one means that there are no rows
        raise DataError(
            f"{name}: the dataset cannot be loaded ({one_line(error)}): without a network, "
            "download it first, or give a local file with source.kind=file"
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{name}[{config.split}]:{number}", row

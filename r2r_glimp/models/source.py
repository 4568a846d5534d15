"""Where a model or adapter comes from: a local folder, or a Hub repository in the local cache.

Whatever the name, the answer is a folder on disk, so everything after this looks at files only.
"""

import os
import re
from pathlib import Path

from r2r_glimp.core import CheckpointError, UsageError

# What is fetched of a repository: no pickles, nothing of subfolders, code only when trusted.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*", "training_args*", "optimizer*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def locate(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    with_code: bool = False,
    only_tokenizer: bool = False,
) -> tuple[Path, str | None]:
    """The folder that holds a checkpoint, and the commit it is of.

    A name is local if it exists on disk, starts with `.`, `/` or `~`, has more than one `/`, or
    stands in a folder that exists. Anything else is a Hub id and is fetched, or taken from the
    cache when offline.

    Args:
        name: a folder or a Hub id.
        revision: branch, tag or commit of a Hub repository.
        with_code: fetch the repository's Python files too.
        only_tokenizer: fetch no weights.

    Returns:
        The folder, and the commit hash (None for a local folder).

    Raises:
        UsageError: the name is empty, or a revision was given for a local folder.
        CheckpointError: no such folder or repository, or it cannot be reached.
    """
    name = os.fspath(name)
    if not name.strip():
        raise UsageError("the name of a model is empty: give a folder or a Hub id")
    path = Path(name).expanduser()
    if not (path.exists() or _looks_local(name, path)):
        wanted = [one for one in _WANTED if not (only_tokenizer and one == "*.safetensors")]
        return _fetch(name, revision, [*wanted, "*.py"] if with_code else wanted)
    if not path.exists():
        raise CheckpointError(f"{name}: no such folder")
    if not path.is_dir():
        raise CheckpointError(f"{name} is a file: give the folder that holds the checkpoint")
    if revision is not None:
        raise UsageError(
            f"revision={revision!r} was given for the local folder {name}: only Hub ids have one"
        )
    return path, None


def _looks_local(name: str, path: Path) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or ("/" in name and path.parent.is_dir())
    )


def _fetch(name: str, revision: str | None, wanted: list[str]) -> tuple[Path, str | None]:
    from huggingface_hub import errors, snapshot_download

    at = f"{name}@{revision}" if revision else name
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=wanted, ignore_patterns=[*_UNWANTED]
            )
        )
    except errors.HFValidationError:
        raise CheckpointError(f"{name!r} is neither a folder nor a Hub id") from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{at} is gated: ask for access on its Hub page, then log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{name}: no such folder here, and no such repository on the Hub "
            "(if it is private, log in with `hf auth login`)"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{name} has no revision {revision!r}: give a branch, a tag or a full commit hash"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise CheckpointError(
            f"{at}: no such folder here, not in the Hub cache, and the Hub cannot be reached "
            "(offline?): fetch it first with `hf download`, or give a folder"
        ) from None
    except Exception as error:  # the network has many ways to fail; none of them is ours to handle
        raise CheckpointError(
            f"{at} could not be fetched from the Hub: {one_line(error)}"
        ) from error
    return folder, folder.name if _COMMIT.fullmatch(folder.name) else None


def one_line(error: BaseException) -> str:
    """What an error of another library says, on one line; a line ending in `:` takes the next."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    said = lines[:1] or [type(error).__name__]
    while said[-1].endswith(":") and len(said) < len(lines):
        said.append(lines[len(said)])
    return " ".join(said)[:300]

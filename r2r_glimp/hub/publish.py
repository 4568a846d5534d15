"""Publishing: render a folder, look at it, upload it; and the way back.

The id is checked before any work and everything is rendered before any network, so that `dry_run`
shows exactly what an upload would send. Tokens come from the environment or `hf auth login`, never
from an argument.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from r2r_glimp.core import CheckpointError, DataError, R2RGlimpError, UsageError
from r2r_glimp.hub.card import render_card
from r2r_glimp.hub.checkpoint import CARD, CONFIG, FILES, read_checkpoint
from r2r_glimp.hub.files import check_writable, read_text, writing_folder
from r2r_glimp.models.source import one_line

RepoType = Literal["model", "dataset"]


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """One file of an upload."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Publication:
    """What was, or on a dry run would be, uploaded. `commit` and `url` are None on a dry run."""

    repo_id: str
    repo_type: RepoType
    revision: str
    private: bool
    files: tuple[PublishedFile, ...]
    card: str
    commit: str | None = None
    url: str | None = None


def check_repo_id(repo_id: str) -> None:
    """Raises UsageError unless the Hub would take this as ORG/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    hint = ' ("+" is not allowed either: write SMALL_LARGE)' if "+" in repo_id else ""
    if repo_id.count("/") != 1:
        raise UsageError(f"{repo_id!r} is not a Hub id: it has the form ORG/NAME{hint}")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is not a Hub id: {one_line(error)}{hint}") from None


def push(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Publish the router in a local folder.

    Args:
        path: the folder, checked as on loading.
        repo_id: ORG/NAME; made if it is not there.
        private: make it private. A repository that is there and public is refused.
        revision: the branch to push to, made if it is not there; None is main.
        dry_run: stop before the network.

    Raises:
        UsageError: no legal id, or the repository is public.
        CheckpointError: the folder is no valid router, or the Hub refuses.
    """
    check_repo_id(repo_id)
    with _rendered_router(Path(path), repo_id) as folder:
        return _publish(folder, repo_id, "model", private, revision, dry_run)


def publish_dataset(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Publish a dataset folder: README.md, `data/*.parquet` and JSON beside them; arguments as for
    `push`.

    Raises:
        UsageError: no legal id, or the repository is public.
        DataError: the folder has no card or no parquet files.
        CheckpointError: the Hub refuses.
    """
    check_repo_id(repo_id)
    source = Path(path)
    parts = [source / CARD, *sorted(source.glob("*.json")), *sorted(source.glob("data/*.parquet"))]
    if not parts[0].is_file() or parts[-1].suffix != ".parquet":
        raise DataError(f"{source}: a dataset to publish has a {CARD} and data/*.parquet")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in parts:
            target = folder / part.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            os.symlink(part.resolve(), target)
        return _publish(folder, repo_id, "dataset", private, revision, dry_run)


def pull(
    repo_id: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Fetch a router into a local folder, whole and checked, or not at all.

    Raises:
        UsageError: no legal id, or the folder is there.
        CheckpointError: not on the Hub, no network, or not a valid router.
    """
    check_repo_id(repo_id)
    target = Path(folder)
    check_writable(target, overwrite, is_ours=CONFIG)
    with hub_errors(repo_id, revision):
        from huggingface_hub import snapshot_download

        cached = Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES))
    read_checkpoint(cached)
    with writing_folder(target, overwrite, is_ours=CONFIG) as fresh:
        for name in FILES:
            if (cached / name).exists():
                shutil.copyfile(cached / name, fresh / name)
    return target


@contextmanager
def _rendered_router(path: Path, repo_id: str) -> Iterator[Path]:
    """A temporary folder to upload; its card names the repository, unless someone edited it."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    checkpoint = read_checkpoint(path)
    config = checkpoint.config.to_dict()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "router"
        checkpoint.save_pretrained(folder)
        edited = (path / CARD).is_file() and read_text(path / CARD) != render_card(config)
        card = read_text(path / CARD) if edited else render_card(config, repo_id)
        (folder / CARD).write_text(card, encoding="utf-8")
        yield folder


def _publish(
    folder: Path,
    repo_id: str,
    repo_type: RepoType,
    private: bool,
    revision: str | None,
    dry_run: bool,
) -> Publication:
    files = tuple(
        PublishedFile(path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    card, branch = read_text(folder / CARD), revision or "main"
    if dry_run:
        return Publication(repo_id, repo_type, branch, private, files, card)
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise UsageError(
                f"{repo_id} is there and public: choose another id, or leave out --private"
            )
        if branch != "main":
            api.create_branch(repo_id, branch=branch, repo_type=repo_type, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            revision=branch,
            commit_message=f"Upload {repo_type} with r2r_glimp",
        )
    return Publication(
        repo_id, repo_type, branch, private, files, card, commit.oid, str(commit.commit_url)
    )


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the Hub client raises into a CheckpointError of one line with the repository."""
    from huggingface_hub.utils import httpx  # whichever of its kinds the client uses

    try:
        yield
    except R2RGlimpError:
        raise
    except (OSError, RuntimeError, ValueError, httpx.HTTPError) as error:
        what = repo_id if revision is None else f"{repo_id} at revision {revision}"
        raise CheckpointError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    reasons: list[tuple[tuple[type[Exception], ...], str]] = [
        ((errors.GatedRepoError,), "access must be asked for on its page"),
        ((errors.RevisionNotFoundError,), "no such revision"),
        ((errors.RepositoryNotFoundError,), "no such repository, or no access: `hf auth login`"),
        ((errors.OfflineModeIsEnabled,), "HF_HUB_OFFLINE is set"),
        ((errors.LocalTokenNotFoundError,), "no Hub token: `hf auth login` or HF_TOKEN"),
        ((errors.HfHubHTTPError,), f"the Hub refused: {one_line(error)}"),
        ((errors.LocalEntryNotFoundError,), "not in the cache, and the Hub cannot be reached"),
        (
            (httpx.HTTPError, ConnectionError, TimeoutError),
            "the Hub cannot be reached: try again with a network (--dry_run needs none)",
        ),
    ]
    return next((text for kinds, text in reasons if isinstance(error, kinds)), one_line(error))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

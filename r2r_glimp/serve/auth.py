"""API keys: read once at start from a file or the environment, compared in constant time."""

import hashlib
import hmac
import os
from pathlib import Path

from r2r_glimp.core import UsageError

ENV = "R2R_GLIMP_API_KEYS"


class Keys:
    """The keys that are let in; without any, everybody is. Only their hashes are kept."""

    def __init__(self, keys: list[str]) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def admit(self, authorization: bytes) -> bool:
        """Whether a request with this Authorization header may come in."""
        if not self._hashes:
            return True
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        given = _hash(key.strip())
        # Every key is compared, so that time tells nothing about which one is near.
        return sum(hmac.compare_digest(given, known) for known in self._hashes) > 0


def read_keys(path: str | None) -> Keys:
    """Keys of a file, one a line (`#` begins a comment line), or else of the environment, with
    commas between them.

    Raises:
        UsageError: the file cannot be read, or a place for keys is there and holds none.
    """
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UsageError(f"--api_key_file {path}: {why}") from None
        where, found = f"--api_key_file {path}", [line.strip() for line in lines]
        found = [key for key in found if key and not key.startswith("#")]
    elif ENV in os.environ:
        where, found = ENV, [key.strip() for key in os.environ[ENV].split(",")]
    else:
        return Keys([])
    if not found or not all(found):
        raise UsageError(f"{where} holds an empty key, or none: write one, or take it away")
    return Keys(found)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

"""Where a remote model is, as a preset or a command line says it. Imports no torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from r2r_glimp.core import UsageError

Api = Literal["auto", "completions", "sglang", "text"]
OnFailure = Literal["fail", "slm"]
_SCHEMES = ("http://", "https://")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSpec:
    """A model behind a server.

    Args:
        url: base of the OpenAI-compatible API, such as http://localhost:8000/v1.
        model: its name there; None where the server has only one.
        tokenizer: folder or Hub id of its tokenizer; None is the other model's, which the server
            is asked to confirm (/tokenize).
        api: completions (token ids both ways: vLLM, r2r-glimp serve), sglang (/generate), text (any
            server), or auto, which asks the server.
        api_key_env: environment variable that holds the key; None sends none.
        timeout_s: of one try of one request.
        retries: after a refused connection, a time-out, a broken reply, 408, 429 or 5xx; the waits
            double from 0.25 s, a Retry-After is obeyed.
        concurrency: requests at once.
        on_failure: fail ends the request whose span the server did not write; slm lets the SLM
            write it, and says so.
        context_length: tokens it reads at most; None is what the server says.

    Raises:
        UsageError: a value makes no sense.
    """

    url: str
    model: str | None = None
    tokenizer: str | None = None
    api: Api = "auto"
    api_key_env: str | None = None
    timeout_s: float = 120.0
    retries: int = 3
    concurrency: int = 64
    on_failure: OnFailure = "fail"
    context_length: int | None = None

    def __post_init__(self) -> None:
        _check_url(self.url)
        _check_no_secret(self.url)
        object.__setattr__(self, "url", self.url.rstrip("/"))
        for name in ("model", "tokenizer", "api_key_env"):
            value = getattr(self, name)
            _require(value is None or (isinstance(value, str) and value), name, value, "a name")
        _require(self.api in get_args(Api), "api", self.api, " or ".join(get_args(Api)))
        known = self.on_failure in get_args(OnFailure)
        _require(known, "on_failure", self.on_failure, " or ".join(get_args(OnFailure)))
        _require(
            _is_number(self.timeout_s) and self.timeout_s > 0,
            "timeout_s",
            self.timeout_s,
            "seconds",
        )
        for name, low in (("retries", 0), ("concurrency", 1)):
            value = getattr(self, name)
            _require(type(value) is int and value >= low, name, value, f"{low} or more")
        length = self.context_length
        _require(
            length is None or (type(length) is int and length > 1),
            "context_length",
            length,
            "tokens",
        )

    @classmethod
    def parse(cls, value: str | Mapping[str, Any], where: str) -> "RemoteSpec":
        """A preset's mapping, or `URL` or `URL#MODEL` of a command line.

        Args:
            where: what to call it in a message, such as `llm`.

        Raises:
            UsageError: a key or value is not known.
        """
        if isinstance(value, str):
            url, _, model = value.partition("#")
            value = {"url": url, "model": model or None}
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in value if key not in known]:
            raise UsageError(
                f"{where} has the unknown key {unknown[0]!r}: it takes {', '.join(known)}"
            )
        if "url" not in value:
            raise UsageError(f"{where} has no url: give one, such as http://localhost:8000/v1")
        try:
            return cls(**value)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    @property
    def name(self) -> str:
        """What to call it."""
        return f"{self.url}#{self.model}" if self.model else self.url

    def key(self) -> str | None:
        """The key, from the environment.

        Raises:
            UsageError: the variable is not set.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise UsageError(
                f"api_key_env: {self.api_key_env} is not in the environment, and {self.url} "
                "is to be sent its key"
            )
        return key


def is_remote(value: Any) -> bool:
    """Whether a model's place is a server's rather than a folder or a Hub id.

    Raises:
        UsageError: it looks like a server's, without a scheme.
    """
    if isinstance(value, Mapping | RemoteSpec):
        return True
    if not isinstance(value, str):
        return False
    if value.startswith(_SCHEMES):
        return True
    looks = re.match(r"[\w.-]+:\d+(/|$)", value) or "://" in value or value.endswith("/v1")
    if looks and not os.path.exists(value):
        _check_url(value)
    return False


def _check_url(url: Any) -> None:
    host = urlsplit(url).hostname if isinstance(url, str) and url.startswith(_SCHEMES) else None
    if not host:
        hint = (
            f"http://{url}" if isinstance(url, str) and "://" not in url else "http://HOST:PORT/v1"
        )
        raise UsageError(f"url={url!r} is no URL: it starts with http:// or https:// ({hint})")


def _check_no_secret(url: str) -> None:
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise UsageError(
            f"the url of {parts.hostname} holds a name or a password: put a key into an "
            "environment variable, and name it in api_key_env"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(ok: Any, name: str, value: Any, wanted: str) -> None:
    if not ok:
        raise UsageError(f"{name}={value!r} is out of range: {wanted}")

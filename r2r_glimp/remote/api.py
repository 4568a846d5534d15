"""What is asked of a server and what it answers, in the three dialects that are spoken.

    completions   POST URL/completions   token ids both ways     vLLM, r2r-glimp serve
    sglang        POST /generate         token ids both ways     SGLang
    text          POST URL/completions   text, streamed          any OpenAI-compatible server

Knows nothing about connections. A reply that is not what was asked for raises BrokenReply.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from r2r_glimp.core import SamplingParams

TOP = 20  # log-probabilities that servers give at most


class BrokenReply(ValueError):
    """A reply that cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a model is to write.

    Args:
        tokens: all it reads, in its own ids.
        text: the same as text, for servers that take no ids.
        max_tokens: tokens to write at most.
        stop: strings at which to stop; they belong to what is written.
        sampling: how tokens are picked.
        seed: of the server's drawing.
        logprobs: whether the first token's likeliest alternatives are wanted.
        is_over: whether a text is all that is wanted; what streams is cut there.
    """

    tokens: list[int]
    text: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    logprobs: bool = False
    is_over: Callable[[str], bool] = lambda text: False


@dataclass(slots=True)
class Reply:
    """What a model wrote: token ids, or text where the server tells none.

    `ended`: the model ended the text itself, or stopped at a string that stands in it (not every
    server tells which). `top`: log-probabilities of the first token's likeliest
    alternatives, highest first.
    """

    tokens: list[int] | None = None
    text: str = ""
    ended: bool = False
    top: list[float] = field(default_factory=list)


class Dialect(Protocol):
    """How to ask."""

    name: str
    streams: bool
    takes_ids: bool

    def path(self, url: str) -> str:
        """Where to post, from the base URL."""
        ...

    def body(self, ask: Ask, model: str) -> dict[str, Any]:
        """What to post."""
        ...


class Completions:
    """Token ids over OpenAI's completions, with vLLM's fields."""

    name, streams, takes_ids = "completions", False, True

    def path(self, url: str) -> str:
        return f"{url}/completions"

    def body(self, ask: Ask, model: str) -> dict[str, Any]:
        body = {
            "model": model,
            "prompt": ask.tokens,
            "max_tokens": ask.max_tokens,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            **_sampling(ask),
        }
        if ask.stop:
            body |= {"stop": list(ask.stop), "include_stop_str_in_output": True}
        if ask.logprobs:
            body["logprobs"] = TOP
        return body

    def parse(self, reply: Any, ask: Ask, vocab_size: int) -> Reply:
        """The reply of a server; raises BrokenReply."""
        choice = _choice(reply)
        tokens = _check_tokens(choice.get("token_ids"), ask, vocab_size)
        ended = choice.get("finish_reason") == "stop" and choice.get("stop_reason") not in ask.stop
        return Reply(tokens, ended=ended, top=_top(choice.get("logprobs")))


class SGLang:
    """SGLang's own API, beside which it speaks OpenAI's."""

    name, streams, takes_ids = "sglang", False, True

    def path(self, url: str) -> str:
        return url.removesuffix("/v1") + "/generate"

    def body(self, ask: Ask, model: str) -> dict[str, Any]:
        given = _sampling(ask)
        if "seed" in given:
            given["sampling_seed"] = given.pop("seed")
        sampling = {"max_new_tokens": ask.max_tokens, "skip_special_tokens": False, **given}
        if ask.stop:
            sampling |= {"stop": list(ask.stop), "no_stop_trim": True}
        body: dict[str, Any] = {"input_ids": ask.tokens, "sampling_params": sampling}
        if ask.logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": TOP, "logprob_start_len": -1}
        return body

    def parse(self, reply: Any, ask: Ask, vocab_size: int) -> Reply:
        """The reply of a server; raises BrokenReply."""
        if not isinstance(reply, dict) or not isinstance(reply.get("meta_info"), dict):
            raise BrokenReply("what it answers is no reply of SGLang's /generate")
        meta = reply["meta_info"]
        tokens = _check_tokens(reply.get("output_ids"), ask, vocab_size)
        reason = meta.get("finish_reason")
        reason = reason if isinstance(reason, dict) else {}
        if reason.get("type") == "abort":
            raise BrokenReply(f"SGLang gave up: {str(reason.get('message'))[:100]}")
        ended = reason.get("type") == "stop" and not isinstance(reason.get("matched"), str)
        tops = meta.get("output_top_logprobs") or [[]]
        try:
            top = _numbers([entry[0] for entry in tops[0] or []])
        except (LookupError, TypeError):
            raise BrokenReply("its log-probabilities cannot be read") from None
        return Reply(tokens, ended=ended, top=top)


class Text:
    """Text over OpenAI's completions, streamed and left where it is long enough: stop strings are
    not in what servers give back, and a stop at one looks like the end of a text."""

    name, streams, takes_ids = "text", True, False

    def path(self, url: str) -> str:
        return f"{url}/completions"

    def body(self, ask: Ask, model: str) -> dict[str, Any]:
        body = {"model": model, "prompt": ask.text, "max_tokens": ask.max_tokens, "stream": True}
        if ask.logprobs:
            body["logprobs"] = TOP
        return body | _sampling(ask)

    def read(self, line: str, ask: Ask, reply: Reply) -> bool:
        """Take in a line of the stream; whether that is all. Raises BrokenReply."""
        if not line.startswith("data:"):
            return False
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return True
        chunk = parse_json(data.encode())
        if isinstance(chunk, dict) and chunk.get("error"):
            raise BrokenReply(f"it gave up: {str(chunk['error'])[:100]}")
        if isinstance(chunk, dict) and chunk.get("choices") == []:
            return False  # the usage
        choice = _choice(chunk)
        piece = choice.get("text") or ""
        if not isinstance(piece, str):
            raise BrokenReply("its text is no text")
        if not reply.text and not reply.top:
            reply.top = _top(choice.get("logprobs"))
        for end in range(1, len(piece) + 1):
            if ask.is_over(reply.text + piece[:end]):
                # White space belongs to what ends before it, as it does within a token.
                blank = len(piece[end:]) - len(piece[end:].lstrip())
                reply.text += piece[: end + blank]
                return True
        reply.text += piece
        if reason := choice.get("finish_reason"):
            reply.ended = reason == "stop"
            return True
        return False


DIALECTS: dict[str, Completions | SGLang | Text] = {
    one.name: one for one in (Completions(), SGLang(), Text())
}


def parse_json(data: bytes) -> Any:
    """JSON, or BrokenReply."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise BrokenReply(f"what it answers is no JSON: {data[:60]!r}") from None


def _sampling(ask: Ask) -> dict[str, Any]:
    """Fields that say how tokens are picked; the ones not everybody knows only where they say
    something."""
    params = ask.sampling
    fields: dict[str, Any] = {"temperature": params.temperature}
    if params.ignore_eos:
        fields["ignore_eos"] = True
    if params.temperature == 0:
        return fields
    fields |= {"top_p": params.top_p, "seed": ask.seed % 2**31}
    if params.top_k:
        fields["top_k"] = params.top_k
    if params.min_p:
        fields["min_p"] = params.min_p
    return fields


def _choice(reply: Any) -> dict[str, Any]:
    try:
        choice = reply["choices"][0]
    except (LookupError, TypeError):
        raise BrokenReply(f"what it answers is no completion: {str(reply)[:60]!r}") from None
    if not isinstance(choice, dict):
        raise BrokenReply("what it answers is no completion")
    return choice


def _check_tokens(tokens: Any, ask: Ask, vocab_size: int) -> list[int]:
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise BrokenReply("its reply has no token ids")
    if bad := [token for token in tokens if not 0 <= token < vocab_size]:
        raise BrokenReply(f"it wrote the token id {bad[0]}, and the vocabulary has {vocab_size:,}")
    if len(tokens) > ask.max_tokens:
        raise BrokenReply(f"it wrote {len(tokens)} tokens where {ask.max_tokens} were asked for")
    return tokens


def _top(logprobs: Any) -> list[float]:
    """Log-probabilities of the first token's alternatives, in either of OpenAI's forms."""
    if logprobs is None:
        return []
    try:
        if logprobs.get("content"):
            return _numbers([one["logprob"] for one in logprobs["content"][0]["top_logprobs"]])
        tops = logprobs.get("top_logprobs") or [{}]
        return _numbers(list((tops[0] or {}).values()))
    except (LookupError, TypeError, AttributeError):
        raise BrokenReply("its log-probabilities cannot be read") from None


def _numbers(values: list[Any]) -> list[float]:
    numbers = [float(value) for value in values]
    if any(math.isnan(number) for number in numbers):
        raise BrokenReply("its log-probabilities are not numbers")
    return sorted(numbers, reverse=True)

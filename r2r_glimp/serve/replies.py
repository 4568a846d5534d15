"""What is written of a choice, in OpenAI's form: whole, or as the deltas of a stream.

A token's event becomes a `Written`, its text cut at the think tags; whole replies and streams are
both made of those, so they cannot differ.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion

from r2r_glimp.core import Event, FinishEvent, RequestOutput, TokenEvent, TokenLogprob
from r2r_glimp.serve.errors import Refusal
from r2r_glimp.serve.reasoning import Piece, Splitter
from r2r_glimp.serve.service import Job, TokenStrings

LEAST = -9999.0  # JSON has no word for minus infinity
Kind = Literal["chat", "text"]
_to_json = json.JSONEncoder(allow_nan=False).encode


@dataclass(slots=True)
class Written:
    """What one token added. `text` is all of it; `reasoning` and `content` are what readers see."""

    event: TokenEvent
    text: str
    reasoning: str
    content: str


@dataclass(slots=True)
class Choice:
    """One completion as it grows."""

    index: int
    splitter: Splitter | None  # None gives all text as content
    num_chars: int = 0
    reasoning_tokens: int = 0
    written: list[Written] = field(default_factory=list)
    output: RequestOutput | None = None

    def add(self, event: Event) -> Written | None:
        """Take in an event; None for an end that brought no more text.

        Raises:
            Refusal: the completion failed.
        """
        if isinstance(event, TokenEvent):
            self.num_chars += len(event.text)
            if self.splitter is None:
                return Written(event, event.text, "", event.text)
            self.reasoning_tokens += self.splitter.in_reasoning
            piece = self.splitter.add(event.text)
            return Written(event, event.text, piece.reasoning, piece.content)
        self.output = event.output
        if event.output.finish_reason == "error":
            raise Refusal(500, event.output.error or "the engine failed")
        if event.output.finish_reason == "abort":
            raise Refusal(503, "the request was aborted", retry_after=1)
        rest = event.output.text[self.num_chars :]  # held back until the end
        last = Piece("", rest)
        if self.splitter is not None:
            last = self.splitter.add(rest, final=True)
        if not (rest or last.reasoning or last.content):
            return None
        nothing = TokenEvent(event.request_id, event.index, -1, -1, "slm", rest)
        return Written(nothing, rest, last.reasoning, last.content)


class Reply:
    """Builds what a job's client reads.

    Args:
        job: the request.
        kind: `chat` for /v1/chat/completions, `text` for /v1/completions.
    """

    def __init__(self, job: Job, kind: Kind) -> None:
        self.job, self.kind, self.body = job, kind, job.body
        self.strings = job.service.texts
        n, tags = job.ticket.sampling.n, job.service.engine.tags
        self.choices = [
            Choice(i, Splitter(tags, job.sections[i // n]) if kind == "chat" else None)
            for i in range(job.ticket.num_choices)
        ]
        head = {
            "id": job.id,
            "object": "chat.completion" if kind == "chat" else "text_completion",
            "created": job.created,
            "model": job.model,
            "system_fingerprint": job.service.fingerprint,
        }
        self.head = head
        if kind == "chat":
            head = head | {"object": "chat.completion.chunk"}
        self._chunk_head = json.dumps(head)[:-1]

    @property
    def finished(self) -> bool:
        return all(choice.output is not None for choice in self.choices)

    # ------------------------------------------------------------------ whole

    def whole(self, events: Iterable[tuple[int, Event]]) -> ChatCompletion | Completion:
        """The reply to a request that is not streamed.

        Raises:
            Refusal: a completion failed.
        """
        for index, event in events:
            choice = self.choices[index]
            written = choice.add(event)
            if written is not None:
                choice.written.append(written)
        cls = ChatCompletion if self.kind == "chat" else Completion
        choices = [self._whole_choice(choice) for choice in self.choices]
        return cls.model_validate(self.head | {"choices": choices, "usage": self.usage()})

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        assert choice.output is not None
        content = "".join(one.content for one in choice.written)
        data: dict[str, Any] = {
            "index": choice.index,
            **_finish(choice.output),
            "logprobs": self._logprobs(choice.written),
        }
        if self.kind == "text":
            data["text"] = content
        else:
            message = {"role": "assistant", "content": content}
            reasoning = "".join(one.reasoning for one in choice.written) or None
            # Readers of vLLM's replies look for the one name, readers of SGLang's for the other.
            data["message"] = message | {"reasoning_content": reasoning, "reasoning": reasoning}
        if self.body.return_token_ids:
            data["prompt_token_ids"] = choice.output.prompt_token_ids
            data["token_ids"] = choice.output.token_ids
        if self.body.return_routing:
            tokens = {"tokens": _routing_tokens(choice.written)}
            data["routing"] = self._routing(choice.output) | tokens
        return data

    # ------------------------------------------------------------------ stream

    def opening(self) -> list[str]:
        """The chunks before any text."""
        if self.kind == "text":
            return []
        opened: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}}
        if self.body.return_routing:
            opened["routing"] = {"tokens": []}
        return [self._chunk({"index": choice.index, **opened}) for choice in self.choices]

    def chunks(self, events: Iterable[tuple[int, Event]]) -> Iterable[str]:
        """The chunks of some events; none for a token that made nothing readable, unless the client
        asked for more than text.

        Raises:
            Refusal: a completion failed.
        """
        body = self.body
        tells_tokens = body.return_token_ids or body.return_routing or body.num_logprobs is not None
        for index, event in events:
            choice = self.choices[index]
            written = choice.add(event)
            if written is not None and (written.reasoning or written.content or tells_tokens):
                yield self._chunk(self._delta(choice, written))
            if isinstance(event, FinishEvent):
                yield self._chunk(self._last(choice, event.output))

    def closing(self) -> list[str]:
        """The chunk with the usage, if the client asked for it."""
        options = self.body.stream_options
        if options is None or not options.include_usage:
            return []
        usage = json.dumps(self.usage())
        return [f'{self._chunk_head}, "choices": [], "usage": {usage}}}']

    def _delta(self, choice: Choice, written: Written) -> dict[str, Any]:
        data: dict[str, Any] = {"index": choice.index}
        if self.kind == "text":
            data["text"] = written.content
        else:
            delta: dict[str, Any] = {}
            if written.reasoning:
                delta = {"reasoning_content": written.reasoning, "reasoning": written.reasoning}
            if written.content or not delta:
                delta["content"] = written.content
            data["delta"] = delta
        if written.event.logprob is not None:
            data["logprobs"] = self._logprobs([written], choice.num_chars - len(written.text))
        if written.event.token_id >= 0 and self.body.return_token_ids:
            data["token_ids"] = [written.event.token_id]
        if self.body.return_routing:
            data["routing"] = {"tokens": _routing_tokens([written])}
        return data

    def _last(self, choice: Choice, output: RequestOutput) -> dict[str, Any]:
        data: dict[str, Any] = {"index": choice.index, **_finish(output)}
        if self.kind == "text":
            data["text"] = ""
        else:
            data["delta"] = {}
        if self.body.return_token_ids:
            data["prompt_token_ids"] = output.prompt_token_ids
        if self.body.return_routing:
            data["routing"] = self._routing(output) | {"tokens": []}
        return data

    def _chunk(self, choice: dict[str, Any]) -> str:
        choice.setdefault("finish_reason", None)
        choice.setdefault("logprobs", None)
        return f'{self._chunk_head}, "choices": [{_to_json(choice)}]}}'

    # ------------------------------------------------------------------ parts

    def usage(self) -> dict[str, Any]:
        """Tokens read and written, by whom, and how many of them were reasoning."""
        outputs = [choice.output for choice in self.choices if choice.output is not None]
        n = self.job.ticket.sampling.n
        prompt = sum(len(o.prompt_token_ids) for o in outputs[::n])
        slm, llm = (
            sum(o.stats.slm_tokens for o in outputs),
            sum(o.stats.llm_tokens for o in outputs),
        )
        lost = sum(o.stats.llm_unavailable for o in outputs)
        usage = CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=slm + llm,
            total_tokens=prompt + slm + llm,
        ).model_dump(exclude_none=True)
        cached = sum(min(o.stats.prefix_hits, len(o.prompt_token_ids)) for o in outputs[::n])
        reasoning = sum(choice.reasoning_tokens for choice in self.choices)
        usage |= {
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
            "slm_tokens": slm,
            "llm_tokens": llm,
            # Spans that the SLM wrote because the LLM's server did not.
            **({"llm_unavailable": lost} if lost else {}),
        }
        monitor = self.job.ticket.monitor
        if monitor is not None and monitor.drifting:
            usage["drift"] = monitor.drifting
        return usage

    def _routing(self, output: RequestOutput) -> dict[str, Any]:
        route, stats = self.job.route, output.stats
        baseline = route.router.constant is not None
        return {
            "router": route.router.name,
            "granularity": None if baseline else route.granularity,
            "threshold": None if baseline else route.threshold,
            "slm_tokens": stats.slm_tokens,
            "llm_tokens": stats.llm_tokens,
            "llm_share": stats.llm_share,
            "switches": stats.switches,
            "decisions": stats.decisions,
            "deferrals": stats.deferrals,
            "draft_tokens": stats.draft_tokens,
            "draft_accepted": stats.draft_accepted,
        }

    def _logprobs(self, written: list[Written], offset: int = 0) -> dict[str, Any] | None:
        if self.body.num_logprobs is None:
            return None
        told = [(one, one.event.logprob) for one in written if one.event.logprob is not None]
        if self.kind == "chat":
            return {"content": [_chat_logprob(one.event, lp, self.strings) for one, lp in told]}
        data: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for one, logprob in told:
            tops = _top(one.event, logprob, self.strings)
            data["tokens"].append(self.strings.get(one.event.source, logprob.token))
            data["token_logprobs"].append(max(LEAST, logprob.logprob))
            data["top_logprobs"].append(dict(tops))
            data["text_offset"].append(offset)
            offset += len(one.text)
        return data


def _finish(output: RequestOutput) -> dict[str, Any]:
    """The finish reason in OpenAI's words; `stop_reason` keeps what they cannot say."""
    if output.finish_reason in ("repetition", "llm_unavailable"):
        return {"finish_reason": "stop", "stop_reason": output.finish_reason}
    return {"finish_reason": output.finish_reason, "stop_reason": None}


def _routing_tokens(written: list[Written]) -> list[dict[str, Any]]:
    """Who wrote each token; where a decision was taken, the router's score. Text that came late
    belongs to the token before."""
    tokens: list[dict[str, Any]] = []
    for one in written:
        event = one.event
        if event.token_id < 0:
            if tokens:
                tokens[-1]["text"] += one.text
            continue
        score = event.score
        tokens.append(
            {
                "token_id": event.token_id,
                "text": one.text,
                "source": event.source,
                "score": score if score is not None and math.isfinite(score) else None,
            }
        )
    return tokens


def _top(
    event: TokenEvent, logprob: TokenLogprob, strings: TokenStrings
) -> list[tuple[str, float]]:
    """Alternatives with their log-probabilities, the token itself among them."""
    tops = [(strings.get(event.source, token), max(LEAST, lp)) for token, lp in logprob.top]
    own = (strings.get(event.source, logprob.token), max(LEAST, logprob.logprob))
    return tops if any(token == logprob.token for token, _ in logprob.top) else [*tops, own]


def _chat_logprob(
    event: TokenEvent, logprob: TokenLogprob, strings: TokenStrings
) -> dict[str, Any]:
    def entry(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode(errors="replace"))}

    own = entry(strings.get(event.source, logprob.token), max(LEAST, logprob.logprob))
    tops = [
        entry(strings.get(event.source, token), max(LEAST, value)) for token, value in logprob.top
    ]
    return own | {"top_logprobs": tops}

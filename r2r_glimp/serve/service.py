"""Service: from a request's body to a running job, and what every handler shares.

body ─▶ slots ─▶ ids (in threads) ─▶ room ─▶ Ticket ─▶ Worker        Job.close gives all back
"""

import asyncio
import dataclasses
import hashlib
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from r2r_glimp import __version__
from r2r_glimp.core import Model, Prompt, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.prompts import EncodedPrompt, prompt_tail
from r2r_glimp.routing.policy import Route
from r2r_glimp.routing.tags import Section, section_of
from r2r_glimp.serve.catalog import Catalog
from r2r_glimp.serve.errors import Refusal
from r2r_glimp.serve.limits import Slots
from r2r_glimp.serve.protocol import Generation
from r2r_glimp.serve.worker import Ticket, Worker

_OVERRIDES = ("temperature", "top_p", "min_p")


@dataclass(slots=True, eq=False)
class Job:
    """One generation request under way; `close` it whatever happens."""

    service: "Service"
    body: Generation
    ticket: Ticket
    route: Route
    sections: list[Section]  # where each prompt leaves the thinking
    timer: asyncio.TimerHandle
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        return self.ticket.request_id

    @property
    def model(self) -> str:
        return self.body.model or self.service.catalog.name

    def close(self) -> None:
        """Abort what still runs and give the slots back."""
        self.timer.cancel()
        self.service.worker.release(self.ticket)
        self.service.slots.give(self.ticket.num_choices)


class Service:
    """One engine behind HTTP.

    Args:
        worker: the engine's thread.
        catalog: models and routers.
        sampling: what holds where a request says nothing.
        slots: completions that may be under way or waiting.
        deadline_s: seconds after which a request is ended.
    """

    def __init__(
        self,
        worker: Worker,
        catalog: Catalog,
        sampling: SamplingParams,
        slots: Slots,
        *,
        deadline_s: float = 600.0,
    ) -> None:
        self.worker, self.catalog, self.sampling, self.slots = worker, catalog, sampling, slots
        self.deadline_s = deadline_s
        self.texts = TokenStrings(worker.engine)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self.fingerprint = _fingerprint(self.engine)

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    async def open(
        self,
        body: Generation,
        prompts: list[Prompt],
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        prefix: str,
    ) -> Job:
        """Check a request and start it.

        Args:
            prefix: of the request's id, `chatcmpl` or `cmpl`.

        Raises:
            Refusal, UsageError, DataError: it cannot run, now or ever; nothing is held.
        """
        self.worker.check()
        routing, route = self.catalog.route(body)
        count = len(prompts) * (body.n or self.sampling.n)
        self.slots.take(count)
        try:
            encoded, sections = await self.in_thread(self._encode, prompts, template_kwargs)
            ticket = Ticket(
                f"{prefix}-{secrets.token_hex(12)}",
                encoded,
                self._sampling(body, encoded),
                routing,
                stream=bool(body.stream),
                monitor=self.catalog.monitor(route),
            )
            self.worker.submit(ticket)
        except BaseException:
            self.slots.give(count)
            raise
        late = Refusal(504, f"not finished within {self.deadline_s:g} s", code="deadline_exceeded")
        timer = asyncio.get_running_loop().call_later(self.deadline_s, ticket.fail, late)
        return Job(self, body, ticket, route, sections, timer)

    async def in_thread(self, call: Any, *args: Any) -> Any:
        """Tokenisation of long texts takes long: it must not hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    def _encode(
        self, prompts: list[Prompt], template_kwargs: Mapping[str, Any] | None
    ) -> tuple[list[EncodedPrompt], list[Section]]:
        engine = self.engine
        encoded = [engine.encode(prompt, template_kwargs) for prompt in prompts]
        room = min(engine.room)
        for one in encoded:
            length = max(len(one.slm), len(one.llm))
            if length >= room:
                raise _too_long(f"the prompt has {length:,} tokens, the context holds {room:,}")
        tokenizer = engine.pair.slm.tokenizer
        tails = [prompt_tail(one.slm, tokenizer, engine.tags) for one in encoded]
        return encoded, [section_of(tail, engine.tags) for tail in tails]

    def _sampling(self, body: Generation, encoded: list[EncodedPrompt]) -> SamplingParams:
        given = {name: getattr(body, name) for name in (*_OVERRIDES, "n")}
        given = {name: value for name, value in given.items() if value is not None}
        if body.top_k is not None:
            given["top_k"] = max(0, body.top_k)  # -1 is vLLM's word for all
        if body.seed is not None:
            given["seed"] = body.seed % 2**64
        if body.stop is not None:
            given["stop"] = body.stops
        if body.stop_token_ids is not None:
            given["stop_token_ids"] = tuple(body.stop_token_ids)
        room = min(self.engine.room)
        longest = max(max(len(one.slm), len(one.llm)) for one in encoded)
        limit = body.token_limit
        if limit is not None and longest + limit > room:
            raise _too_long(
                f"max_tokens={limit:,} after a prompt of {longest:,} tokens: "
                f"the context holds {room:,} in all",
                "max_tokens",
            )
        default = self.sampling.max_tokens or room
        return dataclasses.replace(
            self.sampling,
            **given,
            max_tokens=limit or min(default, room - longest),
            ignore_eos=body.ignore_eos or self.sampling.ignore_eos,
            logprobs=body.num_logprobs,
        )


class TokenStrings:
    """The text of single tokens, remembered; for log-probabilities."""

    def __init__(self, engine: Engine) -> None:
        self._pair = engine.pair
        self._known: dict[tuple[Model, int], str] = {}

    def get(self, source: str, token: int) -> str:
        """A token's text in the vocabulary of the model that wrote it."""
        key = (Model(source == "llm"), token)
        if key not in self._known:
            self._known[key] = str(self._pair[key[0]].tokenizer.decode([token]))
        return self._known[key]


def _too_long(message: str, param: str = "messages") -> Refusal:
    return Refusal(400, message, code="context_length_exceeded", param=param)


def _fingerprint(engine: Engine) -> str:
    """What a client may compare: the version, and the pair's weights and tokenizers."""
    pair = f"{engine.pair.slm.fingerprint!r} {engine.pair.llm.fingerprint!r}"
    return f"r2r_glimp-{__version__}-{hashlib.sha256(pair.encode()).hexdigest()[:8]}"

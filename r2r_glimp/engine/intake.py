"""Intake: what a caller asks for becomes sequences, or is refused before anything is queued."""

import secrets

from r2r_glimp.core import Model, RoutingParams, SamplingParams, Timeline, UsageError
from r2r_glimp.engine.detokenizer import Detokenizer
from r2r_glimp.engine.prompts import EncodedPrompt, prompt_tail
from r2r_glimp.engine.sequence import Sequence
from r2r_glimp.models.pair import ModelPair
from r2r_glimp.routing.policy import Policy, Route
from r2r_glimp.routing.routers import Router
from r2r_glimp.routing.tags import ThinkTags, section_of


class Intake:
    """Makes the sequences of requests.

    Args:
        pair: the two models.
        tags: the pair's think tags, None without.
        capacity: tokens that the KV memory holds.

    Attributes:
        room: tokens a timeline may have, for each model.
    """

    def __init__(self, pair: ModelPair, tags: ThinkTags | None, capacity: int) -> None:
        self.pair = pair
        self.tags = tags
        self.capacity = capacity
        # A config tells its context only slowly.
        self._contexts = [pair[m].context_length for m in Model]
        held = pair.local if not pair.same_vocabulary else Model if pair.local else ()
        self.room = [
            min(c, capacity) if m in held else c for m, c in zip(Model, self._contexts, strict=True)
        ]
        self._arrivals = 0

    def sequences(
        self,
        prompt: EncodedPrompt,
        sampling: SamplingParams,
        routing: RoutingParams,
        router: Router,
        request_id: str | None,
    ) -> list[Sequence]:
        """The `sampling.n` completions of one prompt, in the order in which they arrive.

        Args:
            router: the request's router, loaded.
            request_id: None makes one up.

        Raises:
            UsageError: the request cannot run.
        """
        shared = self.pair.same_vocabulary
        route = Route.resolve(routing, router, shared=shared, apart=self.pair.apart)
        if routing.speculate and not shared:
            raise UsageError(f"speculate needs one vocabulary, and {self.pair.apart}")
        self._check_remote(sampling, routing)
        prompts = (prompt.slm, prompt.llm)
        self._check_room(prompts, sampling)
        if request_id is None:
            request_id = f"request-{self._arrivals}"
        max_tokens = min(self.room) - max(map(len, prompts))
        if sampling.max_tokens is not None:
            max_tokens = min(sampling.max_tokens, max_tokens)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        section = section_of(prompt_tail(prompt.slm, self.pair.slm.tokenizer, self.tags), self.tags)
        sequences = []
        for index in range(sampling.n):
            timelines = [Timeline(list(ids), len(ids)) for ids in prompts]
            tokenizers = [self.pair[m].tokenizer for m in Model]
            detokenizers = [Detokenizer(t, ids) for t, ids in zip(tokenizers, prompts, strict=True)]
            if shared:
                timelines[1], detokenizers[1] = timelines[0], detokenizers[0]
            sequence = Sequence(
                request_id=request_id,
                index=index,
                arrival=self._arrivals,
                seed=(seed + index * 0x9E3779B97F4A7C15) % 2**64,
                sampling=sampling,
                policy=Policy(route, self.tags, section),
                timelines=(timelines[0], timelines[1]),
                detokenizers=(detokenizers[0], detokenizers[1]),
                eos_ids=(self.pair.slm.eos_token_ids, self.pair.llm.eos_token_ids),
                max_tokens=max_tokens,
                logprobs=None if sampling.logprobs is None else [],
                trace={} if routing.trace else None,
                draft_length=routing.speculate,
                planes=self.pair.local,
            )
            self._arrivals += 1
            sequences.append(sequence)
        return sequences

    def _check_remote(self, sampling: SamplingParams, routing: RoutingParams) -> None:
        """Raises UsageError for what needs a model's logits, and the model is behind a server."""
        if len(self.pair.local) == len(Model):
            return
        wanted = {
            "speculate": routing.speculate > 0,
            "logprobs": sampling.logprobs is not None,
        }
        for name, is_wanted in wanted.items():
            if is_wanted:
                raise UsageError(f"{name} needs both models here, and one is behind a server")

    def _check_room(self, prompts: tuple[list[int], list[int]], sampling: SamplingParams) -> None:
        """Raises UsageError if a prompt's tokens, or what it may write, do not fit."""
        for model, ids in zip(Model, prompts, strict=True):
            context = self._contexts[model]
            if len(ids) >= context:
                raise UsageError(
                    f"the prompt has {len(ids):,} tokens, "
                    f"the {model.name}'s context only {context:,}"
                )
            wanted = len(ids) + min(sampling.max_tokens or context, context - len(ids))
            if model in self.pair.local and wanted > self.capacity:
                raise UsageError(
                    f"kv_memory is too small for one request: it may take {wanted:,} tokens "
                    f"(prompt and max_tokens), {self.capacity:,} fit; raise --kv_memory "
                    "or lower --max_tokens"
                )

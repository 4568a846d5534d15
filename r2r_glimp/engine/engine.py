"""The engine: many requests, two models, one KV manager. The public face of what a tick does.

Intake ──▶ Scheduler ◀── Tick ──▶ Passes (runners) ──▶ Decider, Drafter ──▶ Writer ──▶ events
requests   who runs      a tick   forward passes       who writes           timelines
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from r2r_glimp.core import (
    Event,
    FinishEvent,
    Model,
    Prompt,
    RequestOutput,
    RoutingParams,
    SamplingParams,
    UsageError,
)
from r2r_glimp.engine.decider import Decider
from r2r_glimp.engine.drafter import Drafter
from r2r_glimp.engine.graphs import NONE, make_graphs
from r2r_glimp.engine.intake import Intake
from r2r_glimp.engine.memory import plan_blocks
from r2r_glimp.engine.passes import Passes
from r2r_glimp.engine.patience import Patience
from r2r_glimp.engine.prompts import EncodedPrompt, encode_prompt
from r2r_glimp.engine.remote import RemoteRunner, RemoteTurns
from r2r_glimp.engine.runner import ModelRunner
from r2r_glimp.engine.scheduler import Scheduler
from r2r_glimp.engine.sequence import Sequence
from r2r_glimp.engine.split import make_runner
from r2r_glimp.engine.tick import Tick
from r2r_glimp.engine.writer import Writer
from r2r_glimp.kv.manager import KVManager
from r2r_glimp.models.pair import AnyModel, ModelPair
from r2r_glimp.models.remote import RemoteModel
from r2r_glimp.routing.routers import Router
from r2r_glimp.routing.tags import find_tags

log = logging.getLogger(__name__)


class Engine:
    """Generates with a pair of models, routed per token or per step.

    Args:
        pair: the two models.
        router: default router of requests that name none: a name or a loaded router.
        kv_memory: memory for the KV of both models together: `"1GiB"`, bytes, a share of what is
            free on their devices (`0.85`), or `"auto"`: that share of a GPU, 1 GiB of a CPU.
        max_batch: sequences that run at once.
        max_batch_tokens: tokens one forward pass computes at most; longer prompts are chunked.
        llm_min_batch: the LLM runs when this many rows wait for it, or when the SLM has nothing to
            do. None: when waiting for more no longer pays, by what passes of both models take.
        llm_max_wait: with `llm_min_batch`: or when one has waited this many ticks.
        prefix_cache: reuse the KV of earlier requests with the same beginning.
        kernels: "auto", the fastest there is here; "amx", "avx512" or "onednn", what multiplies
            bfloat16 on the CPU; or "torch", the reference they are checked against. On the CPU all
            but "torch" exchange layers of the pair's models for good.
        graphs: on a GPU, repeat passes of few tokens as CUDA graphs.

    Raises:
        CheckpointError: a model cannot run under paged attention.
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        pair: ModelPair,
        *,
        router: str | Router = "entropy",
        kv_memory: str | float = "auto",
        max_batch: int = 32,
        max_batch_tokens: int = 2048,
        llm_min_batch: int | None = None,
        llm_max_wait: int = 4,
        prefix_cache: bool = True,
        kernels: str = "auto",
        graphs: bool = True,
    ) -> None:
        if min(max_batch, max_batch_tokens, 1 if llm_min_batch is None else llm_min_batch) < 1:
            raise UsageError("max_batch, max_batch_tokens and llm_min_batch must be 1 or more")
        self.pair = pair
        self.shared = pair.same_vocabulary
        # One runner each, unless both roles are played by one loaded model.
        slm = _make_runner(pair.slm, kernels)
        self.runners = (slm, slm if pair.llm is pair.slm else _make_runner(pair.llm, kernels))
        self.decider = Decider(pair.slm, slm)
        self.router = self.decider.load(router)
        here = dict.fromkeys(self.runners[model] for model in pair.local)
        on_device: Counter[torch.device] = Counter()
        for runner in here:
            on_device[runner.loaded.device] += runner.kv_bytes_per_token
        num_blocks, memory = plan_blocks(kv_memory, on_device) if here else (0, "nothing")
        for runner in here:
            runner.allocate(num_blocks)
        self.kv = KVManager(num_blocks, shared=self.shared, prefix_cache=prefix_cache)
        log.info("KV of %s holds %s tokens of both models", memory, f"{self.kv.capacity:,}")
        self.tags = find_tags(pair.slm.tokenizer.get_vocab())
        self.intake = Intake(pair, self.tags, self.kv.capacity)
        self.scheduler = Scheduler(self.kv, max_batch=max_batch, max_batch_tokens=max_batch_tokens)
        self.writer = Writer(pair, self.tags, self.scheduler, self.room)
        remote = RemoteTurns(pair, self.decider, self.writer, self.room)
        captured = make_graphs(self.runners, self.router, max_batch, self.room) if graphs else NONE
        for model in Model:
            log.info("%s: %s", model.name, self.runners[model].paths)
        passes = Passes(self.runners, self.scheduler, self.writer, captured)
        self.tick = Tick(
            scheduler=self.scheduler,
            passes=passes,
            decider=self.decider,
            drafter=Drafter(passes, self.scheduler, min(self.room)),
            writer=self.writer,
            remote=remote,
            patience=Patience(passes.costs, llm_min_batch, llm_max_wait),
        )

    @property
    def room(self) -> list[int]:
        """Tokens a timeline may have, for each model."""
        return self.intake.room

    def encode(
        self, prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None
    ) -> EncodedPrompt:
        """The ids that both models read; changes nothing, so any thread may call it.

        Args:
            prompt: as in `add_request`.
            template_kwargs: further variables of the chat template.

        Raises:
            UsageError, DataError: the prompt cannot be encoded.
        """
        return EncodedPrompt(
            *encode_prompt(
                prompt,
                self.pair,
                self.tags,
                shared=self.shared,
                template_kwargs=template_kwargs,
            )
        )

    def add_request(
        self,
        prompt: Prompt | EncodedPrompt,
        sampling: SamplingParams | None = None,
        routing: RoutingParams | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queue a request: `sampling.n` completions of one prompt.

        Args:
            prompt: text, chat messages (the pair's chat template is applied), token ids, or what
                `encode` made of one of them.

        Returns:
            The request's id; its completions are told apart by `index`.

        Raises:
            UsageError, DataError: the request cannot run; nothing is queued.
        """
        sampling, routing = sampling or SamplingParams(), routing or RoutingParams()
        router = self.decider.load(routing.router or self.router)
        encoded = prompt if isinstance(prompt, EncodedPrompt) else self.encode(prompt)
        sequences = self.intake.sequences(encoded, sampling, routing, router, request_id)
        for sequence in sequences:
            self.scheduler.add(sequence)
        return sequences[0].request_id

    def leave_thread(self) -> None:
        """Let another thread than this one run the engine from now on; call in this one."""
        for model in self.pair.local:
            self.runners[model].end_team()

    def abort(self, request_id: str) -> None:
        """End a request's completions; what they wrote so far is reported with finish reason
        `abort`."""
        for sequence in self.scheduler.find(request_id):
            self.writer.finish(sequence, "abort")

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.has_work

    @property
    def running(self) -> list[Sequence]:
        """Sequences that run, oldest first."""
        return self.scheduler.running

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling: SamplingParams | list[SamplingParams] | None = None,
        routing: RoutingParams | list[RoutingParams] | None = None,
        on_finish: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many, all at once.

        Args:
            prompts: one prompt, or a list of them.
            sampling, routing: for all prompts, or a list with one for each.
            on_finish: called with each output as it finishes, in any order.

        Returns:
            Outputs in the order of the prompts, then of `n`.

        Raises:
            UsageError, DataError: a prompt cannot run; none does then.
        """
        batch: list[Prompt] = prompts if _is_batch(prompts) else [prompts]  # type: ignore[assignment, list-item]
        samplings = _one_each("sampling", sampling or SamplingParams(), len(batch))
        routings = _one_each("routing", routing or RoutingParams(), len(batch))
        ids: dict[str, int] = {}
        outputs: dict[tuple[int, int], RequestOutput] = {}
        try:
            for order, request in enumerate(zip(batch, samplings, routings, strict=True)):
                ids[self.add_request(*request)] = order
            num_outputs = sum(one.n for one in samplings)
            while len(outputs) < num_outputs:
                for event in self.step():
                    if isinstance(event, FinishEvent) and event.request_id in ids:
                        outputs[ids[event.request_id], event.index] = event.output
                        if on_finish:
                            on_finish(event.output)
        finally:
            for request_id in ids:  # interrupted: leave nothing behind
                self.abort(request_id)
            self.writer.drop_events(ids)
        return [outputs[key] for key in sorted(outputs)]

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        routing: RoutingParams | None = None,
    ) -> Iterator[Event]:
        """Generate for one prompt, event by event; closing the iterator aborts the request."""
        num_open = sampling.n if sampling else 1
        request_id = self.add_request(prompt, sampling, routing)
        try:
            while num_open:
                for event in self.step():
                    if event.request_id == request_id:
                        num_open -= isinstance(event, FinishEvent)
                        yield event
        finally:
            self.abort(request_id)

    def step(self) -> list[Event]:
        """One tick; what happened in it, for all requests."""
        self.tick.run()
        return self.writer.take_events()

    def check_integrity(self) -> None:
        """Assert that every KV block is accounted for."""
        self.scheduler.check_integrity()


T = TypeVar("T")


def _make_runner(model: AnyModel, kernels: str) -> ModelRunner:
    return RemoteRunner(model) if isinstance(model, RemoteModel) else make_runner(model, kernels)


def _one_each(name: str, values: T | list[T], count: int) -> list[T]:
    """One value per prompt."""
    each = values if isinstance(values, list) else [values] * count
    if len(each) != count:
        raise UsageError(f"{name} has {len(each)} entries for {count} prompts")
    return each


def _is_batch(prompts: Prompt | list[Prompt]) -> bool:
    """Whether this is a list of prompts rather than one prompt (text, messages or token ids)."""
    return isinstance(prompts, list) and not (prompts and isinstance(prompts[0], dict | int))

"""Setting: what every stage needs to know of a run. Made once per worker."""

import hashlib
import re
from dataclasses import dataclass
from typing import cast

from labeling.answers import Extract
from labeling.config import LabelingConfig
from labeling.sources import find_extract
from r2r_glimp.core import DataError, Model, Prompt, R2RGlimpError, UsageError
from r2r_glimp.engine.detokenizer import Detokenizer
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.prompts import encode_prompt, prompt_tail
from r2r_glimp.models.pair import AnyModel
from r2r_glimp.routing.routers import Router, named_router
from r2r_glimp.routing.steps import delimiter_pattern
from r2r_glimp.routing.tags import Section, ThinkTags, section_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A configuration, resolved against the models.

    Args:
        room: tokens a timeline holds at most.
        until: what ends a branch; None goes on to the end of the answer.
        extract: how a final answer is found; None if the source has none.
        router: who routes the responses of an on-policy round.
    """

    config: LabelingConfig
    engine: Engine
    room: int
    eos_ids: frozenset[int]
    step_pattern: re.Pattern[str]
    until: re.Pattern[str] | None
    extract: Extract | None
    router: Router

    @classmethod
    def resolve(
        cls, config: LabelingConfig, engine: Engine, router: Router | None = None
    ) -> "Setting":
        """Check a configuration against a pair.

        Raises:
            UsageError: the two tokenizers differ, or the verifier has nothing to compare.
            CheckpointError: the SLM has no such layer.
        """
        pair = engine.pair
        if not pair.same_vocabulary:
            raise UsageError(
                f"labels need a pair with one vocabulary, and {pair.apart} "
                f"({pair.slm.name}, {pair.llm.name}; the training-free routers need no labels)"
            )
        extract = find_extract(config.source)
        if config.verifier.kind == "answer" and extract is None:
            raise UsageError(
                "verifier.kind=answer, but how this source writes a final answer is not known: "
                "set source.answer, or choose the verifier judge or identical"
            )
        if config.top_k_logits > pair.slm.fingerprint.vocab_size:
            raise UsageError(
                f"top_k_logits={config.top_k_logits}, but the vocabulary has "
                f"{pair.slm.fingerprint.vocab_size} tokens"
            )
        if config.hidden_layer is not None:
            engine.runners[Model.SLM].keep_layer(config.hidden_layer)
        step = delimiter_pattern(config.delimiter)
        until = {"answer": None, "step": step, "sentence": delimiter_pattern("sentence")}
        return cls(
            config=config,
            engine=engine,
            room=min(engine.kv.capacity, *(pair[m].context_length for m in Model)),
            eos_ids=pair.slm.eos_token_ids | pair.llm.eos_token_ids,
            step_pattern=step,
            until=until[config.branches.until],
            extract=extract,
            router=router or named_router("llm"),
        )

    @property
    def slm(self) -> AnyModel:
        """The small model; its tokenizer is the pair's."""
        return self.engine.pair.slm

    @property
    def tags(self) -> ThinkTags | None:
        """The pair's think tags, None without."""
        return self.engine.tags

    @property
    def close(self) -> str | None:
        """The closing think tag, None without."""
        return None if self.tags is None else self.tags.close

    @property
    def on_policy(self) -> bool:
        """Whether the routed pair writes the responses."""
        return self.config.responses.by == "pair"

    def encode(self, text: str, where: str) -> list[int]:
        """A prompt's ids: through the chat template where the pair has one.

        Raises:
            DataError: it does not fit the context; says `where`.
        """
        chat = self.slm.tokenizer.chat_template is not None
        prompt: Prompt = [{"role": "user", "content": text}] if chat else text
        try:
            ids, _ = encode_prompt(prompt, self.engine.pair, self.tags, shared=True)
        except R2RGlimpError as error:
            raise DataError(f"{where}: {error}") from None
        if len(ids) >= self.room:
            raise DataError(
                f"{where}: the prompt has {len(ids):,} tokens, but only {self.room:,} fit "
                "(context of the pair, and engine.kv_memory): leave the row out"
            )
        return ids

    def section(self, prompt: list[int]) -> Section:
        """Where a prompt leaves the thinking."""
        return section_of(prompt_tail(prompt, self.slm.tokenizer, self.tags), self.tags)

    def pieces(self, prompt: list[int], tokens: list[int]) -> tuple[list[str], list[bool]]:
        """The text that each token makes readable, as the engine sees it, and whether no character
        is cut after it."""
        detokenizer = Detokenizer(self.slm.tokenizer, prompt)
        texts, complete = [], []
        for token in tokens:
            texts.append("" if token in self.eos_ids else detokenizer.append(token))
            complete.append(detokenizer.complete)
        return texts, complete

    def text(self, tokens: list[int]) -> str:
        """Text of tokens, without the end-of-text tokens; think tags stay."""
        kept = [token for token in tokens if token not in self.eos_ids]
        return cast(str, self.slm.tokenizer.decode(kept, skip_special_tokens=False))


def seed_of(*parts: str | int) -> int:
    """A seed that depends on names alone, not on an order."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

"""Prompts: text, chat messages or token ids to the token ids each model reads.

Special tokens that stand in a message stay text: nobody ends a turn, or opens another, by typing
`<|im_end|>`. A prompt given as text is the whole of what the model reads, special tokens and all.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from r2r_glimp.core import DataError, Model, Prompt, UsageError
from r2r_glimp.models.pair import AnyModel, ModelPair
from r2r_glimp.routing.tags import ThinkTags, section_of

_STAND_INS = 0xF0000  # code points of a private plane, where no text has meaning


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the ids that the SLM and the LLM read: one list for both where they share a
    vocabulary."""

    slm: list[int]
    llm: list[int]


def encode_prompt(
    prompt: Prompt,
    pair: ModelPair,
    tags: ThinkTags | None,
    *,
    shared: bool,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """The prompt's ids for the SLM and for the LLM: the same list where the pair shares a
    vocabulary.

    Messages go through each model's own chat template. With two tokenizers, thinking that one
    template opens is opened for the other model too, so that the tag stands once in both.

    Args:
        template_kwargs: further variables of the chat template, such as `enable_thinking`.

    Raises:
        DataError: empty, not encodable, or refused by the chat template.
        UsageError: token ids for a pair with two tokenizers, ids out of range, or messages without
            a chat template.
    """
    if shared:
        ids = _encode(prompt, pair.slm, template_kwargs or {})
        return ids, ids
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], int):
        raise UsageError(
            "token ids mean different text to the two tokenizers of this pair: "
            "pass text or messages"
        )
    slm, llm = (_encode(prompt, pair[model], template_kwargs or {}) for model in Model)
    sections = [
        section_of(prompt_tail(ids, pair[m].tokenizer, tags), tags)
        for m, ids in zip(Model, (slm, llm), strict=True)
    ]
    if tags is not None and "thinking" in sections:
        for model, ids, section in zip(Model, (slm, llm), sections, strict=True):
            if section != "thinking":
                ids += pair[model].tokenizer.encode(f"{tags.open}\n", add_special_tokens=False)
    return slm, llm


def prompt_tail(ids: list[int], tokenizer: PreTrainedTokenizerBase, tags: ThinkTags | None) -> str:
    """The prompt's text after its last special token; a think tag a user typed stands before it."""
    thinking = (tags.open, tags.close) if tags else ()
    names = [token for token in tokenizer.all_special_tokens if token not in thinking]
    special = {int(tokenizer.convert_tokens_to_ids(name)) for name in names}  # type: ignore[arg-type]
    start = next((i for i in range(len(ids), 0, -1) if ids[i - 1] in special), 0)
    return str(tokenizer.decode(ids[start:], skip_special_tokens=False))


def _encode(prompt: Prompt, loaded: AnyModel, template_kwargs: Mapping[str, Any]) -> list[int]:
    tokenizer = loaded.tokenizer
    if isinstance(prompt, str):
        if not prompt:
            raise DataError("the prompt is empty")
        ids = tokenizer(_valid(prompt))["input_ids"]
    elif prompt and all(isinstance(t, int) for t in prompt):
        ids = list(prompt)
        size = loaded.fingerprint.vocab_size
        if not all(0 <= t < size for t in ids):
            bad = next(t for t in ids if not 0 <= t < size)
            raise DataError(f"token ids must be 0 to {size - 1:,}: got {bad}")
    else:
        ids = _encode_messages(prompt, loaded, template_kwargs)
    if not ids:
        raise DataError("the prompt is empty")
    return ids


def _encode_messages(
    messages: Any, loaded: AnyModel, template_kwargs: Mapping[str, Any]
) -> list[int]:
    if not messages:
        raise DataError("the prompt is empty")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise DataError(
                f"a chat message needs the strings `role` and `content`: got {message!r:.80}"
            )
        _valid(message["content"])
    if loaded.tokenizer.chat_template is None:
        raise UsageError(f"{loaded.name} has no chat template: pass the prompt as text")
    tokenizer = loaded.tokenizer
    stand_ins = _find_special(messages, tokenizer)
    if stand_ins:
        messages = [_disguise(message, stand_ins) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **template_kwargs
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses these messages: {error}") from None
    if stand_ins:
        return _encode_disguised(str(text), tokenizer, stand_ins)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _find_special(messages: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A character to stand in for each special token that occurs in the messages' text."""
    text = "".join(message["content"] for message in messages)
    found = [token for token in tokenizer.get_added_vocab() if token in text]
    if not found:
        return {}
    used = set(text)
    unused = (c for i in range(_STAND_INS, _STAND_INS + 0xFFFE) if (c := chr(i)) not in used)
    # Longest first: one may begin with another.
    found.sort(key=len, reverse=True)
    return dict(zip(found, unused, strict=False))


def _disguise(message: dict[str, str], stand_ins: dict[str, str]) -> dict[str, str]:
    """A message with its special tokens replaced; templates look for think tags in what the
    assistant said, to leave out earlier thinking, so those stay."""
    visible = ("<think>", "</think>") if message["role"] == "assistant" else ()
    content = message["content"]
    for token, stand_in in stand_ins.items():
        if token not in visible:
            content = content.replace(token, stand_in)
    return {**message, "content": content}


def _encode_disguised(
    text: str, tokenizer: PreTrainedTokenizerBase, stand_ins: dict[str, str]
) -> list[int]:
    """Ids of a templated text: the template's special tokens are tokens, the disguised are not."""
    special = tokenizer.get_added_vocab()
    plain = _without_special_tokens(tokenizer)
    names = sorted(special, key=len, reverse=True)
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, names))})", text):
        if piece in special:
            ids.append(special[piece])
            continue
        for token, stand_in in stand_ins.items():
            piece = piece.replace(stand_in, token)
        written = plain.encode(piece, add_special_tokens=False).ids
        if not special.keys().isdisjoint(plain.id_to_token(i) for i in written):
            raise DataError("a message holds a special token that cannot be written as text")
        ids += written
    return ids


@lru_cache(maxsize=4)
def _without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The same tokenizer, to which special tokens are ordinary text."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(described | {"added_tokens": [], "post_processor": None}))


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the prompt is not valid Unicode text (character {error.start})") from None
    return text

"""Prompts: text, chat messages or token ids to the token ids each model reads."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from r2r_glimp.core import DataError, Model, Prompt, UsageError
from r2r_glimp.models.pair import LoadedModel, ModelPair
from r2r_glimp.routing.tags import ThinkTags, section_of


def encode_prompt(
    prompt: Prompt, pair: ModelPair, tags: ThinkTags | None, *, shared: bool
) -> tuple[list[int], list[int]]:
    """The prompt's ids for the SLM and for the LLM: the same list where the pair shares a
    vocabulary.

    Messages go through each model's own chat template. With two tokenizers, thinking that one
    template opens is opened for the other model too, so that the tag stands once in both.

    Raises:
        DataError: empty, or not encodable.
        UsageError: token ids for a pair with two tokenizers, ids out of range, or messages without
            a chat template.
    """
    if shared:
        ids = _encode(prompt, pair.slm)
        return ids, ids
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], int):
        raise UsageError(
            "token ids mean different text to the two tokenizers of this pair: "
            "pass text or messages"
        )
    slm, llm = (_encode(prompt, pair[model]) for model in Model)
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


def _encode(prompt: Prompt, loaded: LoadedModel) -> list[int]:
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
        ids = _encode_messages(prompt, loaded)
    if not ids:
        raise DataError("the prompt is empty")
    return ids


def _encode_messages(messages: Any, loaded: LoadedModel) -> list[int]:
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
    text = loaded.tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the prompt is not valid Unicode text (character {error.start})") from None
    return text

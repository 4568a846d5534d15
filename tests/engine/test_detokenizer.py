"""Readable text comes as soon as it can and never in half characters."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from r2r_glimp.engine.detokenizer import Detokenizer


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_pieces_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    detokenizer = Detokenizer(tokenizer, tokenizer("Say hats 4.")["input_ids"])
    pieces = [detokenizer.append(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + detokenizer.flush() == text


def test_a_character_belongs_to_the_token_that_completes_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    ids = tokenizer("a🎲")["input_ids"]
    assert [detokenizer.append(token) for token in ids] == ["a", "", "", "", "🎲"]
    assert detokenizer.complete


def test_bytes_that_are_no_text_do_not_block(tokenizer: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    half = tokenizer("🎲")["input_ids"][0]
    text = "".join(detokenizer.append(half) for _ in range(20)) + detokenizer.flush()
    assert text == "\ufffd" * 20

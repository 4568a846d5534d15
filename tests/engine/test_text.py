"""A text in pieces is the text."""

from hypothesis import given
from hypothesis import strategies as st

from r2r_glimp.engine.text import Text


@given(st.lists(st.text("ab ", max_size=4), max_size=8), st.integers(-3, 40))
def test_it_reads_like_a_string(pieces: list[str], start: int) -> None:
    text, whole = Text(), "".join(pieces)
    for piece in pieces:
        text.append(piece)
    assert (str(text), len(text)) == (whole, len(whole))
    assert text.since(start) == whole[max(0, start) :]

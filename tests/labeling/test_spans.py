"""Where branches stop, and what a draft is."""

from labeling.spans import span_ends, span_leads, span_length
from r2r_glimp.routing.steps import delimiter_pattern

STEP, SENTENCE = delimiter_pattern("blank_line"), delimiter_pattern("sentence")
PIECES = ["One", " and", ".", "\n", "\n", "Two", ".\n\n", "</think>", "\n\n", "Done", "."]


def test_spans_end_as_steps_do() -> None:
    assert span_length(PIECES, "", STEP, "</think>") == 5
    assert span_length(PIECES[5:], "", STEP, "</think>") == 2
    assert span_length(PIECES[7:], "", STEP, "</think>") == 1
    assert span_length(PIECES[9:], "", STEP, "</think>") == 2  # nothing ends it: all
    assert span_length(PIECES, "", SENTENCE, "</think>") == 3
    assert span_length(PIECES, "", None, "</think>") == len(PIECES)


def test_a_lead_is_part_of_its_span() -> None:
    assert not span_ends("\n\n", STEP, None)  # white space alone is no step
    assert span_ends("x\n\n", STEP, None)
    assert span_length(["\n", "\n", "Two", "\n\n"], "One", STEP, None) == 2
    leads = span_leads(PIECES, STEP, "</think>")
    assert leads[:6] == ["", "One", "One and", "One and.", "One and.\n", ""]
    assert leads[7:9] == ["", ""]

"""The policy: whose turn it is, rule by rule."""

import pytest

from r2r_glimp.core import Model, RoutingParams, UsageError
from r2r_glimp.routing.policy import Policy, Route, Turn
from r2r_glimp.routing.routers import EntropyRouter, Router, named_router
from r2r_glimp.routing.tags import Section, ThinkTags, find_tags, section_of

SLM, LLM = Model.SLM, Model.LLM
TAGS = ThinkTags()


def policy(
    section: Section = "thinking", router: str = "entropy", tags: ThinkTags | None = TAGS, **params
) -> Policy:  # type: ignore[no-untyped-def]
    route = Route.resolve(RoutingParams(**params), named_router(router), shared=True)
    return Policy(route, tags, section)


def test_a_token_decision_lasts_one_token() -> None:
    p = policy(granularity="token", threshold=1.0)
    assert p.turn is Turn.DECIDE
    assert p.decide(1.5) is True
    assert p.turn is Turn.LLM
    p.append(LLM, "So")
    assert p.turn is Turn.DECIDE


def test_the_rule_is_above_not_at_the_threshold() -> None:
    """The paper says H > tau; its code compares with >=."""
    assert policy(threshold=1.0).decide(1.0) is False
    assert policy(threshold=1.0).decide(1.0001) is True


def test_a_step_decision_lasts_through_the_delimiter() -> None:
    p = policy(granularity="step", threshold=1.0)
    p.decide(2.0)
    for text in ("So", " 4", ".\n"):
        assert p.turn is Turn.LLM
        p.append(LLM, text)
    assert p.turn is Turn.LLM
    p.append(LLM, "\n")
    assert p.turn is Turn.DECIDE


def test_opening_white_space_is_no_place_for_a_decision() -> None:
    p = policy(granularity="step")
    assert p.is_opening("\n")
    p.append(SLM, "\n")
    assert not p.is_opening("So")
    p.decide(0.0)
    p.append(SLM, "So.\n\n")
    assert not p.is_opening("\n")  # only a section opens, not a step


def test_the_opening_is_bounded() -> None:
    p = policy(granularity="step")
    for _ in range(8):
        assert p.is_opening("\n")
        p.append(SLM, "\n")
    assert not p.is_opening("\n")


def test_the_tag_itself_is_never_probed() -> None:
    """GlimpRouter reads the entropy of `<think>` as its first step's; here the tag is not a
    step."""
    p = policy("preamble", granularity="step")
    assert p.is_opening("<think>")
    p.append(SLM, "<think>")
    assert p.section == "thinking"
    assert p.is_opening("\n") and not p.is_opening("First")
    assert p.num_thinking == 0


def test_a_tag_in_pieces_opens_the_thinking() -> None:
    p = policy("preamble", granularity="step")
    for piece in ("<th", "ink", ">"):
        assert p.is_opening(piece)
        p.append(SLM, piece)
    assert p.section == "thinking"


def test_thinking_without_a_tag_is_thinking_all_the_same() -> None:
    p = policy("preamble", granularity="step")
    assert not p.is_opening("First")
    p.decide(0.0)
    p.append(SLM, "First")
    assert p.section == "thinking" and p.num_thinking == 1


@pytest.mark.parametrize(
    ("granularity", "answer_by", "turn"),
    [
        ("step", None, Turn.LLM),
        ("token", None, Turn.DECIDE),
        ("step", "slm", Turn.SLM),
        ("step", "router", Turn.DECIDE),
        ("token", "llm", Turn.LLM),
        ("token", "slm", Turn.SLM),
    ],
)
def test_who_answers(granularity: str, answer_by: str | None, turn: Turn) -> None:
    p = policy(granularity=granularity, answer_by=answer_by)
    p.decide(0.0)
    p.append(SLM, "So.\n\n")
    p.decide(0.0)
    p.append(SLM, "</think>")
    assert p.section == "answer"
    for text in ("\n\n", "Answer", " 4"):
        assert p.turn is turn
        if turn is Turn.DECIDE and not p.is_opening(text):
            break
        p.append(LLM if turn is Turn.LLM else SLM, text)


def test_an_answer_by_the_router_is_one_decision() -> None:
    p = policy("answer", granularity="step", answer_by="router", threshold=1.0)
    assert p.is_opening("\n\n")
    p.append(SLM, "\n\n")
    p.decide(2.0)
    for text in ("Answer", "\n\n", " 4"):
        assert p.turn is Turn.LLM
        p.append(LLM, text)


@pytest.mark.parametrize(("name", "turn"), [("slm", Turn.SLM), ("llm", Turn.LLM)])
def test_baselines_never_ask(name: str, turn: Turn) -> None:
    for granularity in ("token", "step"):
        p = policy("preamble", router=name, granularity=granularity)
        for text in ("<think>", "\n", "So.\n\n", "So.\n\n", "</think>", "\n\n", "Answer"):
            assert p.turn is turn
            p.append(SLM if turn is Turn.SLM else LLM, text)


def test_a_long_step_gets_a_new_decision_and_nothing_is_spliced_in() -> None:
    p = policy(granularity="step", max_step_tokens=3)
    p.decide(0.0)
    for text in (" a", " b", " c"):
        assert p.turn is Turn.SLM
        p.append(SLM, text)
    assert p.turn is Turn.DECIDE and not p.close_due


def test_a_step_is_never_cut_inside_a_character() -> None:
    p = policy(granularity="step", max_step_tokens=2)
    p.decide(0.0)
    p.append(SLM, "a")
    p.append(SLM, "", complete=False)
    assert p.turn is Turn.SLM
    p.append(SLM, "é")
    assert p.turn is Turn.DECIDE


def test_max_thinking_tokens_closes_the_thinking() -> None:
    p = policy(granularity="step", max_thinking_tokens=2)
    p.decide(0.0)
    p.append(SLM, "So")
    assert not p.close_due
    p.append(SLM, " on")
    assert p.close_due and p.closing_text() == "\n\n</think>\n\n"
    p.append(SLM, "\n\n")
    p.append(SLM, "</think>")
    assert p.section == "answer" and not p.close_due


@pytest.mark.parametrize("granularity", ["token", "step"])
@pytest.mark.parametrize("period", [1, 2, 3])
def test_a_loop_is_escalated_once_then_closed(granularity: str, period: int) -> None:
    """R2R loses 80% of its failures to endless repetition."""
    p = policy(granularity=granularity, threshold=1.0)
    steps = ["a.\n\n", "b.\n\n", "c.\n\n"][:period]
    for text in steps * 2:
        assert p.turn is Turn.DECIDE
        p.decide(0.0)
        p.append(SLM, text)
    assert p.turn is Turn.LLM and not p.close_due
    p.append(LLM, "d")
    assert p.turn is Turn.LLM  # the LLM keeps the whole step, also at token granularity
    p.append(LLM, ".\n\n")
    assert p.turn is Turn.DECIDE
    for text in ["e.\n\n"] * 2:
        p.decide(0.0)
        p.append(SLM, text)
    assert p.close_due and p.repeated


def test_baselines_have_no_guard_unless_asked() -> None:
    p = policy(router="slm", granularity="step")
    for _ in range(6):
        p.append(SLM, "a.\n\n")
    assert not p.close_due


def test_the_cap_holds_at_every_position() -> None:
    p = policy(granularity="step", threshold=1.0, max_llm_share=0.5)
    assert p.decide(2.0) is False and p.capped  # the first token may not be the LLM's
    p.append(SLM, "a.\n\n")
    assert p.decide(2.0) is True
    p.append(LLM, "b")
    # 1 of 2; one more would be 2 of 3: the SLM finishes the step.
    assert p.turn is Turn.SLM
    p.append(SLM, " c")
    assert p.turn is Turn.SLM


def test_contradictions_are_refused() -> None:
    class StepRouter(Router):
        name = "mine"
        granularity = "step"

    with pytest.raises(UsageError, match="was trained for granularity step"):
        Route.resolve(RoutingParams(granularity="token"), StepRouter(), shared=True)
    assert Route.resolve(RoutingParams(), StepRouter(), shared=True).granularity == "step"
    with pytest.raises(UsageError, match="tokenizers of this pair differ"):
        Route.resolve(RoutingParams(granularity="token"), EntropyRouter(), shared=False)
    assert Route.resolve(RoutingParams(), EntropyRouter(), shared=False).granularity == "step"


@pytest.mark.parametrize(
    ("tail", "section"),
    [
        ("assistant\n<think>\n", "thinking"),
        ("assistant\n", "preamble"),
        ("assistant\n<think>\n\n</think>\n\n", "answer"),
        ("assistant\n<think>\nFirst, ", "thinking"),
    ],
)
def test_where_a_prompt_leaves_the_thinking(tail: str, section: Section) -> None:
    assert section_of(tail, TAGS) == section
    assert section_of(tail, None) == "thinking"


def test_tags_need_both_tokens() -> None:
    assert find_tags({"<think>": 1, "</think>": 2}) == TAGS
    assert find_tags({"<think>": 1}) is None

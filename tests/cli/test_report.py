"""`inspect OUTPUTS --html`: a page of what was recorded, drawn in Chromium where there is one."""

import json
import re

import pytest

from r2r_glimp.cli.report import TEMPLATE
from tests.browser import Browser, browser  # noqa: F401

EVIL = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>\ud800"


def output(scores, threshold=0.5, *, texts=None, spans=None, name="a", answer="", **fields):
    """An output as `generate --json --trace` writes it: a decision per token, or per span."""
    spans = spans or [1] * len(scores)
    texts = texts or [f" t{i}" for i in range(sum(spans))]
    sources, trace = [], []
    for score, length in zip(scores, spans, strict=True):
        writer = "llm" if score > threshold else "slm"
        for offset in range(length):
            taken = {"score": score, "threshold": threshold, "deferred": writer == "llm"}
            none = {"score": None, "threshold": None, "deferred": False}
            own = {"slm_token": 1, "llm_token": 1 if score < 0.3 else 2} if not offset else {}
            row = {"position": len(sources), "source": writer, "token": len(sources)}
            trace.append(row | (none if offset else taken) | own)
            sources.append(writer)
    record = {"id": name, "text": "".join(texts), "sources": sources, "finish_reason": "stop"}
    more = {"stats": {}, "token_ids": list(range(len(sources))), "token_texts": texts}
    return record | more | {"trace": trace} | fields


@pytest.fixture
def draw(cli, jsonl, tmp_path):
    """`draw(record, ...)`: the page of these outputs."""

    def run(*records):
        page = tmp_path / "page.html"
        result = cli("inspect", jsonl(*records), "--html", page, "--overwrite")
        assert result.code == 0, result.err
        assert "written" in result.err and "LLM share" in result.out
        return page

    return run


def data_of(page):
    match = re.search(r'<script type="application/json" id="run">(.*?)</script>', page.read_text())
    return json.loads(match[1])


def test_what_the_page_holds(draw) -> None:
    routed = output([0.1, 0.9, 0.2, 0.6])
    random = output([0.1, 0.9])
    for row in random["trace"]:
        row["deferred"] = row["score"] < row["threshold"]
    steps = output([0.1, 0.9], spans=[3, 2])
    steps["trace"][-1]["phase"] = "answer"
    neither = output([0.1, 0.9])
    neither["trace"][0]["deferred"] = neither["trace"][1]["deferred"] = True
    plain = {k: v for k, v in output([0.1]).items() if k not in ("trace", "token_texts")}
    run = data_of(draw(routed, random, steps, neither, plain))
    assert [o["rule"] for o in run["outputs"][:4]] == ["above", "below", "above", None]
    assert [o["steps"] for o in run["outputs"]] == [False, False, True, False, False]
    assert [o["answer"] for o in run["outputs"]] == [4, 2, 4, 2, 1]
    assert run["outputs"][4]["decisions"] == run["outputs"][4]["texts"] == []
    assert run["thresholds"] == [0.5] and ["threshold", "0.5"] in run["facts"]
    first = run["outputs"][0]["decisions"][0]
    assert first["slm"] == " t1" and first["same"] and not first["deferred"]


def test_a_capped_decision_was_still_wanted(draw) -> None:
    record = output([0.1, 0.9])
    record["trace"][1] |= {"deferred": False, "capped": True, "source": "slm"}
    record["sources"][1] = "slm"
    (drawn,) = data_of(draw(record))["outputs"]
    assert drawn["rule"] == "above" and drawn["decisions"][1]["deferred"]


def test_a_trace_is_data_and_nothing_else(draw) -> None:
    """Whatever is recorded, the page has the template's elements and no more."""
    record = output([0.1, 0.9], texts=[EVIL, EVIL], name=EVIL, finish_reason=EVIL)
    page = draw(record)
    text = page.read_text(encoding="utf-8")
    count = lambda text: {tag: text.count(tag) for tag in ("<script", "</script", "<img", "<!--")}  # noqa: E731
    assert count(text) == count(TEMPLATE.read_text(encoding="utf-8"))
    assert data_of(page)["outputs"][0]["texts"] == [EVIL, EVIL]
    assert "https:" not in text and "http:" not in text
    assert "default-src &#x27;none&#x27;" in text and "unsafe" not in text


BAD_FIELDS = [
    {"token_texts": "abc"},
    {"token_texts": [1, 2]},
    {"token_ids": [{}]},
    {"stats": {"switches": "many"}},
    {"trace": [{"position": 0}]},
]
BAD_ROWS = [
    {"score": "high"},
    {"score": 10**400},
    {"threshold": None},
    {"source": ["slm"]},
    {"deferred": "no"},
    {"llm_token": "x"},
    {"position": 0.5},
    {"phase": 3},
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=str)
def test_a_trace_that_is_none(cli, jsonl, tmp_path, row) -> None:
    record = output([0.1])
    record["trace"][0] |= row
    _refused(cli, jsonl(record), tmp_path)


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=str)
def test_an_output_that_is_none(cli, jsonl, tmp_path, fields) -> None:
    _refused(cli, jsonl(output([0.1]) | fields), tmp_path)


def _refused(cli, path, tmp_path) -> None:
    result = cli("inspect", path, "--html", tmp_path / "page.html")
    assert result.code == 2 and "line 1: not an output" in result.error
    assert not (tmp_path / "page.html").exists()


def test_positions_beyond_the_text_are_left_out(draw) -> None:
    record = output([0.1, 0.9])
    record["trace"][1]["position"] = 10**30
    record["trace"].append(record["trace"][0] | {"position": -1})
    assert [d["at"] for d in data_of(draw(record))["outputs"][0]["decisions"]] == [0]


def test_files_in_the_way(cli, jsonl, tmp_path) -> None:
    path, page = jsonl(output([0.1])), tmp_path / "page.html"
    page.write_text("mine")
    result = cli("inspect", path, "--html", page)
    assert result.code == 2 and "is there already" in result.error
    assert page.read_text() == "mine"
    assert cli("inspect", path, "--html", page, "--overwrite").code == 0
    assert page.read_text().startswith("<!doctype html>")
    before = path.read_bytes()
    result = cli("inspect", path, "--html", path, "--overwrite")
    assert result.code == 2 and "the file that is read" in result.error
    assert path.read_bytes() == before
    for argv, message in (
        (["--html", tmp_path], "is a folder"),
        (["--html", tmp_path / "no" / "page.html"], "there is no folder"),
        (["--overwrite"], "goes with --html"),
    ):
        result = cli("inspect", path, *argv)
        assert result.code == 2 and message in result.error
    result = cli("inspect", "abacus", "--html", tmp_path / "new.html")
    assert result.code == 2 and "recorded outputs or labels" in result.error


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def show(browser: Browser, draw):  # noqa: F811
    """`show(record, ...)`: their page in the browser, which must not complain."""

    def run(*records):
        browser.open(draw(*records).as_uri())
        return browser

    yield run
    assert not browser.complaints()


def marks(page: Browser) -> str:
    """Who wrote each token, by the marks: `s`, `l`, and in capitals where the preview turns it."""
    return page.run("""return [...document.querySelectorAll("#texts .t")].map((node) => {
        const mark = node.classList[1][0];
        return node.classList.contains("changed") ? mark.toUpperCase() : mark;
    }).join("")""")


def test_replaying_thresholds_per_token(show) -> None:
    page = show(output([0.1, 0.9, 0.2, 0.6]), output([0.05, 0.4], name="b"))
    assert marks(page) == "slsl"
    assert page.text("#preview") == "LLM share 33.3%, as recorded"
    page.set("#threshold", 0.15)
    assert marks(page) == "slLl"
    assert page.text("#preview").startswith("LLM share 66.7% in preview, 33.3% recorded; 2 of 6")
    assert "known at 2: 1 times it is the SLM's token" in page.text("#agreement")
    page.set("#threshold", 0.7)
    assert marks(page) == "slsS" and "16.7%" in page.text("#preview")
    page.set("#slider", 0)
    assert "LLM share 100.0%" in page.text("#preview")
    page.set("#slider", 10**6)
    assert "LLM share 0.0%" in page.text("#preview")
    page.set("#pick", 1)
    assert marks(page) == "ss"
    page.click("#reset")
    assert page.text("#preview") == "LLM share 33.3%, as recorded"
    assert "preview" in page.text("#replay") and "another text" in page.text("#replay")


def test_replaying_thresholds_per_step(show) -> None:
    texts = ["One", ".\n\n", "Two", ".\n\n", "</think>", "\n\n", "4", ""]
    record = output([0.1, 0.9, 0.2], spans=[2, 2, 4], texts=texts)
    for row in record["trace"][5:]:
        row |= {"phase": "answer", "source": "llm"}
    record["sources"][5:] = ["llm"] * 3
    page = show(record)
    heads = "return [...document.querySelectorAll('.head')].map((head) => head.textContent)"
    assert page.run(heads) == [
        "Step 1 · SLM · score 0.1", "Step 2 · LLM · score 0.9", "Step 3 · SLM · score 0.2",
        "Answer · LLM",
    ]  # fmt: skip
    assert "62.5%" in page.text("#preview")
    page.set("#threshold", 0.15)  # the last step, and not the answer, which nobody decided
    assert page.run(heads)[2:] == ["Step 3 · LLM, recorded SLM · score 0.2", "Answer · LLM"]
    assert "75.0% in preview" in page.text("#preview")
    page.set("#threshold", 1)
    assert page.run(heads)[1] == "Step 2 · SLM, recorded LLM · score 0.9"
    assert "37.5% in preview" in page.text("#preview")
    page.set("#cards", False)
    assert page.run("return document.querySelectorAll('.steps').length") == 0


def test_the_random_routers_rule(show) -> None:
    record = output([0.1, 0.9])
    for row in record["trace"]:
        row["deferred"] = row["score"] < row["threshold"]
    record["sources"] = ["llm", "slm"]
    page = show(record)
    page.set("#threshold", 0.95)
    assert marks(page) == "lL"


def test_evil_text_is_shown_as_text(show) -> None:
    evil = EVIL[:-1]  # the driver has no word for a lone surrogate
    page = show(output([0.1, 0.9], texts=[evil, " b"], name=evil))
    assert page.run("return window.pwned") is None
    assert page.run("return document.querySelectorAll('img').length") == 0
    assert "<img src=x" in page.text("#texts .t") and "<img" in page.text("#pick option")
    page.point("#texts .t.llm")
    assert "score 0.9, threshold 0.5" in page.text("#tip")


def test_nothing_to_replay(show) -> None:
    plain = {k: v for k, v in output([0.1]).items() if k not in ("trace", "token_texts")}
    page = show(plain)
    assert "--trace" in page.text("#no-replay") and page.text("#texts") == " t0"
    assert page.run("return document.querySelector('#replay').hidden")
    neither = output([0.1, 0.9])
    neither["trace"][0]["deferred"] = True
    neither["trace"][1]["deferred"] = True
    assert "follow no threshold" in show(neither).text("#no-replay")

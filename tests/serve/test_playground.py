"""The playground: one page, safe to serve; used in Chromium as a person would."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

from r2r_glimp.models import ModelPair
from r2r_glimp.serve.app import PLAYGROUND
from tests.browser import Browser, browser  # noqa: F401
from tests.serve.conftest import Live, start

PAGE = PLAYGROUND.read_text(encoding="utf-8")
EXAMPLES = re.findall(r'"(Say .*?)"\]', PAGE.replace("\\n", "\n"), re.DOTALL)
QUESTION = EXAMPLES[0]
RIGHT, SHIFT, ENTER, TAB, ESCAPE = "\ue014", "\ue008", "\ue007", "\ue004", "\ue00c"
DONE = "document.querySelector('#status').textContent.startsWith('Done')"

# Puts a stream of our own in the server's place: arguments are the chunks, and whether it ends.
FAKE = """
const [chunks, ends] = arguments;
window.fetch = async (path, { signal } = {}) => new Response(new ReadableStream({
  start(controller) {
    signal?.addEventListener("abort", () => controller.error(new DOMException("", "AbortError")));
    const send = (line) => controller.enqueue(new TextEncoder().encode(`data: ${line}\\n\\n`));
    chunks.forEach((chunk) => send(JSON.stringify(chunk)));
    if (ends) { send("[DONE]"); controller.close(); }
  },
}));
"""


def chunk(text: str, source: str = "slm", score: float | None = 0.25, **fields) -> dict:
    tokens = [{"token_id": 1, "text": text, "source": source, "score": score}]
    return {"choices": [{"delta": {"content": text}, "routing": {"tokens": tokens}, **fields}]}


# ---------------------------------------------------------------- the page as a file


class Elements(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_comes_from_elsewhere() -> None:
    assert not re.search(r"(https?:)?//[\w.]+\.\w", re.sub(r"(?m)^\s*//.*$|\s// .*$", "", PAGE))
    assert "@import" not in PAGE and "url(" not in PAGE
    for tag, attributes in Elements(PAGE).found:
        assert not {"src", "srcdoc", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("href", "#").startswith(("#", "data:,"))


def test_text_is_only_ever_text() -> None:
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                 "localStorage", "sessionStorage", "cookie"):  # fmt: skip
        assert word not in PAGE


def test_every_field_has_a_name() -> None:
    elements = Elements(PAGE).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {v for _, a in elements for k, v in a.items() if k in ("for", "aria-describedby")}
    assert targets <= set(ids)
    assert set(re.findall(r'\$\("([\w-]+)"\)', PAGE)) <= set(ids)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_parses(tmp_path) -> None:
    script = re.search(r"<script>(.*?)</script>", PAGE, re.DOTALL)
    assert script is not None
    (tmp_path / "page.js").write_text(script[1])
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)


def test_the_policy_lets_nothing_else_run(live: Live) -> None:
    reply = live.http.get("/")
    assert reply.text == PAGE
    policy = dict(
        part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["style-src"])
    assert policy["require-trusted-types-for"] == "'script'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def abacus() -> Iterator[Live]:
    """A server of the bundled pair."""
    live = start(ModelPair.from_config("abacus"), router="entropy", max_tokens=200)
    yield live
    live.wait_idle()
    live.stop()


@pytest.fixture
def page(browser: Browser, abacus: Live) -> Iterator[Browser]:  # noqa: F811
    """The playground, freshly opened; the browser must not have complained at the end."""
    browser.open(abacus.url)
    browser.wait("document.querySelectorAll('#router option').length > 1")
    yield browser
    assert not browser.complaints()


def share(page: Browser) -> float:
    """What the last reply's meter says."""
    return float(page.run("return [...document.querySelectorAll('.meter')].at(-1).ariaValueNow"))


def count(page: Browser, selector: str) -> int:
    return page.run("return document.querySelectorAll(arguments[0]).length", selector)


def ask(page: Browser, question: str = QUESTION) -> None:
    page.type("#question", question.replace("\n", SHIFT + ENTER + SHIFT) + ENTER)
    page.wait(DONE)


def test_the_threshold_decides_who_writes(page: Browser) -> None:
    page.set("#granularity", "token")
    page.set("#router", "entropy")
    page.set("#rule", "threshold")
    page.set("#amount", 0.5)
    ask(page)
    assert count(page, ".t.slm") > 10 and count(page, ".t.llm") >= 1
    first = share(page)
    assert 0 < first < 50
    assert page.run("return document.querySelector('.question').textContent") == QUESTION
    assert "Answer" in page.text(".answer") and "Sum cups" in page.text(".reasoning")
    assert "threshold 0.5" in page.text(".reply header")
    # Not by colour alone.
    kinds = [
        page.run(
            "return getComputedStyle(document.querySelector(arguments[0])).textDecorationStyle",
            f"#turns .t.{writer}",
        )
        for writer in ("slm", "llm")
    ]
    assert kinds == ["dotted", "solid"]
    shares = [first]
    for threshold in (0.001, 9):
        page.set("#amount", threshold)
        before = count(page, ".turn")
        page.click("#again")
        page.wait(f"document.querySelectorAll('.turn').length > {before} && {DONE}")
        shares.append(share(page))
    assert shares[1] > first > shares[2] == 0


def test_the_examples_are_questions_of_the_abacus_world(abacus: Live) -> None:
    replies = [
        abacus.chat(
            model="pair:llm", messages=[{"role": "user", "content": text}], max_tokens=200
        ).json()
        for text in EXAMPLES
    ]
    answers = [reply["choices"][0]["message"]["content"] for reply in replies]
    assert answers == ["Answer 5.", "Answer 6.", "Answer 3."]


def test_a_tooltip_tells_the_decision(page: Browser) -> None:
    page.set("#router", "entropy")
    page.set("#rule", "threshold")
    page.set("#amount", 0.5)
    ask(page)
    page.point(".reasoning .t.llm")
    tip = page.text("#tip")
    assert "LLM" in tip and "threshold 0.5" in tip
    assert float(tip.partition("score ")[2].partition(",")[0]) > 0.5
    page.press(ESCAPE)
    assert page.run("return document.querySelector('#tip').hidden")
    # The same by keyboard, said aloud.
    page.run("document.querySelector('.reasoning .tokens').focus()")
    page.press(RIGHT, RIGHT)
    assert count(page, ".t.current") == 1
    assert page.text("#tip") == page.run("return document.querySelector('#spoken').textContent")


def test_steps_are_cards(page: Browser) -> None:
    page.set("#granularity", "step")
    page.set("#router", "entropy")
    page.set("#rule", "threshold")
    page.set("#amount", 0.001)
    ask(page)
    heads = page.run(
        "return [...document.querySelectorAll('.steps .head')].map((h) => h.innerText)"
    )
    assert len(heads) == 5 and heads[0].startswith("Step 1") and "score" in heads[0]
    assert all("0.001" in head for head in heads)  # the threshold, on its side of the score
    assert heads[4].startswith("Close")
    page.set("#granularity", "token")
    page.click("#again")
    page.wait(f"document.querySelectorAll('.turn').length > 1 && {DONE}")
    assert count(page, ".turn:last-child .steps") == 0


def test_each_model_beside_the_pair(page: Browser) -> None:
    page.set("#compare", True)
    page.set("#router", "random")
    page.set("#rule", "target_llm_share")
    page.set("#amount", 0.4)
    ask(page)
    assert "wanted 40.0%" in page.text(".reply header")
    values = page.run("return [...document.querySelectorAll('.meter')].map((m) => m.ariaValueNow)")
    assert len(values) == 3 and [float(v) for v in values[1:]] == [0, 100]


def test_what_the_server_refuses_is_told(page: Browser) -> None:
    page.set("#router", "entropy")
    page.set("#rule", "target_llm_share")
    page.type("#question", "Hi" + ENTER)
    page.wait("document.querySelector('#status').textContent === 'Failed'")
    assert page.text(".error").startswith("400: router 'entropy' has no calibration")
    assert any("400" in line for line in page.complaints())  # the browser's own word on it


def test_nothing_is_sent_while_a_setting_is_wrong(page: Browser) -> None:
    page.set("#rule", "threshold")
    page.set("#amount", "")
    page.type("#question", "Hi" + ENTER)
    assert count(page, ".turn") == 0
    assert page.run("return document.activeElement.id") == "amount"


def test_a_key_is_asked_for_and_forgotten(browser: Browser, serve) -> None:  # noqa: F811
    live = serve(keys=("secret",))
    browser.open(live.url)
    browser.wait("document.querySelector('#served').textContent.startsWith('401')")
    browser.set("#key", "secret")
    browser.wait("document.querySelectorAll('#router option').length > 1")
    browser.type("#question", "cups" + ENTER)
    browser.wait(DONE)
    assert browser.run("return localStorage.length + sessionStorage.length") == 0
    browser.open(live.url)
    assert browser.run("return document.querySelector('#key').value") == ""
    browser.wait("document.querySelector('#served').textContent.startsWith('401')")
    assert all("401" in line for line in browser.complaints())


def test_text_of_models_is_no_markup(page: Browser) -> None:
    evil = '<img src=x onerror="window.pwned = 1"><script>window.pwned = 1</script>'
    page.run(FAKE, [chunk(evil, finish_reason="stop")], True)
    ask(page, evil)
    assert page.text(".answer .t") == page.text(".question") == evil
    assert count(page, "img") == 0 and page.run("return window.pwned") is None
    # And if the script were ever changed to try, the browser itself would refuse.
    refused = "try { document.body.innerHTML = '<b>x</b>'; return false } catch { return true }"
    assert page.run(refused)
    assert any("TrustedHTML" in line for line in page.complaints())


def test_an_error_amid_a_stream_keeps_what_came(page: Browser) -> None:
    page.run(FAKE, [chunk("Hello"), {"error": {"message": "it failed"}}], False)
    page.type("#question", "Hi" + ENTER)
    page.wait("document.querySelector('#status').textContent === 'Failed'")
    assert page.text(".error") == "it failed" and page.text(".answer .t") == "Hello"
    page.run(FAKE, [chunk("Hello")], False)


def test_stopping(page: Browser) -> None:
    page.run(FAKE, [chunk("Hello"), chunk(" there", "llm")], False)
    page.type("#question", "Hi")
    page.click("#send")
    page.wait("document.querySelectorAll('.answer .t').length === 2")
    assert share(page) == 50
    assert page.run("return document.querySelector('.reply').ariaBusy") == "true"
    assert page.run("return document.activeElement.id") == "stop"
    page.click("#stop")
    page.wait(DONE)
    assert "stopped" in page.text(".end") and page.text(".error") == ""
    assert page.run("return document.activeElement.id") == "question"


def test_conversations(page: Browser) -> None:
    """What earlier messages are sent: those of the pair, if wanted; asking again replaces."""
    page.run(FAKE, [chunk("Yes.")], True)
    page.run("""window.sent = []; const inner = fetch;
        fetch = (path, options) => (sent.push(JSON.parse(options.body)), inner(path, options));""")
    page.set("#remember", True)
    for number, question in enumerate(("One", "Two"), start=1):
        ask(page, question)
        page.wait(f"sent.length === {number} && {DONE}")
    page.click("#again")
    page.wait(f"sent.length === 3 && {DONE}")
    page.set("#remember", False)
    ask(page, "Three")
    page.wait(f"sent.length === 4 && {DONE}")
    sent = page.run("return sent.map(({ messages }) => messages.map((m) => m.content))")
    assert sent == [["One"], ["One", "Yes.", "Two"], ["One", "Yes.", "Two"], ["Three"]]
    page.click("#clear")
    assert count(page, ".turn") == 0


def test_themes_and_sizes(page: Browser) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    page.prefer(prefers_color_scheme="light", prefers_reduced_motion="reduce")
    light = page.run(background)
    page.prefer(prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    dark = page.run(background)
    page.click("#theme")
    assert page.text("#theme") == "Theme: light" and page.run(background) == light != dark
    ask(page)
    moves = "return getComputedStyle(document.querySelector('.meter > div')).transitionDuration"
    assert page.run(moves) == "0s"
    page.resize(360, 700)
    try:
        assert page.run("return document.documentElement.scrollWidth") <= 360
    finally:
        page.resize(1280, 860)
        page.prefer()


def test_the_order_of_the_keyboard(page: Browser) -> None:
    """Tab leads to the question at once by the skip link, or through the settings."""
    page.run("document.activeElement.blur()")
    page.press(TAB)
    assert page.run("return document.activeElement.className") == "skip"
    page.press(ENTER)
    assert page.run("return document.activeElement.id") == "question"
    names = page.run("""return [...document.querySelectorAll('input, select, textarea, button')]
        .map((node) => node.labels?.length || node.textContent.trim().length)""")
    assert all(names)

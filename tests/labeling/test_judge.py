"""A judge behind HTTP: verdicts, retries, and an endpoint that fails in every way."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from labeling.config import LabelingConfig
from labeling.continue_ import Branch, Fork
from labeling.judge import EndpointJudge, LocalJudge
from labeling.run import run
from labeling.schema import Label
from labeling.sections import BranchConfig, JudgeConfig, SourceConfig, VerifierConfig
from labeling.verifiers import by_verdicts, judge_prompts, parse_verdict
from r2r_glimp.core import EngineError, UsageError
from r2r_glimp.models import ModelPair
from tests.labeling.conftest import read

Reply = tuple[int, dict[str, str], bytes]


def says(text: str) -> Reply:
    body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, {}, json.dumps(body).encode()


class Endpoint:
    """A server whose replies are a function of the request, with a count of what came at once."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]) -> None:
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.requests.append(body | {"path": self.path})
                    endpoint.headers.append(dict(self.headers))
                    endpoint.now += 1
                    endpoint.most = max(endpoint.most, endpoint.now)
                    number = len(endpoint.requests)
                status, headers, content = endpoint.reply(body, number)
                with endpoint.lock:
                    endpoint.now -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    endpoints = []

    def start(reply: Callable[[dict[str, Any], int], Reply]) -> Endpoint:
        endpoints.append(Endpoint(reply))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.server.shutdown()
        endpoint.server.server_close()


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("SAME", "same"),
        (" Different.\n", "different"),
        ("**same**", "same"),
        ("<think>SAME? no</think>\nDIFFERENT", "different"),
        ("They are the same", None),
        ("SAME or DIFFERENT", None),
        ("not the same", None),
        ("1", None),
        ("", None),
    ],
)
def test_only_a_verdict_is_a_verdict(answer: str, verdict: str | None) -> None:
    assert parse_verdict(answer) == verdict


def test_verdicts_must_agree() -> None:
    assert by_verdicts(["SAME", "same."]).label is Label.NEUTRAL
    assert by_verdicts(["DIFFERENT"]).label is Label.DIVERGENT
    assert (by_verdicts(["SAME", "DIFFERENT"]).note, by_verdicts(["SAME", "eh"]).note) == (
        "disagreement",
        "unparsable",
    )
    assert by_verdicts(["SAME", "DIFFERENT"]).label is Label.UNLABELED
    assert by_verdicts(["SAME", "eh"]).label is Label.UNLABELED


def test_prompts_show_both_sentences_in_both_orders() -> None:
    fork = Fork(3, "So ", Branch([1], "books 7."), Branch([2], "cups 7."))
    first, second = judge_prompts(
        fork, "How many?", "Cups are 7. So ", both_orders=True, context_chars=8
    )
    assert "A goes on:\nSo <<cups>> 7.\n" in first and "B goes on:\nSo <<books>> 7.\n" in first
    assert "A goes on:\nSo <<books>> 7.\n" in second
    assert "\n… are 7. \n" in first and "How many?" in first
    [only] = judge_prompts(fork, "How many?", "So ", both_orders=False, context_chars=8)
    assert "(nothing)" in only


def test_labels_come_from_the_endpoint(
    serve: Callable[..., Endpoint],
    pair: ModelPair,
    make_config: Callable[..., LabelingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        text = body["messages"][0]["content"]
        if number % 7 == 0:
            return 429, {"Retry-After": "0"}, b"slow down"
        first, second = text.split("A goes on:\n")[1].split("\n\nWriter B goes on:\n")
        digits = [
            sorted(c for c in part.split("\n\nAnswer with")[0] if c.isdigit())
            for part in (first, second)
        ]
        return says("SAME" if digits[0] == digits[1] else "DIFFERENT")

    endpoint = serve(reply)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = JudgeConfig(url=endpoint.url, model="judge", api_key_env="JUDGE_KEY", concurrency=3)
    config = make_config(
        source=SourceConfig(count=4, split="validation", levels=[2]),
        verifier=VerifierConfig(kind="judge", judge=judge),
        branches=BranchConfig(until="sentence", max_tokens=40),
        granularity="token",
    )
    summary = run(config, pair)
    assert summary is not None
    rows = read(config.out_dir)
    assert {row["label"] for row in rows.values()} == {0, 1, 2}
    asked = {request["messages"][0]["content"] for request in endpoint.requests}
    same_text = 2 * summary["counts"]["token_forks"] - len(asked)
    assert 0 <= same_text <= 4  # the same text in other tokens is not asked about
    assert len(endpoint.requests) > len(asked)  # 429 was tried again
    assert endpoint.most <= 3
    assert endpoint.requests[0]["path"] == "/v1/chat/completions"
    assert endpoint.requests[0]["model"] == "judge" and endpoint.requests[0]["temperature"] == 0
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"


def test_a_judge_that_depends_on_the_order_gives_no_label(
    serve: Callable[..., Endpoint], pair: ModelPair, make_config: Callable[..., LabelingConfig]
) -> None:
    endpoint = serve(lambda body, n: says("SAME" if n % 2 else "DIFFERENT"))
    judge = JudgeConfig(url=endpoint.url, model="judge", concurrency=1)
    config = make_config(
        source=SourceConfig(count=2, split="validation", levels=[2]),
        verifier=VerifierConfig(kind="judge", judge=judge),
        branches=BranchConfig(until="step", max_tokens=40),
        granularity="token",
    )
    summary = run(config, pair)
    assert summary is not None and summary["counts"]["disagreement"] > 2
    # With one request at a time both orders of a fork follow each other, so all disagree.
    assert {row["label"] for row in read(config.out_dir).values()} <= {0, 1}


@pytest.mark.parametrize(
    ("reply", "message", "num_requests"),
    [
        ((503, {}, b"busy"), r"cannot be used: HTTP 503 busy \(3 tries\); the finished shards", 3),
        ((429, {"Retry-After": "7"}, b""), r"HTTP 429 Too Many Requests \(3 tries\)", 3),
        ((401, {}, b'{"error": "no key"}'), r'refuses: HTTP 401 {"error": "no key"}', 1),
        ((404, {}, b"no such\nmodel"), "refuses: HTTP 404 no such model", 1),
        ((200, {}, b"<html>hello"), "is no chat completion: b'<html>hello'", 3),
        ((200, {}, b'{"choices": []}'), "is no chat completion", 3),
        ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), "has no text", 3),
    ],
)
def test_an_endpoint_that_fails(
    serve: Callable[..., Endpoint], reply: Reply, message: str, num_requests: int
) -> None:
    endpoint = serve(lambda body, n: reply)
    waits: list[float] = []
    config = JudgeConfig(url=endpoint.url, model="judge", retries=2, concurrency=1)
    with pytest.raises(EngineError, match=message) as raised:
        EndpointJudge(config, sleep=waits.append).ask("?").result(20)
    assert "\n" not in str(raised.value) and endpoint.url in str(raised.value)
    assert len(endpoint.requests) == num_requests
    assert waits == ([7.0, 7.0] if reply[1] else [1.0, 2.0])[: num_requests - 1]


def test_an_endpoint_that_is_slow_or_down(serve: Callable[..., Endpoint]) -> None:
    gate = threading.Event()

    def reply(body: dict[str, Any], number: int) -> Reply:
        gate.wait(5)
        return says("SAME")

    slow = JudgeConfig(url=serve(reply).url, model="judge", retries=0, timeout_s=0.1)
    with pytest.raises(EngineError, match=r"no answer within 0.1 s \(1 try\)"):
        EndpointJudge(slow).ask("?").result(20)
    gate.set()
    down = JudgeConfig(url="http://127.0.0.1:9/v1", model="judge", retries=0)
    with pytest.raises(EngineError, match="cannot be used: .*refused"):
        EndpointJudge(down).ask("?").result(20)


def test_a_local_judge_is_another_model() -> None:
    judge = LocalJudge(JudgeConfig(model="checkpoints/abacus-llm", max_tokens=3), "cpu", "32MiB")
    assert isinstance(judge.ask("How many cups?").result(), str)
    assert judge.fingerprint.architecture == "Qwen3ForCausalLM"


def test_settings_that_contradict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="verifier.judge.url='localhost:8000'"):
        JudgeConfig(url="localhost:8000", model="judge")
    with pytest.raises(UsageError, match="a url needs a model"):
        JudgeConfig(url="http://localhost:8000/v1")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = JudgeConfig(url="http://localhost/v1", model="judge", api_key_env="NO_SUCH_KEY")
    with pytest.raises(UsageError, match="NO_SUCH_KEY is not in the environment"):
        EndpointJudge(config)

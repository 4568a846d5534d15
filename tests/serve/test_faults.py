"""Faults: what breaks, what its client is told, and that nobody else notices."""

import json
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch

from r2r_glimp.engine.runner import Rows
from r2r_glimp.serve.process import running_server
from tests.serve.conftest import HELLO, Live, eventually
from tests.serve.test_bad_input import check

LONG = {"max_tokens": 400, "ignore_eos": True}
SEEDED = {"max_tokens": 30, "temperature": 1.0, "seed": 3, "return_token_ids": True}


def in_thread(call, *args, **kwargs):
    """Run a call beside the test; `result()` waits for what it gave."""
    box = []
    thread = threading.Thread(target=lambda: box.append(call(*args, **kwargs)))
    thread.start()

    def result():
        thread.join(30)
        return box[0]

    return result


def slow_down(live: Live, seconds: float) -> None:
    """Make each tick last, so that there is time to do something meanwhile."""
    step = live.worker.engine.step
    live.worker.engine.step = lambda: (time.sleep(seconds), step())[1]


def hold(live: Live) -> threading.Event:
    """A gate before each tick, open at first."""
    gate, step = threading.Event(), live.worker.engine.step
    gate.set()
    live.worker.engine.step = lambda: (gate.wait(20), step())[1]
    return gate


def poison(live: Live, token: int, monkeypatch, fault) -> None:
    """Let a fault befall the rows that hold a token."""
    for runner in set(live.worker.engine.runners):
        forward = runner.forward

        def wrapped(rows, wanted, forward=forward):
            return fault(rows, wanted, forward, [token in row.tokens for row in rows])

        monkeypatch.setattr(runner, "forward", wrapped)


def neighbours(live: Live):
    """Requests beside the fault: what they gave alone, and a call that runs them now."""
    alone = [live.chat(**SEEDED | {"seed": i}).json()["choices"][0]["token_ids"] for i in range(4)]
    calls = [lambda i=i: live.chat(**SEEDED | {"seed": i}) for i in range(4)]
    return alone, calls


@pytest.mark.parametrize("stream", [False, True])
def test_nan_logits_end_one_request_alone(serve, monkeypatch, stream) -> None:
    live = serve()
    alone, calls = neighbours(live)

    def fault(rows, wanted, forward, bad):
        out = forward(rows, wanted)
        logits = out.logits_RV.clone()
        start = 0
        for is_bad, count in zip(bad, wanted, strict=True):
            logits[start : start + count][:] = (
                torch.nan if is_bad else logits[start : start + count]
            )
            start += count
        return Rows(out.hidden_RH, logits)

    poison(live, 400, monkeypatch, fault)
    running = [in_thread(call) for call in calls]
    reply = live.complete(prompt=[400, 5, 6], stream=stream)
    assert "NaN" in check(reply, 500)["message"]
    assert reply.headers["x-should-retry"] == "false"
    assert [one().json()["choices"][0]["token_ids"] for one in running] == alone
    live.wait_idle()
    assert live.worker.health == "ok"


def test_an_exception_in_a_pass_ends_its_requests_alone(serve, monkeypatch) -> None:
    live = serve()
    before = live.chat(**SEEDED).json()["choices"][0]["token_ids"]

    def fault(rows, wanted, forward, bad):
        if any(bad):
            raise RuntimeError("the device is on fire")
        return forward(rows, wanted)

    poison(live, 400, monkeypatch, fault)
    check(live.complete(prompt=[400]), 500, "on fire")
    assert live.chat(**SEEDED).json()["choices"][0]["token_ids"] == before
    assert live.worker.health == "ok"
    live.wait_idle()


def test_a_fault_in_a_stream_is_its_last_event(serve) -> None:
    live = serve()
    engine, step = live.worker.engine, live.worker.engine.step

    def failing():
        for sequence in list(engine.running):
            if len(sequence.tokens) == 5:
                engine.writer.fail(sequence, "it broke")
        return step()

    engine.step = failing
    events = live.events(**LONG)
    assert events[-1]["error"]["message"] == "it broke" and events[-1]["error"]["code"] == 500
    assert "[DONE]" not in events
    live.wait_idle()


def test_the_engines_death_is_told(serve) -> None:
    live = serve()
    slow_down(live, 0.01)
    waiting = [in_thread(live.chat, **LONG) for _ in range(3)]
    eventually(lambda: len(live.worker.engine.running) == 3)

    def die():
        raise KeyError("unforeseen")

    live.worker.engine.step = die
    for one in waiting:
        check(one(), 500, "the engine died")
    eventually(lambda: live.http.get("/health").status_code == 503)
    assert live.http.get("/health").json() == {"status": "dead"}
    check(live.http.get("/ready"), 503, "dead")
    check(live.chat(), 503, "dead", "restarted")
    assert live.http.get("/metrics").is_success


def test_a_stall_is_noticed_and_survived(serve) -> None:
    live = serve(stall_s=1.0)
    gate = hold(live)
    gate.clear()
    waiting = in_thread(live.chat, **LONG)
    eventually(lambda: live.http.get("/health").status_code == 503)
    check(waiting(), 503, "stalled")
    reply = live.chat()
    check(reply, 503, "stalled")
    assert reply.headers["retry-after"]
    gate.set()
    eventually(lambda: live.http.get("/health").is_success)
    live.wait_idle()
    assert live.chat().is_success


def test_out_of_blocks(serve) -> None:
    """Too little memory for one request is its own fault; too little for many means turns."""
    live = serve(kv_memory="48KiB", prefix_cache=False)
    room = min(live.worker.engine.room)
    assert room < 512
    check(live.chat(max_tokens=room), 400, f"{room:,}")
    slow_down(live, 0.005)  # so that they do run beside each other
    calls = [
        in_thread(live.chat, **SEEDED | {"seed": i % 4, "ignore_eos": True}) for i in range(12)
    ]
    texts = [one().json()["choices"][0]["token_ids"] for one in calls]
    assert texts[:4] * 3 == texts
    assert live.metric("num_preemptions_total") > 0
    live.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_aborted_within_a_tick(serve, stream) -> None:
    live = serve()
    slow_down(live, 0.01)
    engine, late, step = live.worker.engine, [], live.worker.engine.step

    def watched():
        tickets = {live.worker._tickets[s.request_id][0] for s in engine.running}
        late.extend(tickets - live.worker.open)  # ticks that begin with a client gone
        return step()

    engine.step = watched
    body = json.dumps({"messages": HELLO, "stream": stream, "n": 3, **LONG}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sock = live.connect()
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    eventually(lambda: len(live.worker.engine.running) == 3)
    eventually(lambda: len(live.worker.engine.running[0].tokens) > 2)
    sock.close()
    eventually(lambda: not live.worker.engine.running)
    assert len(late) <= 1  # it may have left while the tick began
    live.wait_idle()
    assert live.metric('request_success_total{finished_reason="abort"}') == 3


def test_a_client_that_waits_in_the_queue_can_leave(serve) -> None:
    live = serve(max_batch=1)
    slow_down(live, 0.01)
    first = in_thread(live.chat, max_tokens=60, ignore_eos=True)
    eventually(lambda: len(live.worker.engine.running) == 1)
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{live.url}/v1/chat/completions", json={"messages": HELLO}, timeout=0.1)
    assert first().is_success
    live.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_deadlines(serve, stream) -> None:
    live = serve(deadline_s=1.0)
    slow_down(live, 0.03)
    if stream:
        error = live.events(**LONG)[-1]["error"]
        assert error["code"] == "deadline_exceeded" and "1 s" in error["message"]
    else:
        assert check(live.chat(**LONG), 504, "1 s")["code"] == "deadline_exceeded"
    live.wait_idle()


def stream_lines(url, **body):
    """The `data:` lines of a stream, as they come."""
    body = {"messages": HELLO, "stream": True, "ignore_eos": True, **body}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield line[6:]


def test_a_signal_lets_requests_finish_and_refuses_new_ones(serve) -> None:
    live = serve()
    gate = hold(live)
    lines = stream_lines(live.url, max_tokens=300)
    got = [next(lines) for _ in range(3)]
    gate.clear()
    live.server.handle_exit(signal.SIGTERM, None)
    eventually(lambda: live.http.get("/ready").status_code == 503)
    assert live.http.get("/health").json() == {"status": "draining"}
    check(live.chat(), 503, "shutting down")
    gate.set()
    got += lines
    assert got[-1] == "[DONE]"
    # Sampled text may also run into the guard against loops, which is a stop.
    assert json.loads(got[-2])["choices"][0]["finish_reason"] in ("length", "stop")
    live.thread.join(10)
    assert not live.thread.is_alive()


def test_a_signal_ends_what_takes_too_long(serve) -> None:
    live = serve()
    live.server.drain_s = 0.2
    slow_down(live, 0.02)
    lines, whole = stream_lines(live.url, max_tokens=400), in_thread(live.chat, **LONG)
    next(lines)
    eventually(lambda: len(live.worker.engine.running) == 2)
    live.server.handle_exit(signal.SIGTERM, None)
    assert "shutting down" in json.loads(list(lines)[-1])["error"]["message"]
    check(whole(), 503, "shutting down")
    live.thread.join(10)
    assert not live.thread.is_alive()


CLIENT = """
import json, sys, urllib.request
body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "ignore_eos": True}
request = urllib.request.Request(
    sys.argv[1] + "/v1/chat/completions", json.dumps(body | {"max_tokens": 30_000}).encode(),
    {"Content-Type": "application/json"},
)
for line in urllib.request.urlopen(request):
    print(line, flush=True)
"""


def test_a_killed_client_and_sigterm(tmp_path, tokenizer, tiny_model) -> None:
    """The whole thing as processes: a client is killed in its stream, then the server stopped."""
    for seed, name in enumerate(("slm", "llm")):
        model = tiny_model("qwen3", seed=seed, max_position_embeddings=40_000)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pair = ("--slm", str(tmp_path / "slm"), "--llm", str(tmp_path / "llm"), "--dtype", "float32")
    with running_server(*pair, "--kv_memory", "64MiB", "--router", "random") as server:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, server.url], stdout=subprocess.PIPE
        )
        assert client.stdout is not None
        for _ in range(5):
            client.stdout.readline()

        def live_blocks() -> float:
            text = httpx.get(f"{server.url}/metrics").text
            line = next(line for line in text.splitlines() if 'state="live"' in line)
            return float(line.rpartition(" ")[2])

        assert live_blocks() > 0
        client.kill()
        client.wait()
        client.stdout.close()
        eventually(lambda: live_blocks() == 0)
        lines = stream_lines(server.url, max_tokens=1000)  # a second or more
        got = [next(lines)]
        server.process.send_signal(signal.SIGTERM)
        got += lines
        assert got[-1] == "[DONE]"
        assert server.process.wait(20) == 0
        assert server.lines[-1].startswith("r2r-glimp: warning: shutting down: 1 request")

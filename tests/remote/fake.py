"""A small server that speaks vLLM's completions, SGLang's /generate and OpenAI's streams, and fails
as a test wants it to."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import PreTrainedTokenizerBase

Fault = Callable[["Handler"], bool]  # True: it has answered, in its way


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    fake: "FakeServer"

    def do_GET(self) -> None:
        cards = [{"id": name, "max_model_len": 256} for name in self.fake.models]
        self.say({"object": "list", "data": cards})

    def do_POST(self) -> None:
        fake, body = self.fake, self.rfile.read(int(self.headers["Content-Length"]))
        self.body = json.loads(body)
        if self.path.endswith("/tokenize"):
            if fake.tokenize is None:
                self.say({"detail": "Not Found"}, 404)
            else:
                self.say({"tokens": fake.tokenize(self.body["prompt"])})
            return
        with fake.lock:
            fake.asked.append({"path": self.path, "headers": dict(self.headers), **self.body})
            number = len(fake.asked) - 1
        if fake.fault is not None and fake.fault(number) is not None:
            fake.fault(number)(self)  # type: ignore[misc]
            return
        time.sleep(fake.latency_s)
        self.say(fake.reply(self.path, self.body))

    def say(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class _Quiet(ThreadingHTTPServer):
    """A client that has gone is no news."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class FakeServer:
    """Writes `text`, as tokens; `fault(n)` says how the n-th request fails, if it does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.models = ["m"]
        self.text = "5"
        self.ended = False
        self.top = [-0.5, -1.5]
        self.latency_s = 0.0
        self.tokenize: Callable[[str], list[int]] | None = self.ids
        self.fault: Callable[[int], Callable[[Handler], Any] | None] | None = None
        self.knows = ("/v1/completions",)
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.server = _Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        reason = "stop" if self.ended else "length"
        if path.endswith("/generate"):
            tokens = self.ids(self.text)[: body["sampling_params"]["max_new_tokens"]]
            finish = {"type": reason} | ({"matched": 1} if self.ended else {})
            tops = [[[value, i, None] for i, value in enumerate(self.top)]]
            meta = {"finish_reason": finish, "output_top_logprobs": tops}
            return {"text": self.text, "output_ids": tokens, "meta_info": meta}
        tokens = self.ids(self.text)[: body["max_tokens"]]
        top = {str(i): value for i, value in enumerate(self.top)}
        logprobs = {"top_logprobs": [top]} if body.get("logprobs") and self.top else None
        choice = {"text": self.text, "finish_reason": reason, "logprobs": logprobs}
        if body.get("stream"):
            return f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n".encode()
        if body.get("return_token_ids"):
            choice |= {"token_ids": tokens, "stop_reason": None}
        return {"choices": [choice]}

    def stop(self) -> None:
        """From here on, connections are refused."""
        self.fault = lambda number: lambda handler: setattr(handler, "close_connection", True)
        self.server.shutdown()
        self.server.server_close()

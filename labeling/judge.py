"""Judges that answer prompts: an OpenAI-compatible endpoint, or another model on this machine."""

import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from http.client import HTTPException
from typing import Any

from labeling.batch import Judge
from labeling.sections import JudgeConfig
from r2r_glimp.core import EngineError, Prompt, RoutingParams, SamplingParams, UsageError

_RETRIED = (408, 429)  # and every 5xx
_MAX_WAIT_S = 30.0


class EndpointJudge:
    """Asks `URL/chat/completions`, many at once.

    Raises:
        UsageError: the environment variable of the key is not set.
    """

    def __init__(self, config: JudgeConfig, sleep: Callable[[float], None] = time.sleep) -> None:
        assert config.url is not None
        self.config = config
        self.url = config.url.rstrip("/") + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise UsageError(
                    f"verifier.judge.api_key_env: {config.api_key_env} is not in the environment"
                )
            self.headers["Authorization"] = f"Bearer {key}"
        self._sleep = sleep
        self._prompts: queue.SimpleQueue[tuple[str, Future[str]]] = queue.SimpleQueue()
        self._failed = threading.Event()
        # Daemons, so that an interrupted run ends at once and not with its last request.
        for _ in range(config.concurrency):
            threading.Thread(target=self._serve, daemon=True).start()

    def ask(self, prompt: str) -> Future[str]:
        """The judge's answer, sooner or later; a failure is an EngineError of one line."""
        future: Future[str] = Future()
        self._prompts.put((prompt, future))
        return future

    def _serve(self) -> None:
        while True:
            prompt, future = self._prompts.get()
            try:
                future.set_result(self._post(prompt))
            except Exception as error:
                self._failed.set()  # the run ends with the first failure
                future.set_exception(error)

    def _post(self, prompt: str) -> str:
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
        }
        data, problem = json.dumps(body).encode(), ""
        for attempt in range(self.config.retries + 1):
            if attempt and self._failed.is_set():
                break
            try:
                return self._try(data)
            except _Retry as retry:
                problem = str(retry)
                wait_s = min(_MAX_WAIT_S, 2.0**attempt if retry.after_s is None else retry.after_s)
            if attempt < self.config.retries:
                self._sleep(wait_s)
        tries = f"{self.config.retries + 1} tries" if self.config.retries else "1 try"
        raise EngineError(
            f"the judge at {self.url} cannot be used: {problem} ({tries}); the finished shards "
            "are kept: run the same command again when it answers"
        )

    def _try(self, data: bytes) -> str:
        """One request; raises _Retry where another may go better."""
        late = f"no answer within {self.config.timeout_s:g} s"
        request = urllib.request.Request(self.url, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout_s) as reply:
                return _content(reply.read())
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {_reason(error)}"
            if error.code not in _RETRIED and error.code < 500:
                raise EngineError(f"the judge at {self.url} refuses: {problem}") from None
            raise _Retry(problem, _retry_after(error)) from None
        except TimeoutError:
            raise _Retry(late) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise _Retry(late if isinstance(reason, TimeoutError) else str(reason)) from None


class _Retry(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, problem: str, after_s: float | None = None) -> None:
        super().__init__(problem)
        self.after_s = after_s


class LocalJudge:
    """Asks another model on this machine, greedily."""

    def __init__(self, config: JudgeConfig, device: str | None, kv_memory: str) -> None:
        from r2r_glimp.engine.engine import Engine
        from r2r_glimp.models import ModelPair

        assert config.model is not None
        pair = ModelPair.from_pretrained(config.model, config.model, device=device or "auto")
        self.fingerprint = pair.llm.fingerprint
        self._engine = Engine(pair, router="llm", kv_memory=kv_memory)
        self._has_chat = pair.llm.tokenizer.chat_template is not None
        self._sampling = SamplingParams(max_tokens=config.max_tokens, seed=0)

    def ask(self, prompt: str) -> Future[str]:
        """The judge's answer, at once."""
        given: Prompt = [{"role": "user", "content": prompt}] if self._has_chat else prompt
        [output] = self._engine.generate(given, self._sampling, RoutingParams(router="llm"))
        future: Future[str] = Future()
        future.set_result(output.text)
        return future


def make_judge(config: JudgeConfig, device: str | None, kv_memory: str) -> Judge | None:
    """The configured judge; None if it is the pair's own LLM."""
    if config.url is not None:
        return EndpointJudge(config)
    return LocalJudge(config, device, kv_memory) if config.model is not None else None


def _content(body: bytes) -> str:
    """The text of a chat completion; raises ValueError for anything else."""
    try:
        content: Any = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"what it answers is no chat completion: {body[:80]!r}") from None
    if not isinstance(content, str):
        raise ValueError(f"what it answers has no text: {body[:80]!r}")
    return content


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(300).decode("utf-8", "replace")
    except (OSError, HTTPException):
        text = ""
    return " ".join(text.split())[:200] or str(error.reason)


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return None

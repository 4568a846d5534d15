"""OpenAI's own client, sync and async, against a running server."""

import asyncio
import json
import subprocess

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from r2r_glimp.core import RoutingParams, SamplingParams
from tests.serve.conftest import HELLO, Live

ROUTED = {"router": "random", "threshold": 0.5}


def text_of(message):
    """Reasoning and answer of a message, or of a stream's delta."""
    return (getattr(message, "reasoning_content", None) or "") + (message.content or "")


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def test_chat(client, live):
    reply = client.chat.completions.create(model="pair", messages=HELLO, max_tokens=8)
    (choice,) = reply.choices
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")
    assert choice.finish_reason in ("stop", "length")
    assert isinstance(choice.message.content, str)
    assert choice.message.reasoning_content == choice.message.reasoning
    usage = reply.usage
    assert 0 < usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.slm_tokens + usage.llm_tokens == usage.completion_tokens
    ChatCompletion.model_validate(live.chat().json(), strict=True)


def test_stream_equals_the_whole(client):
    extra = {**ROUTED, "return_routing": True, "return_token_ids": True}
    options = {"model": "pair", "messages": HELLO, "max_tokens": 40, "seed": 3, "temperature": 1.0}
    options["extra_body"] = extra
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    for chunk in chunks:
        assert isinstance(chunk, ChatCompletionChunk)
        assert (chunk.id, chunk.created) == (chunks[0].id, chunks[0].created)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    message = whole.choices[0].message
    for name in ("content", "reasoning_content", "reasoning"):
        streamed = "".join(getattr(d.delta, name, None) or "" for d in deltas)
        assert streamed == (getattr(message, name, None) or "")
    assert [d.finish_reason for d in deltas][:-1] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason
    tokens = [token for delta in deltas for token in delta.routing["tokens"]]
    assert tokens == whole.choices[0].routing["tokens"]
    ids = [i for d in deltas for i in getattr(d, "token_ids", None) or []]
    assert ids == whole.choices[0].token_ids == [t["token_id"] for t in tokens]
    assert {t["source"] for t in tokens} == {"slm", "llm"}


def test_n_and_seed(client):
    def ask(**more):
        reply = client.chat.completions.create(
            model="pair", messages=HELLO, max_tokens=20, n=3, temperature=1.0,
            extra_body=ROUTED, **more,
        )  # fmt: skip
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        return [text_of(choice.message) for choice in reply.choices], reply.usage

    first, usage = ask(seed=1)
    assert first == ask(seed=1)[0] != ask(seed=2)[0]
    assert len(set(first)) == 3
    prompt = client.chat.completions.create(model="pair", messages=HELLO, max_tokens=1).usage
    assert usage.prompt_tokens == prompt.prompt_tokens and usage.completion_tokens > 20
    assert ask(seed=-1)[0] == ask(seed=2**64 - 1)[0]


def test_logprobs(client, live):
    options = {"model": "pair", "messages": HELLO, "max_tokens": 6, "logprobs": True}
    options["top_logprobs"] = 3
    reply = client.chat.completions.create(**options, seed=1)
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == max(t.logprob for t in entry.top_logprobs)
        assert bytes(entry.bytes).decode() == entry.token
    stream = client.chat.completions.create(**options, seed=1, stream=True)
    told = [chunk.choices[0].logprobs for chunk in stream]
    assert [entry for one in told if one for entry in one.content] == content
    text = client.completions.create(model="pair", prompt="Cups", max_tokens=6, logprobs=2)
    told = text.choices[0].logprobs
    assert "".join(told.tokens) == text.choices[0].text or text.choices[0].finish_reason == "stop"
    assert told.text_offset[0] == 0 and len(told.top_logprobs) == len(told.tokens)
    Completion.model_validate(live.complete(logprobs=2).json(), strict=True)


def test_completions(client, live):
    ids = live.post("/tokenize", prompt="Cups hats").json()["tokens"]
    one, other = (
        client.completions.create(model="pair", prompt=prompt, max_tokens=10, seed=1)
        for prompt in ("Cups hats", ids)
    )
    assert one.object == "text_completion" and one.choices[0].text == other.choices[0].text
    many = client.completions.create(
        model="pair", prompt=["Cups", "Cups hats"], n=2, max_tokens=10, seed=1
    )
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[2].text == one.choices[0].text  # a second completion has a seed of its own
    stream = client.completions.create(model="pair", prompt=ids, max_tokens=10, seed=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == one.choices[0].text
    both = client.completions.create(model="pair", prompt=[ids, ids], max_tokens=10, seed=1)
    assert {choice.text for choice in both.choices} == {one.choices[0].text}


def test_stop(client):
    options = {"model": "pair", "prompt": "Cups", "max_tokens": 30, "temperature": 1.0, "seed": 5}
    text = client.completions.create(**options).choices[0].text
    stop = text[4:7]
    cut = client.completions.create(**options, stop=[stop, "never"]).choices[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"
    stream = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == cut.text


def test_async(live):
    async def ask():
        client = openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        replies = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model="pair", messages=HELLO, max_tokens=12, seed=i % 4, temperature=1.0
                )
                for i in range(16)
            )
        )
        stream = await client.chat.completions.create(
            model="pair", messages=HELLO, max_tokens=12, seed=0, temperature=1.0, stream=True
        )
        parts = [chunk.choices[0].delta async for chunk in stream]
        return replies, "".join(map(text_of, parts))

    replies, streamed = asyncio.run(ask())
    texts = [text_of(reply.choices[0].message) for reply in replies]
    assert texts[:4] * 4 == texts and len(set(texts)) == 4
    assert streamed == texts[0]


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["pair", "pair:slm", "pair:llm"]
    assert client.models.retrieve("pair:slm").max_model_len == models[0].max_model_len
    for name, source in (("pair:slm", "slm"), ("pair:llm", "llm")):
        reply = client.chat.completions.create(model=name, messages=HELLO, max_tokens=5)
        assert reply.model == name and reply.usage.completion_tokens > 0
        assert getattr(reply.usage, f"{source}_tokens") == reply.usage.completion_tokens
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert raised.value.code == "model_not_found"


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.BadRequestError, match="temperature") as raised:
        client.chat.completions.create(model="pair", messages=HELLO, temperature=9)
    assert raised.value.type == "invalid_request_error" and raised.value.param == "temperature"


def test_replies_are_the_offline_engines(live):
    """The worker's engine may only be called by its thread, so it is asked what it has computed."""
    sampling = SamplingParams(max_tokens=24, temperature=1.0, seed=11)
    routing = RoutingParams(router="random", threshold=0.5)
    live.wait_idle()
    expected = live.worker.engine.generate([HELLO], sampling, routing)[0]
    choice = live.chat(
        max_tokens=24, temperature=1.0, seed=11, **ROUTED, return_token_ids=True,
        return_routing=True,
    ).json()["choices"][0]  # fmt: skip
    assert choice["token_ids"] == expected.token_ids
    assert choice["prompt_token_ids"] == expected.prompt_token_ids
    assert [t["source"] for t in choice["routing"]["tokens"]] == expected.sources
    assert "".join(t["text"] for t in choice["routing"]["tokens"]) == expected.text
    assert choice["routing"]["llm_share"] == expected.stats.llm_share


def test_curl(live):
    body = json.dumps({"model": "pair", "messages": HELLO, "max_tokens": 4})
    done = subprocess.run(
        ["curl", "-sS", "--fail", f"{live.url}/v1/chat/completions",
         "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["usage"]["completion_tokens"] > 0

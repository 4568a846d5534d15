"""Connecting: what a server is asked at the start, and what is refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r2r_glimp.cli.main import main
from r2r_glimp.core import CheckpointError, Prompt, RoutingParams, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import ModelPair, read_preset
from r2r_glimp.models.remote import RemoteModel
from r2r_glimp.remote.spec import RemoteSpec, is_remote
from tests.remote.conftest import FLOAT32
from tests.remote.fake import FakeServer

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
SLM = str(CHECKPOINTS / "abacus-slm")
QUICK = SamplingParams(max_tokens=8, seed=0)
STEP = RoutingParams(
    granularity="step", router="random", threshold=1.0, answer_by="slm", repetition_guard=False
)
Connect = Callable[..., ModelPair]


# ---------------------------------------------------------------- what is asked


def test_token_ids_where_the_tokenizer_is_the_same(
    connect: Connect, fake: FakeServer, prompts: list[Prompt]
) -> None:
    pair = connect({"url": fake.url})
    remote = pair.llm
    assert isinstance(remote, RemoteModel)
    assert remote.dialect.name == "completions" and pair.same_vocabulary
    assert (remote.name_there, remote.context_length) == ("m", 256)
    engine = Engine(pair, kv_memory="16MiB")
    fake.asked.clear()
    [output] = engine.generate(prompts[0], QUICK, RoutingParams(router="llm"))
    assert output.text == "5" * 8
    assert fake.asked[0]["prompt"] == output.prompt_token_ids
    assert fake.asked[0]["model"] == "m" and fake.asked[0]["max_tokens"] == 8
    assert [len(one["prompt"]) for one in fake.asked] == [
        len(output.prompt_token_ids) + i for i in range(8)
    ]
    assert "Authorization" not in fake.asked[0]["headers"]


def test_a_step_is_asked_for_up_to_its_delimiter(
    connect: Connect, fake: FakeServer, prompts: list[Prompt]
) -> None:
    engine = Engine(connect({"url": fake.url}), kv_memory="16MiB")
    fake.asked.clear()
    fake.text = "Say hats 4.\n\nSay cups"
    [output] = engine.generate(prompts[0], SamplingParams(max_tokens=100, seed=0), STEP)
    first = next(one for one in fake.asked if one["max_tokens"] > 1)
    assert first["stop"] == ["\n\n"] and first["include_stop_str_in_output"] is True
    assert "Say hats 4.\n\n" in output.text and "Say cups" not in output.text


def test_sglang(connect: Connect, fake: FakeServer, prompts: list[Prompt]) -> None:
    completions = fake.reply

    def reply(path: str, body: dict[str, Any]) -> Any:
        answer = completions(path, body)
        if path.endswith("/completions"):  # which tells no ids there
            answer["choices"][0].pop("token_ids", None)
        return answer

    fake.reply = reply  # type: ignore[method-assign]
    pair = connect({"url": fake.url})
    assert isinstance(pair.llm, RemoteModel) and pair.llm.dialect.name == "sglang"
    engine = Engine(pair, kv_memory="16MiB")
    fake.asked.clear()
    sampling = SamplingParams(max_tokens=4, temperature=0.5, top_k=7, min_p=0.1, seed=1)
    [output] = engine.generate(prompts[0], sampling, RoutingParams(router="llm"))
    assert output.text == "5555"
    assert fake.asked[0]["path"] == "/generate"
    assert fake.asked[0]["input_ids"] == output.prompt_token_ids
    given = fake.asked[0]["sampling_params"]
    assert given.pop("sampling_seed") >= 0
    assert given == {
        "max_new_tokens": 4, "skip_special_tokens": False,
        "temperature": 0.5, "top_p": 1.0, "top_k": 7, "min_p": 0.1,
    }  # fmt: skip
    fake.ended = True
    [output] = engine.generate(prompts[0], QUICK, RoutingParams(router="llm"))
    assert (output.text, output.finish_reason) == ("5", "stop")


def test_a_server_ends_a_text_by_a_token_we_do_not_know(
    connect: Connect, fake: FakeServer, prompts: list[Prompt]
) -> None:
    engine = Engine(connect({"url": fake.url}), kv_memory="16MiB")
    fake.ended = True
    [output] = engine.generate(prompts[0], QUICK, RoutingParams(router="llm"))
    assert (output.text, output.finish_reason) == ("5", "stop")


@pytest.mark.parametrize(
    ("tokenize", "reason"),
    [
        (None, "it does not tell its tokenizer (/tokenize): name a folder or Hub id in tokenizer"),
        (
            lambda text: [7, 8, 9],
            "its tokenizer differs from the SLM's (token 0 of a sample is [7]",
        ),
    ],
    ids=["unknown", "different"],
)
def test_another_tokenizer_means_text_and_steps(
    tokenize: Any, reason: str, connect: Connect, fake: FakeServer, prompts: list[Prompt]
) -> None:
    fake.tokenize = tokenize
    pair = connect({"url": fake.url})
    assert not pair.same_vocabulary and reason in pair.apart
    engine = Engine(pair, kv_memory="16MiB")
    with pytest.raises(UsageError, match="token granularity needs one vocabulary, and http") as e:
        engine.generate(prompts[0], QUICK, RoutingParams(granularity="token"))
    assert reason in str(e.value) and "use --granularity step" in str(e.value)
    fake.asked.clear()
    fake.text = "Say hats 4.\n\nSay cups"
    [output] = engine.generate(prompts[0], SamplingParams(max_tokens=40, seed=0), STEP)
    assert all(isinstance(one["prompt"], str) and one["stream"] for one in fake.asked)
    assert "Say hats 4.\n\n" in output.text and "Say cups" not in output.text


def test_a_named_tokenizer_is_believed(connect: Connect, fake: FakeServer) -> None:
    fake.tokenize = None
    assert connect({"url": fake.url, "tokenizer": SLM}).same_vocabulary


def test_the_key_comes_from_the_environment(
    connect: Connect, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="api_key_env: SOME_KEY is not in the environment"):
        connect({"url": fake.url, "api_key_env": "SOME_KEY"})
    monkeypatch.setenv("SOME_KEY", "secret")
    pair = connect({"url": fake.url, "api_key_env": "SOME_KEY"})
    assert fake.asked[-1]["headers"]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(pair.llm)


def test_a_key_is_missing(connect: Connect, fake: FakeServer) -> None:
    fake.fault = lambda number: lambda handler: handler.say({"error": "Unauthorized"}, 401)
    with pytest.raises(UsageError, match="HTTP 401 .*name the variable of its key in api_key_env"):
        connect({"url": fake.url, "api": "auto"})


def test_an_slm_without_logprobs(fake: FakeServer) -> None:
    fake.top = []
    slm = {"url": fake.url, "tokenizer": SLM}
    with pytest.raises(UsageError, match="tells no logprobs of m, and of an SLM behind a server"):
        ModelPair.from_pretrained(slm=slm, llm={"url": fake.url})
    fake.top = [-0.5, -1.5]
    pair = ModelPair.from_pretrained(slm=slm, llm={"url": fake.url})
    with pytest.raises(UsageError, match="an SLM behind a server is asked once for a step"):
        Engine(pair).generate("x", QUICK, RoutingParams(granularity="token"))
    from r2r_glimp.hub import load_router

    with pytest.raises(UsageError, match="router 'mlp' looks inside the SLM"):
        Engine(pair, router=load_router(str(CHECKPOINTS / "abacus-step-router")))


def test_what_needs_the_llms_logits_is_refused(
    connect: Connect, fake: FakeServer, prompts: list[Prompt]
) -> None:
    engine = Engine(connect({"url": fake.url}), kv_memory="16MiB")
    for sampling, routing in (
        (SamplingParams(logprobs=2), RoutingParams()),
        (SamplingParams(), RoutingParams(speculate=4, granularity="step")),
    ):
        with pytest.raises(UsageError, match="needs both models here, and one is behind a server"):
            engine.add_request(prompts[0], sampling, routing)


# ---------------------------------------------------------------- presets and the command line


def test_presets(tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text(f"slm: {SLM}\nllm: {{url: 'https://host/v1/', model: big}}\n")
    assert read_preset(path)["llm"] == {"url": "https://host/v1/", "model": "big"}
    for line, message in (
        ("{url: 'host:8000/v1'}", r"llm: url='host:8000/v1' is no URL: .*\(http://host:8000/v1\)"),
        ("{model: big}", "llm has no url"),
        ("{url: 'https://me:abc@h/v1'}", "the url of h holds a name or a password: put a key"),
        ("{url: 'http://h/v1', key: abc}", "llm has the unknown key 'key'"),
        ("{url: 'http://h/v1', timeout_s: 0}", "timeout_s=0 is out of range"),
        ("{url: 'http://h/v1', api: soap}", "api='soap' is out of range: auto or completions"),
        ("{url: 'http://h/v1', on_failure: cry}", "on_failure='cry' is out of range: fail or slm"),
        ("{url: 'http://h/v1', context_length: 1}", "context_length=1 is out of range"),
    ):
        path.write_text(f"slm: {SLM}\nllm: {line}\n")
        with pytest.raises(UsageError, match=message):
            read_preset(path)


def test_places() -> None:
    assert is_remote("http://host/v1") and is_remote({"url": "x"})
    assert not is_remote("Qwen/Qwen3-8B") and not is_remote("./folder") and not is_remote(SLM)
    for place in ("localhost:8000/v1", "ftp://host/v1", "host/v1", "10.0.0.1:80"):
        with pytest.raises(UsageError, match="is no URL: it starts with http:// or https://"):
            is_remote(place)
    spec = RemoteSpec.parse("http://host/v1/#org/name", "llm")
    assert (spec.url, spec.model, spec.name) == (
        "http://host/v1",
        "org/name",
        "http://host/v1#org/name",
    )


def generate(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[str]]:
    options = ["--device", "cpu", "--dtype", "float32", "--slm", SLM, "--max_tokens", "6", *argv]
    code = main(["generate", *options, "Say hats 4.\nHow many hats?"])
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("llm", "code", "message"),
    [
        ("localhost:9/v1", 2, "is no URL: it starts with http://"),
        ("{url}#nothing", 2, "does not serve 'nothing': it serves m, n"),
        ("{url}", 2, "serves m, n: say which (model)"),
        ("http://127.0.0.1:9/v1", 1, "cannot be used: Connect call failed"),
    ],
)
def test_one_line(
    llm: str,
    code: int,
    message: str,
    fake: FakeServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("r2r_glimp.remote.client.FIRST_WAIT_S", 0.01)
    fake.models = ["m", "n"]
    found, lines = generate(capsys, "--llm", llm.replace("{url}", fake.url))
    assert found == code
    [line] = [line for line in lines if line.startswith("r2r-glimp: error: ")]
    assert message in line


def test_token_granularity_by_text_is_exit_code_2(
    fake: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.tokenize = None
    code, lines = generate(capsys, "--llm", fake.url, "--granularity", "token")
    assert code == 2 and "name a folder or Hub id in tokenizer" in lines[-1]
    code, _ = generate(capsys, "--llm", fake.url, "--granularity", "step")
    assert code == 0


def test_aiohttp_is_not_installed(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    code, lines = generate(capsys, "--llm", fake.url)
    assert code == 2 and "pip install 'r2r_glimp[remote]'" in lines[-1]


def test_what_is_there_cannot_be_had_here(connect: Connect, fake: FakeServer) -> None:
    remote = connect({"url": fake.url}).llm
    with pytest.raises(UsageError, match="is behind a server: its weights cannot be had here"):
        print(remote.model)
    with pytest.raises(UsageError, match="llm_adapters: .* must be started with them"):
        ModelPair.from_pretrained(SLM, fake.url, llm_adapters=["x"], **FLOAT32)
    with pytest.raises(CheckpointError, match="no such folder"):
        connect({"url": fake.url, "tokenizer": "./nowhere"})
    fake.models = []
    with pytest.raises(UsageError, match="serves nothing: say which"):
        connect({"url": fake.url})

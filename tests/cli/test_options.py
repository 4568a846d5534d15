"""The grammar, and options that contradict each other; nothing here loads a model."""

import pytest
import yaml

from r2r_glimp.cli.generate import build_parser
from r2r_glimp.cli.options import (
    PairOptions,
    RouterOptions,
    default_router,
    make_router,
    pair_arguments,
    read_params,
)
from r2r_glimp.cli.parser import pick
from r2r_glimp.core import RoutingParams, SamplingParams, UsageError
from r2r_glimp.routing.routers import EntropyRouter


def parse(*argv):
    return build_parser().parse([str(arg) for arg in argv])


def test_defaults_are_those_of_the_library():
    sampling, routing = read_params(parse())
    assert (sampling, routing) == (SamplingParams(), RoutingParams())


def test_flat_dotted_and_repeated_options():
    sampling, routing = read_params(
        parse(
            *("--temperature", 0.5, "--sampling.top_p", 0.9, "--stop", "a", "--stop", "b c"),
            *("--stop_token_ids", 1, "--stop_token_ids", 2, "--routing.granularity", "step"),
            *("--trace", "--repetition_guard", "false", "--max_tokens", "null"),
        )
    )
    assert sampling == SamplingParams(
        temperature=0.5, top_p=0.9, stop=("a", "b c"), stop_token_ids=(1, 2), max_tokens=None
    )
    assert routing == RoutingParams(granularity="step", trace=True, repetition_guard=False)


def test_configs_in_order_then_the_command_line(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("temperature: 0.1\nseed: 1\ntop_k: 5\nstop: [x]\nprompt: hello\n")
    two.write_text("sampling:\n  seed: 2\nrouting:\n  trace: true\nkv_memory: 1000000\n")
    options = parse("--config", one, "-c", two, "--top_k", 7)
    sampling, routing = read_params(options)
    assert sampling == SamplingParams(temperature=0.1, seed=2, top_k=7, stop=("x",))
    assert routing.trace and options.prompt == "hello" and options.kv_memory == 1000000


def test_print_config_is_a_config(cli, tmp_path):
    result = cli("generate", "--temperature", "0.3", "--stop", "x", "--print_config")
    assert result.code == 0
    assert yaml.safe_load(result.out)["temperature"] == 0.3
    (tmp_path / "c.yaml").write_text(result.out)
    sampling, _ = read_params(parse("--config", tmp_path / "c.yaml"))
    assert sampling == SamplingParams(temperature=0.3, stop=("x",))


BAD = [
    (["--temprature", "1"], "unknown option --temprature: did you mean --temperature?"),
    (["--max-tokens=3"], "unknown option --max-tokens: did you mean --max_tokens?"),
    (["two", "words"], "quotes"),
    (["--temperature", "warm"], "--temperature: expected a number, got 'warm'"),
    (["--n", "1.5"], "--n: expected an integer, got '1.5'"),
    (["--granularity", "word"], "--granularity: expected token or step or null, got 'word'"),
    (["--threshold"], "--threshold: expected one argument"),
    (["--stop_token_ids", "x"], "--stop_token_ids"),
    (["--config", "nowhere.yaml"], "does not exist"),
    (["--config", "trace: 3"], "--trace: expected true or false, got 3"),
    (["--config", "colour: red"], "unknown option --colour"),
    (["--config", "n: [1"], "--config"),
    # Out of range.
    (["--temperature", "-1"], "temperature=-1.0 is out of range"),
    (["--top_p", "0"], "top_p=0.0 is out of range"),
    (["--min_p", "2"], "min_p"),
    (["--top_k", "-3"], "top_k"),
    (["--max_tokens", "0"], "max_tokens=0"),
    (["--n", "0"], "n=0"),
    (["--seed", "-1"], "seed=-1"),
    (["--stop", ""], "stop"),
    (["--max_llm_share", "1.5"], "max_llm_share=1.5"),
    (["--max_step_tokens", "0"], "max_step_tokens"),
    (["--max_thinking_tokens", "0"], "max_thinking_tokens"),
    (["--delimiter", "comma"], "unknown delimiter 'comma'"),
    (["--delimiter", "regex:("], "not a regular expression"),
    # Contradictions.
    (["--slm", "a"], "--slm stands alone: give --llm too"),
    (["--pair", "abacus", "--llm", "b"], "--llm stands alone: give --slm too"),
    (["--router", "slm", "--threshold", "0.5"], "router slm"),
    (["--router", "llm", "--threshold", "0.5"], "router llm"),
    (["--entropy_top_k", "20"], "--entropy_top_k goes with --router entropy"),
    (["--router", "margin", "--entropy_top_k", "20"], "--entropy_top_k"),
    (["Hi", "--file", "x"], "contradict"),
    (["Hi", "--input_format", "jsonl"], "--input_format"),
    (["Hi", "--raw", "--system", "x"], "--system"),
    (["Hi", "--overwrite"], "--overwrite goes with --output"),
    (["Hi", "--logprobs", "2"], "--logprobs"),
    (["Hi", "--skip_invalid"], "--skip_invalid"),
    # What is not there.
    (["Hi", "--pair", "nope"], "no pair is named 'nope'"),
    (["Hi", "--router", "cleverest"], "unknown router 'cleverest'"),
    (["Hi", "--router", "./no/such/folder"], "no such folder"),
    (["Hi", "--slm", "./none", "--llm", "./none"], "./none"),
    (["Hi", "--output", "/nowhere/at/all.jsonl"], "there is no folder /nowhere/at"),
    (["Hi", "--output", "/tmp"], "is a folder"),
    (["Hi", "--entropy_top_k", "1", "--router", "entropy"], "entropy_top_k=1"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_options_are_one_line_and_exit_2(cli, argv, message):
    result = cli("generate", *argv)
    assert result.code == 2
    assert message in result.error


def test_a_step_router_at_token_granularity(cli, step_router):
    result = cli("generate", "Hi", "--router", step_router, "--granularity", "token")
    assert result.code == 2 and "trained for granularity step" in result.error


def test_models_replace_those_of_a_pair(tmp_path):
    preset = tmp_path / "pair.yaml"
    preset.write_text("slm: a/b\nllm: c/d\ndtype: float16\nrevision: v1\nslm_adapters: [x/y]\n")

    def arguments(*argv):
        return pair_arguments(pick(PairOptions, parse(*argv)))

    assert arguments("--pair", preset, "--slm", "e/f", "--llm", "g/h") == {
        "slm": "e/f",
        "llm": "g/h",
        "dtype": "float16",
    }
    assert arguments("--slm", "e/f", "--llm", "g/h") == {"slm": "e/f", "llm": "g/h"}
    given = arguments("--pair", preset, "--device", "cpu,cuda:1", "--dtype", "bfloat16")
    assert given["device"] == ["cpu", "cuda:1"] and given["dtype"] == "bfloat16"
    assert given["slm_adapters"] == ["x/y"] and given["revision"] == "v1"


def test_the_bundled_pair_brings_its_routers(tmp_path, monkeypatch):
    preset = {"slm": str(tmp_path / "abacus-slm"), "llm": str(tmp_path / "abacus-llm")}
    monkeypatch.setattr("r2r_glimp.cli.options.read_preset", lambda name: preset)
    assert default_router(parse(), None) == "entropy"
    for granularity in ("token", "step"):
        folder = tmp_path / f"abacus-{granularity}-router"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        assert default_router(parse(), granularity) == str(folder)
    assert default_router(parse(), None) == str(tmp_path / "abacus-token-router")
    assert default_router(parse("--pair", "other"), None) == "entropy"
    assert default_router(parse("--slm", "a", "--llm", "b"), None) == "entropy"


def test_entropy_over_the_likeliest_tokens():
    routing = pick(RouterOptions, parse("--router", "entropy", "--entropy_top_k", 20))
    assert routing.router is not None
    router = make_router(routing.router, routing.entropy_top_k)
    assert isinstance(router, EntropyRouter) and router.top_k == 20


def test_unset_options_are_left_to_the_library():
    with pytest.raises(UsageError):
        read_params(parse("--threshold", "0.1", "--router", "slm"))

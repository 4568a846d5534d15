"""`inspect` a pair, a model, a router, recorded outputs; and `env`."""

import json

import pytest

from tests.hub.conftest import folder, make_checkpoint  # noqa: F401 - fixtures


@pytest.fixture
def preset(models, tmp_path):
    path = tmp_path / "pair.yaml"
    path.write_text(f"slm: {models / 'slm'}\nllm: {models / 'llm'}\n")
    return path


def test_a_pair(cli, preset, models, tiny_model):
    facts = json.loads(cli("inspect", preset, "--json").out)
    model = tiny_model("qwen3")
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert facts["kind"] == "pair" and facts["same_vocabulary"]
    assert facts["granularities"] == ["token", "step"]
    assert facts["kv_bytes_per_token"] == 2 * per_token
    slm, llm = facts["slm"], facts["llm"]
    assert slm["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert slm["architecture"] == "Qwen3ForCausalLM" and slm["refusal"] is None
    assert slm["think_tags"] and slm["chat_template"] and slm["context_length"] == 1024
    prints = slm["fingerprint"], llm["fingerprint"]
    assert prints[0]["tokenizer_sha256"] == prints[1]["tokenizer_sha256"]
    assert prints[0]["weights_sha256"] != prints[1]["weights_sha256"]
    text = cli("inspect", preset).out
    assert "same vocabulary  yes" in text and str(models / "llm") in text


def test_fingerprints_are_those_of_a_loaded_pair(cli, preset):
    from r2r_glimp.models.pair import ModelPair

    facts = json.loads(cli("inspect", preset, "--json").out)
    loaded = ModelPair.from_config(preset)
    assert facts["slm"]["fingerprint"] == loaded.slm.fingerprint.to_dict()
    assert facts["slm"]["dtype"] == "float32"


def test_a_model(cli, models):
    result = cli("inspect", models / "plain")
    assert (
        result.out.startswith(f"model {models / 'plain'}\n") and "chat template   no" in result.out
    )


def test_experts_look_at_values(cli, tmp_path, tiny_model, tokenizer):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    facts = json.loads(cli("inspect", tmp_path, "--json").out)
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4


def test_a_router(cli, folder):  # noqa: F811
    text = cli("inspect", folder).out
    assert "mlp, per token" in text and "recall-0.95" in text and "acme/small" in text
    facts = json.loads(cli("inspect", folder, "--json").out)
    assert facts["kind"] == "router" and facts["granularity"] == "token" and facts["has_curve"]
    assert facts["thresholds"]["recall-0.95"]["value"] == 0.25


@pytest.fixture
def outputs(cli, pair, jsonl, tmp_path):
    path = tmp_path / "out.jsonl"
    rows = [{"id": "first", "prompt": "Hello"}, {"id": "second", "prompt": "World"}]
    routed = ("--router", "random", "--threshold", "0.5", "--seed", "1", "--trace")
    assert cli("generate", *pair, *routed, "--file", jsonl(*rows), "--output", path).code == 0
    return path


def test_outputs(cli, outputs):
    facts = json.loads(cli("inspect", outputs, "--json").out)
    records = [json.loads(line) for line in outputs.read_text().splitlines()]
    assert facts["outputs"] == 2 and facts["tokens"] == 24 and facts["decisions"] == 24
    assert facts["llm_tokens"] == sum(r["stats"]["llm_tokens"] for r in records)
    assert facts["llm_tokens"] == facts["deferrals"]
    assert 0 < facts["slm_tokens_compared"] <= facts["slm_tokens"]
    text = cli("inspect", outputs, "--show", "2", "--decisions", "3").out
    assert "--- first (0)" in text and "--- second (0)" in text and "⟦" in text
    assert "< threshold 0.5" in text and "9 more" in text
    assert "---" not in cli("inspect", outputs, "--show", "0").out


def test_outputs_without_traces(cli, pair, tmp_path):
    path = tmp_path / "out.jsonl"
    cli("generate", *pair, "Hello", "--output", path)
    text = cli("inspect", path).out
    assert "--trace" in text and "--- request-0 (0)" in text


BAD = [
    (b"", "is empty"),
    (b'{"text": 3}', "line 1: not an output"),
    (b"{", "line 1: not valid JSON"),
    (b"\xff", "line 1: not valid UTF-8"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_a_file_that_holds_something_else(cli, tmp_path, data, message):
    (tmp_path / "x.jsonl").write_bytes(data)
    result = cli("inspect", tmp_path / "x.jsonl")
    assert result.code == 2 and message in result.error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "nothing has this name"),
        (["./no/folder"], "no such folder"),
        (["no.yaml"], "no such file"),
        (["abacus", "--show", "-1"], "--show -1"),
        ([], "thing"),
    ],
)
def test_nothing_to_look_at(cli, argv, message):
    result = cli("inspect", *argv)
    assert result.code == 2 and message in result.error


def test_a_folder_that_holds_neither(cli, tmp_path):
    assert cli("inspect", tmp_path).code == 2
    (tmp_path / "config.json").write_text('{"format_version": 99}')
    result = cli("inspect", tmp_path)
    assert result.code == 2 and "format_version 99" in result.error


def test_env(cli):
    facts = json.loads(cli("env", "--json").out)
    assert facts["software"]["torch"] and facts["software"]["r2r_glimp"]
    assert facts["cpu"]["cores"] >= 1 and facts["cpu"]["torch_threads"] >= 1
    assert "devices" in facts["gpu"]
    text = cli("env").out
    assert "software\n" in text and "  torch " in text

"""`calibrate`: targets met on routed text, results in their places, one line where it cannot be."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from r2r_glimp.cli.calibration.labels import load_labels
from r2r_glimp.hub import load_router
from r2r_glimp.hub.checkpoint import RouterCheckpoint, read_checkpoint
from r2r_glimp.hub.config import RouterConfig
from r2r_glimp.models.pair import ModelPair
from r2r_glimp.routing.features import FeatureSpec
from r2r_glimp.routing.mlp import MLPConfig, MLPRouterNet, MLPSize, Threshold
from tests.training.conftest import NUM_QUESTIONS, columns_of, signals_of, write

HIDDEN = 32  # of the tiny models
SIZES = ("--num_prompts", "12", "--max_tokens", "10", "--tolerance", "0.1")


@pytest.fixture
def calibrate(cli, pair, tmp_path, monkeypatch):
    """`calibrate("--router", "entropy", ...)` on abacus prompts, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: cli("calibrate", *pair, *SIZES, "--prompts", "abacus", *args)


@pytest.fixture
def router(models, tmp_path):
    """An untrained router of the tiny SLM; its scores are spread by a large head."""
    spec = FeatureSpec(hidden_size=HIDDEN, top_k_logits=4)
    config = MLPConfig(granularity="token", features=spec, size=MLPSize(width=16, blocks=1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLPRouterNet(config)
        net.head.weight.data *= 10
    threshold = Threshold(value=0.5, calibrated_on="nothing", recall=0.9)
    curve = {
        "measured_on": "labeled text",
        "threshold": [0.0, 0.5, 1.0],
        "llm_share": [1.0, 0.4, 0.0],
        "recall": [1.0, 0.9, 0.0],
        "precision": [0.1, 0.2, None],
    }
    config = RouterConfig(
        model=config,
        thresholds={"recall-0.95": threshold},
        default_threshold="recall-0.95",
        slm=ModelPair.from_pretrained(models / "slm", models / "slm", device="cpu").slm.fingerprint,
        trained_on={"dataset": "elsewhere", "positive": "divergent"},
    )
    folder = tmp_path / "router"
    RouterCheckpoint(config, dict(net.state_dict()), curve).save_pretrained(folder)
    return folder


@pytest.fixture
def labeled(models, tmp_path):
    """A labeled dataset of the tiny SLM."""
    options = {"device": "cpu", "dtype": "float32"}
    slm = ModelPair.from_pretrained(models / "slm", models / "slm", **options).slm
    return write(columns_of(signals_of(slm), HIDDEN), tmp_path / "labels", slm)


ENTROPY = ("--router", "entropy", "--granularity", "token")


def test_a_share_is_met_and_generate_takes_it(calibrate, cli, pair):
    result = calibrate(*ENTROPY, "--target_llm_share", "0.3", "--json", "--fresh", "10")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    (found,) = facts["thresholds"]
    assert found["llm_share"] == pytest.approx(0.3, rel=0.1)
    assert found["llm_share_low"] <= found["llm_share"] <= found["llm_share_high"]
    assert found["num_prompts"] == 12 and found["fresh"]["num_prompts"] == 10
    assert found["fresh"]["llm_share"] != found["llm_share"]
    assert "LLM share" in result.err and "fresh prompts" in result.err

    stored = Path(facts["stored"])
    assert stored == Path("runs/calibrate/entropy-token/generate.yaml")
    options = yaml.safe_load(stored.read_text())
    assert options["threshold"] == found["threshold"] and options["answer_by"] == "router"
    assert "# LLM share" in stored.read_text()
    again = cli("generate", *pair[4:], "--config", stored, "--json", "Say hats 4. How many hats?")
    assert again.code == 0 and {"slm", "llm"} == set(options) & {"slm", "llm"}


def test_the_report(calibrate):
    assert calibrate(*ENTROPY, "--target_llm_share", "0.3", "--report", "report").code == 0
    folder = Path("report")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("calibration.json", "generate.yaml", "share.csv", "share.png", "scores.csv"),
        "scores.png",
    }
    rows = list(csv.DictReader((folder / "share.csv").open()))
    shares = [float(row["llm_share"]) for row in rows]
    assert len(rows) >= 6 and shares[0] > 0.9 and shares[-1] == 0
    facts = json.loads((folder / "calibration.json").read_text())
    assert [point["llm_share"] for point in facts["curve"]] == shares
    counts = [int(row["decisions"]) for row in csv.DictReader((folder / "scores.csv").open())]
    assert sum(counts) > 80
    for name in ("share.png", "scores.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_data_is_written_and_said(calibrate, monkeypatch):
    monkeypatch.setattr("r2r_glimp.cli.calibration.plots.find_spec", lambda name: None)
    result = calibrate(*ENTROPY, "--target_llm_share", "0.3", "--report", "report")
    assert result.code == 0 and "no plots: matplotlib is not installed" in result.err
    assert Path("report/share.csv").exists() and not list(Path("report").glob("*.png"))


def test_several_shares_at_once(calibrate):
    targets = ("--target_llm_share", "0.5", "--target_llm_share", "0.2")
    result = calibrate(*ENTROPY, *targets, "--json", "--quiet")
    found = json.loads(result.out)["thresholds"]
    assert [one["name"] for one in found] == ["share-0.5", "share-0.2"]
    assert [one["llm_share"] for one in found] == pytest.approx([0.5, 0.2], rel=0.1)
    assert (
        yaml.safe_load(Path("runs/calibrate/entropy-token/generate.yaml").read_text())["threshold"]
        == found[0]["threshold"]
    )


def test_targets_from_a_config_file(calibrate, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("target_llm_share: [0.5, 0.2]\nrouter: margin\nquiet: true\n")
    result = calibrate("--config", config, "--json")
    assert result.code == 0, result.err
    assert [one["target"] for one in json.loads(result.out)["thresholds"]] == [0.5, 0.2]


def test_average_parameters(calibrate, models):
    one = sum(p.numel() for p in ModelPair.from_pretrained(
        models / "slm", models / "slm", device="cpu").slm.model.parameters())  # fmt: skip
    result = calibrate(*ENTROPY, "--target_avg_params", str(1.25 * one / 1e3) + "K", "--json")
    (found,) = json.loads(result.out)["thresholds"]
    assert found["target"] == pytest.approx(0.25, rel=1e-3)
    assert found["average_parameters"] == pytest.approx(1.25 * one, rel=0.05)


def test_steps_and_the_random_router(calibrate):
    step = calibrate("--router", "entropy", "--granularity", "step", "--delimiter", "newline",
                     "--answer_by", "router", "--max_step_tokens", "4",
                     "--target_llm_share", "0.4", "--json")  # fmt: skip
    assert step.code == 0, step.err
    (found,) = json.loads(step.out)["thresholds"]
    assert found["llm_share"] == pytest.approx(0.4, abs=0.06)
    options = yaml.safe_load(Path("runs/calibrate/entropy-step/generate.yaml").read_text())
    assert (options["delimiter"], options["max_step_tokens"]) == ("newline", 4)
    result = calibrate("--router", "random", "--target_llm_share", "0.3", "--json")
    (found,) = json.loads(result.out)["thresholds"]
    assert found["threshold"] == pytest.approx(0.3, abs=0.1)


def test_sampled_completions_draw_apart(calibrate):
    more = ("--temperature", "1.0", "--n", "2", "--seed", "3", "--num_prompts", "6", "--json")
    result = calibrate(*ENTROPY, "--target_llm_share", "0.3", *more)
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert "temperature 1" in facts["calibrated_on"]
    assert facts["thresholds"][0]["num_prompts"] == 6
    again = calibrate(*ENTROPY, "--target_llm_share", "0.3", *more)
    assert json.loads(again.out)["thresholds"] == facts["thresholds"]


def test_mixture_on_the_bundled_pair(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli("calibrate", "--router", "entropy", "--granularity", "step", "--mixture",
                 "--answer_by", "router", "--num_prompts", "20", "--max_tokens", "80",
                 "--kv_memory", "64MiB", "--json")  # fmt: skip
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    (found,) = facts["thresholds"]
    assert found["name"] == "mixture" and found["target"] is None and 0 < found["llm_share"] < 1
    assert facts["mixture"]["scale"] == "log"
    assert facts["mixture"]["means"][0] < facts["mixture"]["means"][1]
    assert facts["prompts"] == "abacus validation problems"


def test_a_trained_router_keeps_its_threshold_in_its_checkpoint(calibrate, router):
    result = calibrate("--router", router, "--target_llm_share", "0.25", "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert facts["stored"] == str(router)
    checkpoint = read_checkpoint(router)
    config = checkpoint.config
    assert set(config.thresholds) == {"recall-0.95", "share-0.25"}
    assert config.default_threshold == "share-0.25"
    assert config.threshold.llm_share == facts["thresholds"][0]["llm_share"]
    assert config.threshold.llm_share == pytest.approx(0.25, rel=0.1)
    assert config.threshold.llm_share_low < 0.25 < config.threshold.llm_share_high
    said = "12 abacus validation problems, routed per token, answer by router, greedy"
    assert config.threshold.calibrated_on == said
    assert load_router(router).threshold("token") == facts["thresholds"][0]["threshold"]
    assert "| share-0.25 |" in (router / "README.md").read_text()
    curve = checkpoint.curve
    assert said in curve["measured_on"] and "labeled text" in curve["measured_on"]
    rows = dict(
        zip(curve["threshold"], zip(curve["llm_share"], curve["recall"], strict=True), strict=True)
    )
    assert rows[0.5][1] == 0.9 and curve["threshold"] == sorted(curve["threshold"])
    measured = [share for share, _ in rows.values() if share is not None]
    assert len(measured) == len(facts["curve"])


def test_once_more_into_another_folder_keeping_the_default(calibrate, router):
    calibrate("--router", router, "--target_llm_share", "0.25")
    card = (router / "README.md").read_text()
    (router / "README.md").write_text(card.replace("## The pair", "Ask me first.\n\n## The pair"))
    result = calibrate("--router", router, "--target_llm_share", "0.5", "--keep_default",
                       "--output", "other")  # fmt: skip
    assert result.code == 0, result.err
    config = read_checkpoint(Path("other")).config
    assert set(config.thresholds) == {"recall-0.95", "share-0.25", "share-0.5"}
    assert config.default_threshold == "share-0.25"
    card = Path("other/README.md").read_text()
    assert "Ask me first." in card and "| share-0.5 |" in card
    assert set(read_checkpoint(router).config.thresholds) == {"recall-0.95", "share-0.25"}
    assert read_checkpoint(Path("other")).curve["measured_on"].count("LLM share: ") == 1
    again = calibrate("--router", router, "--target_llm_share", "0.5", "--output", "other")
    assert again.code == 2 and "other is there already" in again.error


def test_recall_is_told_by_labels(calibrate, router, labeled):
    result = calibrate("--router", router, "--target_recall", "0.8", "--labels", labeled, "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    (found,) = facts["thresholds"]
    assert found["name"] == "recall-0.80" and 0.8 <= found["recall"] < 0.83
    threshold = read_checkpoint(router).config.thresholds["recall-0.80"]
    assert threshold.recall == found["recall"] and threshold.precision == found["precision"]
    curve = read_checkpoint(router).curve
    assert facts["labels"] in curve["measured_on"]
    assert None not in curve["recall"]
    folder = Path(facts["report"])
    rows = list(csv.DictReader((folder / "precision_recall.csv").open()))
    assert float(rows[0]["recall"]) == 1 and (folder / "precision_recall.png").exists()


def test_labels_beside_a_share_for_entropy(calibrate, labeled):
    result = calibrate(*ENTROPY, "--target_llm_share", "0.3", "--labels", labeled, "--json")
    (found,) = json.loads(result.out)["thresholds"]
    assert 0 < found["recall"] <= 1 and 0 < found["precision"] <= 1


def test_labels_of_another_slm(calibrate, labeled, models):
    other = ("--slm", models / "llm", "--target_llm_share", "0.3", "--labels", labeled)
    result = calibrate(*ENTROPY, *other)
    assert result.code == 2 and "was labeled with another SLM" in result.error


def test_labels_of_scores_a_dataset_does_not_hold(calibrate, labeled):
    share = ("--target_llm_share", "0.3", "--labels", labeled)
    result = calibrate("--router", "random", *share)
    assert result.code == 2 and "says nothing about router random" in result.error
    result = calibrate(*ENTROPY, "--entropy_top_k", "5", *share)
    assert result.code == 2 and "entropy of the full vocabulary" in result.error


def test_prompts_of_files_and_of_a_labeled_dataset(cli, pair, jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = jsonl(*({"id": i, "prompt": f"Say hats {i}.", "max_tokens": 8} for i in range(9)))
    text = tmp_path / "prompts.txt"
    text.write_text("Say hats 1.\n\nSay cups 2.\nSay keys 3.\n")
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    source = {"kind": "abacus", "split": "train", "levels": [1], "seed": 5}
    info = {"config": {"source": source}, "counts": {"questions": 7}}
    (dataset / "info.json").write_text(json.dumps(info))
    for prompts, count, name in (
        (rows, 9, "prompts of in.jsonl"),
        (text, 3, "prompts of prompts.txt"),
        (dataset, 7, "questions of dataset"),
    ):
        result = cli("calibrate", *pair, *ENTROPY, "--prompts", prompts, "--json",
                     "--target_llm_share", "0.4", "--tolerance", "0.2")  # fmt: skip
        assert result.code == 0, result.err
        facts = json.loads(result.out)
        assert (facts["prompts"], facts["thresholds"][0]["num_prompts"]) == (name, count)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "say what to aim at"),
        (("--target_llm_share", "0.1", "--mixture"), "say what to aim at"),
        (("--target_llm_share", "10"), "--target_llm_share 10.0 is out of range"),
        (("--target_llm_share", "much"), "out of range"),
        (("--target_recall", "0.9"), "give --labels DATASET"),
        (("--target_llm_share", "0.1", "--router", "llm"), "never decides"),
        (("--target_llm_share", "0.1", "--router", "best"), "unknown router 'best'"),
        (("--target_llm_share", "0.1", "--threshold", "1"), "--threshold is for generate"),
        (("--target_llm_share", "0.1", "--num_prompts", "0"), "--num_prompts must be 1 or more"),
        (("--target_llm_share", "0.1", "--prompts", "none.jsonl"), "none.jsonl: No such file"),
        (("--target_llm_share", "0.1", "--prompts", "empty.txt"), "empty.txt is empty"),
        (("--target_llm_share", "0.1", "--prompts", "latin.txt"), "latin.txt: not valid UTF-8"),
        (("--target_llm_share", "0.1", "--prompts", "folder"), "info.json: missing"),
        (("--target_llm_share", "0.1", "--output", "folder"), "folder is a folder"),
        (("--target_llm_share", "0.1", "--output", "empty.txt"), "empty.txt is there already"),
        (("--target_llm_share", "0.1", "--report", "empty.txt"), "empty.txt is a file"),
        (("--target_avg_params", "1K"), "cannot be had"),
        (("--target_avg_params", "few"), "no number of parameters"),
        (("--target_recall", "0.9", "--labels", "nothing"), "nothing: no such folder"),
        (("--target_llm_share", "0.9", "--max_llm_share", "0.5"), "never above"),
    ],
)  # fmt: skip
def test_one_line_where_it_cannot_be(calibrate, tmp_path, args, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "folder").mkdir()
    router = () if "--router" in args else ("--router", "entropy")
    result = calibrate(*router, "--quiet", *args)
    assert result.code == 2 and message in result.error


def test_the_llm_writes_every_answer(cli, tmp_path, monkeypatch):
    """At step granularity the default `answer_by` leaves small shares out of reach."""
    monkeypatch.chdir(tmp_path)
    result = cli("calibrate", "--granularity", "step", "--target_llm_share", "0.05", "--quiet",
                 "--router", "entropy", "--num_prompts", "8", "--kv_memory", "64MiB")  # fmt: skip
    assert result.code == 2
    assert "never below" in result.error and "--answer_by router" in result.error


def test_which_prompts(cli, pair):
    result = cli("calibrate", *pair, *ENTROPY, "--target_llm_share", "0.1")
    assert result.code == 2 and "which prompts?" in result.error


def test_of_its_own_training_data_only_the_selection_split_counts(router, labeled, models):
    slm = ModelPair.from_pretrained(models / "slm", models / "slm", device="cpu").slm
    checkpoint = read_checkpoint(router)
    checkpoint.training_config = "data:\n  selection: 0.3\n  test: 0.2\n  split_seed: 1\n"
    whole = load_labels(labeled, checkpoint.build(), "token", slm, checkpoint)
    facts = {"dataset": f"runs/{Path(labeled).name}", "questions": NUM_QUESTIONS}
    checkpoint.config = dataclasses.replace(checkpoint.config, trained_on=facts)
    part = load_labels(labeled, checkpoint.build(), "token", slm, checkpoint)
    assert part.name.startswith("selection split of labels: ")
    assert 0.1 < len(part.scores) / len(whole.scores) < 0.5

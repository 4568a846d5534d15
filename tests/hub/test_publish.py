"""Publishing, against a Hub on this machine."""

import hashlib
import json

import pytest
import torch
from huggingface_hub import ModelCard

from r2r_glimp.core import CheckpointError, DataError, UsageError
from r2r_glimp.hub import load_router, publish_dataset, pull, push
from r2r_glimp.hub.checkpoint import FILES, RouterCheckpoint

REPO = "acme/small_large-token-router"


def test_card_says_what_a_reader_needs(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == ["acme/small", "acme/small"]
    assert card.data.datasets == ["acme/labels"]
    assert card.data.library_name == "r2r_glimp" and "token-router" in card.data.tags
    for words in ("arxiv.org/abs/2505.21600", "| recall-0.95 | 0.25 | 10.00% | 95.00% |", "0.5"):
        assert words in card.content
    assert "python -m training.fit" in card.content
    assert "More Information Needed" not in card.content


def test_dry_run_shows_what_would_be_sent(folder, hub):
    publication = push(folder, REPO, dry_run=True)
    assert hub.requests == []
    assert sorted(file.name for file in publication.files) == sorted(FILES)
    by_name = {file.name: file for file in publication.files}
    for name in ("config.json", "model.safetensors"):
        data = (folder / name).read_bytes()
        assert by_name[name].num_bytes == len(data)
        assert by_name[name].sha256 == hashlib.sha256(data).hexdigest()
    assert f'load_router("{REPO}")' in publication.card
    assert publication.commit is None and publication.revision == "main"


def test_push_then_load_and_pull(folder, hub, make_checkpoint, tmp_path):
    publication = push(folder, REPO, private=True)
    assert hub.repos[REPO].private
    assert publication.commit == hub.repos[REPO].sha("main") and REPO in str(publication.url)
    dry = push(folder, REPO, dry_run=True)
    sent = hub.repos[REPO].branches["main"]
    assert {f.name: f.sha256 for f in dry.files} == {
        name: hashlib.sha256(data).hexdigest() for name, data in sent.items()
    }
    for revision in (None, "main", publication.commit):
        tensors = load_router(REPO, revision=revision).net.state_dict()
        assert torch.equal(tensors["head.weight"], make_checkpoint().tensors["head.weight"])
    pulled = pull(REPO, tmp_path / "pulled")
    assert sorted(path.name for path in pulled.iterdir()) == sorted(FILES)
    assert RouterCheckpoint.from_pretrained(pulled).config == make_checkpoint().config
    with pytest.raises(UsageError, match="is there already"):
        pull(REPO, tmp_path / "pulled")


def test_revision_is_a_branch_of_its_own(folder, hub):
    push(folder, REPO, revision="v2")
    assert sorted(hub.repos[REPO].branches["v2"]) == sorted(FILES)
    assert hub.repos[REPO].branches["main"] == {}
    assert load_router(REPO, revision="v2").granularity == "token"
    with pytest.raises(CheckpointError, match="v3"):
        load_router(REPO, revision="v3")


def test_push_to_hub_of_the_mixin(make_checkpoint, hub):
    make_checkpoint().push_to_hub(REPO)
    assert sorted(hub.repos[REPO].branches["main"]) == sorted(FILES)


def test_an_edited_card_is_kept(folder, hub):
    (folder / "README.md").write_text("# Mine\n")
    assert push(folder, REPO).card == "# Mine\n"
    assert hub.repos[REPO].branches["main"]["README.md"] == b"# Mine\n"


@pytest.mark.parametrize(
    "repo_id", ["router", "a/b/c", "acme/small+large", "acme/-x", "acme/a..b", "", "acme/x.git"]
)
def test_an_illegal_name_is_refused_before_any_work(repo_id, tmp_path, hub):
    with pytest.raises(UsageError, match="is not a Hub id") as error:
        push(tmp_path / "not even there", repo_id)
    assert "\n" not in str(error.value)
    assert ("SMALL_LARGE" in str(error.value)) == ("+" in repo_id)
    assert hub.requests == []


def test_private_never_lands_in_a_public_repository(folder, hub):
    push(folder, REPO)
    with pytest.raises(UsageError, match="is there and public"):
        push(folder, REPO, private=True)


def test_nothing_invalid_is_published(folder, hub):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty"):
        push(folder, REPO)
    assert hub.requests == []


def test_what_the_hub_refuses(folder, hub, tmp_path):
    with pytest.raises(CheckpointError, match="acme/nothing: no such repository"):
        pull("acme/nothing", tmp_path / "x")
    hub.refuse_with = 403
    with pytest.raises(CheckpointError, match=f"{REPO}: the Hub refused: .*403"):
        push(folder, REPO)
    assert not (tmp_path / "x").exists()


def test_no_network(folder, hub, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"{REPO}: .*HF_HUB_OFFLINE"):
        push(folder, REPO)
    with pytest.raises(CheckpointError, match=f"{REPO}: not in the cache"):
        pull(REPO, tmp_path / "x")


def test_nobody_answers(folder, hub, monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

    def refused(*args, **more):
        return httpx.get("http://127.0.0.1:1")

    monkeypatch.setattr(HfApi, "create_repo", refused)
    with pytest.raises(CheckpointError, match=f"{REPO}: the Hub cannot be reached: try again"):
        push(folder, REPO)


def test_publish_a_dataset_folder(tmp_path, hub):
    folder = tmp_path / "labels"
    (folder / "data").mkdir(parents=True)
    with pytest.raises(DataError, match="has a README.md and data"):
        publish_dataset(folder, "acme/labels")
    (folder / "README.md").write_text("# Labels\n")
    (folder / "info.json").write_text(json.dumps({}))
    (folder / "secret.txt").write_text("not for publication")
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    publish_dataset(folder, "acme/labels")
    assert hub.repos["acme/labels"].kind == "datasets"
    assert sorted(hub.repos["acme/labels"].branches["main"]) == [
        "README.md",
        "data/train-00000-of-00001.parquet",
        "info.json",
    ]

"""Encoders in folders and repositories of the Hub: our files, a card, and nothing believed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fisherkern as fk
from fisherkern.merging.files.card import encoder_card

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

from fisherkern.hub import HubEncoder  # noqa: E402

FILES = ["README.md", "config.json", "model.json", "model.safetensors"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sasrec(seed: int = 0) -> fk.SASRec:
    torch.manual_seed(seed)
    model = fk.SASRec(7, max_len=4, dim=4, heads=1, layers=1)
    model.item_ids = [f"item {v}" for v in range(7)]
    return model.eval()


def parallel() -> Any:
    return fk.ParallelEncoders.seeded(lambda: fk.GRU4Rec(7, max_len=4, dim=4), 2).eval()


def assert_same(read: Any, model: Any) -> None:
    assert type(read) is type(model) and read.config == model.config and not read.training
    assert read.item_ids == model.item_ids and read.merge_report == model.merge_report
    stored = read.state_dict()
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor), name


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)


def cached(folder: Path, repo_id: str, cache: Path) -> None:
    """Lay a repository into a cache as huggingface_hub does: links to blobs."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for path in (repository / "blobs", repository / "refs", snapshot):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(repository / "blobs" / str(number))


def test_the_package_imports_no_library_of_the_hub_or_of_trainers() -> None:
    code = "import sys, fisherkern.cli; print(*{n.partition('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"huggingface_hub", "lightning", "pytorch_lightning", "transformers"}
    assert "torch" in done.stdout.split() and not heavy & set(done.stdout.split())


def test_without_the_library_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "fisherkern.hub")
    with pytest.raises(ImportError, match=r"pip install 'fisherkern\[hub\]'"):
        import fisherkern.hub  # noqa: F401


@pytest.mark.parametrize("make", [sasrec, lambda: fk.merge([sasrec(), sasrec(1)]), parallel])
def test_a_folder_gives_the_encoder_back(make: Any, tmp_path: Path) -> None:
    model = make()
    HubEncoder(model, {"ndcg@10": 0.25}).save_pretrained(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == FILES
    assert_same(HubEncoder.from_pretrained(tmp_path / "a").encoder, model)
    assert_same(HubEncoder.from_pretrained(str(tmp_path / "a")).encoder, model)
    about = json.loads((tmp_path / "a" / "model.json").read_text())
    assert about["metrics"] == {"ndcg@10": 0.25}
    card = hub.ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.library_name == "fisherkern"
    assert ("merge" in card.data.tags) is (model.merge_report is not None)
    assert [it.metric_value for it in card.data.eval_results] == [0.25]
    HubEncoder(model).save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_push_is_the_folder_and_comes_back_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class FakeHfApi:
        def __init__(self, token: Any = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, **settings: Any) -> Any:
            calls.append((repo_id, self.token, settings["private"]))
            return hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, folder_path: Path, **settings: Any) -> str:
            shutil.copytree(folder_path, tmp_path / "pushed")
            return f"{settings['repo_id']}: {settings['commit_message']}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeHfApi)
    model = fk.merge([sasrec(), sasrec(1)], weights=[3.0, 1.0])
    told = HubEncoder(model).push_to_hub("me/merged", token="t", private=True, commit_message="m")
    assert told == "me/merged: m" and calls == [("me/merged", "t", True)]
    assert sorted(path.name for path in (tmp_path / "pushed").iterdir()) == FILES
    cached(tmp_path / "pushed", "me/merged", tmp_path / "cache")
    read = HubEncoder.from_pretrained("me/merged", cache_dir=tmp_path / "cache")
    assert_same(read.encoder, model)
    with pytest.raises(fk.InputError, match=r"'me/other': the Hub: \w"):
        HubEncoder.from_pretrained("me/other", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "config", [b"{", b"[]", b'{"encoder": 1, "self": 2}', b'{"class": "GRU4Rec"}', b"\xff"]
)
def test_config_json_is_not_believed(config: bytes, tmp_path: Path) -> None:
    HubEncoder(sasrec()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    assert_same(HubEncoder.from_pretrained(tmp_path).encoder, sasrec())
    (tmp_path / "config.json").unlink()
    assert_same(HubEncoder.from_pretrained(tmp_path).encoder, sasrec())


def test_a_folder_without_a_model_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fk.InputError, match=r"model.safetensors: no such file"):
        HubEncoder.from_pretrained(tmp_path)
    torch.save(sasrec().state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(sasrec().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(fk.InputError, match=r"model.safetensors: "):
        HubEncoder.from_pretrained(tmp_path)


def test_a_card_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine\n")
    HubEncoder(sasrec()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine\n"


@pytest.mark.parametrize(
    "name", ["a/b/c", "../a", "a b", "a\n\x1b[31m\u202e/b", "x" * 5000, "\0", "http://a.b/c"]
)
def test_odd_names_of_repositories_are_refused_on_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for ask in (HubEncoder.from_pretrained, HubEncoder(sasrec()).push_to_hub):
        with pytest.raises(fk.InputError, match="the Hub: ") as error:
            ask(name)
        assert str(error.value).isprintable() and len(str(error.value)) < 500
    assert not list(tmp_path.iterdir())


def test_a_merge_of_files_is_told_on_the_card(tmp_path: Path) -> None:
    for number in range(2):
        fk.save_model(sasrec(number), tmp_path / f"m{number}.safetensors")
    members = [tmp_path / "m0.safetensors", tmp_path / "m1.safetensors"]
    out = tmp_path / "merged.safetensors"
    provenance = fk.merge_files(members, out, weights=[3.0, 1.0])
    merged = fk.load_model(out)
    assert merged.merge_report == json.loads(json.dumps(provenance))
    card = encoder_card(merged, {})
    assert "| m0.safetensors | 0.75 |" in card and "| method | weighted |" in card


HOSTILE = (
    "<script>alert(1)</script>",
    "a|b `c` ![x](http://a.b/c.png)",
    "a\r\n## heading\n---\n",
    "---\nlicense: other\n---",
    "\x1b[31m\u202egpj",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_merge_report_of_anybody_is_text_on_the_card(text: str, tmp_path: Path) -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    HubEncoder(sasrec()).save_pretrained(tmp_path)

    def card(word: str) -> str:
        about = json.loads((tmp_path / "model.json").read_text())
        about["extra"]["merge_report"] = {
            "method": word,
            "members": [{"file": word}, {"file": {word: [word]}}, word],
            "weights": [word, {word: word}, None, 1.0],
            "options": {word: [word]},
            word: word,
        }
        (tmp_path / "model.json").write_text(json.dumps(about))
        read = HubEncoder.from_pretrained(tmp_path)
        read.metrics = {word: 0.5}
        return str(read.generate_model_card())

    def shape(source: str) -> Any:
        tokens = markdown.parse(source.split("\n---\n", 1)[1])
        inner = [child for token in tokens for child in token.children or ()]
        return [t.type for t in tokens], [t.type for t in inner if t.type != "text"]

    hostile = card(text)
    assert shape(hostile) == shape(card("x"))
    data = hub.ModelCard(hostile).data
    assert data.license is None and data.tags == ["sequential-recommendation", "merge"]
    assert [result.metric_type for result in data.eval_results] == [text]
    assert "<" not in hostile.split("\n---\n", 1)[1]


@pytest.mark.parametrize(
    "report", [{}, {"weights": {"a": [1.0]}}, {"weights": [], "members": 10**15}, {"method": []}]
)
def test_reports_of_other_kinds_make_a_card(report: dict[str, Any]) -> None:
    model = sasrec()
    model.merge_report = report
    assert encoder_card(model, {}).count("# SASRec\n") == 1

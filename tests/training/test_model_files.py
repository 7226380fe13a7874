"""Model files: what is saved comes back bit for bit, and what is wrong with a file is named."""

import json
import subprocess

import numpy as np
import pytest
import torch

import fisherkern as fk
from fisherkern.encoders import BERT4Rec
from fisherkern.errors import InputError
from fisherkern.files import read_tensors, save_tensors
from fisherkern.provenance import source_commit
from fisherkern.training import load_model, save_model

V, T = 20, 8
ITEM_IDS = [f"item {v}" for v in range(1, V + 1)]


def new_model(**changes):
    torch.manual_seed(0)
    return BERT4Rec(V, T, dim=16, **changes)


def test_a_model_file_gives_the_model_back(tmp_path):
    model = new_model(tied=False, norm="pre").eval()
    model.item_ids = ITEM_IDS
    path = tmp_path / "a.safetensors"
    save_model(model, path, metrics={"ndcg@10": 0.1}, extra={"note": "x"})
    before = torch.get_rng_state()
    again = load_model(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(again) is BERT4Rec and again.config == model.config and not again.training
    assert again.item_ids == ITEM_IDS
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    history = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(history), model(history))
    assert all(parameter.requires_grad for parameter in again.parameters())
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["metrics"] == {"ndcg@10": 0.1} and about["extra"] == {"note": "x"}
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["commit"] == source_commit()


def test_a_model_file_stands_alone_and_may_hold_nan(tmp_path):
    model = new_model().double()
    model.item_ids = ITEM_IDS
    with torch.no_grad():
        model.output_bias[3] = float("nan")
    save_model(model, tmp_path / "a.safetensors")
    (tmp_path / "a.json").unlink()
    again = load_model(tmp_path / "a.safetensors")
    assert again.item_ids is None and again.get_parameter("output_bias")[3].isnan()
    assert again.get_parameter("output_bias").dtype == torch.float64


def test_a_model_without_item_ids(tmp_path):
    save_model(new_model(), tmp_path / "a.safetensors")
    assert load_model(tmp_path / "a.safetensors").item_ids is None


def drop_tensor(tensors, header):
    del tensors["output_bias"]


def other_shape(tensors, header):
    tensors["output_bias"] = torch.zeros(V + 1)


def extra_tensor(tensors, header):
    tensors["other"] = torch.zeros(1)


def other_dtype(tensors, header):
    tensors["output_bias"] = torch.zeros(V, dtype=torch.int64)


def other_class(tensors, header):
    header["class"] = "GPT"


def other_config(tensors, header):
    header["config"]["colour"] = 1


def other_kind(tensors, header):
    header["kind"] = "fisher"


@pytest.mark.parametrize(
    "change, message",
    [
        (drop_tensor, "tensor 'output_bias' is missing"),
        (other_shape, r"tensor 'output_bias' has shape \(21,\), not \(20,\)"),
        (extra_tensor, "tensor 'other' is not part of the model"),
        (other_dtype, "tensor 'output_bias' is torch.int64"),
        (other_class, "unknown encoder 'GPT'; known: BERT4Rec"),
        (other_config, "does not fit BERT4Rec: .*colour"),
        (other_kind, "not a model file"),
    ],
)
def test_a_wrong_model_file_is_named(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    save_model(new_model(), path)
    tensors, header = read_tensors(path)
    change(tensors, header)
    save_tensors(path, tensors, header)
    with pytest.raises(InputError, match=f"{path}: .*{message}"):
        load_model(path)


def test_item_ids_of_another_model_are_refused(tmp_path):
    for name, ids in (("a", ["x"] * V), ("b", ["y"] * V)):
        model = new_model()
        model.item_ids = ids
        save_model(model, tmp_path / f"{name}.safetensors")
    (tmp_path / "b.json").replace(tmp_path / "a.json")
    with pytest.raises(InputError, match="a.json: its item_ids are not those of a.safetensors"):
        load_model(tmp_path / "a.safetensors")


def test_what_cannot_be_a_model_file_is_named(tmp_path):
    class Other(BERT4Rec):
        pass

    with pytest.raises(InputError, match="Other is not an encoder"):
        save_model(Other(V), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="must end in .safetensors"):
        save_model(new_model(), tmp_path / "a.v1")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "a.safetensors")


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_the_source_and_of_nothing_else(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    package = checkout / "fisherkern"
    installed = checkout / ".venv" / "lib" / "fisherkern"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("")
    assert source_commit(package) is None
    git(checkout, "init")
    assert source_commit(package / ".") is None  # a checkout without a commit
    git(checkout, "add", "fisherkern")
    git(checkout, "commit", "-m", "first")
    source_commit.cache_clear()
    commit = git(checkout, "rev-parse", "HEAD")
    assert len(commit) == 40 and source_commit(package) == commit
    git(checkout, "tag", "v1")
    (package / "a.py").write_text("changed")
    source_commit.cache_clear()
    assert source_commit(package) == f"{commit}-dirty"
    # Somebody's project is not what made the file.
    assert source_commit(installed) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    source_commit.cache_clear()
    assert source_commit(package) is None
    source_commit.cache_clear()


def test_numpys_numbers_are_sizes_seeds_and_metrics(tmp_path):
    data = fk.synthetic(np.int64(30), np.int32(20), np.int64(1))
    model = fk.SASRec(np.int64(data.num_items), max_len=np.int32(8), dim=np.int64(4), layers=1)
    settings = {"epochs": np.int64(1), "batch_size": np.int32(16), "seed": np.int64(3)}
    state = tmp_path / "state"
    first = fk.train(model, data, state=state, progress=False, objective=fk.NextItem(), **settings)
    again = fk.train(model, data, state=state, progress=False, objective=fk.NextItem(), **settings)
    assert again.losses == first.losses
    fk.save_model(model, tmp_path / "a.safetensors", metrics={"ndcg@10": np.float32(0.5)})
    assert fk.load_model(tmp_path / "a.safetensors").config == model.config
    with pytest.raises(TypeError, match="object is no JSON value"):
        fk.save_model(model, tmp_path / "a.safetensors", extra={"x": object()})

"""The last checkpoints of a run: which files stay, and their bits after a kill."""

from pathlib import Path

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.errors import InputError
from fisherkern.files import read_json

DATA = fk.synthetic(num_users=30, num_items=20, clusters=4, min_length=4, max_length=9, seed=0)


def model() -> fk.SASRec:
    torch.manual_seed(0)
    return fk.SASRec(DATA.num_items, max_len=8, dim=8, layers=1)


def train(on_epoch, epochs=7, **more):
    how = {"objective": fk.NextItem(), "batch_size": 7, "progress": False, **more}
    return fk.train(model(), DATA, epochs=epochs, on_epoch=on_epoch, **how)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(*epochs: int) -> set[str]:
    return {f"checkpoint-{e:04d}.{end}" for e in epochs for end in ("safetensors", "json")}


@pytest.mark.parametrize(
    ("last", "every", "epochs"),
    [(3, 1, (5, 6, 7)), (2, 3, (3, 6)), (9, 2, (2, 4, 6)), (1, 1, (7,))],
)
def test_the_last_epochs_stay_as_they_were(tmp_path, last, every, epochs):
    keep = fk.KeptCheckpoints(tmp_path / "kept", last, every)
    states = {}

    def on_epoch(epoch, own, loss):
        keep(epoch, own, loss)
        states[epoch] = {name: value.clone() for name, value in own.state_dict().items()}

    train(on_epoch)
    assert content(tmp_path / "kept").keys() == names(*epochs)
    for epoch in epochs:
        kept = fk.load_model(keep.path(epoch))
        assert kept.item_ids == list(DATA.item_ids)
        assert all(torch.equal(kept.state_dict()[n], v) for n, v in states[epoch].items())


@pytest.mark.parametrize("save_every", [1, 3])
@pytest.mark.parametrize("kills", [(1,), (4,), (2, 5), (6, 7)])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_run_ends_with_the_same_files(tmp_path, save_every, kills, moment):
    expected = fk.KeptCheckpoints(tmp_path / "whole", 3)
    train(expected)
    keep = fk.KeptCheckpoints(tmp_path / "killed", 3)
    left = list(kills)

    def on_epoch(epoch, own, loss):
        if moment == "after":
            keep(epoch, own, loss)
        if left and epoch == left[0]:
            left.pop(0)
            raise KeyboardInterrupt
        if moment == "before":
            keep(epoch, own, loss)

    state = {"state": tmp_path / "state.safetensors", "save_every": save_every}
    for _ in kills:
        with pytest.raises(KeyboardInterrupt):
            train(on_epoch, **state)
    train(on_epoch, **state)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_other_files_are_left_alone(tmp_path):
    keep = fk.KeptCheckpoints(tmp_path, 1)
    others = ["checkpoint-1.safetensors", "checkpoint-best.safetensors", "model.safetensors"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "checkpoint-0001.safetensors").write_bytes(b"")  # its JSON went first
    keep(3, model(), 0.0)
    assert {path.name for path in tmp_path.iterdir()} == {*others, *names(3)}


def test_numbers_below_one_are_refused(tmp_path):
    for how in ({"last": 0}, {"every": 0}, {"last": 1.5}):
        with pytest.raises(InputError, match=f"{next(iter(how))} must be"):
            fk.KeptCheckpoints(tmp_path, **how)


def test_the_command_keeps_and_merges_them(tmp_path, capsys):
    network = ["--encoder", "SASRec", "--dim", "8", "--layers", "1", "--max-len", "8"]
    out = tmp_path / "run"
    train_it = ["train", "--data", "synthetic", *network, "--epochs", "3", "--quiet"]
    train_it += ["--batch-size", "1000", "--out", str(out), "--keep", "2"]
    assert main(train_it) == 0
    kept = sorted(out.glob("checkpoint-*.safetensors"))
    assert [path.stem for path in kept] == ["checkpoint-0002", "checkpoint-0003"]
    last, final = fk.load_model(kept[1]), fk.load_model(out / "model.safetensors")
    assert torch.equal(last.item_embedding.weight, final.item_embedding.weight)
    models = [fk.load_model(path) for path in kept]
    expected = fk.merge(models, weights=fk.decay_weights(2, "1-sqrt"))
    for stream in ([], ["--stream"]):
        merge = ["merge", *map(str, kept), "--weights", "1-sqrt-decay", *stream]
        assert main([*merge, "--out", str(tmp_path / "merged")]) == 0
        merged = fk.load_model(tmp_path / "merged" / "merged.safetensors")
        assert torch.equal(merged.item_embedding.weight, expected.item_embedding.weight)
        found = read_json(tmp_path / "merged" / "result.json")
        assert found["report"]["weights"] == fk.decay_weights(2, "1-sqrt")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"members: [{kept[0]}, {kept[1]}]\nweights: cosine-decay\nout: r\n")
    assert main(["merge", "--recipe", str(recipe)]) == 0
    used = read_json(tmp_path / "r" / "result.json")["report"]["weights"]
    assert used == fk.decay_weights(2, "cosine")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "checkpoint-0002.safetensors").write_bytes(b"mine")
    assert main([*train_it[:-4], "--out", str(taken), "--keep", "2"]) == 2
    assert "did not make it" in capsys.readouterr().err
    assert main([*train_it[:-4], "--out", str(tmp_path / "x"), "--keep", "0"]) == 2
    assert "--keep must be at least 1" in capsys.readouterr().err
    long = ["--epochs", "10000", "--keep", "1", "--out", str(tmp_path / "x")]
    assert main(["train", "--data", "synthetic", *long]) == 2
    assert "--epochs: must be at most 9,999" in capsys.readouterr().err
    assert main([*train_it[:-4], "--out", str(tmp_path / "x"), "--keep-every", "2"]) == 2
    assert "--keep-every: says how far apart" in capsys.readouterr().err

"""Checkpoints are written back as their own kind and load in their libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path

import native_checkpoints as native
import pytest
import torch
from torch import Tensor

from fisherkern.adapters import load_tensors, write_like
from fisherkern.errors import InputError


def doubled(checkpoint) -> dict[str, Tensor]:
    """Other values of the same types."""
    return {
        name: tensor * 2 if tensor.is_floating_point() else tensor.clone()
        for name, tensor in checkpoint.items()
    }


@pytest.fixture(params=native.KINDS)
def made(request, tmp_path):
    path = tmp_path / request.param
    native.KINDS[request.param][1](path)
    return path


def test_other_values_come_back_in_the_same_kind(made, tmp_path):
    source = load_tensors(made)
    new = doubled(source)
    target = tmp_path / "new" / made.name
    native.RAN.clear()
    write_like(target, new, source)
    written = load_tensors(target)
    assert written.kind == source.kind
    assert written.names() == source.names()
    assert written.config == source.config
    assert written.item_ids == source.item_ids
    for name, value in new.items():
        assert native.same(written[name], value), name
        assert written[name].stride() == source[name].stride()
    assert native.RAN == []


def test_the_same_values_give_the_same_bytes_where_there_is_no_archive(made, tmp_path):
    source = load_tensors(made)
    target = tmp_path / "new" / made.name
    write_like(target, source, source)
    pairs = [(made, target)]
    if made.is_dir():
        pairs = [(made / file.name, file) for file in sorted(target.iterdir())]
    for old, new in pairs:
        if zipfile.is_zipfile(old):
            with zipfile.ZipFile(old) as one, zipfile.ZipFile(new) as other:
                assert one.namelist() == other.namelist()
                assert all(one.read(name) == other.read(name) for name in one.namelist())
                assert other.testzip() is None
        else:
            assert old.read_bytes() == new.read_bytes()


PLAIN = ("raw.pth", "legacy.pt", "model.pt", "model_state_dict.pt", "old_nested.pth", "weights.bin")


@pytest.mark.parametrize("name", PLAIN)
def test_torch_loads_what_was_written(name, tmp_path):
    native.KINDS[name][1](tmp_path / name)
    source = load_tensors(tmp_path / name)
    new = doubled(source)
    write_like(tmp_path / "new", new, source)
    modes = (False,) if "l" in name[:1] or "old" in name else (False, True)
    for mapped in modes:
        loaded = torch.serialization.load(tmp_path / "new", weights_only=True, mmap=mapped)
        state = next(
            (loaded[k] for k in ("model", "model_state_dict", "net") if k in loaded), loaded
        )
        assert all(native.same(state[key], value) for key, value in new.items())
        tied = state["item_embedding.weight"], state["output.weight"]
        assert tied[0].data_ptr() == tied[1].data_ptr()
        if state is not loaded:
            assert loaded["epoch"] == 2 and loaded["loss"] == 0.5


# Loads as RecBole and Lightning do, which is to run the file: in a process of its own.
LIBRARY = """
import sys, torch, native_checkpoints as native
name, path = sys.argv[1:]
with native.library():
    loaded = torch.load(path, weights_only=False)
same = [native.same(loaded["state_dict"][k], v) for k, v in torch.load(path + ".expected").items()]
assert same and all(same)
if name == "recbole":
    assert loaded["config"].values == {"model": "SASRec", "hidden_size": 4}
    assert loaded["optimizer"]["state"][0]["exp_avg"].tolist() == [[1.0] * 4] * 7
    assert loaded["epoch"] == 3
else:
    assert loaded["hyper_parameters"]["net"].values == {"size": 4}
    ids = loaded["hyper_parameters"].get("item_external_ids")
    assert (ids is None) if name == "lightning" else (tuple(ids) == native.IDS)
"""


@pytest.mark.parametrize("name", ["recbole.pth", "lightning.ckpt", "rectools.ckpt"])
def test_every_object_of_the_library_is_kept(name, tmp_path):
    native.KINDS[name][1](tmp_path / name)
    source = load_tensors(tmp_path / name)
    new = doubled(source)
    write_like(tmp_path / "new", new, source)
    torch.save(new, tmp_path / "new.expected")
    command = [sys.executable, "-c", LIBRARY, name.partition(".")[0], str(tmp_path / "new")]
    paths = [str(Path(native.__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_module_is_a_module_again(tmp_path):
    native.module(tmp_path / "a.pt")
    source = load_tensors(tmp_path / "a.pt")
    write_like(tmp_path / "b.pt", doubled(source), source)
    tower = native.Tower()
    tower.load_state_dict(dict(load_tensors(tmp_path / "b.pt")))
    assert native.same(tower.items.weight, source["items.weight"] * 2)


def tiny(kind, seed):
    """A random model of transformers, as small as they come."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        vocab_size=20, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def save_as(model, path, form):
    """Save a model of transformers in one of the forms that its hub holds."""
    model.save_pretrained(path, max_shard_size="3KB" if "shards" in form else "1GB")
    if "bin" not in form:
        return
    names = {}
    for file in sorted(path.glob("*.safetensors")):
        part = dict(load_tensors(file))
        name = file.name.replace("safetensors", "bin").replace("model", "pytorch_model")
        torch.save(part, path / name)
        names |= dict.fromkeys(part, name)
        file.unlink()
    for index in path.glob("*.index.json"):
        index.unlink()
        text = json.dumps({"metadata": {}, "weight_map": names})
        (path / "pytorch_model.bin.index.json").write_text(text)


@pytest.mark.parametrize("form", ["safetensors", "safetensors shards", "bin", "bin shards"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_merge_by_hand_loads_in_transformers(kind, form, tmp_path):
    models = [tiny(kind, seed) for seed in (0, 1)]
    for number, model in enumerate(models):
        save_as(model, tmp_path / str(number), form)
    members = [load_tensors(tmp_path / str(number)) for number in (0, 1)]
    assert members[0].kind == "huggingface"
    assert members[0].config["architectures"] == [type(models[0]).__name__]
    assert ("shards" in form) == (len(members[0].parts) > 1)
    merged = {name: (members[0][name] + members[1][name]) / 2 for name in members[0]}
    write_like(tmp_path / "merged", merged, members[0])
    loaded = type(models[0]).from_pretrained(tmp_path / "merged").state_dict()
    for name, value in models[0].state_dict().items():
        assert native.same(loaded[name], (value + models[1].state_dict()[name]) / 2), name


def test_a_folder_s_companions(tmp_path):
    native.KINDS["hf_shards"][1](tmp_path / "hf")
    (tmp_path / "hf" / "modeling.py").write_text("x = 1")
    (tmp_path / "hf" / "trainer_state.json").write_text("{}")
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text("{}")
    os.mkfifo(tmp_path / "hf" / "pipe.json")
    source = load_tensors(tmp_path / "hf")
    write_like(tmp_path / "new", source, source)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modeling.py",
        "tokenizer.json",
    ]
    index = load_tensors(tmp_path / "hf" / "model.safetensors.index.json")
    assert index.names() == source.names()
    assert (tmp_path / "new").stat().st_mode & 0o777 == (tmp_path / "hf").stat().st_mode & 0o777


def test_a_link_is_followed_as_the_hub_s_cache_has_them(tmp_path):
    native.KINDS["hf"][1](tmp_path / "hf")
    os.rename(tmp_path / "hf" / "model.safetensors", tmp_path / "blob")
    (tmp_path / "hf" / "model.safetensors").symlink_to(tmp_path / "blob")
    source = load_tensors(tmp_path / "hf")
    write_like(tmp_path / "new", doubled(source), source)
    assert not (tmp_path / "new" / "model.safetensors").is_symlink()
    assert native.same(load_tensors(tmp_path / "new")["layer.weight"], source["layer.weight"] * 2)


@pytest.mark.parametrize("name", ["raw.pth", "legacy.pt"])
def test_names_that_share_memory_need_one_value(name, tmp_path):
    native.KINDS[name][1](tmp_path / name)
    source = load_tensors(tmp_path / name)
    new = doubled(source)
    new["output.weight"] = new["output.weight"].clone()
    write_like(tmp_path / "equal", new, source)
    new["output.weight"][0, 0] += 1
    with pytest.raises(InputError, match="'item_embedding.weight' shares memory with 'output"):
        write_like(tmp_path / "new", new, source)
    new = doubled(source)
    new["position_ids"] = torch.arange(10).view(2, 5)
    with pytest.raises(InputError, match="'position_ids' shares memory with itself"):
        write_like(tmp_path / "new", new, source)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, "equal"])


def test_views_that_overlap_and_what_no_tensor_covers(tmp_path):
    base = torch.arange(12.0)
    saved = {"a": base[2:6], "b": base.as_strided((3, 3), (1, 1), 6)}
    torch.save({"state_dict": saved, "base": base}, tmp_path / "a.pth")
    source = load_tensors(tmp_path / "a.pth")
    new = {name: value + 100 for name, value in saved.items()}
    write_like(tmp_path / "b.pth", new, source)
    loaded = torch.serialization.load(tmp_path / "b.pth", weights_only=True)
    assert loaded["base"].tolist() == [0, 1, *range(102, 111), 11]


def test_what_does_not_fit_is_refused_and_leaves_nothing(made, tmp_path):
    source = load_tensors(made)
    new = doubled(source)
    name = next(name for name in source if source.shape(name) == (4, 4))
    cases = [
        ({k: v for k, v in new.items() if k != name}, "missing in what is written"),
        (new | {"more": torch.ones(1)}, "'more' of .* is unknown"),
        (new | {name: new[name][:1]}, "is torch.float32 \\(1"),
        (new | {name: new[name].double()}, "is torch.float64"),
    ]
    for tensors, message in cases:
        with pytest.raises(InputError, match=message):
            write_like(tmp_path / "new", tensors, source)
    assert [file.name for file in tmp_path.iterdir()] == [made.name]


def test_nothing_is_overwritten(made, tmp_path):
    source = load_tensors(made)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target in (made, tmp_path / "file", tmp_path / "folder", tmp_path / "link"):
        with pytest.raises(InputError, match="exists already"):
            write_like(target, source, source)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_place_that_cannot_be_written(tmp_path):
    for name in ("raw.pth", "hf"):
        native.KINDS[name][1](tmp_path / name)
        source = load_tensors(tmp_path / name)
        with pytest.raises(InputError, match="could not be written"):
            write_like(tmp_path / "raw.pth" / "x", source, source)


def test_values_are_fetched_one_storage_at_a_time(tmp_path):
    torch.save({f"t{n}": torch.full((1000,), float(n)) for n in range(5)}, tmp_path / "a.pth")
    source = load_tensors(tmp_path / "a.pth")
    alive = []

    class Lazy(dict):
        def __getitem__(self, name):
            value = source[name] + 1
            assert sum(reference() is not None for reference in alive) <= 1
            alive.append(weakref.ref(value))
            return value

    write_like(tmp_path / "b.pth", Lazy.fromkeys(source), source)
    written = load_tensors(tmp_path / "b.pth")
    assert [written[f"t{n}"][0].item() for n in range(5)] == [1, 2, 3, 4, 5]
    places = [written.slot(name).region.start % 64 for name in written]
    assert places == [0] * 5

"""Native checkpoints of every kind merged by the command line, as their tensors in memory."""

import json

import pytest
import safetensors.torch
import torch
from adapters.native_checkpoints import KINDS, same, values
from torch import nn

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint
from fisherkern.fisher import DiagFisher
from fisherkern.merging import merge_files

KEPT = ("position_ids", "steps", "num_batches_tracked", "running_mean", "running_var", "mask")


class Bare(nn.Module):
    """Tensors by name as a module, tied where they share memory; what is no parameter a buffer."""

    def __init__(self, tensors):
        super().__init__()
        known: dict[int, nn.Parameter] = {}
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            home = self
            for part in path:
                if not hasattr(home, part):
                    home.add_module(part, nn.Module())
                home = getattr(home, part)
            if tensor.is_floating_point() and not name.endswith(KEPT):
                same_memory = known.get(tensor.data_ptr())
                parameter = nn.Parameter(tensor.clone()) if same_memory is None else same_memory
                known[tensor.data_ptr()] = parameter
                home.register_parameter(last, parameter)
            else:
                home.register_buffer(last, tensor.clone())


def members(tmp_path, kind, count=2):
    """(paths, models in memory) of members of one kind."""
    name = f"x.{kind.partition('.')[2]}" if "." in kind else "x"
    found = []
    for seed in range(count):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        tensors = KINDS[kind][1](folder / name, seed)
        found.append((folder / name, Bare(tensors)))
    return [path for path, _ in found], [model for _, model in found]


def check_written(out, first, expected):
    """The result has the kind and the names of the first member, and the expected bits."""
    merged, source = fk.load_tensors(out), fk.load_tensors(first)
    state = expected.state_dict()
    assert merged.kind == source.kind and list(merged) == list(source)
    for name in source:
        assert same(merged[name], state[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_merges_every_kind(kind, tmp_path, capsys):
    paths, models = members(tmp_path, kind)
    out = tmp_path / "out"
    assert main(["merge", *map(str, paths), "--out", str(out), "--weights", "1,3"]) == 0
    result = out / f"merged{paths[0].suffix}"
    check_written(result, paths[0], fk.merge(models, method="weighted", weights=[1, 3]))
    report = json.loads((out / "result.json").read_text())["report"]
    assert report["kind"] == KINDS[kind][0] and report["weights"] == [0.25, 0.75]
    if kind == "recbole.pth":
        assert "optimizer" in report["from_first_member"]
    capsys.readouterr()
    # Once more: an earlier merge may be replaced.
    assert main(["merge", *map(str, paths), "--out", str(out), "--weights", "1,3"]) == 0


def prefixed(state):
    return {f"module.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        (lambda state: {"ema": dict(state)}, "ema"),
        (
            lambda state: {"callbacks": {"EMA": {"weights": prefixed(state)}}},
            "callbacks.EMA.weights",
        ),
        (lambda state: {"shadow": {key.replace(".", ""): v for key, v in state.items()}}, "shadow"),
        (lambda state: {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 0.1}}, None),
    ],
)
def test_averages_beside_the_weights_are_told(beside, told, tmp_path, caplog):
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for path in paths:
        state = {"items.weight": torch.randn(3, 2), "bias": torch.randn(2)}
        more = beside({name: value + 1 for name, value in state.items()})
        more["round"] = {}
        more["round"]["again"] = more["round"]
        torch.save({"model": state, **more}, path)
    merge_files(paths, tmp_path / "out.pth")
    texts = [record.getMessage() for record in caplog.records if "same weights" in record.message]
    assert [f": '{told}' holds other" in text for text in texts] == ([True] if told else [])


METHODS = {
    "uniform": {},
    "slerp": {"method": "slerp", "weights": [1, 2]},
    "ties": {"method": "ties", "base": True, "options": {"density": 0.4}},
    "model_stock": {"method": "model_stock", "base": True},
    "decay": {"weights": "cosine-decay"},
    "dare": {"method": "dare", "base": True, "seed": 2},
    "task_arithmetic": {"method": "task_arithmetic", "base": True},
}


@pytest.mark.parametrize("kind", ["recbole.pth", "legacy.pt", "hf_shards", "module.pt"])
@pytest.mark.parametrize("case", METHODS)
def test_every_method_is_that_in_memory(case, kind, tmp_path):
    paths, models = members(tmp_path, kind, count=3)
    given, held = dict(METHODS[case]), dict(METHODS[case])
    if given.pop("base", None):
        given["base"], held["base"] = paths[2], models[2]
    out = tmp_path / "out" / paths[0].name
    merge_files(paths[:2], out, **given)
    check_written(out, paths[0], fk.merge(models[:2], **held))


def fisher_of(model, path, prefix=""):
    """A made-up Fisher of a model's parameters, in memory and in a file with a prefix."""
    generator = torch.Generator().manual_seed(len(str(path)) + ord(path.stem[-1]))
    found = {
        name: torch.rand(value.shape, generator=generator).square()
        for name, value in model.named_parameters()
    }
    DiagFisher({prefix + name: value for name, value in found.items()}, {}).save(path)
    return found


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "torch_model.", "model."])
@pytest.mark.parametrize("kind", ["recbole.pth", "hf", "hf_bin_shards", "module.pt"])
def test_fishers_fit_by_name_and_buffers_need_none(kind, prefix, tmp_path):
    paths, models = members(tmp_path, kind)
    files = [tmp_path / f"f{n}.safetensors" for n in range(2)]
    fishers = [fisher_of(m, f, prefix) for m, f in zip(models, files, strict=True)]
    out = tmp_path / "out" / paths[0].name
    report = merge_files(paths, out, fishers=files)
    check_written(out, paths[0], fk.merge(models, fishers=fishers))
    assert report["without_fisher"] == []


def test_a_buffer_without_a_fisher_is_averaged(tmp_path):
    """As BART's final_logits_bias, which is in the checkpoint and in no Fisher."""
    paths, models = members(tmp_path, "foreign.safetensors")
    for number, (path, model) in enumerate(zip(paths, models, strict=True)):
        state = safetensors.torch.load_file(path)
        model.register_buffer("final_logits_bias", torch.full((1, 7), float(number)))
        safetensors.torch.save_file(state | {"final_logits_bias": model.final_logits_bias}, path)
    files = [tmp_path / f"f{n}.safetensors" for n in range(2)]
    fishers = [fisher_of(m, f) for m, f in zip(models, files, strict=True)]
    out = tmp_path / "out.safetensors"
    report = merge_files(paths, out, fishers=files)
    check_written(out, paths[0], fk.merge(models, fishers=fishers))
    assert report["without_fisher"] == ["final_logits_bias"]
    assert torch.equal(fk.load_tensors(out)["final_logits_bias"], torch.full((1, 7), 0.5))
    for model, own, file in zip(models, fishers, files, strict=True):
        DiagFisher(own, {"fingerprint": fingerprint(model)}).save(file)
    merge_files(paths, out, fishers=files)
    with pytest.raises(InputError, match="f1.safetensors: was computed on another model"):
        merge_files(paths, out, fishers=files[::-1])


def test_fishers_of_a_bare_model_fit_a_wrapped_checkpoint(tmp_path):
    paths, models = members(tmp_path, "rectools.ckpt")
    files = [tmp_path / f"f{n}.safetensors" for n in range(2)]
    fishers = [fisher_of(m.torch_model, f) for m, f in zip(models, files, strict=True)]
    merge_files(paths, tmp_path / "out.ckpt", fishers=files)
    expected = fk.merge([m.torch_model for m in models], fishers=fishers).state_dict()
    merged = fk.load_tensors(tmp_path / "out.ckpt")
    for name, value in expected.items():
        assert same(merged[f"torch_model.{name}"], value), name


def test_a_fisher_of_another_model_is_refused(tmp_path):
    paths, models = members(tmp_path, "raw.pth")
    bad = dict(models[0].named_parameters())
    DiagFisher({"nobody": torch.ones(3)}, {}).save(tmp_path / "f.safetensors")
    with pytest.raises(InputError, match="tensor 'nobody' is none of .*x.pth's"):
        merge_files(paths[:1], tmp_path / "out.pth", fishers=[tmp_path / "f.safetensors"])
    meta = {"fingerprint": "0" * 64}
    DiagFisher({name: torch.ones_like(p).float() for name, p in bad.items()}, meta).save(
        tmp_path / "g.safetensors"
    )
    with pytest.raises(InputError, match="was computed on another model than"):
        merge_files(paths[:1], tmp_path / "out.pth", fishers=[tmp_path / "g.safetensors"])
    assert not (tmp_path / "out.pth").exists()


# Refusals by the command line: one line, status 2, nothing written.


def refused(capsys, *words):
    assert main(["merge", *map(str, words)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("fisherkern merge: ")
    return error[-1]


def test_what_does_not_fit_is_one_line(tmp_path, capsys):
    paths, _ = members(tmp_path, "raw.pth")
    out, other = tmp_path / "out", tmp_path / "other.pth"
    KINDS["recbole.pth"][1](other)
    assert "is a recbole file, and" in refused(capsys, paths[0], other, "--out", out)
    torch.save({k: v for k, v in values(0).items() if k != "scale"}, paths[1])
    assert "tensor 'scale' is missing, which" in refused(capsys, *paths, "--out", out)
    torch.save({**values(0), "scale": torch.ones(4).half()}, paths[1])
    assert "'scale' has shape (4,) and in" in refused(capsys, *paths, "--out", out)
    torch.save({**values(0), "output.weight": torch.ones(7, 4)}, paths[1])
    assert "'output.weight' is tied to 'item_embedding.weight'" in refused(
        capsys, *paths, "--out", out
    )
    assert "no such file" in refused(capsys, paths[0], tmp_path / "none.pth", "--out", out)
    fk.save_model(fk.SASRec(5, max_len=3, dim=4, layers=1), tmp_path / "ours.safetensors")
    assert "is a state dict file" in refused(
        capsys, tmp_path / "ours.safetensors", paths[0], "--out", out
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("key", "one", "two"),
    [
        ("n_head", 2, 4),
        ("activation_function", "gelu_new", "relu"),
        ("layer_norm_epsilon", 1e-5, 1e-1),
    ],
)
def test_configs_that_change_the_function_are_refused(key, one, two, tmp_path, capsys):
    paths, _ = members(tmp_path, "hf")
    common = {"model_type": "toy", "hidden_dropout_prob": 0.1, "_name_or_path": "a"}
    other = {"model_type": "toy", "hidden_dropout_prob": 0.3, "transformers_version": "9"}
    for path, config, value in zip(paths, (common, other), (one, two), strict=True):
        (path / "config.json").write_text(json.dumps({**config, key: value}))
    line = refused(capsys, *paths, "--out", tmp_path / "out")
    assert f"was built with {key}={two!r}, and" in line and line.endswith(f"with {key}={one!r}")
    (paths[1] / "config.json").write_text(json.dumps({**other, key: one}))
    merge_files(paths, tmp_path / "out")


def test_settings_in_a_checkpoint_are_compared(tmp_path):
    for number, heads in enumerate((2, 4)):
        saved = {
            "pytorch-lightning_version": "2",
            "state_dict": values(number),
            "hyper_parameters": {"n_heads": heads, "lr": 0.1 * number, "dropout_rate": number},
        }
        torch.save(saved, tmp_path / f"{number}.ckpt")
    paths = [tmp_path / f"{number}.ckpt" for number in range(2)]
    with pytest.raises(InputError, match="1.ckpt: was built with n_heads=4, and .* n_heads=2"):
        merge_files(paths, tmp_path / "out.ckpt")


def test_nothing_of_others_is_overwritten(tmp_path, capsys):
    paths, _ = members(tmp_path, "raw.pth")
    folder = tmp_path / "run0"
    merged = folder / "merged.pth"
    paths[0].rename(merged)
    before = merged.read_bytes()
    assert "would be written over, and is read" in refused(
        capsys, merged, paths[1], "--out", folder
    )
    merged.rename(paths[0])
    (folder / "result.json").write_text(json.dumps({"arguments": {"command": "train"}}))
    assert main(["merge", *map(str, paths), "--out", str(folder)]) == 0
    assert json.loads((folder / "result.json").read_text())["arguments"]["command"] == "train"
    (folder / "result-merge.json").unlink()
    (folder / "merged.pth").write_text("mine")
    line = refused(capsys, *paths, "--out", folder)
    assert "merged.pth: exists, and `fisherkern merge` did not make it" in line
    assert paths[0].read_bytes() == before and merged.read_text() == "mine"
    for number in range(2):
        fk.save_model(fk.SASRec(5, max_len=3, dim=4, layers=1), tmp_path / f"{number}.safetensors")
    own = tmp_path / "0.safetensors"
    own.rename(tmp_path / "merged.safetensors")
    line = refused(
        capsys, tmp_path / "merged.safetensors", tmp_path / "1.safetensors", "--out", tmp_path
    )
    assert "would be written over, and is read" in line


def test_a_folder_stays_where_the_next_merge_fails(tmp_path, capsys):
    paths, _ = members(tmp_path, "hf")
    out = tmp_path / "out"
    assert main(["merge", *map(str, paths), "--out", str(out)]) == 0
    before = (out / "merged" / "model.safetensors").read_bytes()
    state = safetensors.torch.load_file(paths[1] / "model.safetensors")
    state["scale"][0] = torch.nan
    safetensors.torch.save_file(state, paths[1] / "model.safetensors")
    assert "tensor 'scale' holds a NaN" in refused(capsys, *paths, "--out", out)
    assert (out / "merged" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["merged", "result.json"]
    assert "merged from 2 members" in (out / "merged" / "README.md").read_text()

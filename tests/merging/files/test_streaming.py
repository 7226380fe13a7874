"""Files merged in blocks of rows: the same bits as in memory, in bounded memory, or nothing."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers.merging_files import saved, saved_fisher
from models import NUM_ITEMS

from fisherkern.merging.files import streaming, tensor_files
from fisherkern.merging.files.streaming import merge_files
from fisherkern.merging.fishers import Fishers, block_sums
from fisherkern.merging.merge import merge
from fisherkern.training import load_model


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks from small tensors, and sizes that do not divide one another."""
    from fisherkern.merging import blocks, fishers
    from fisherkern.merging.files import fisher_files

    for module in (blocks, fisher_files, fishers):
        monkeypatch.setattr(module, "BLOCK", 13)
    monkeypatch.setattr(fisher_files, "READ", 31)
    monkeypatch.setattr(streaming, "READ", 29)


ARGUMENTS = {
    "uniform": {},
    "weighted": {"weights": [3, 1, 0.5]},
    "fisher": {"fishers": True},
    "fisher-weighted": {"fishers": True, "weights": [1, 2, 0], "floor": 1e-3, "normalize": None},
    "fisher-row": {"method": "fisher", "fishers": True, "options": {"group": "row"}, "floor": 0.0},
    "task_arithmetic": {"method": "task_arithmetic", "base": True, "options": {"scale": 0.7}},
    "dare": {"method": "dare", "base": True, "seed": 3},
    "decay": {"weights": "1-sqrt-decay"},
}
# Those that look at whole tensors first.
PREPARED = {
    "fisher-tensor": {"fishers": True, "options": {"group": "tensor"}},
    "fisher-neuron": {"fishers": True, "options": {"group": "neuron"}, "weights": [1, 2, 3]},
    "slerp": {"method": "slerp", "weights": [1, 2, 3]},
    "ties": {"method": "ties", "base": True, "options": {"density": 0.3}},
    "model_stock": {"method": "model_stock", "base": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ARGUMENTS)
def test_the_file_is_the_merge_in_memory_to_the_last_bit(case, dtype, tmp_path):
    check_equal_to_memory(ARGUMENTS[case], dtype, tmp_path)


@pytest.mark.parametrize("case", PREPARED)
def test_methods_that_look_at_whole_tensors_too(case, tmp_path, monkeypatch):
    from fisherkern.merging import blocks

    monkeypatch.setattr(blocks, "BLOCK", 50)
    monkeypatch.setattr(streaming, "READ", 80)
    # In float64 the order of a sum is seen.
    check_equal_to_memory(PREPARED[case], torch.float64, tmp_path)


def check_equal_to_memory(arguments, dtype, tmp_path):
    found = [saved(tmp_path, number, dtype=dtype) for number in range(4)]
    paths, models = [path for path, _ in found[:3]], [load_model(path) for path, _ in found]
    given, held = dict(arguments), dict(arguments)
    if given.pop("fishers", None):
        fishers = [saved_fisher(tmp_path, n, models[n]) for n in range(3)]
        given["fishers"], held["fishers"] = zip(*fishers, strict=True)
    if given.pop("base", None):
        given["base"], held["base"] = found[3][0], models[3]
    out = tmp_path / "out" / "merged.safetensors"
    provenance = merge_files(paths, out, **given)
    expected = merge(models[:3], **held)
    merged = load_model(out)
    assert merged.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert merged.state_dict()[name].dtype == dtype
        assert torch.equal(merged.state_dict()[name], tensor), name
    assert merged.item_ids == expected.item_ids
    assert provenance["method"] == expected.merge_report["method"]
    assert provenance["weights"] == expected.merge_report["weights"]


@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (100, 3), (3, 2, 11), (0, 4), (4, 0)])
def test_sums_of_blocks_are_those_of_the_whole(shape, tmp_path):
    value = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": value}, path)
    step = 2 * tensor_files.rows_per_block(shape, 13)
    with tensor_files.opened([path]) as ((file,),):
        parts = [part for block in file.blocks("x", step) for part in block_sums(block)]
        blocks = list(file.blocks("x", 2))
    assert parts == list(block_sums(value))
    assert sum(parts) == pytest.approx(float(value.double().sum()), rel=1e-12)
    whole = torch.cat([block.reshape(-1) for block in blocks] or [torch.zeros(0)])
    assert torch.equal(whole.reshape(shape), value)


def test_the_mean_fisher_is_that_of_all_entries():
    values = {"a": torch.rand(11, 7), "b": torch.rand(3)}
    held = Fishers([values], "mean")
    mean = torch.cat([value.flatten() for value in values.values()]).double().mean()
    assert held.units == [pytest.approx(float(mean), rel=1e-14)]


def test_provenance_is_in_the_file_beside_it_and_on_the_card(tmp_path):
    found = [saved(tmp_path, number) for number in range(2)]
    fishers = [saved_fisher(tmp_path, n, found[n][1])[0] for n in range(2)]
    out = tmp_path / "merged.safetensors"
    provenance = merge_files(
        [path for path, _ in found],
        out,
        weights=[3, 1],
        fishers=fishers,
        metrics={"ndcg@10": 0.25},
    )
    with safetensors.safe_open(out, framework="pt") as file:
        header = json.loads(file.metadata()["fisherkern"])
    assert header["merge"] == json.loads(json.dumps(provenance))
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["extra"]["merge"] == header["merge"]
    assert about["metrics"] == {"ndcg@10": 0.25}
    assert provenance["weights"] == [0.75, 0.25]
    assert provenance["versions"]["torch"] == torch.__version__
    card = out.with_suffix(".md").read_text()
    for number, (path, _) in enumerate(found):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert provenance["members"][number] == {
            "file": path.name,
            "sha256": digest,
            "metrics": {"ndcg@10": 0.1 + number},
            "items": NUM_ITEMS,
            "item_ids_sha256": header["item_ids_sha256"],
        }
        assert digest in card
        assert hashlib.sha256(fishers[number].read_bytes()).hexdigest() in card
    assert "[Fisher-weighted average](https://arxiv.org/abs/2111.09832)" in card
    assert "| m0.safetensors | 0.75 |" in card and "sampler=topk, k=30" in card
    assert "| this model | 0.25 |" in card and "| m1.safetensors | 1.1 |" in card
    assert "| floor | 0.1 |" in card and "| layers | 2 |" in card
    assert provenance["catalogue"] == {
        "items": NUM_ITEMS,
        "item_ids_sha256": header["item_ids_sha256"],
        "owners": {"2": NUM_ITEMS},
    }
    assert str(tmp_path) not in card + json.dumps(header)
    again = tmp_path / "again" / "merged.safetensors"
    merge_files(
        [p for p, _ in found], again, weights=[3, 1], fishers=fishers, metrics={"ndcg@10": 0.25}
    )
    assert again.read_bytes() == out.read_bytes()


def test_files_of_others_merge_too(tmp_path):
    def tensors(seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            "odd": torch.rand(3, generator=generator).to(torch.bfloat16),
            "table": torch.rand(9, 4, generator=generator),
            "double": torch.rand(5, generator=generator, dtype=torch.float64),
            "scale": torch.rand((), generator=generator),
            "empty": torch.zeros(0, 3),
            "hollow": torch.zeros(3, 0),
            "mask": torch.tensor([0.0, -torch.inf]),
            "steps": torch.tensor(7),
            "flags": torch.tensor([True, False, True]),
        }

    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        safetensors.torch.save_file(tensors(seed), path, metadata={"format": "pt"})
    out = tmp_path / "out.safetensors"
    merge_files(paths, out, weights=[1, 3])
    found = safetensors.torch.load_file(out)
    one, two = tensors(0), tensors(1)
    assert found.keys() == one.keys()
    for name in ("odd", "table", "double", "scale"):
        expected = (0.25 * one[name].double() + 0.75 * two[name].double()).to(one[name].dtype)
        assert found[name].dtype == one[name].dtype and found[name].shape == one[name].shape
        assert torch.allclose(found[name], expected, rtol=1e-15 if name == "double" else 1e-6)
    for name in ("empty", "hollow", "mask", "steps", "flags"):
        assert torch.equal(found[name], one[name])
    with safetensors.safe_open(out, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    # Readers that map the file want every tensor at a multiple of its type's size.
    content = out.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, own in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            assert own["data_offsets"][0] % one[name].element_size() == 0, name
    assert out.with_suffix(".md").is_file() and not out.with_suffix(".json").exists()


def test_equal_tensors_of_others_are_merged_by_the_rule(tmp_path):
    """Only what holds infinities is kept: members that agree may still differ from the base."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, value in zip(paths, (3.0, 3.0, 1.0), strict=True):
        safetensors.torch.save_file({"a": torch.full((9,), value)}, path)
    out = tmp_path / "out.safetensors"
    known = {"method": "task_arithmetic", "options": {"scale": 0.25}}
    merge_files(paths[:2], out, base=paths[2], **known)
    assert torch.equal(safetensors.torch.load_file(out)["a"], torch.full((9,), 2.0))


MEASURE = """
import sys

from fisherkern.merging.files.streaming import merge_files
# ru_maxrss starts at what the parent had, so ask for this process's own peak.
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)


start = peak()
merge_files(sys.argv[2:], sys.argv[1], weights=[1, 2, 3])
print(peak() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
def test_memory_does_not_grow_with_the_table(tmp_path):
    """160 MB of members and result, and less than 120 MB beside Python with PyTorch."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        safetensors.torch.save_file({"table": torch.full((80_000, 128), float(number))}, path)
    out = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, out, *paths], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 120e6
    with safetensors.safe_open(out, framework="pt") as file:
        assert torch.equal(file.get_slice("table")[79_998:], torch.full((2, 128), 8 / 6))

"""Files merged in blocks of rows: the same bits as in memory, in bounded memory, or nothing."""

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from models import NUM_ITEMS

from fisherkern.encoders import ENCODERS
from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint
from fisherkern.fisher import DiagFisher
from fisherkern.merging import streaming, tensor_files
from fisherkern.merging.fishers import Fishers, block_sums
from fisherkern.merging.merge import merge
from fisherkern.merging.streaming import merge_files
from fisherkern.training import load_model, save_model


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks from small tensors, and sizes that do not divide one another."""
    from fisherkern.merging import blocks, fisher_files, fishers

    for module in (blocks, fisher_files, fishers):
        monkeypatch.setattr(module, "BLOCK", 13)
    monkeypatch.setattr(fisher_files, "READ", 31)
    monkeypatch.setattr(streaming, "READ", 29)


def saved(folder, number, name="BERT4Rec", dtype=torch.float32, **config):
    """(Path, model) of a random model in a file."""
    with torch.random.fork_rng():
        torch.manual_seed(number)
        model = ENCODERS[name](NUM_ITEMS, max_len=5, dim=6, **config)
        for parameter in model.parameters():
            parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).to(dtype)
    model.item_ids = [f"item {v}" for v in range(NUM_ITEMS)]
    path = folder / f"m{number}.safetensors"
    save_model(model, path, metrics={"ndcg@10": 0.1 + number})
    return path, model


def saved_fisher(folder, number, model):
    generator = torch.Generator().manual_seed(number)
    tensors = {
        name: torch.rand(p.shape, generator=generator).square() * 10.0 ** (number - 2)
        for name, p in model.named_parameters()
    }
    for name in tensors:
        if "key.bias" in name:
            tensors[name] *= 1e-20
    if number == 1:
        tensors["output_bias"] *= 1e-20  # noise in one member, information in the others
    path = folder / f"f{number}.safetensors"
    fisher = DiagFisher(tensors, {"fingerprint": fingerprint(model), "sampler": "topk", "k": 30})
    fisher.save(path)
    return path, fisher


ARGUMENTS = {
    "uniform": {},
    "weighted": {"weights": [3, 1, 0.5]},
    "fisher": {"fishers": True},
    "fisher-weighted": {"fishers": True, "weights": [1, 2, 0], "floor": 1e-3, "normalize": None},
    "fisher-row": {"method": "fisher", "fishers": True, "options": {"group": "row"}, "floor": 0.0},
    "task_arithmetic": {"method": "task_arithmetic", "base": True, "options": {"scale": 0.7}},
    "dare": {"method": "dare", "base": True, "seed": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ARGUMENTS)
def test_the_file_is_the_merge_in_memory_to_the_last_bit(case, dtype, tmp_path):
    found = [saved(tmp_path, number, dtype=dtype) for number in range(4)]
    paths, models = [path for path, _ in found[:3]], [load_model(path) for path, _ in found]
    given, held = dict(ARGUMENTS[case]), dict(ARGUMENTS[case])
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
        }
        assert digest in card
        assert hashlib.sha256(fishers[number].read_bytes()).hexdigest() in card
    assert "| m0.safetensors | 0.75 |" in card and "sampler=topk, k=30" in card
    assert "| this model | 0.25 |" in card and "| m1.safetensors | 1.1 |" in card
    assert "| floor | 0.1 |" in card and "| layers | 2 |" in card
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


def rewritten(path, change, data=None):
    """The file with its header's dict changed, and its data too if given."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + (content[8 + length :] if data is None else data)
    )


def overlap(header):
    header["b"]["data_offsets"] = header["a"]["data_offsets"]


HOSTILE = {
    "huge length": lambda path: path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}" * 50),
    "length past the end": lambda path: path.write_bytes(struct.pack("<Q", 5000) + b"{}"),
    "empty": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"{{{{"),
    "overlap": lambda path: rewritten(path, overlap),
    "past the end": lambda path: rewritten(
        path, lambda header: header["b"].update(data_offsets=[16, 1 << 40], shape=[1 << 38])
    ),
    "negative": lambda path: rewritten(path, lambda h: h["a"].update(data_offsets=[-4, 12])),
    "shape is not the size": lambda path: rewritten(path, lambda h: h["a"].update(shape=[9])),
    "unknown type": lambda path: rewritten(path, lambda h: h["a"].update(dtype="F31")),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "data too long": lambda path: path.write_bytes(path.read_bytes() + b"1234"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence(fault, tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path in paths:
        safetensors.torch.save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    HOSTILE[fault](paths[1])
    with pytest.raises(InputError, match="1.safetensors: not a whole safetensors file") as error:
        merge_files(paths, tmp_path / "out.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1000)}, path)
    with tensor_files.opened([path]) as ((file,),):
        assert torch.equal(file.rows("a", 0, 10), torch.ones(10))
        with path.open("r+b") as stream:
            stream.truncate(1000)
        with pytest.raises(InputError, match="x.safetensors: became shorter while it was read"):
            file.rows("a", 0, 1000)


def one_tensor(tmp_path, *tensors):
    paths = []
    for number, tensor in enumerate(tensors):
        paths.append(tmp_path / f"{number}.safetensors")
        safetensors.torch.save_file(tensor, paths[-1])
    return paths


A = {"a": torch.arange(40.0).reshape(20, 2)}


def with_value(value):
    changed = A["a"].clone()
    changed[17, 1] = value
    return {"a": changed}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (with_value(torch.nan), "1.safetensors: tensor 'a' holds a NaN"),
        (with_value(torch.inf), "1.safetensors: tensor 'a' holds an infinity"),
        ({"a": torch.ones(20, 3)}, r"1.safetensors: tensor 'a' has shape \(20, 3\) and in "),
        ({"a": A["a"].double()}, "1.safetensors: tensor 'a' is F64 and in .*0.safetensors F32"),
        ({**A, "b": torch.ones(1)}, "0.safetensors: tensor 'b' is missing, which .*1.safetensors"),
        ({"b": torch.ones(1)}, "1.safetensors: tensor 'a' is missing|tensor 'b' is missing"),
        ({"a": A["a"].to(torch.float8_e4m3fn)}, "tensor 'a' is F8_E4M3, which cannot be merged"),
    ],
)
def test_members_that_do_not_fit_are_named_and_nothing_is_left(other, message, tmp_path):
    paths = one_tensor(tmp_path, A, other)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"what was there")
    with pytest.raises(InputError, match=message):
        merge_files(paths, out)
    assert out.read_bytes() == b"what was there"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["0.safetensors", "1.safetensors", "out.safetensors"]


def test_integers_must_agree(tmp_path):
    paths = one_tensor(tmp_path, {"n": torch.tensor([1, 2])}, {"n": torch.tensor([1, 3])})
    with pytest.raises(InputError, match="1.safetensors: tensor 'n' differs from that of .*int64"):
        merge_files(paths, tmp_path / "out.safetensors")


def test_arguments_that_do_not_fit_are_named(tmp_path):
    paths = one_tensor(tmp_path, A, A)
    out = tmp_path / "out.safetensors"
    for arguments, message in (
        ({"paths": []}, "there is no model to merge"),
        ({"paths": [tmp_path / "none.safetensors"]}, "none.safetensors: no such file"),
        ({"out": tmp_path / "out.bin"}, "must end in .safetensors"),
        ({"out": paths[1]}, "1.safetensors: is one of the files that are merged"),
        ({"method": "slerp"}, "method 'slerp' is not one that files merge by"),
        ({"weights": "search"}, "takes numbers as weights"),
        ({"weights": [1]}, "weights has 1 numbers for 2 members"),
        ({"method": "weighted"}, "method 'weighted' needs weights"),
        ({"floor": -1}, "floor is -1"),
        ({"fishers": paths}, "0.safetensors: not a Fisher file"),
        ({"fishers": paths[:1]}, "there are 1 fishers for 2 members"),
        ({"method": "task_arithmetic"}, "needs base"),
        (
            {"method": "fisher", "fishers": paths, "options": {"group": "tensor"}},
            "option 'group' is 'tensor', which needs whole tensors",
        ),
    ):
        with pytest.raises(InputError, match=message):
            merge_files(**{"paths": paths, "out": out, **arguments})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_models_that_do_not_fit_are_named(tmp_path):
    path, model = saved(tmp_path, 0)
    out = tmp_path / "out.safetensors"
    other, _ = saved(tmp_path, 1, heads=3)
    with pytest.raises(InputError, match="member 1 was built with heads=3"):
        merge_files([path, other], out)
    other, _ = saved(tmp_path, 1, "GRU4Rec")
    with pytest.raises(InputError, match="is missing, which|is a GRU4Rec model"):
        merge_files([path, other], out)
    model.item_ids = [f"other {v}" for v in range(NUM_ITEMS)]
    save_model(model, tmp_path / "m2.safetensors")
    with pytest.raises(InputError, match="m2.safetensors: has other item ids than .*m0.safeten"):
        merge_files([path, tmp_path / "m2.safetensors"], out)
    path.with_suffix(".json").write_text('{"item_ids": ["x"]}')
    with pytest.raises(InputError, match="m0.json: its item_ids are not those of m0.safetensors"):
        merge_files([path, path], out)


def test_fishers_that_do_not_fit_are_named(tmp_path):
    path, model = saved(tmp_path, 0)
    own, fisher = saved_fisher(tmp_path, 0, model)
    other, _ = saved_fisher(tmp_path, 1, saved(tmp_path, 1)[1])
    out = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match="f1.safetensors: was computed on another model"):
        merge_files([path, path], out, fishers=[own, other])
    merge_files([path, path], out, fishers=[own, other], check_fingerprint=False)

    def fails(change, message):
        tensors = {name: value.clone() for name, value in fisher.items()}
        change(tensors)
        bad = tmp_path / "bad.safetensors"
        DiagFisher(tensors, {}).save(bad)
        with pytest.raises(InputError, match=message):
            merge_files([path], out, fishers=[bad])

    fails(lambda t: t.pop("output_bias"), "bad.safetensors: tensor 'output_bias' is missing")
    fails(lambda t: t.update(x=torch.ones(1)), "tensor 'x' is none of .*m0.safetensors's param")
    fails(lambda t: t.update(output_bias=torch.ones(3)), r"has shape \(3,\) where the member's")
    fails(lambda t: t["output_bias"].fill_(-1), "'output_bias' holds a negative value")
    fails(lambda t: t["output_bias"][2:3].fill_(torch.nan), "'output_bias' holds a value that is")
    fails(lambda t: [v.zero_() for v in t.values()], "bad.safetensors: the Fisher is zero every")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    path, _ = saved(tmp_path, 0)
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streaming._Job, "write", full)
    with pytest.raises(InputError, match="could not be written: No space left on device"):
        merge_files([path, path], tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


MEASURE = """
import sys

from fisherkern.merging.streaming import merge_files
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

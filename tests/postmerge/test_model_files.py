"""Model files of weight ensembles and of representation surgery: what was saved comes back."""

import json

import pytest
import safetensors.torch
import torch
from helpers.alignment import CASES
from models import HISTORIES, NUM_ITEMS

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.files import read_tensors

KINDS = ("BERT4Rec-post-tied", "SASRec-pre-untied-bias")
TARGETS = torch.tensor([4, 6, 11, 1, 2])
BATCH = {"history": HISTORIES, "target": TARGETS}


def ensemble(kind="BERT4Rec-post-tied", dtype=torch.float64, **given):
    models = [CASES[kind](seed).to(dtype) for seed in range(3)]
    for model in models:
        model.item_ids = [f"item {v}" for v in range(NUM_ITEMS)]
    return fk.weight_ensemble(models[:2], base=models[2], loader=[BATCH], steps=2, lr=0.1, **given)


def corrected(kind="BERT4Rec-post-tied", dtype=torch.float64, **given):
    models = [CASES[kind](seed).to(dtype) for seed in range(2)]
    return fk.representation_surgery(models[0], models[1:], [HISTORIES], steps=3, rank=3, **given)


MADE = {
    "wemoe": ensemble,
    "wemoe of one layer": lambda *k: ensemble(*k, router_layers=1),
    "e-wemoe": lambda *k: ensemble(*k, efficient=True, density=0.3),
    "surgery": corrected,
    "surgery of blocks": lambda *k: corrected(*k, version=2),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MADE)
def test_what_is_saved_comes_back(name, kind, dtype, tmp_path):
    model = MADE[name](kind, dtype)
    path = tmp_path / "model.safetensors"
    fk.save_model(model, path, extra={"merge_report": model.merge_report})
    state = torch.get_rng_state()
    found = fk.load_model(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(found) is type(model) and not found.training
    assert found.config == json.loads(json.dumps(model.config))
    assert found.item_ids == model.item_ids
    assert torch.equal(found(HISTORIES), model(HISTORIES))
    assert hasattr(found, "mask_token") == hasattr(model, "mask_token")
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (found, model)]
    assert trains[0] == trains[1] != set()
    again = tmp_path / "again.safetensors"
    fk.save_model(found, again)
    assert again.read_bytes() == path.read_bytes()


def test_a_file_of_version_0_1_0_has_the_class_by_its_former_name(tmp_path):
    model = MADE["surgery"]()
    path = tmp_path / "model.safetensors"
    fk.save_model(model, path)
    tensors, header = read_tensors(path)
    assert header["class"] == "SurgeryEncoder"
    header["class"] = "Calibrated"
    safetensors.torch.save_file(tensors, path, metadata={"fisherkern": json.dumps(header)})
    found = fk.load_model(path)
    assert type(found) is fk.SurgeryEncoder
    assert torch.equal(found(HISTORIES), model(HISTORIES))


def test_it_can_be_trained_on_and_the_router_stays_shared(tmp_path):
    path = tmp_path / "model.safetensors"
    fk.save_model(MADE["e-wemoe"](), path)
    found = fk.load_model(path)
    (router,) = found.routers()
    assert all(block.feed_forward.router is router for block in found.network.blocks)
    found(HISTORIES).square().sum().backward()
    assert router.outer.weight.grad.abs().max() > 0
    assert sum("router" in name for name in found.state_dict()) == 4


def rewrite(path, tensors=None, **config):
    """The file with other tensors or another config."""
    own, header = read_tensors(path)
    header["config"].update(config)
    own = {name: value for name, value in {**own, **(tensors or {})}.items() if value is not None}
    safetensors.torch.save_file(own, path, metadata={"fisherkern": json.dumps(header)})


ROUTER = "network.blocks.0.feed_forward.router.outer.bias"
PLACES = "network.blocks.1.feed_forward.tensors.inner_bias.places"
BERT = {"class": "BERT4Rec", "num_items": 11, "max_len": 5, "dim": 6, "inner_dim": 7}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("wemoe", {"tensors": {ROUTER: None}}, "bias' is missing"),
        ("wemoe", {"tensors": {ROUTER: torch.zeros(3)}}, r"bias' has shape \(3,\), not \(2,\)"),
        ("wemoe", {"members": 3}, "'network.blocks.0.feed_forward.router.outer.weight' has shape"),
        ("wemoe", {"members": 10**15}, "which no tensor of the file has"),
        ("wemoe", {"members": 0}, "members is 0 where an integer of at least 1"),
        ("wemoe", {"members": "two"}, "members is 'two' where an integer"),
        ("wemoe", {"router_layers": 3}, "router_layers is 3 where 1 or 2"),
        ("wemoe", {"density": 2.0}, "density is 2.0 where"),
        ("wemoe", {"density": 0.5}, "places' is missing|has shape"),
        ("wemoe", {"density": "all"}, "density is 'all' where"),
        ("wemoe", {"network": 3}, "WeightEnsemble: network is a int, not a class's config"),
        ("wemoe", {"network": {"class": "os"}}, "the unknown class 'os'"),
        ("wemoe", {"network": {"class": ["x"]}}, r"the unknown class \['x'\]"),
        ("wemoe", {"network": {**BERT, "oops": 1}}, "config does not fit WeightEnsemble"),
        ("wemoe", {"network": {**BERT, "dim": 0}}, "dim must be at least 1"),
        ("wemoe", {"network": {"class": "GRU4Rec", "num_items": 3}}, "no feed-forward layer"),
        ("wemoe", {"extra": 3}, "config does not fit WeightEnsemble"),
        ("e-wemoe", {"tensors": {PLACES: torch.tensor([[0, 9], [0, 1]])}}, "names entry 9 of 7"),
        ("e-wemoe", {"tensors": {PLACES: torch.tensor([[0, 1], [-1, 1]])}}, "names entry -1 of 7"),
        (
            "e-wemoe",
            {"tensors": {PLACES: torch.tensor([[0, 1], [0, 1]], dtype=torch.uint8)}},
            f"tensor '{PLACES}' is torch.uint8",
        ),
        ("surgery", {"rank": 0}, "rank is 0 where"),
        ("surgery", {"rank": 10**15}, "which no tensor of the file has"),
        ("surgery", {"version": 2}, "surgery.*is missing|has shape|is missing"),
        ("surgery", {"version": True}, "version is True where an integer"),
        ("surgery", {"network": None}, "SurgeryEncoder: network is a NoneType"),
        ("surgery", {"tensors": {"surgery.up.weight": None}}, "'surgery.up.weight' is missing"),
    ],
)
def test_a_hostile_file_is_refused_in_one_sentence(name, change, message, tmp_path):
    path = tmp_path / "model.safetensors"
    fk.save_model(MADE[name](), path)
    rewrite(path, **change)
    with pytest.raises(InputError, match=message) as error:
        fk.load_model(path)
    assert "\n" not in str(error.value)


def test_a_network_of_ones_own_is_no_model_file(tmp_path):
    class Own(fk.SASRec):
        pass

    models = [Own(11, max_len=5, dim=6, layers=1) for _ in range(3)]
    made = [fk.weight_ensemble(models[:2], base=models[2])]
    made.append(fk.representation_surgery(models[0], models[1:], [HISTORIES], steps=0))
    for model in made:
        with pytest.raises(InputError, match="Own is not an encoder that a model file can hold"):
            fk.save_model(model, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())

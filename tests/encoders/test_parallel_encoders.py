"""The ensemble of parallel encoders: its logits, its seeds and branches, its files."""

import json

import pytest
import torch
from models import HISTORIES
from objective_models import NAMES, T, V, generator
from parallel_models import ensemble, member
from training_runs import assert_same_bits, bits

import fisherkern as fk
from fisherkern.errors import InputError


def test_logits_are_the_mean_of_the_members():
    model = ensemble("BERT4Rec", "SASRec", "GRU4Rec", "Caser")
    logits = model(HISTORIES)
    mean = torch.stack([own(HISTORIES) for own in model.members]).mean(0)
    assert torch.allclose(logits, mean, atol=1e-12)
    weight, bias = model.head()
    assert torch.allclose(model.encode(HISTORIES) @ weight.t() + bias, mean, atol=1e-12)
    assert not model.causal and not hasattr(model, "append_mask")
    with pytest.raises(InputError, match="no mask token"):
        fk.MaskedItems()(model, HISTORIES, generator())


def test_an_ensemble_is_trained_by_other_objectives_too():
    model = ensemble("SASRec", "GRU4Rec")
    assert model.causal
    loss = fk.NextItem()(model, torch.cat([HISTORIES, HISTORIES[:, :1]], 1)[:1, 1:], generator())
    assert loss.isfinite()
    model = ensemble("BERT4Rec", "BERT4Rec")
    assert (fk.MaskedItems() + fk.CL4SRec())(model, HISTORIES, generator()).isfinite()


def test_networks_from_seeds_really_differ():
    def make():
        return fk.BERT4Rec(V, max_len=T, dim=8)

    before = torch.random.get_rng_state()
    model = fk.ParallelEncoders.seeded(make, 3, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for i in range(3):
        for j in range(i):
            theirs = dict(model.members[j].named_parameters())
            for name, own in model.members[i].named_parameters():
                drawn = own.ndim >= 2
                assert torch.equal(own, theirs[name]) != drawn, name
    assert_same_bits(bits(fk.ParallelEncoders.seeded(make, 3, seed=4)), bits(model))

    def with_a_seed_of_its_own():
        model = make()
        torch.manual_seed(0)
        for parameter in model.blocks.parameters():
            torch.nn.init.normal_(parameter)
        return model

    with pytest.raises(InputError, match=r"^make: blocks\.0\.attention.* networks 0 and 1$"):
        fk.ParallelEncoders.seeded(with_a_seed_of_its_own, 2)


def test_branches_of_one_model_can_be_merged_again():
    base = member("BERT4Rec", 0).float()
    base.item_ids = NAMES
    same = fk.ParallelEncoders.copies(base, 2)
    for own in same.members:
        assert_same_bits(bits(own), bits(base))
    model = fk.ParallelEncoders.copies(base, 3, noise=0.01, seed=1)
    assert model.item_ids == NAMES
    for own in model.members:
        for name, value in own.named_parameters():
            from_base = dict(base.named_parameters())[name]
            apart = (value - from_base).double().square().mean().sqrt()
            expected = 0.01 * from_base.double().square().mean().sqrt()
            assert expected / 3 < apart < 3 * expected, name
        assert torch.equal(own.item_embedding.weight[0], base.item_embedding.weight[0])
    assert not torch.equal(*[own.item_embedding.weight for own in list(model.members)[:2]])
    merged = fk.merge(list(model.members))
    assert torch.allclose(merged(HISTORIES), base(HISTORIES), atol=0.1)


def test_model_files(tmp_path):
    model = ensemble("BERT4Rec", "Caser").float()
    model.item_ids = NAMES
    assert all(own.item_ids == NAMES for own in model.members)
    fk.save_model(model, tmp_path / "a.safetensors", metrics={"x": 1.0})
    again = fk.load_model(tmp_path / "a.safetensors")
    assert isinstance(again, fk.ParallelEncoders) and again.config == model.config
    assert [type(own).__name__ for own in again.members] == ["BERT4Rec", "Caser"]
    assert again.item_ids == NAMES and again.members[1].item_ids == NAMES
    assert_same_bits(bits(again), bits(model))
    assert torch.equal(again(HISTORIES), model(HISTORIES)) and not again.members[0].training
    json.dumps(model.config)
    fk.save_model(again.members[0], tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: fk.ParallelEncoders([]), "no members"),
        (lambda: fk.ParallelEncoders([torch.nn.Linear(1, 1)]), "Linear"),
        (lambda: fk.ParallelEncoders([{"class": "X"}]), "unknown class 'X'"),
        (lambda: fk.ParallelEncoders([own := member("Caser", 0), own]), "twice"),
        (
            lambda: fk.ParallelEncoders([member("Caser", 0), fk.Caser(V + 1, T, 4)]),
            "num_items is 12 in member 1, but 11 in member 0",
        ),
        (lambda: fk.ParallelEncoders.copies(member("Caser", 0), 2, noise=-1), "noise"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()

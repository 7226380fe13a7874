"""Representation surgery against its equations, and the translation between output layers."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers.alignment import CASES
from models import HISTORIES
from torch import Tensor

import fisherkern as fk
from fisherkern import representation_surgery
from fisherkern.errors import InputError
from fisherkern.postmerge.surgery import Surgery, _translation

BLOCKED = ["BERT4Rec-post-tied", "SASRec-pre-tied-bias", "SASRec-post-untied-bias"]
BOTH = [(kind, version) for kind in BLOCKED for version in (1, 2)]
EVERY = [*BOTH, ("GRU4Rec-tied", 1), ("Caser-untied", 1)]


def near(model, seed, size=0.05):
    """The model with every weight moved a little."""
    new = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in new.named_parameters():
            value += size * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            if name == "item_embedding.weight":
                value[0] = 0
    return new


def shaken(corrected, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in surgeries(corrected).values():
            value.normal_(0, 0.5, generator=generator)
    return corrected


def surgeries(corrected):
    return {n: value for n, value in corrected.named_parameters() if value.requires_grad}


def corrected_by_hand(h, down, up):
    """h - U relu(D h) of one vector, number by number."""
    lower = [max(0.0, sum(d * x for d, x in zip(row, h, strict=True))) for row in down.tolist()]
    return [
        x - sum(u * y for u, y in zip(row, lower, strict=True))
        for x, row in zip(h, up.tolist(), strict=True)
    ]


def run(model, row, parts=None):
    """(Means of block outputs, h) of one history without padding, corrected by `parts`."""
    tokens = row[row != 0][None]
    if hasattr(model, "mask_token"):
        tokens = model.append_mask(tokens)
    means: list[Tensor] = []
    handles = []

    def hook(number):
        def change(module, inputs, output):
            if parts is not None:
                rows = [corrected_by_hand(h, *parts[number]) for h in output[0].tolist()]
                output = torch.tensor([rows], dtype=torch.float64)
            means.append(output[0].mean(0))
            return output

        return change

    if hasattr(model, "blocks"):
        for number, block in enumerate(model.blocks):
            handles.append(block.register_forward_hook(hook(number)))
    with torch.no_grad():
        h = model.transform(model.states(tokens)[:, -1])[0]
    for handle in handles:
        handle.remove()
    return means, h


def pairs_of(corrected, version):
    """The blocks' (D, U), where there are any, and the last (D, U)."""
    last = corrected.surgery.down.weight, corrected.surgery.up.weight
    if version == 1:
        return None, last
    blocks = [block.surgery for block in corrected.network.blocks]
    return [(part.down.weight, part.up.weight) for part in blocks], last


def translated(merged, member, h):
    """The nearest to h of the h* with W h* + b + c = W_m h + b_m in least squares."""
    (weight, bias), (own, own_bias) = merged.head(), member.head()
    z = own @ h + (0 if own_bias is None else own_bias)
    rest = z - weight @ h - (0 if bias is None else bias)
    table = torch.cat([weight, torch.ones(len(weight), 1).double()], 1).detach().numpy()
    found = np.linalg.lstsq(table, rest.detach().numpy(), rcond=None)[0]
    return h + torch.tensor(found[:-1])


def loss_by_hand(corrected, merged, members, lam, version):
    parts, last = pairs_of(corrected, version)
    total = 0.0
    for row in HISTORIES:
        means, h = run(merged, row, parts)
        mine = [*means, torch.tensor(corrected_by_hand(h.tolist(), *last), dtype=torch.float64)]
        theirs = [run(member, row) for member in members]
        wanted = [
            sum(share * own[0][i] for share, own in zip(lam, theirs, strict=True))
            for i in range(len(means))
        ]
        wanted.append(
            sum(
                share * translated(merged, member, own[1])
                for share, member, own in zip(lam, members, theirs, strict=True)
            )
        )
        if version == 1:
            mine, wanted = mine[-1:], wanted[-1:]
        for a, b in zip(mine, wanted, strict=True):
            total += sum(abs(x - y) for x, y in zip(a.tolist(), b.tolist(), strict=True)) / len(a)
    return total / len(HISTORIES)


@pytest.mark.parametrize(("kind", "version"), EVERY)
def test_without_a_step_the_function_is_the_merged_models(kind, version):
    merged = CASES[kind](0)
    corrected = representation_surgery(
        merged, [CASES[kind](1)], [HISTORIES], version=version, steps=0
    )
    assert torch.allclose(corrected(HISTORIES), merged(HISTORIES), rtol=0, atol=1e-14)
    assert corrected.causal == merged.causal and corrected.losses == []
    down = corrected.surgery.down.weight
    assert down.shape == (16, merged.head()[0].shape[1])
    bound = down.shape[1] ** -0.5
    assert 0.8 * bound < down.abs().max() < bound


@pytest.mark.parametrize(("kind", "version"), EVERY)
def test_the_correction_is_subtracted_from_every_state(kind, version):
    merged = CASES[kind](0)
    corrected = shaken(
        representation_surgery(merged, [merged], [HISTORIES], version=version, rank=3, steps=0)
    )
    parts, last = pairs_of(corrected, version)
    with torch.no_grad():
        found = corrected.encode(HISTORIES)
        for row, h in zip(HISTORIES, found, strict=True):
            expected = corrected_by_hand(run(merged, row, parts)[1].tolist(), *last)
            assert h.tolist() == pytest.approx(expected, rel=1e-10)
        weight, bias = merged.head()
        logits = found @ weight.T + (0 if bias is None else bias)
        assert torch.allclose(corrected(HISTORIES), logits, rtol=0, atol=1e-12)
        tokens = HISTORIES
        if hasattr(corrected, "mask_token"):
            tokens = corrected.append_mask(HISTORIES)
        states = corrected.transform(corrected.states(tokens))
        assert torch.allclose(states[:, -1], found, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "version"), BOTH)
def test_the_loss_and_the_first_step(kind, version):
    merged = CASES[kind](0)
    members = [near(merged, 1), near(merged, 2)]
    given = {"version": version, "rank": 2, "weights": [3, 1], "lr": 1e-3}
    start = representation_surgery(merged, members, [HISTORIES], steps=0, **given)
    fitted = representation_surgery(merged, members, [{"history": HISTORIES}], steps=1, **given)

    def loss():
        return loss_by_hand(start, merged, members, [0.75, 0.25], version)

    assert fitted.losses == [pytest.approx(loss(), rel=1e-9)]
    moved, checked = surgeries(fitted), 0
    for name, value in surgeries(start).items():
        if ".down." in name:  # U is 0, so D has no gradient yet
            assert torch.equal(value, moved[name])
            continue
        for i in (0, value.numel() - 1):
            sides = []
            for step in (1e-6, -1e-6):
                value.data.view(-1)[i] = step
                sides.append(loss())
            value.data.view(-1)[i] = 0
            if abs(sides[0] - sides[1]) > 1e-10:
                checked += 1
                expected = -math.copysign(1e-3, sides[0] - sides[1])
                assert moved[name].flatten()[i].item() == pytest.approx(expected, rel=1e-2)
    assert checked >= 1


@pytest.mark.parametrize(("kind", "version"), [*BOTH[:4], ("GRU4Rec-tied", 1)])
def test_only_the_corrections_train_and_the_loss_falls(kind, version):
    merged = CASES[kind](0)
    members = [near(merged, 1, 0.2), near(merged, 2, 0.2)]
    members[0].train()
    before = [copy.deepcopy(model.state_dict()) for model in (merged, *members)]
    loader = [HISTORIES[:2], HISTORIES[2:]]
    given = {"version": version, "targets": [0], "lr": 1e-2}
    fitted = representation_surgery(merged, members, loader, steps=60, **given)
    assert set(surgeries(fitted)) == {n for n, _ in fitted.named_parameters() if "surgery." in n}
    start = representation_surgery(merged, members, loader, steps=0, **given)
    for name, value in start.state_dict().items():
        assert torch.equal(value, fitted.state_dict()[name]) == ("surgery." not in name), name
    assert sum(fitted.losses[-2:]) < 0.7 * sum(fitted.losses[:2])
    for model, state in zip((merged, *members), before, strict=True):
        assert all(torch.equal(value, state[n]) for n, value in model.state_dict().items())
    assert members[0].training and not members[1].training and not fitted.training
    assert merged.head()[0].requires_grad
    start.load_state_dict(fitted.state_dict())
    assert torch.equal(start(HISTORIES), fitted(HISTORIES))
    alone = representation_surgery(merged, members[:1], loader, steps=60, version=version, lr=1e-2)
    assert alone.losses == fitted.losses


def test_equal_output_layers_translate_nothing_and_turned_ones_turn_back():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(7, generator=generator, dtype=torch.float64)
    slope, offset = _translation((weight, bias), (weight.clone(), bias + 3.0))
    assert torch.equal(slope, torch.zeros(4, 4).double()) and offset.abs().max() < 1e-12
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    slope, offset = _translation((weight, None), (weight @ turn.T, None))
    h = torch.randn(4, generator=generator, dtype=torch.float64)
    assert torch.allclose(turn @ h + slope @ (turn @ h) + offset, h, rtol=0, atol=1e-10)


def test_fewer_items_than_channels_leave_the_rest_of_a_representation():
    generator = torch.Generator().manual_seed(1)
    weight, own = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    slope, offset = _translation((weight, None), (own, torch.tensor([1.0, 2, 4]).double()))
    h = torch.randn(5, generator=generator, dtype=torch.float64)
    moved = h + slope @ h + offset
    gap = weight @ moved - own @ h - torch.tensor([1.0, 2, 4]).double()
    assert torch.allclose(gap - gap.mean(), torch.zeros(3).double(), atol=1e-10)
    null = torch.linalg.svd(weight - weight.mean(0))[2][2:]
    assert torch.allclose(null @ (moved - h), torch.zeros(3).double(), atol=1e-10)


def test_evaluation_takes_it():
    data = fk.synthetic(num_users=20, num_items=17, seed=0)
    models = [fk.BERT4Rec(data.num_items, max_len=6, dim=4, layers=1) for _ in range(3)]
    loader = data.loader(split="train", batch_size=7, max_len=6)
    corrected = representation_surgery(models[0], models[1:], loader, version=2, steps=4)
    assert 0 <= fk.evaluate(corrected, data, k=(5,))["ndcg@5"] <= 1
    assert all(value.dtype == torch.float32 for value in corrected.parameters())
    objective = fk.MaskedItems(0.5)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5]])
    assert objective(corrected, tokens, torch.Generator().manual_seed(0)).isfinite()


def test_bad_input():
    kind = "SASRec-pre-tied-bias"
    merged, member = CASES[kind](0), CASES[kind](1)
    named = copy.deepcopy(member)
    named.item_ids, merged.item_ids = list("abcdefghijk"), list("abcdefghijl")
    gru = CASES["GRU4Rec-tied"]
    for members, given, message in [
        ([], {}, "there is no member to move towards"),
        ([member], {"version": 3}, "version is 3 where 1 or 2 was expected"),
        ([member], {"rank": 0}, "rank is 0 where an integer of at least 1"),
        ([member], {"lr": -1.0}, "lr is -1.0 where a number above 0"),
        ([member], {"steps": 1.5}, "steps is 1.5 where an integer of at least 0"),
        ([member], {"targets": [1]}, "targets names member 1 of 1"),
        ([member], {"targets": []}, "the weights sum to 0"),
        ([member], {"weights": [1, 2]}, "weights has 2 numbers for 1 members"),
        ([member], {"loader": []}, "loader gives no batch"),
        ([gru(0)], {}, "member 0 is a GRU4Rec, the merged model a SASRec"),
        ([member, torch.nn.Linear(1, 1)], {}, "member 1 is a Linear, not an encoder"),
        ([member, named], {}, "member 1 and the merged model differ in item_ids"),
        ([fk.SASRec(12, max_len=5, dim=6)], {}, "num_items is 12 in member 0, 11 in the merged"),
        (
            [fk.SASRec(11, max_len=5, dim=6, layers=2, heads=1, inner_dim=7, bias=True)],
            {},
            "member 0 was built with heads=1 and the merged model with heads=2",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            representation_surgery(merged, members, **{"loader": [HISTORIES], "steps": 1, **given})
    with pytest.raises(InputError, match="version 2 needs Transformer blocks: GRU4Rec has none"):
        representation_surgery(gru(0), [gru(1)], [HISTORIES], version=2)
    corrected = representation_surgery(merged, [member], [HISTORIES], steps=0)
    with pytest.raises(InputError, match="merged model 0 is a SurgeryEncoder"):
        representation_surgery(corrected, [member], [HISTORIES])
    broken = copy.deepcopy(member)
    broken.item_embedding.weight.data[3] = float("nan")
    with pytest.raises(InputError, match="the loss of a batch is not finite"):
        representation_surgery(merged, [broken], [HISTORIES], steps=1)


def test_a_surgery_is_differentiable_in_both_matrices():
    surgery = Surgery(3, 2, torch.Generator().manual_seed(0))
    surgery.up.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(surgery, h)

"""Alignment by activations: planted symmetries undone, padding of no account, functions kept."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from helpers.alignment import CASES, logits, random_transforms
from models import HISTORIES, NUM_ITEMS
from torch import nn

import fisherkern as fk
from fisherkern.alignment.activations import Correlations, record_activations
from fisherkern.alignment.align import align
from fisherkern.errors import InputError
from fisherkern.members.symmetries import fold_norms, symmetries_of, transform_model


def histories(number=40, seed=0):
    """Rows of random items behind padding of random width."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, NUM_ITEMS + 1, (number, 5), generator=generator)
    padding = torch.randint(0, 5, (number, 1), generator=generator)
    return rows.masked_fill(torch.arange(5) < padding, 0)


LOADER = [histories(24), {"history": histories(16, 1)}]


def planted(case, seed=0):
    """A model and a copy of it moved by a random element of every group."""
    model = CASES[case](seed)
    symmetries = symmetries_of(model)
    rotates = any(group.kind == "rotation" for group in symmetries.groups.values())
    start = fold_norms(model, symmetries) if rotates else model
    return model, transform_model(start, symmetries, random_transforms(symmetries, 7 + seed))


def largest_difference(one, other, idle=frozenset()):
    mine, others = one.state_dict(), other.state_dict()
    return max(float((mine[name] - others[name]).abs().max()) for name in mine.keys() - idle)


@pytest.mark.parametrize("case", CASES)
def test_a_planted_symmetry_is_found_again(case):
    model, moved = planted(case)
    reference, found = align([model, moved], by="activations", loader=LOADER)
    assert largest_difference(found, reference, symmetries_of(model).idle) < 1e-6
    for new in (reference, found):
        assert torch.allclose(logits(new), logits(model), rtol=0, atol=1e-12)
    report = found.align_report
    assert json.loads(json.dumps(report)) == report
    assert report["by"] == "activations" and report["distance_after"] < 1e-5
    assert report["agreement"].keys() == report["groups"].keys()
    for before, after in report["agreement"].values():
        assert before <= after + 1e-9 <= 1 + 2e-9
    # Units that never fire correlate with nothing; all the others do the same again.
    exact = [after > 1 - 1e-9 for _, after in report["agreement"].values()]
    assert sum(exact) >= len(exact) - 2 or "one" in case  # a layer norm of one channel is constant
    assert "agreement" not in reference.align_report


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_independent_members_keep_their_functions(case, dtype):
    members = [CASES[case](seed).to(dtype) for seed in range(2)]
    members[1].train()
    before = [logits(model.eval()) for model in members]
    members[1].train()
    state = torch.get_rng_state()
    aligned = align(members, reference=1, by="activations", loader=LOADER)
    assert torch.equal(torch.get_rng_state(), state)
    for new, expected in zip(aligned, before, strict=True):
        found = logits(new.eval())
        bound = 1e-12 if dtype == torch.float64 else 1e-5 * float(expected.abs().max())
        assert (found - expected).abs().max() <= bound
    assert members[1].training
    for before_, after in aligned[0].align_report["agreement"].values():
        assert -1 - 1e-9 <= before_ and after <= 1 + 1e-9


def correlation_by_hand(one, other, symmetries, name, tokens):
    """Pearson's, channel by channel, of a layer's outputs at the real positions one by one."""
    found = []
    for model in (one, other):
        rows = []
        for row in tokens:
            own = row[row != 0][None]
            if not own.shape[1]:
                continue
            seen = []
            part = model.get_submodule(name)
            handle = part.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
            with torch.no_grad():
                model.states(own)
            handle.remove()
            rows += [channel.tolist() for channel in seen[0][0]]
        found.append(rows)
    size = len(found[0][0])
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i, j in itertools.product(range(size), repeat=2):
        a, b = [row[i] for row in found[0]], [row[j] for row in found[1]]
        mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
        products = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
        squares = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
        matrix[i, j] = products / squares**0.5 if squares > 1e-20 else 0.0
    return matrix


@pytest.mark.parametrize("seed", range(2))
def test_feed_forward_units_are_matched_as_trying_all_orders_by_hand_does(seed):
    """What `outer` reads, and what `inner` writes, correlated one number after another."""
    case = "SASRec-post-untied-bias"
    one, other = CASES[case](seed), CASES[case](seed + 5)
    symmetries = symmetries_of(one)
    tokens = histories(20, seed)
    sums = Correlations(symmetries, {})
    sums.add(*(record_activations(model, symmetries, tokens) for model in (one, other)))
    found = sums.of()
    for layer in range(2):
        label = f"blocks.{layer}.feed_forward"
        reads = correlation_by_hand(one, other, symmetries, f"{label}.outer", tokens)
        writes = correlation_by_hand_of_output(one, other, f"{label}.inner", tokens)
        expected = (reads + writes) / 2
        assert torch.allclose(found[label], expected, rtol=0, atol=1e-10)
        _, moved = align([one, other], by="activations", loader=[tokens])
        orders = itertools.permutations(range(7))
        best = max(sum(float(expected[i, j]) for i, j in enumerate(o)) for o in orders) / 7
        assert moved.align_report["agreement"][label][1] == pytest.approx(best, abs=1e-5)


def correlation_by_hand_of_output(one, other, name, tokens):
    """The same of what a layer writes: its output is the input of an identity put after it."""

    class After(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.out = layer, nn.Identity()

        def forward(self, x):
            return self.out(self.layer(x))

    wrapped = []
    for model in (one, other):
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, After(layer))
        wrapped.append((model.get_submodule(parent), child, layer))
    try:
        return correlation_by_hand(one, other, None, f"{name}.out", tokens)
    finally:
        for parent, child, layer in wrapped:
            setattr(parent, child, layer)


@pytest.mark.parametrize("case", CASES)
def test_neither_padding_nor_the_batch_matters(case):
    one, other = CASES[case](0), CASES[case](1)
    symmetries = symmetries_of(one)
    base = histories(12)
    wide = F.pad(base, (3, 0))

    def correlations(batches):
        sums = Correlations(symmetries, {})
        for tokens in batches:
            # Up to max_len columns fit; what is cut is padding.
            tokens = tokens[:, -5:]
            sums.add(*(record_activations(model, symmetries, tokens) for model in (one, other)))
        return sums.of()

    expected = correlations([base])
    several = correlations([wide[:5], wide[5:], torch.zeros(2, 5, dtype=torch.int64)])
    short = base[(base[:, :2] == 0).all(1)]
    assert len(short) > 2
    for found, wanted in (
        (several, expected),
        (correlations([short]), correlations([short[:, 2:]])),
    ):
        assert found.keys() == wanted.keys()
        for label, value in found.items():
            assert torch.allclose(value, wanted[label], rtol=0, atol=1e-9), label


def test_what_stands_at_padding_is_never_seen():
    """The padding row of the table may hold anything where padding is not attended to."""
    model = CASES["BERT4Rec-pre-untied"](0)
    symmetries, tokens = symmetries_of(model), histories(12)
    before = record_activations(model, symmetries, tokens)
    with torch.no_grad():
        model.item_embedding.weight[0] = 1e6
    after = record_activations(model, symmetries, tokens)
    assert before.keys() == after.keys() and len(before) > 20
    for name, (labels, value) in before.items():
        assert after[name][0] == labels
        assert torch.allclose(after[name][1], value, rtol=0, atol=1e-12), name
        assert len(value) == int((tokens != 0).sum())


def test_units_that_never_fire_are_matched_by_their_weights():
    case = "SASRec-post-tied-plain"
    model = CASES[case](0)
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.inner.weight[:3] *= 1e-3
            block.feed_forward.inner.bias[:3] = -50.0
    symmetries = symmetries_of(model)
    moved = transform_model(model, symmetries, random_transforms(symmetries, 3))
    _, found = align([model, moved], by="activations", loader=LOADER)
    assert largest_difference(found, model, symmetries.idle) < 1e-6


def test_only_vertical_filters_need_more_than_one_pass():
    for case, passes in (("GRU4Rec-untied", 1), ("BERT4Rec-post-tied", 1), ("Caser-untied", 3)):
        _, found = align(list(planted(case)), by="activations", loader=LOADER)
        assert found.align_report["sweeps"] == passes, case


def test_items_are_matched_by_id():
    model, moved = planted("GRU4Rec-tied")
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(0))
    model.item_ids = [f"i{v}" for v in range(NUM_ITEMS)]
    with torch.no_grad():
        moved.item_embedding.weight[1:] = moved.item_embedding.weight[1:][order]
        moved.item_embedding.weight[4] = 100.0  # an item that only the copy has
    moved.item_ids = [f"i{v}" for v in order]
    moved.item_ids[3] = "new"
    _, found = align([model, moved], by="activations", loader=LOADER)
    names = [n for n in model.state_dict() if n != "item_embedding.weight"]
    for name in names:
        assert torch.allclose(found.state_dict()[name], model.state_dict()[name], atol=1e-6)


def test_trained_copies_that_were_permuted_merge_as_if_they_had_not_been():
    """By activations a merge of a model and its shuffled copy is the model itself."""
    data = fk.synthetic(num_users=60, num_items=30, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fk.BERT4Rec(data.num_items, max_len=6, dim=8, layers=1, heads=2)
    fk.train(model, data, epochs=1, batch_size=16, progress=False)
    symmetries = symmetries_of(model)
    moved = transform_model(model, symmetries, random_transforms(symmetries, 0))
    loader = data.loader(batch_size=16, max_len=6)
    merged = fk.merge(align([model, moved], by="activations", loader=lambda m: loader))
    batch = next(iter(loader))["history"]
    assert torch.allclose(merged(batch), model.eval()(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"by": "heart"}, "by is 'heart' where 'weights', 'activations', 'loss' was expected"),
        ({"by": "activations"}, "by='activations' needs loader"),
        ({"loader": LOADER}, "loader= is used by by='activations' and 'loss' only"),
        ({"by": "activations", "loader": []}, "loader gives no batch"),
        ({"by": "activations", "loader": 3}, "loader is a int, not an iterable of batches"),
        ({"by": "activations", "loader": [HISTORIES + 5]}, "history holds item id 14, outside"),
        (
            {"by": "activations", "loader": [torch.zeros(2, 3, dtype=torch.int64)]},
            "loader: its histories hold no items",
        ),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(InputError, match=message):
        align([CASES["SASRec-constant"](seed) for seed in range(2)], **given)


def test_a_module_that_is_no_encoder_is_refused():
    with pytest.raises(InputError, match="no symmetries are known|not an encoder"):
        align([nn.Linear(2, 2), nn.Linear(2, 2)], by="activations", loader=LOADER)

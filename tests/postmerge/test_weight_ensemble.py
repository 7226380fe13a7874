"""Weight-ensembling feed-forward layers against the method's equations, sequence by sequence."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.alignment import CASES, build
from models import HISTORIES, NUM_ITEMS

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.postmerge.weight_ensemble import TaskVectors

KINDS = [
    "BERT4Rec-post-tied",
    "BERT4Rec-pre-untied",
    "SASRec-pre-tied-bias",
    "SASRec-post-untied-bias",
]
T64 = partial(torch.tensor, dtype=torch.float64)
FEED = ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
TARGETS = torch.tensor([4, 6, 11, 1, 2])


def family(kind, members=3):
    """MemberSet and their base."""
    models = [CASES[kind](seed) for seed in range(members + 1)]
    return models[:-1], models[-1]


def shaken_routers(ensemble, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in ensemble.routers():
            for value in router.parameters():
                value.normal_(0, 0.5, generator=generator)
    return ensemble


def feed(model, layer):
    return [model.get_parameter(f"blocks.{layer}.feed_forward.{name}").detach() for name in FEED]


def input_of(module, run):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run()
    handle.remove()
    return seen[0]


def pruned(tau, density):
    """All but the largest entries set to 0, one by one."""
    flat = tau.flatten().tolist()
    kept = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))
    kept = set(kept[: max(1, round(density * len(flat)))])
    flat = [value if i in kept else 0.0 for i, value in enumerate(flat)]
    return torch.tensor(flat, dtype=tau.dtype).view(tau.shape)


def by_hand(models, base, static, ensemble, history, density=None):
    """h of one sequence without padding: the static network run with layers rebuilt for it."""
    network = copy.deepcopy(static)
    routers = ensemble.routers()
    tokens = history[history != 0][None]
    if hasattr(network, "mask_token"):
        tokens = network.append_mask(tokens)
    for layer in range(2):
        router = routers[layer % len(routers)]
        part = network.blocks[layer].feed_forward
        # The layers before this one are done, so its input is final.
        (x,) = input_of(part, partial(network.states, tokens))
        rows = []
        for token in x:
            if router.inner is not None:
                token = router.inner.weight @ token + router.inner.bias
                token = T64([max(0.0, value) for value in token.tolist()])
            rows.append(router.outer.weight @ token + router.outer.bias)
        r = sum(rows) / len(rows)
        own = feed(base, layer)
        for i, name in enumerate(FEED):
            value = own[i].clone()
            for m, model in enumerate(models):
                tau = feed(model, layer)[i] - own[i]
                value += r[m] * (tau if density is None else pruned(tau, density))
            part.get_parameter(name).data.copy_(value)
    return network.transform(network.states(tokens)[:, -1])[0]


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("router_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sequence_has_the_network_its_routers_say(kind, router_layers, efficient):
    models, base = family(kind)
    ensemble = fk.weight_ensemble(
        models, base=base, efficient=efficient, density=0.3, scale=0.4, router_layers=router_layers
    )
    shaken_routers(ensemble)
    assert len(ensemble.routers()) == (1 if efficient else 2)
    static = fk.merge(models, method="task_arithmetic", base=base, options={"scale": 0.4})
    with torch.no_grad():
        expected = torch.stack(
            [
                by_hand(models, base, static, ensemble, row, 0.3 if efficient else None)
                for row in HISTORIES
            ]
        )
        torch.testing.assert_close(ensemble.encode(HISTORIES), expected, rtol=1e-10, atol=1e-10)
        weight, bias = static.head()
        logits = expected @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(ensemble(HISTORIES), logits, rtol=1e-10, atol=1e-10)
        # Neither the batch nor padding matters.
        for row in HISTORIES:
            alone = ensemble.encode(row[row != 0][None])
            torch.testing.assert_close(
                alone, ensemble.encode(F.pad(row, (2, 0))[None]), rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("kind", KINDS[1:3])
def test_constant_routers_are_task_arithmetic_and_one_hot_ones_the_members_layers(kind):
    models, base = family(kind)
    ensemble = fk.weight_ensemble(models, base=base, scale=0.2)
    static = fk.merge(models, method="task_arithmetic", base=base, options={"scale": 0.2})
    for router in ensemble.routers():
        assert router.outer.bias.tolist() == [0.2] * 3 and router.inner.bias.tolist() == [0] * 6
        assert 0 < router.outer.weight.abs().max() < 0.05
        router.outer.weight.data.zero_()
    assert torch.allclose(ensemble(HISTORIES), static(HISTORIES), rtol=0, atol=1e-12)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    for m, model in enumerate(models):
        for layer, router in enumerate(ensemble.routers()):
            router.outer.bias.data.copy_(torch.eye(3)[m])
            mine = ensemble.network.blocks[layer].feed_forward(x)
            assert torch.allclose(mine, model.blocks[layer].feed_forward(x), rtol=0, atol=1e-12)


def test_states_and_encode_agree_at_any_positions():
    models, base = family("SASRec-pre-tied-bias")
    ensemble = shaken_routers(fk.weight_ensemble(models, base=base))
    assert not ensemble.causal
    positions = torch.tensor([[4, 2], [0, 4], [4, 4], [3, 4], [1, 4]])
    with torch.no_grad():
        full = ensemble.states(HISTORIES)
        some = ensemble.states(HISTORIES, positions)
        for n in range(5):
            assert torch.equal(some[n], full[n, positions[n]])
        assert torch.allclose(
            ensemble.encode(HISTORIES), ensemble.transform(full[:, -1]), rtol=0, atol=1e-12
        )
        assert ensemble.encode(torch.zeros(2, 3, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("objective", ["cross_entropy", "entropy"])
def test_the_first_step_follows_the_gradient_of_the_objective(objective):
    models, base = family("BERT4Rec-post-tied", members=2)
    batch = {"history": HISTORIES, "target": TARGETS}
    given = {
        "base": base,
        "objective": objective,
        "router_layers": 1,
        "lr": 1e-3,
        "efficient": True,
    }
    start = fk.weight_ensemble(models, **given)
    fitted = fk.weight_ensemble(models, loader=[batch], steps=1, **given)

    def loss(model):
        total = 0.0
        for row, target in zip(model(HISTORIES).tolist(), TARGETS.tolist(), strict=True):
            norm = sum(math.exp(z) for z in row)
            p = [math.exp(z) / norm for z in row]
            entropy = -sum(q * math.log(q) for q in p)
            total += entropy if objective == "entropy" else -math.log(p[target - 1])
        return total / len(TARGETS)

    assert fitted.merge_report["losses"] == [pytest.approx(loss(start))]
    (router,), (moved,) = start.routers(), fitted.routers()
    for name, value in router.outer.named_parameters():
        for i in range(min(value.numel(), 4)):
            sides = []
            for step in (1e-5, -1e-5):
                old = value.data.flatten()[i].item()
                value.data.view(-1)[i] = old + step
                sides.append(loss(start))
                value.data.view(-1)[i] = old
            # Adam's first step is the learning rate against the gradient's sign.
            step = (moved.outer.get_parameter(name) - value).flatten()[i].item()
            assert step == pytest.approx(-math.copysign(1e-3, sides[0] - sides[1]), rel=1e-2)


def test_only_the_routers_train_and_the_members_stay():
    models, base = family("SASRec-post-untied-bias", members=2)
    before = [copy.deepcopy(model.state_dict()) for model in (*models, base)]
    for model in models:
        model.train()
    loader = [
        {"history": HISTORIES[:3], "target": TARGETS[:3]},
        {"history": HISTORIES[3:], "target": TARGETS[3:]},
    ]
    ensemble = fk.weight_ensemble(models, base=base)
    fitted = fk.weight_ensemble(models, base=base, loader=loader, steps=40, lr=1e-2)
    trainable = {name for name, value in fitted.named_parameters() if value.requires_grad}
    assert trainable == {name for name, _ in fitted.named_parameters() if ".router." in name}
    old = ensemble.state_dict()
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, old[name]) == (".router." not in name), name
    losses = fitted.merge_report["losses"]
    assert len(losses) == 40 and sum(losses[-2:]) < sum(losses[:2])
    for model, state in zip((*models, base), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert models[0].training and not fitted.training
    again = fk.weight_ensemble(models, base=base, loader=loader, steps=40, lr=1e-2)
    assert torch.equal(again(HISTORIES), fitted(HISTORIES))
    ensemble.load_state_dict(fitted.state_dict())
    assert torch.equal(ensemble(HISTORIES), fitted(HISTORIES))
    assert torch.equal(copy.deepcopy(fitted)(HISTORIES), fitted(HISTORIES))


def test_sparse_task_vectors_keep_the_largest_entries_of_each_member():
    base = torch.zeros(2, 3, dtype=torch.float64)
    members = [torch.tensor([[1.0, -5, 2], [0, 3, 4]]), torch.tensor([[7.0, 1, -1], [1, -8, 1]])]
    vectors = TaskVectors(base, 2, 1 / 3)
    vectors.fill(base, [member.double() for member in members])
    r = torch.tensor([[1.0, 0.0], [0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    expected = [[[0.0, -5, 0], [0, 0, 4]], [[-14.0, -2.5, 0], [0, 16, 2]]]
    assert vectors(r).tolist() == expected
    assert torch.autograd.gradcheck(vectors, r)
    assert vectors.values.shape == vectors.places.shape == (2, 2)
    assert TaskVectors(base, 2, 1e-9).values.shape == (2, 1)


def test_catalogues_are_united_and_the_loader_may_ask_for_the_encoder():
    models, base = family("SASRec-pre-tied-bias", members=2)
    small = build("SASRec", 5, norm="pre", bias=True, dim=6, layers=2, heads=2, inner_dim=7)
    for model, start in ((models[0], 0), (models[1], 3), (base, 0)):
        model.item_ids = [str(start + i) for i in range(NUM_ITEMS)]
    assert small.num_items == NUM_ITEMS
    asked = []

    def loader(ensemble):
        asked.append(ensemble.num_items)
        return [{"history": HISTORIES, "target": TARGETS + 3}]

    ensemble = fk.weight_ensemble(models, base=base, loader=loader, steps=2)
    assert asked == [14] and ensemble.item_ids == [str(i) for i in range(14)]
    assert ensemble(HISTORIES).shape == (5, 14)


def test_evaluation_takes_it():
    data = fk.synthetic(num_users=20, num_items=17, seed=0)
    make = [fk.SASRec(data.num_items, max_len=6, dim=4, layers=1, dropout=0.5) for _ in range(3)]
    loader = data.loader(split="validation", batch_size=7, max_len=6)
    ensemble = fk.weight_ensemble(make[:2], base=make[2], loader=loader, steps=3, efficient=True)
    report = fk.evaluate(ensemble, data, split="test", k=(5,))
    assert 0 <= report["ndcg@5"] <= 1


def test_bad_input():
    models, base = family("BERT4Rec-post-tied", members=2)
    batch = {"history": HISTORIES, "target": TARGETS}
    gru = CASES["GRU4Rec-tied"]
    for given, message in [
        ({"objective": "loss"}, "objective is 'loss' where 'cross_entropy' or 'entropy'"),
        ({"density": 0.0}, "density is 0.0 where a number above 0 and at most 1"),
        ({"router_layers": 3}, "router_layers is 3 where 1 or 2 was expected"),
        ({"steps": -1}, "steps is -1 where"),
        ({"lr": 0}, "lr is 0 where a number above 0"),
        ({"scale": -1.0}, "option 'scale' is -1.0"),
        ({"loader": []}, "loader gives no batch"),
        ({"loader": 3}, "loader is a int, not an iterable of batches"),
        ({"loader": batch}, "loader is a dict, not an iterable of batches"),
        ({"loader": [HISTORIES]}, "loader: a batch holds no next items"),
        ({"loader": [{**batch, "target": TARGETS + 7}]}, "next items are outside the catalogue"),
        ({"loader": [{**batch, "target": TARGETS - 1}]}, "next items are outside the catalogue"),
        ({"base": torch.nn.Linear(1, 1)}, "model 2 is a Linear, not an encoder of one network"),
        ({"base": CASES["SASRec-pre-tied-bias"](0)}, "the base is a SASRec"),
    ]:
        with pytest.raises(InputError, match=message):
            fk.weight_ensemble(models, **{"base": base, "steps": 1, **given})
    with pytest.raises(InputError, match="GRU4Rec has no feed-forward layer"):
        fk.weight_ensemble([gru(0), gru(1)], base=gru(2))
    with pytest.raises(InputError, match="model 0 is a ParallelEncoders"):
        fk.weight_ensemble([fk.ParallelEncoders([base])], base=base)
    with pytest.raises(InputError, match="there is no model to merge"):
        fk.weight_ensemble([], base=base)
    broken = copy.deepcopy(models)
    broken[0].output_bias.data.fill_(torch.finfo(torch.float64).max)
    with pytest.raises(InputError, match="the loss of a batch is not finite"):
        fk.weight_ensemble(broken, base=base, loader=[batch], steps=1, scale=5.0)

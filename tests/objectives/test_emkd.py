"""EMKD's loss against its equations as loops, its draws, and a run of it."""

import dataclasses
import json
import math

import pytest
import torch
from models import HISTORIES
from objective_models import T, V, check_gradient, generator, padded
from parallel_models import ensemble, member
from test_objectives_attributes import ATTRIBUTES, dataset
from training_runs import Cycles, assert_same_bits, bits
from training_runs import T as CYCLE
from training_runs import V as ITEMS

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.objectives import emkd, from_settings

MASK = V + 1
ROWS = [[1, 2, 3, 6, 2], [4], [5, 5, 1], [2, 9]]
PLAIN = fk.EMKD(views=2, ratio=0.4, attribute_weight=0)


def bound(objective):
    objective = objective.bind(dataset(), T)
    for head in objective.modules().values():
        head.double()
    return objective


def softmax(z):
    total = math.fsum(math.exp(own) for own in z)
    return [math.exp(own) / total for own in z]


def similarity(a, b, kind):
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    if kind == "dot":
        return dot
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def slow_contrast(objective, anchor, other, views):
    """c(n, k): lists of flat states, `views` [m][row]."""
    terms = []
    for u in range(len(anchor)):
        s = [similarity(anchor[u], own[u], objective.similarity) for own in views]
        p = [math.exp(own / objective.temperature) for own in s]
        s = [similarity(anchor[u], own, objective.similarity) for own in other]
        q = [math.exp(own / objective.temperature) for v, own in enumerate(s) if v != u]
        if objective.contrast == "joint":
            terms.append(-math.log(sum(p) / (sum(p) + sum(q))))
        elif objective.contrast == "each":
            terms.append(sum(-math.log(own / (own + sum(q))) for own in p) / len(p))
        else:
            terms.append(-math.log(sum(p)) + math.log(1 + sum(q)))
    return sum(terms) / len(terms)


def slow_states(network, tokens):
    """H (T, D) of one row as nested lists; hidden items as the network sees them."""
    if not hasattr(network, "mask_token"):
        tokens = tokens.masked_fill(tokens == MASK, 0)
    return network.transform(network.states(tokens[None]))[0]


def slow_loss(objective, model, tokens, heads=()):
    """The docstring's equations, one row, item and network at a time."""
    hidden, views = objective.draw(model, tokens, generator(3))
    rows, networks = range(len(tokens)), model.networks
    h = [[slow_states(own, row) for row in tokens] for own in networks]
    seen = [[[slow_states(own, row) for row in view] for view in views] for own in networks]
    total = 0.0
    for m in range(len(views)):
        z = [[] for _ in networks]
        items = []
        for row in rows:
            for t in range(tokens.shape[1]):
                if hidden[m, row, t]:
                    items.append(int(tokens[row, t]))
                    for n, own in enumerate(networks):
                        column = t if hasattr(own, "mask_token") else t - 1
                        weight, bias = own.head()
                        state = seen[n][m][row][column]
                        scores = weight @ state + (0 if bias is None else bias)
                        z[n].append(scores.tolist())
        for n in range(len(networks)):
            terms = [-math.log(softmax(z[n][i])[y - 1]) for i, y in enumerate(items)]
            total += sum(terms) / len(terms)
        for a in range(len(networks)):
            for b in range(len(networks)):
                if a == b:
                    continue
                terms = []
                for i in range(len(items)):
                    p = softmax([own / objective.temperature for own in z[a][i]])
                    q = softmax([own / objective.temperature for own in z[b][i]])
                    terms.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
                weight = objective.distill_weight * (0.5 if objective.distill == "mean" else 1)
                total += weight * sum(terms) / len(terms)

    def flat(states, row):
        kept = states if objective.padding else states * (tokens[row] != 0)[:, None]
        return kept.flatten().tolist()

    anchors = [[flat(own[row], row) for row in rows] for own in h]
    views = [[[flat(view[row], row) for row in rows] for view in own] for own in seen]
    for n in range(len(networks)):
        for k in range(len(networks)):
            term = slow_contrast(objective, anchors[n], anchors[k], views[k])
            total += objective.contrast_weight * term
    for n, head in enumerate(heads):
        total += objective.attribute_weight * slow_attributes(objective, h[n], tokens, hidden, head)
    return total


def slow_attributes(objective, h, tokens, hidden, head):
    numbers = sorted({number for own in ATTRIBUTES.values() for number in own})
    terms = []
    for row in range(len(tokens)):
        for t in range(tokens.shape[1]):
            own = ATTRIBUTES.get(f"i{int(tokens[row, t])}", [])
            if own and (objective.attribute_positions == "all" or hidden[-1, row, t]):
                z = head(h[row][t]).tolist()
                for column, number in enumerate(numbers):
                    p = 1 / (1 + math.exp(-z[column]))
                    terms.append(-math.log(p if number in own else 1 - p))
    return sum(terms) / len(terms)


VARIANTS = {
    "the paper's": {},
    "weights": {"contrast_weight": 0.7, "distill_weight": 0.3, "temperature": 0.5},
    "dot": {"similarity": "dot", "temperature": 5.0},
    "each": {"contrast": "each"},
    "distill": {"distill": "mean", "distill_weight": 1.0},
    "padding": {"padding": True, "contrast_weight": 1.0},
    "released contrast": {"contrast": "released", "contrast_weight": 1.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_is_the_equations(name):
    objective = dataclasses.replace(PLAIN, **VARIANTS[name])
    model, tokens = ensemble("BERT4Rec", "BERT4Rec", "BERT4Rec"), padded(ROWS, T)
    loss = objective(model, tokens, generator(3))
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(slow_loss(objective, model, tokens), abs=1e-9)


@pytest.mark.parametrize("names", [("SASRec", "SASRec"), ("BERT4Rec", "GRU4Rec", "Caser")])
def test_any_encoders_inside(names):
    model, tokens = ensemble(*names), padded(ROWS, T)
    assert PLAIN(model, tokens, generator(3)).item() == pytest.approx(
        slow_loss(PLAIN, model, tokens), abs=1e-9
    )


@pytest.mark.parametrize("changes", [{}, {"attribute_positions": "masked"}])
def test_the_attribute_task(changes):
    objective = fk.EMKD(views=2, ratio=0.5, networks=2, dim=4, attribute_weight=0.6, **changes)
    objective = bound(objective)
    heads = list(objective.modules().values())
    assert len(heads) == 2 and not torch.equal(heads[0].weight, heads[1].weight)
    model, tokens = ensemble("BERT4Rec", "BERT4Rec"), padded(ROWS, T)
    expected = slow_loss(objective, model, tokens, heads)
    assert objective(model, tokens, generator(3)).item() == pytest.approx(expected, abs=1e-9)


def test_the_released_variants_together():
    settings = {"views": 3, "ratio": 0.4, "networks": 2, "dim": 4, "contrast_weight": 1.0}
    objective = bound(fk.EMKD.released(0.3, **settings))
    assert objective.temperature == 0.3 and objective.masking == "bert"
    model, tokens = ensemble("BERT4Rec", "BERT4Rec"), padded(ROWS, T)
    expected = slow_loss(objective, model, tokens, list(objective.modules().values()))
    assert objective(model, tokens, generator(3)).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("names", [("BERT4Rec", "BERT4Rec"), ("BERT4Rec", "GRU4Rec")])
def test_gradients(names):
    # Without teachers, which are constants to the gradient and not to a difference quotient, and
    # without SASRec, whose padding row is in the state of a hidden item but is not trained.
    objective = dataclasses.replace(PLAIN, distill_weight=0.0)
    check_gradient(objective, ensemble(*names), padded(ROWS, T))


def test_no_gradient_reaches_a_teacher():
    torch.manual_seed(0)
    z = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    fixed = [own.detach() for own in z]
    got = torch.autograd.grad(emkd.distillation(z, 0.5), z)
    for student in range(3):
        # The same with every teacher a number: only the student's own terms move.
        p = [(own / 0.5).softmax(1) for own in fixed]
        log = (z[student] / 0.5).log_softmax(1)
        own = sum(-(p[a] * log).sum() / 3 for a in range(3) if a != student)
        assert torch.allclose(got[student], torch.autograd.grad(own, z[student])[0], atol=1e-12)


def test_a_view_with_many_logits_is_computed_again(monkeypatch):
    model, tokens = ensemble("BERT4Rec", "BERT4Rec"), padded(ROWS, T)
    kept = torch.autograd.grad(PLAIN(model, tokens, generator()), list(model.parameters()))
    monkeypatch.setattr(emkd, "_KEPT", 0)
    again = torch.autograd.grad(PLAIN(model, tokens, generator()), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("names, first", [(("BERT4Rec",), True), (("BERT4Rec", "SASRec"), False)])
def test_views_hide_their_share_of_items_uniformly(names, first):
    objective = dataclasses.replace(PLAIN, views=2, ratio=0.3)
    tokens = padded([[1, 2, 3, 4], [7]], 6).repeat(1500, 1)
    hidden, views = objective.draw(ensemble(*names), tokens, generator())
    assert torch.equal(views, tokens.expand(2, -1, -1).masked_fill(hidden, MASK))
    assert not (hidden & (tokens == 0)).any()
    # ceil(0.3 * 4) = 2 of four items, of the last three where the first one must be seen.
    assert (hidden[:, ::2].sum(2) == 2).all()
    assert (hidden[:, 1::2].sum(2) == first).all()
    shares = hidden[:, ::2].double().mean((0, 1))[2:]
    expected = torch.tensor([1 / 2] * 4 if first else [0.0] + [2 / 3] * 3).double()
    assert torch.allclose(shares, expected, atol=0.05)
    assert (hidden[0] != hidden[1]).any(), "every view has its own mask"


def test_bert_masking_hides_changes_and_keeps():
    objective = dataclasses.replace(PLAIN, views=1, ratio=0.5, masking="bert")
    tokens = torch.full((6000, 1), 3)
    hidden, views = objective.draw(ensemble("BERT4Rec"), tokens, generator())
    assert hidden.double().mean().item() == pytest.approx(0.5, abs=0.04)
    assert (views[~hidden] == 3).all()
    shares = torch.bincount(views[hidden], minlength=MASK + 1) / hidden.sum()
    assert shares[MASK].item() == pytest.approx(0.8, abs=0.03)
    assert shares[3].item() == pytest.approx(0.1 + 0.1 / V, abs=0.03)
    assert shares[0] == 0 and (shares[1 : V + 1] > 0).all()


def train(model, state=None, epochs=2, **changes):
    objective = fk.EMKD(views=2, ratio=0.3, attribute_weight=0)
    settings = {"epochs": epochs, "batch_size": 16, "lr": 3e-3, "seed": 5, "progress": False}
    data = Cycles(users=32)
    return fk.train(model, data, objective=objective, state=state, **(settings | changes))


def fresh():
    return fk.ParallelEncoders.seeded(lambda: fk.BERT4Rec(ITEMS, CYCLE, dim=8, layers=1), 2)


def test_training_is_deterministic_and_resumes(tmp_path):
    class Stop(Exception):
        pass

    def stop(epoch, *_):
        if epoch == 2:
            raise Stop

    model, other = fresh(), fresh()
    log = train(model)
    assert log.losses[1] < log.losses[0]
    assert model.item_ids == Cycles.item_ids == model.members[1].item_ids
    with pytest.raises(Stop):  # after a step of the second epoch has been saved
        train(other, state=tmp_path / "s", save_every_steps=3, on_epoch=stop)
    other = fresh()
    assert train(other, state=tmp_path / "s").losses == log.losses
    assert_same_bits(bits(model), bits(other))


def test_settings_make_the_objective_again():
    for objective in (PLAIN, fk.EMKD.released(0.3), fk.MaskedItems() + 0.5 * PLAIN):
        assert from_settings(json.loads(json.dumps(objective.settings()))) == objective


def test_rows_of_padding_and_lone_items():
    model = ensemble("BERT4Rec", "SASRec")
    some = padded([[1, 2, 3], []], T)
    assert torch.equal(PLAIN(model, some, generator()), PLAIN(model, some[:1], generator()))
    for rows in ([[4]], [[], []]):
        loss = PLAIN(model, padded(rows, T), generator())
        loss.backward()
        assert loss.isfinite()
    assert all(own.grad is None or own.grad.isfinite().all() for own in model.parameters())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: fk.EMKD(views=0), "views must be at least 1, got 0"),
        (lambda: fk.EMKD(ratio=0), r"ratio must be in \(0, 1\], got 0"),
        (lambda: fk.EMKD(temperature=0), "temperature must be positive and finite"),
        (lambda: fk.EMKD(distill_weight=-1), "distill_weight must be 0 or more and finite"),
        (lambda: fk.EMKD(contrast="x"), "contrast must be 'joint' or 'each' or 'released'"),
        (lambda: PLAIN(member("BERT4Rec", 0), HISTORIES, generator()), "trains ParallelEncoders"),
        (lambda: fk.EMKD()(ensemble("BERT4Rec"), HISTORIES, generator()), "must be bound first"),
        (lambda: fk.EMKD().bind(dataset(None), T), "attribute_weight=0 does without them"),
        (
            lambda: bound(fk.EMKD(dim=4))(ensemble("BERT4Rec"), HISTORIES, generator()),
            r"networks = 3 of dim = 4 do not fit the model's, of widths \[4\]",
        ),
        (
            lambda: PLAIN(
                fk.ParallelEncoders([member("Caser", 0), member("Caser", 1, dim=6)]),
                HISTORIES,
                generator(),
            ),
            "needs networks of one width",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()

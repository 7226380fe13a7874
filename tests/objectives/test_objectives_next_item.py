"""Next-item losses against their equations as loops; the tiled softmax; what is drawn."""

import math

import numpy as np
import pytest
import torch
from objective_models import T, V, causal, check_gradient, encoder, generator, padded

import fisherkern as fk
from fisherkern.objectives import scoring
from fisherkern.objectives.scoring import softmax_loss

ROWS = [[3, 5, 3, 8, 1, 2], [7], [], [2, 9, 4, 4], [1, 2], [0, 6]]
CAUSAL = ("SASRec", "GRU4Rec", "Caser")
DATA = fk.SequenceDataset(
    "t", [1, 1, 2, 9, 9, 3, 2, 1, 8, 8], [0, 5, 10], [str(v) for v in range(1, V + 1)], ["a", "b"]
)


def places(tokens, last_only):
    """(row, column of the input) of every pair of an item and its next."""
    columns = [tokens.shape[1] - 2] if last_only else range(tokens.shape[1] - 1)
    return [
        (n, t) for n in range(len(tokens)) for t in columns if tokens[n, t] and tokens[n, t + 1]
    ]


def hidden(model, tokens, n, t, last_only):
    if last_only:
        return model.encode(tokens[n : n + 1, :-1])[0]
    return model.transform(model.states(tokens[n : n + 1, :-1]))[0, t]


def slow_loss(objective, model, tokens, drawn, log_q):
    """The docstring's equations, one position and one negative at a time."""
    weight, bias = model.head()
    pairs, losses = places(tokens, objective.last_only), []
    rows = sorted({n for n, _ in pairs})
    for place, (n, t) in enumerate(pairs):
        h = hidden(model, tokens, n, t, objective.last_only)
        target = int(tokens[n, t + 1]) - 1

        def score(item, h=h):
            return (weight[item] @ h + bias[item]).item()

        if objective.loss == "softmax":
            total = sum(math.exp(score(item)) for item in range(V))
            losses.append(-math.log(math.exp(score(target)) / total))
            continue
        row = place if objective.negatives_per == "position" else rows.index(n)
        kept = [(k, q) for k, q in zip(drawn[row], log_q[row], strict=True) if k != target]
        if objective.loss == "sampled_softmax":
            scale = objective.negatives if objective.log_q else 1
            total = math.exp(score(target))
            for item, q in kept:
                corrected = math.exp(q) * scale if objective.log_q else 1
                total += math.exp(score(item)) / corrected
            losses.append(-math.log(math.exp(score(target)) / total))
            continue
        if objective.loss == "bpr":
            pairs = [math.log(1 + math.exp(score(k) - score(target))) for k, _ in kept]
            losses.append(sum(pairs) / max(1, len(kept)))
            continue
        alpha = objective.negatives / (V - 1)
        beta = 1.0
        if objective.loss == "gbce":  # eq. 14: α (t (1 - 1/α) + 1/α)
            beta = alpha * (objective.t * (1 - 1 / alpha) + 1 / alpha)

        def sigmoid(x):
            return 1 / (1 + math.exp(-x))

        loss = math.log(sigmoid(score(target)) ** beta)
        for item, _ in kept:
            loss += math.log(1 - sigmoid(score(item)))
        losses.append(-loss / (len(kept) + 1))
    return sum(losses) / len(losses)


SAMPLED = [
    fk.NextItem("sampled_softmax", 4),
    fk.NextItem("sampled_softmax", 4, log_q=True),
    fk.NextItem("sampled_softmax", 4, log_q=True, sampling="popularity"),
    fk.NextItem("sampled_softmax", 3, negatives_per="position"),
    fk.NextItem("bce", 1, negatives_per="position"),
    fk.NextItem("bce", 5),
    fk.NextItem("gbce", 5),
    fk.NextItem("gbce", 5, t=0.2, negatives_per="position"),
    fk.NextItem("gbce", 5, t=1.0, sampling="popularity"),
    fk.NextItem("bpr", 1, negatives_per="position"),
    fk.NextItem("bpr", 4),
]


@pytest.mark.parametrize("objective", [fk.NextItem(), *SAMPLED], ids=lambda o: o.loss)
@pytest.mark.parametrize("last_only", [False, True])
def test_losses_equal_their_equations(objective, last_only):
    objective = fk.NextItem(**{**arguments(objective), "last_only": last_only}).bind(DATA, T)
    tokens = padded(ROWS, T + 1)
    for name in ("BERT4Rec", "SASRec") if last_only else CAUSAL:
        model = encoder(name)
        pairs = places(tokens, last_only)
        count = len(pairs) if objective.negatives_per == "position" else len({n for n, _ in pairs})
        drawn, log_q = objective._draw(count, V, generator(4))
        expected = slow_loss(objective, model, tokens, drawn.tolist(), log_q.tolist())
        loss = objective(model, tokens, generator(4))
        assert loss.ndim == 0
        assert loss.item() == pytest.approx(expected, abs=1e-10)


def arguments(objective):
    return {name: value for name, value in objective.settings().items() if name != "name"}


@pytest.mark.parametrize("objective", [fk.NextItem(), *SAMPLED], ids=lambda o: o.loss)
def test_gradients(objective):
    check_gradient(objective.bind(DATA, T), causal(), padded(ROWS, T + 1))


def test_gradients_of_the_last_item_alone():
    check_gradient(fk.NextItem(last_only=True), encoder("BERT4Rec"), padded(ROWS, T + 1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [1, 20, 21, 1000])
def test_tiles_give_the_loss_and_gradient_of_the_whole(monkeypatch, bias, tile):
    def inputs():
        draw = torch.randn(13 * 3 + 7 * 3 + 7, dtype=torch.float64, generator=generator())
        h, weight, b = draw.split((39, 21, 7))
        parts = h.reshape(13, 3), weight.reshape(7, 3), b if bias else None
        return [part if part is None else part.clone().requires_grad_() for part in parts]

    column = torch.randint(7, (13,), generator=generator(1))
    h, weight, b = inputs()
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, weight, b), column)
    (3 * expected).backward()
    monkeypatch.setattr(scoring, "_WHOLE", 0)
    monkeypatch.setattr(scoring, "_TILE", tile)
    tiled_h, tiled_weight, tiled_b = inputs()
    loss = softmax_loss(tiled_h, column, tiled_weight, tiled_b)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-13)
    assert torch.allclose(tiled_h.grad, h.grad, atol=1e-13)
    assert torch.allclose(tiled_weight.grad, weight.grad, atol=1e-13)
    assert b is None or torch.allclose(tiled_b.grad, b.grad, atol=1e-13)
    # What runs is the tiled way, with half precision as well.
    assert "TiledSoftmaxLoss" in type(loss.grad_fn).__name__
    with torch.autocast("cpu", torch.bfloat16):
        low = softmax_loss(h.float(), column, weight.float(), None if b is None else b.float())
    low.backward()
    assert low.dtype == torch.float32 and low.item() == pytest.approx(expected.item(), rel=0.03)


@pytest.mark.parametrize("places", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_in_single_precision_the_last_tile_is_filled_up(monkeypatch, places, bias):
    """Tiles of 64 and 128 places of fp32 against float64; what is filled up adds nothing."""
    draw = generator()
    h, weight = torch.randn(places, 5, generator=draw), torch.randn(7, 5, generator=draw)
    given = [h, weight, torch.randn(7, generator=draw)][: 2 + bias]
    column = torch.randint(7, (places,), generator=draw)
    wide = [part.double().requires_grad_() for part in given]
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*wide), column)
    gradients = torch.autograd.grad(expected, wide)
    monkeypatch.setattr(scoring, "_WHOLE", 0)
    shapes, product = set(), scoring.product
    monkeypatch.setattr(scoring, "product", lambda x, w: (shapes.add(len(x)), product(x, w))[1])
    for tile in (7 * 64, 7 * 130):
        monkeypatch.setattr(scoring, "_TILE", tile)
        own = [part.clone().requires_grad_() for part in given]
        loss = softmax_loss(own[0], column, own[1], own[2] if bias else None)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for found, exact in zip(torch.autograd.grad(loss, own), gradients, strict=True):
            assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert shapes <= {64, 128}


def test_many_logits_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(scoring, "_WHOLE", 500)
    monkeypatch.setattr(scoring, "_TILE", 200)
    sizes, linear = [], torch.nn.functional.linear

    def recorded(x, weight, bias=None):
        result = linear(x, weight, bias)
        if len(weight) == V:  # not a layer: those are 6 or 7 wide
            sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    tokens = torch.randint(1, V + 1, (16, T + 1), generator=generator())
    fk.NextItem()(causal(), tokens, generator()).backward()
    assert len(sizes) == 5 and max(sizes) <= 200  # 80 positions of 11 items


def test_corrected_sampled_softmax_estimates_the_full_sum():
    """E[Σ_k exp(s_k) / (K q_k)] over the negatives that are not the target, by many draws."""
    model, tokens = causal(), padded([[1, 2]], T + 1)
    weight, bias = model.head()
    scores = weight @ hidden(model, tokens, 0, T - 1, False) + bias
    others = scores.exp().sum() - scores[1].exp()
    # Every item but the target must be drawable: one user who bought all of them.
    data = fk.SequenceDataset(
        "t", [*range(1, V + 1), 3, 3, 7, 1, 1], [0, V + 5], DATA.item_ids, ["a"]
    )
    for sampling in ("uniform", "popularity"):
        objective = fk.NextItem("sampled_softmax", 200_000, log_q=True, sampling=sampling)
        loss = objective.bind(data, T)(model, tokens, generator())
        expected = torch.log(others + scores[1].exp()) - scores[1]
        assert loss.item() == pytest.approx(expected.item(), rel=0.01)


def test_popularity_is_that_of_the_training_part():
    # Held out: 9 9 and 8 8. Left: 1 1 2 and 3 2 1.
    objective = fk.NextItem("bce", 60_000, sampling="popularity").bind(DATA, T)
    drawn, log_q = objective._draw(1, V, generator())
    shares = np.bincount(drawn[0].numpy(), minlength=V) / 60_000
    expected = np.zeros(V)
    expected[:3] = [3 / 6, 2 / 6, 1 / 6]
    assert np.abs(shares - expected).max() < 0.01 and (shares[3:] == 0).all()
    assert np.allclose(log_q[0].exp().numpy(), expected[drawn[0].numpy()])


def test_draws_come_from_the_generator_alone():
    objective, tokens = fk.NextItem("gbce", 5), padded(ROWS, T + 1)
    losses = []
    for seed, own in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(seed)
        losses.append(objective(causal(), tokens, generator(own)).item())
    assert losses[0] == losses[1] != losses[2]


def test_rows_of_one_item_have_no_next():
    for last_only in (False, True):
        loss = fk.NextItem(last_only=last_only)(causal(), padded([[3], []], T + 1), generator())
        loss.backward()
        assert loss.item() == 0.0


def test_it_learns_what_follows_what():
    torch.manual_seed(0)
    model = fk.SASRec(V, max_len=T, dim=16, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = (torch.arange(V)[:, None] + torch.arange(T + 1)) % V + 1
    for step in range(60):
        optimizer.zero_grad()
        fk.NextItem()(model, tokens, generator(step)).backward()
        optimizer.step()
    assert (model(tokens[:, :-1]).argmax(dim=1) + 1 == tokens[:, -1]).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"loss": "ce"}, "loss must be 'softmax' or .*, got 'ce'"),
        ({"sampling": "all"}, "sampling must be 'uniform' or"),
        ({"negatives_per": "batch"}, "negatives_per must be 'position' or"),
        ({"negatives": 0}, "negatives must be at least 1"),
        ({"t": -0.1}, r"t must be in \[0, 1\]"),
        ({"t": math.nan}, r"t must be in \[0, 1\]"),
        ({"log_q": True}, "log_q corrects 'sampled_softmax', not 'softmax'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(fk.InputError, match=message):
        fk.NextItem(**arguments)


def test_wrong_use_is_named():
    tokens = padded([[1, 2, 3]], T + 1)
    with pytest.raises(fk.InputError, match="causal encoder or last_only=True: BERT4Rec"):
        fk.NextItem()(encoder("BERT4Rec"), tokens, generator())
    with pytest.raises(fk.InputError, match="negatives = 11 must be below the 11 items"):
        fk.NextItem("gbce", 11)(causal(), tokens, generator())
    with pytest.raises(fk.InputError, match="popularity' must be bound"):
        fk.NextItem("bce", 2, sampling="popularity")(causal(), tokens, generator())

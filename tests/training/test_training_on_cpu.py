"""The faster linear layers and dropout of a training step."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherkern as fk
from fisherkern.objectives import emkd
from fisherkern.ops.products import suits
from fisherkern.training.cpu_kernels import FastCPUKernels, dropout

P = 0.1
KEPT = 1 - round(P * 65536) / 65536


def test_every_element_is_dropped_as_often() -> None:
    torch.manual_seed(0)
    runs, size = 4000, 37  # not a multiple of the four elements that share a draw
    x = torch.ones(runs, size)
    kept = dropout(x, P) != 0
    # Six standard deviations, for 37 places and for all of them together.
    spread = 6 * math.sqrt(KEPT * (1 - KEPT) / runs)
    flat = kept.flatten()
    for lane in range(4):
        assert abs(flat[lane::4].double().mean() - KEPT) < 2 * spread / math.sqrt(size)
    assert (kept.double().mean(dim=0) - KEPT).abs().max() < spread
    # Neighbours that share a draw are independent: so are their products.
    both = (flat[:-1] & flat[1:]).double().mean()
    assert abs(both - KEPT**2) < 2 * spread / math.sqrt(size)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_what_is_kept_is_scaled_and_its_gradient_with_it(p: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(50, 7, 11, requires_grad=True)
    y = dropout(x, p)
    factor = y / x
    scale = 65536 / (65536 - round(p * 65536))
    assert ((factor == 0) | ((factor - scale).abs() < 1e-5)).all()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, factor.detach())
    assert abs(float(y.detach().sum() - x.detach().sum())) < 6 * 3850**0.5 * scale**0.5


def test_a_draw_repeats() -> None:
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(dropout(torch.ones(100), 0.5))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "p, training, dtype",
    [(0.0, True, torch.float32), (1.0, True, torch.float32), (0.5, False, torch.float32)]
    + [(0.5, True, torch.float64), (1e-7, True, torch.float32)],
)
def test_what_is_left_to_pytorch(p: float, training: bool, dtype: torch.dtype) -> None:
    x = torch.randn(10, 10, dtype=dtype)
    torch.manual_seed(0)
    found = dropout(x, p, training)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(x, p, training))


def test_in_place_is_in_place() -> None:
    x = torch.ones(100)
    assert dropout(x, 0.5, True, True) is x and (x == 0).any()


@pytest.mark.skipif(not suits(torch.ones(1)), reason="no oneDNN")
def test_a_model_of_others_is_served_without_being_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    # Of numbers of rows that come from data there may be too many.
    for rows, served in ((8, True), (24, True), (7, False)):
        x = torch.randn(rows, 3)
        expected = model(x)
        with FastCPUKernels():
            found = model(x)
            with torch.no_grad():
                assert torch.equal(model(x), expected)
        assert expected.grad_fn.name() != "LinearBackward"
        assert (found.grad_fn.name() == "LinearBackward") == served
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("encoder", [fk.BERT4Rec, fk.SASRec], ids=lambda e: e.__name__)
def test_gradients_of_an_encoder_are_those_of_float64(encoder: type) -> None:
    torch.manual_seed(0)
    model = encoder(23, max_len=7, dim=16, layers=2, heads=2, dropout=0.0).train()
    history = torch.randint(1, 24, (5, 7))
    history[0, :4] = 0
    found = []
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        with FastCPUKernels():
            loss = F.cross_entropy(model(history), torch.arange(5))
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*found, strict=True):
        assert (one.double() - other).abs().max() <= 1e-5 * other.abs().max() + 1e-8


def test_train_enters_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dropout of a run is drawn by it, and none where a compiler has the model."""
    seen: list[float] = []

    def counting(input: torch.Tensor, p: float, **rest: bool) -> torch.Tensor:
        seen.append(p)
        return F.dropout(input, p, **rest)

    monkeypatch.setattr("fisherkern.training.cpu_kernels.dropout", counting)
    data = fk.load("synthetic")
    for compiled, calls in ((False, True), ("eager", False)):
        seen.clear()
        model = fk.BERT4Rec(data.num_items, max_len=5, dim=8, layers=1, heads=2, dropout=0.3)
        settings = {"epochs": 1, "batch_size": data.num_users, "compile": compiled}
        fk.train(model, data, progress=False, **settings)
        assert (set(seen) == {0.3}) == calls


class Checkpointed(fk.BERT4Rec):
    """Computes each block again in the backward pass, dropout and all."""

    def states(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            if not hasattr(block, "plain"):
                block.plain = block.forward
                block.forward = partial(checkpoint, block.plain, use_reentrant=False)
        return super().states(tokens, positions)


def test_what_is_computed_again_is_the_same() -> None:
    data = fk.synthetic(64, 40, seed=0)
    trained = []
    for kind in (fk.BERT4Rec, Checkpointed):
        torch.manual_seed(0)
        model = kind(data.num_items, max_len=8, dim=16, layers=2, heads=2, dropout=0.3)
        fk.train(model, data, epochs=2, batch_size=32, progress=False)
        trained.append(dict(model.named_parameters()))
    for name, parameter in trained[0].items():
        assert torch.equal(parameter, trained[1][name]), name


def test_emkd_trains_with_more_logits_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    data = fk.synthetic(64, 40, seed=0)
    trained = []
    for kept in (emkd._KEPT, 0):
        monkeypatch.setattr(emkd, "_KEPT", kept)
        sizes = {"max_len": 8, "dim": 16, "layers": 1, "heads": 2, "dropout": 0.3}
        model = fk.ParallelEncoders.seeded(partial(fk.BERT4Rec, data.num_items, **sizes), 2)
        objective = fk.EMKD(views=2, attribute_weight=0, networks=2, dim=16)
        fk.train(model, data, objective=objective, epochs=2, batch_size=32, progress=False)
        trained.append(dict(model.named_parameters()))
    for name, parameter in trained[0].items():
        assert torch.equal(parameter, trained[1][name]), name

"""torch.nn's recurrent layers and cells: against brute force, and served by rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import SIZES, Recommender, assert_right
from models import HISTORIES
from torch import Tensor, nn

from fisherkern.adapters.parameters import Parameters
from fisherkern.fisher.forward.capture import Capture
from fisherkern.fisher.layers import HANDLERS, LinearGrad

LAYERS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
CELLS = {"gru": nn.GRUCell, "lstm": nn.LSTMCell, "rnn": nn.RNNCell}


class Layers(nn.Module):
    """A recurrent layer, and a dense one on its last output (GRU4Rec), or on its last states."""

    def __init__(self, kind: str, last: str = "output", **kwargs: Any) -> None:
        super().__init__()
        self.last, self.batch_first = last, kwargs.get("batch_first", False)
        self.recurrent = LAYERS[kind](4, 3, **kwargs)
        self.dense = nn.LazyLinear(4)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        output, state = self.recurrent(x if self.batch_first else x.transpose(0, 1))
        if self.last == "output":
            return self.dense(output[:, -1] if self.batch_first else output[-1])
        states = torch.cat(state) if isinstance(state, tuple) else state
        return self.dense(states.transpose(0, 1).flatten(1))


def recommender(body: nn.Module) -> nn.Module:
    model = Recommender(body)
    model(HISTORIES)  # the lazy layer's size
    return model


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_layer(kind: str, batch_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(recommender(Layers(kind, batch_first=batch_first)), caplog)


@pytest.mark.parametrize("kind", LAYERS)
def test_two_layers_both_ways(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    body = Layers(kind, last="states", num_layers=2, bidirectional=True, dropout=0.5)
    assert_right(recommender(body), caplog)


@pytest.mark.parametrize("kwargs", [{"bias": False}, {"nonlinearity": "relu"}])
def test_variants(kwargs: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert_right(recommender(Layers("rnn", batch_first=True, **kwargs)), caplog)


@pytest.mark.parametrize("size", SIZES)
def test_gru_on_any_number(size: int, caplog: pytest.LogCaptureFixture) -> None:
    body = recommender(Layers("gru", num_layers=2))
    assert_right(body, caplog, history=HISTORIES[-size:])


def test_a_history_of_one(caplog: pytest.LogCaptureFixture) -> None:
    model = recommender(Layers("gru", batch_first=True))
    # From a state of zero the state's weight has no gradient at all; its bias does.
    model.body.recurrent.weight_hh_l0.requires_grad_(False)
    assert_right(model, caplog, history=HISTORIES[:, -1:])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_forward_is_the_librarys(kind: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    shape = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    module = LAYERS[kind](4, 3, **shape).double().eval()
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    n = 5 if batch_first else 7
    state: Any = torch.randn(4, n, 3, dtype=torch.float64)
    state = (state, state.cos()) if kind == "lstm" else state
    for given in ((), (state,)):
        expected = module(x, *given)
        with Capture(Parameters(module), n, HANDLERS) as capture:
            found = module(x, *given)
        assert capture.ops
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["gru", "lstm", "tanh", "relu"])
def test_gradients_are_the_librarys(kind: str) -> None:
    """Of outputs and last states, to the input, the first states and every weight."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    if kind in ("tanh", "relu"):
        shape["nonlinearity"] = kind
    module = LAYERS.get(kind, nn.RNN)(4, 3, **shape).double().eval()
    x = torch.randn(7, 5, 4, dtype=torch.float64, requires_grad=True)
    first = [torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True) for _ in "hc"]
    state: Any = tuple(first) if kind == "lstm" else first[0]

    def gradients() -> list[Tensor | None]:
        output, last = module(x, state)
        last = torch.cat(last) if isinstance(last, tuple) else last
        score = (output * output.detach().cos()).sum() + last.exp().sum()
        inputs = [x, *first, *module.parameters()]
        return list(torch.autograd.grad(score, inputs, allow_unused=True))

    expected = gradients()
    with Capture(Parameters(module), 5, HANDLERS):
        found = gradients()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


class FromDense(nn.Module):
    """First states computed from parameters, some of the layer's own weights frozen."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.recurrent = LAYERS[kind](4, 3, batch_first=True)
        self.recurrent.weight_ih_l0.requires_grad_(False)
        self.recurrent.bias_hh_l0.requires_grad_(False)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        first = torch.tanh(self.first(x.mean(1)))[None]
        state = (first, first * 2) if isinstance(self.recurrent, nn.LSTM) else first
        return F.pad(self.recurrent(x, state)[0].square().sum(1), (0, 1))


@pytest.mark.parametrize("kind", LAYERS)
def test_first_states(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(FromDense(kind)), caplog)


class Cells(nn.Module):
    """A cell in a loop of one's own."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.cell = CELLS[kind](4, 4, bias=bias)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        state: Any = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] * state[1] if isinstance(state, tuple) else state


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, bias: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Cells(kind, bias)), caplog)


def test_uses_of_a_weight_are_joined(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the positions, before the square: no sequence's gradient is stored."""
    monkeypatch.delattr(LinearGrad, "per_sequence")
    assert_right(Recommender(Cells("gru")), caplog)
    assert_right(Recommender(Shared(False)), caplog)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        lengths = (history != 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        return self.gru(packed)[1][0]


def test_packed_sequences_fall_back(caplog: pytest.LogCaptureFixture) -> None:
    model = Recommender(Packed())
    names = [f"body.gru.{name}" for name, _ in model.body.gru.named_parameters()]
    assert_right(model, caplog, fallback=names)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_fall_back(caplog: pytest.LogCaptureFixture) -> None:
    model = recommender(Layers("lstm", proj_size=2))
    names = [f"body.recurrent.{name}" for name, _ in model.body.recurrent.named_parameters()]
    assert_right(model, caplog, fallback=names)


class Shared(nn.Module):
    """A layer of one's own applied three times, as ALBERT does; once by a product with @."""

    def __init__(self, matrix: bool) -> None:
        super().__init__()
        self.matrix = matrix
        self.dense = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        for _ in range(3):
            x = self.norm(x + torch.tanh(self.dense(x)))
        if self.matrix:
            x = x @ self.dense.weight
        return x.sum(1)


@pytest.mark.parametrize("matrix", [False, True])
def test_shared_layers(matrix: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Shared(matrix)), caplog)

"""GRU4Rec against its equations written out step by step."""

from __future__ import annotations

import pytest
import torch
from models import shaken
from torch import Tensor

from fisherkern.encoders import GRU4Rec
from fisherkern.errors import InputError

V, MAX_LEN, D, H = 11, 7, 6, 4
TOKENS = torch.tensor(
    [[0, 0, 0, 0, 7], [1, 2, 3, 4, 5], [0, 6, 6, 6, 2], [0, 0, 0, 0, 0], [3, 0, 0, 9, 3]]
)


def make(**changes: object) -> GRU4Rec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(GRU4Rec(V, MAX_LEN, D, **{"hidden_dim": H, **changes}))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def step(w: Tensor, u: Tensor, x: Tensor, s: Tensor) -> Tensor:
    """One layer's next state; w (3 H, inputs) and u (3 H, H) hold the gates r, z and c."""
    r = sigmoid(w[:H] @ x + u[:H] @ s)
    z = sigmoid(w[H : 2 * H] @ x + u[H : 2 * H] @ s)
    c = torch.tanh(w[2 * H :] @ x + r * (u[2 * H :] @ s))
    return z * s + (1 - z) * c


def written_out(model: GRU4Rec, tokens: Tensor) -> Tensor:
    """dense(s_t) (T, D) of one sequence; padding leaves every layer's state as it was."""
    layers = model.config["layers"]
    s = [torch.zeros(H, dtype=torch.float64) for _ in range(layers)]
    found = []
    for token in tokens:
        if token:
            x = model.item_embedding.weight[token]
            for layer in range(layers):
                w = model.get_parameter(f"gru.weight_ih_l{layer}")
                u = model.get_parameter(f"gru.weight_hh_l{layer}")
                x = s[layer] = step(w, u, x, s[layer])
        found.append(model.dense.weight @ s[-1] + model.dense.bias)
    return torch.stack(found)


@pytest.mark.parametrize("layers", [1, 3])
def test_states_and_logits_are_the_papers(layers: int) -> None:
    model = make(layers=layers)
    with torch.no_grad():
        expected = torch.stack([written_out(model, tokens) for tokens in TOKENS])
        assert (model.states(TOKENS) - expected).abs().max() < 1e-12
        assert (model.encode(TOKENS) - expected[:, -1]).abs().max() < 1e-12
        logits = expected[:, -1] @ model.item_embedding.weight[1:].T
        assert (model(TOKENS) - logits).abs().max() < 1e-12


def test_padding_is_stepped_over() -> None:
    model, other = make(), make()
    with torch.no_grad():
        other.item_embedding.weight[0] = 100.0
    assert torch.equal(other.states(TOKENS), model.states(TOKENS))
    assert torch.equal(model.states(TOKENS)[3], model.dense.bias.expand(5, D))


def test_there_are_no_more_steps_than_items() -> None:
    model = make()
    steps = []
    model.gru.register_forward_hook(lambda _, inputs, __: steps.append(inputs[0].shape[:2]))
    for rows in (TOKENS, TOKENS[[0, 4]], TOKENS[3:4], TOKENS[:0]):
        model.encode(rows)
        model.states(rows)
    assert steps == [(5, 5)] * 2 + [(2, 3)] * 2 + [(1, 1)] * 2 + [(0, 1)] * 2


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = GRU4Rec(1000, dim=64, tied=False, bias=True)
    assert model.config["hidden_dim"] == 128
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {
        "item_embedding.weight": (1001, 64),
        "gru.weight_ih_l0": (384, 64),
        "gru.weight_hh_l0": (384, 128),
        "dense.weight": (64, 128),
        "dense.bias": (64,),
        "output_embedding": (1000, 64),
        "output_bias": (1000,),
    }
    for name, gates in (("gru.weight_ih_l0", 3), ("gru.weight_hh_l0", 3), ("dense.weight", 1)):
        for gate in model.get_parameter(name).chunk(gates):
            assert gate.var().item() == pytest.approx(2 / sum(gate.shape), rel=0.1), name
    for table in (model.item_embedding.weight, model.output_embedding):
        assert table.std().item() == pytest.approx(0.88 * 0.02, rel=0.05)
    assert not model.item_embedding.weight[0].any()
    assert not model.output_bias.any() and not model.dense.bias.any()


@pytest.mark.parametrize("name", ["layers", "hidden_dim"])
def test_wrong_arguments_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"^GRU4Rec: {name} must be at least 1, got 0"):
        make(**{name: 0})

"""Small encoders, batches and a gradient check that the tests of objectives share."""

from __future__ import annotations

import torch
from models import bert, shaken
from torch import Tensor, nn

from fisherkern.encoders import Caser, GRU4Rec, SASRec
from fisherkern.encoders.base import SequenceEncoder
from fisherkern.objectives import Objective

V, T = 11, 5  # of `models.bert`
NAMES = [f"i{v}" for v in range(1, V + 1)]  # item ids


def causal(name: str = "SASRec", tied: bool = True, max_len: int = T) -> SequenceEncoder:
    """A causal encoder of `bert`'s catalogue and width, in float64 and eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        kind = {"SASRec": SASRec, "GRU4Rec": GRU4Rec, "Caser": Caser}[name]
        model = kind(V, max_len=max_len, dim=6, tied=tied, bias=True)
        return shaken(model)


def encoder(name: str, max_len: int = T) -> SequenceEncoder:
    return bert(max_len=max_len) if name == "BERT4Rec" else causal(name, max_len=max_len)


ENCODERS = ("BERT4Rec", "SASRec", "GRU4Rec", "Caser")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padded(rows: list[list[int]], width: int) -> Tensor:
    """(N, width) int64: each row's last `width` items, padded with 0 on the left."""
    cut = [row[max(0, len(row) - width) :] for row in rows]
    return torch.tensor([[0] * (width - len(row)) + row for row in cut]).reshape(-1, width)


def items_of(tokens: Tensor) -> list[list[int]]:
    """The items of each row, padding left out."""
    return [[item for item in row if item] for row in tokens.tolist()]


class _Loss(nn.Module):
    def __init__(self, objective: Objective, model: SequenceEncoder) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.objective(self.model, tokens, generator())


def check_gradient(objective: Objective, model: SequenceEncoder, tokens: Tensor) -> None:
    """The gradient of every parameter of `model` against central differences, in float64."""
    loss = _Loss(objective, model)
    names = [name for name, _ in loss.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in loss.parameters()]

    def of_values(*values: Tensor) -> Tensor:
        return torch.func.functional_call(loss, dict(zip(names, values, strict=True)), (tokens,))

    assert torch.autograd.gradcheck(of_values, values, fast_mode=True)

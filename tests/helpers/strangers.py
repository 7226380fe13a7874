"""Small recommenders as strangers write them, and their Fishers by brute force."""

from __future__ import annotations

from typing import Any, NamedTuple

import brute
import torch
import torch.nn.functional as F
from models import HISTORIES, NUM_ITEMS
from torch import Tensor, nn

COLUMNS = NUM_ITEMS + 1


class Body(nn.Module):
    """Item and position vectors and a layer: states (N, T, D)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.items = nn.Embedding(COLUMNS, width, padding_idx=0)
        self.position = nn.Parameter(torch.zeros(5, width))
        self.layer = nn.Linear(width, width)

    def states(self, ids: Tensor) -> Tensor:
        x = self.items(ids) + self.position
        return torch.tanh(self.layer(x.cumsum(1)))


class Linear(Body):
    """A last linear layer with a bias, at the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, COLUMNS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.states(ids)[:, -1])


class LastView(Linear):
    """Logits of every position, of which the last are returned."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.states(ids))[:, -1]


class EveryPosition(Linear):
    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.states(ids))


class Tied(Body):
    """A product with the item table, padding left out of the softmax, a bias added later."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(COLUMNS))

    def forward(self, ids: Tensor) -> Tensor:
        scores = self.states(ids)[:, -1] @ self.items.weight.T + self.bias
        return scores[:, 1:]


class Scaled(Body):
    """Logits divided by a temperature."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.states(ids)[:, -1], self.items.weight) / 0.7


class FrozenHead(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.out.requires_grad_(False)


class WholeTable(Body):
    """The item table looked up whole, indexed and scored with, as RecTools has it."""

    def forward(self, ids: Tensor) -> Tensor:
        table = torch.stack([self.items(torch.arange(COLUMNS))]).sum(0)
        x = table[ids] + self.position
        h = torch.tanh(self.layer(x.cumsum(1)))[:, -1]
        return h @ table.T


class Output(NamedTuple):
    loss: None
    logits: Tensor


class InAnObject(Linear):
    def forward(self, ids: Tensor) -> Any:
        return Output(None, super().forward(ids))


class Bent(Linear):
    """No linear map comes last."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(super().forward(ids))


SPLIT = [Linear, LastView, EveryPosition, Tied, Scaled, FrozenHead, WholeTable, InAnObject]


class Flat(nn.Module):
    """A model's next-item logits (N, V), for the oracle."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        z = self.model(ids)
        z = z.logits if isinstance(z, Output) else z
        return z[:, -1] if z.dim() == 3 else z


def expected(model: nn.Module) -> dict[str, Tensor]:
    p, gradients = brute.all_gradients(Flat(model), HISTORIES)
    return {n.removeprefix("model."): f for n, f in brute.fisher(gradients, p).items()}

"""BERT4Rec in the form that libraries with module hooks or functional calls can take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import fisherkern as fk

Estimate = dict[str, Tensor]
Run = Callable[[Tensor, int], Estimate]


class Port(nn.Module):
    """The same network on tokens: no input checks, no dropout, an nn.Linear as output layer.

    The checks branch on data, which vmap cannot enter; a parameter used outside a module
    of its own is invisible to hooks; Opacus wants `train()`, where dropout would act, and in
    `eval()` attention takes a short cut past its key and value modules. A tied output layer
    has the table's V + 2 rows, of which `forward` returns those of items.
    """

    def __init__(self, model: fk.BERT4Rec) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(model)
        for module in self.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        tied = self.encoder.output_embedding is None
        table = self.encoder.item_embedding.weight if tied else self.encoder.output_embedding
        self.first = 1 if tied else 0
        self.num_items = model.num_items
        self.decoder = nn.Linear(model.dim, len(table), device=table.device, dtype=table.dtype)
        self.decoder.weight = table
        bias = torch.zeros_like(self.decoder.bias)
        bias[self.items] = self.encoder.output_bias.detach()
        self.decoder.bias = nn.Parameter(bias)
        self.encoder.output_embedding = self.encoder.output_bias = None

    @property
    def items(self) -> slice:
        return slice(self.first, self.first + self.num_items)

    def forward(self, tokens: Tensor) -> Tensor:
        last = tokens.new_full((tokens.shape[0], 1), tokens.shape[1] - 1)
        h = self.encoder.transform(self.encoder.states(tokens, last).squeeze(1))
        return self.decoder(h)[:, self.items]

    def tokens(self, history: Tensor) -> Tensor:
        return self.encoder.append_mask(history.to(self.decoder.weight.device))

    def estimate(self, found: Mapping[str, Tensor]) -> Estimate:
        """Tensors by this module's names, under the model's."""
        renamed = {}
        for name, tensor in found.items():
            if name == "decoder.bias":
                renamed["output_bias"] = tensor[self.items]
            elif name == "decoder.weight":
                renamed["output_embedding"] = tensor
            else:
                renamed[name.removeprefix("encoder.")] = tensor
        return renamed


def top(port: Port, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Probabilities and columns of the k most likely items, (N, k) each."""
    with torch.no_grad():
        found = torch.softmax(port(tokens), dim=1).topk(k, dim=1)
    return found.values, found.indices

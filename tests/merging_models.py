"""Small models for the merging tests, made of given numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Open(nn.Module):
    """A module whose attributes have any type, as the names vary from test to test."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class Toy(Open):
    """A module of the given parameters and buffers."""

    def __init__(self, buffers: Mapping[str, Tensor] | None = None, **parameters: Tensor) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            trainable = tensor.is_floating_point()
            self.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=trainable))
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor.clone())


class Encoder(Open):
    """The part of a SequenceEncoder that merging uses: a table with a pad and a mask row."""

    def __init__(self, num_items: int, dim: int = 2, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = {"num_items": num_items, "dim": dim, "heads": heads, "dropout": dropout}
        self.num_items = num_items
        self.item_ids: list[str] | None = None
        self.item_embedding = nn.Embedding(num_items + 2, dim)
        self.dense = nn.Linear(dim, dim)
        self.output_bias = nn.Parameter(torch.zeros(num_items))

    def item_parameters(self) -> dict[str, int]:
        return {"item_embedding.weight": 1, "output_bias": 0}


def encoder(ids: str, seed: int, **config: float) -> Encoder:
    """An Encoder over the items of `ids` (one letter each) with random values."""
    generator = torch.Generator().manual_seed(seed)
    model = Encoder(len(ids), **config)  # type: ignore[arg-type]
    model.item_ids = list(ids)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def random_fisher(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Positive random numbers for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator).square() + 1e-3
        for name, parameter in model.named_parameters()
    }


class FisherWithMeta(Mapping[str, Tensor]):
    """A Fisher that says which model it was computed on."""

    def __init__(self, tensors: dict[str, Tensor], fingerprint: str) -> None:
        self.tensors = tensors
        self.meta = {"fingerprint": fingerprint}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

"""Small models for the merging tests, made of given numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.merging import METHODS


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

    def forward(self, history: Tensor) -> Tensor:
        """Logits (N, V) of items 0..V - 1 from histories (N, T) of items 0..V - 1."""
        hidden = self.dense(self.item_embedding(history + 1).mean(1)).tanh()
        return hidden @ self.item_embedding.weight[1:-1].T + self.output_bias


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


def matrix_product(seed: int) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """v -> A v with a random symmetric positive definite A over all tensors of v together."""

    def product(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = torch.cat([value.flatten() for value in vector.values()]).double()
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(len(flat), len(flat), generator=generator, dtype=torch.float64)
        image = root @ (root.T @ flat) / len(flat) + 0.1 * flat
        parts = image.split([value.numel() for value in vector.values()])
        return {n: part.view(vector[n].shape) for n, part in zip(vector, parts, strict=True)}

    return product


def validation_of(model: Encoder) -> list[tuple[Tensor, Tensor]]:
    """Two batches of histories over the model's own items and next items, the same by id."""
    assert model.item_ids is not None
    place = {item: number for number, item in enumerate(model.item_ids)}
    known = sorted(model.item_ids)
    pairs = [(known[i], known[(3 * i + 1) % len(known)]) for i in range(len(known))]
    history = torch.tensor([[place[a], place[b]] for a, b in pairs])
    target = torch.tensor([place[b] for _, b in pairs])
    return [(history, target), (history.flip(0)[:1], target[:1])]


def arguments_for(
    method: str,
    models: Sequence[Encoder],
    fishers: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    numbers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """What `merge` needs for the rule, members 0, 1, ... being `numbers` of an original order.

    Task vectors are applied whole, so that a member alone is itself.
    """
    rule, numbers = METHODS[method], numbers or list(range(len(models)))
    count = len(models)

    def gram(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        return inputs.T @ inputs

    def score(model: Encoder) -> float:
        return -float(sum((p.detach().double() - 0.3).square().sum() for p in model.parameters()))

    given = {
        "fishers": list(fishers),
        "weights": list(weights),
        "base": encoder("abcz", 77).to(models[0].dense.weight.dtype),
        "grams": [{"dense.weight": gram(n)} for n in numbers],
        "products": [matrix_product(n) for n in numbers],
        "score": score,
        "validation": validation_of,
    }
    whole = {"task_arithmetic": 1 / count, "dare": 1 / count, "ties": 1.0}
    options: dict[str, Any] = {"scale": whole[method]} if method in whole else {}
    if "density" in rule.options:
        options["density"] = 1.0
    found = {name: given[name] for name in rule.inputs}
    return {"method": method, "options": options, "steps": 5, **found}


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

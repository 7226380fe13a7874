"""What the package needs of a model, recognised by its attributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.errors import InputError

# W (V, D) and b (V,) or None.
HeadTensors = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class ModelAdapter:
    """A model seen as parameters, logits and, where it has them, a hidden state and a head.

    logits(batch) -> (N, V); encode(batch) -> h (N, D) and head() -> (W (V, D),
    b (V,) or None) with logits = h Wᵀ + b, or both None. Column c of the logits is
    the item with id c + first_item. target(batch) -> (N,) item ids.
    """

    module: nn.Module
    logits: Callable[[Any], Tensor]
    encode: Callable[[Any], Tensor] | None
    head: Callable[[], HeadTensors] | None
    first_item: int
    target: Callable[[Any], Tensor] | None = None

    @property
    def skips_padding(self) -> bool:
        """Whether the model computes no padding on the left that a whole batch shares.

        A model says so by an attribute of this name.
        """
        return bool(getattr(self.module, "skips_padding", False))

    @staticmethod
    def of(model: Any) -> ModelAdapter:
        """The adapter of a model, or of the result of `fisherkern.adapt`."""
        if isinstance(model, ModelAdapter):
            return model
        if not isinstance(model, nn.Module):
            raise InputError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        encode, head = getattr(model, "encode", None), getattr(model, "head", None)
        factored = callable(encode) and callable(head) and not isinstance(head, nn.Module)
        return ModelAdapter(
            module=model,
            logits=model,
            encode=encode if factored else None,
            head=head if factored else None,
            first_item=int(getattr(model, "first_item", 0)),
        )

    def targets(self, batch: Any) -> Tensor:
        """Logit columns of the batch's next items, (N,) int64."""
        if self.target is not None:
            items = self.target(batch)
        elif isinstance(batch, Mapping) and "target" in batch:
            items = batch["target"]
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            items = batch[1]
        else:
            raise InputError(
                "sampler 'target': the batch holds no next items; give mappings with 'history'"
                " and 'target', or (history, target) pairs"
            )
        return torch.as_tensor(items).long() - self.first_item


def adapt(
    model: nn.Module,
    *,
    logits: Callable[[nn.Module, Any], Tensor] | None = None,
    encode: Callable[[nn.Module, Any], Tensor] | None = None,
    head: Callable[[nn.Module], HeadTensors] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    first_item: int = 0,
) -> ModelAdapter:
    """Describe another library's model to `diag_fisher`.

        logits = encode(model, batch) Wᵀ + b,   (W, b) = head(model)

    Args:
        model: The network whose parameters count.
        logits: (model, batch) -> (N, V). Default: `model(batch)`, or the formula above.
        encode: (model, batch) -> h (N, D), the hidden state before the output layer. With
            `head` it opens the fast path.
        head: (model) -> (W (V, D), b (V,) or None). W should be the parameter itself or a slice
            of its rows, so that a tie with the input embedding is seen.
        target: (batch) -> (N,) item ids, for `sampler="target"`. Default: the batch's "target",
            or the second of a pair.
        first_item: The item id of logit column 0.

    Returns:
        What `diag_fisher`, `linear_grams` and `fisher_product` take in place of a model.

    Raises:
        InputError: `encode` without `head`, or `head` without `encode`.
    """
    if (encode is None) != (head is None):
        raise InputError("adapt: encode and head belong together; give both or neither")
    if logits is None and encode is not None and head is not None:
        encoder, output = encode, head

        def logits(model: nn.Module, batch: Any) -> Tensor:
            weight, bias = output(model)
            return nn.functional.linear(encoder(model, batch), weight, bias)

    return ModelAdapter(
        module=model,
        logits=model if logits is None else lambda batch: logits(model, batch),
        encode=None if encode is None else lambda batch: encode(model, batch),
        head=None if head is None else lambda: head(model),
        first_item=first_item,
        target=target,
    )

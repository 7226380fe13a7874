"""Whether a model's functions agree, with each other and with themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters.batches import batch_size, batch_slice, leaves
from fisherkern.errors import InputError, one_line

#: Sequences on which a model's functions are compared first.
EXAMPLE = 4
# Logits compared at once.
_COMPARED = 2**22
BATCH_DEPENDENT = (
    "they depend on the other sequences (batch norm without running statistics, a batch mean) and "
    "are no function of a sequence"
)
HOW_TO_CALL = (
    "say how it is called with fk.adapt(model, logits=lambda model, batch: ...), and for evaluate "
    "with make_batch= and max_len="
)


class NoLogitsError(InputError):
    """A model gives no logits of all items for a batch, by what its forward pass says of them."""


@contextlib.contextmanager
def batch_norm_refused() -> Iterator[None]:
    """Say of a pass of one sequence that a batch norm of the batch's own statistics needs more."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"model: it gives no logits of one sequence, as {BATCH_DEPENDENT}"
        ) from None


def check_function(adapter: Any, batch: Any) -> Tensor:
    """Return logits (N, V); refuse what is not the same twice, or without other sequences."""
    parameters = [(n, p) for n, p in adapter.module.named_parameters() if not p.is_inference()]
    versions = [parameter._version for _, parameter in parameters]
    with torch.no_grad(), batch_norm_refused():
        z = logits_of(adapter, batch)
        for (name, parameter), version in zip(parameters, versions, strict=True):
            if parameter._version != version:
                raise InputError(f"model: its forward pass changes '{name}' in place")
        if z.dim() != 2 or z.layout != torch.strided:
            kind = "" if z.layout == torch.strided else " in a sparse tensor"
            raise InputError(f"model: its logits must be (N, V), got {tuple(z.shape)}{kind}")
        n = batch_size(batch)
        if len(z) != n:
            raise InputError(f"model: {n} sequences gave a result of {len(z)} rows")
        if (gap := distance(z, adapter.logits(batch))) is not None:
            raise InputError(
                f"model: two passes over one batch give logits that are {gap} apart, in eval mode "
                "too; does it draw random numbers, or keep a state?"
            )
        if n == 1:
            return z
        if (gap := distance(z[:1], logits_of(adapter, batch_slice(batch, 0, 1)))) is not None:
            raise InputError(
                f"model: a sequence's logits alone are {gap} from those in a batch, so "
                + BATCH_DEPENDENT
            )
    return z


def logits_of(adapter: Any, batch: Any) -> Tensor:
    """Return a model's logits (N, V) where they may be those of all items, or say how they are."""
    plain = adapter.library.name == "plain module"
    own = "logits" in adapter.given or "encode" in adapter.given
    name = "the function given to adapt" if own else f"{type(adapter.module).__name__}.forward"
    try:
        values = adapter.all_logits(batch)
    except (TypeError, NotImplementedError) as error:  # it is called in another way
        if not (plain or own):
            raise
        parts = ", ".join(f"{n} {_shape(v)}".strip() for n, v in leaves(batch) if _shape(v))
        raise NoLogitsError(
            f"model: {name} does not take a batch of {parts}: {one_line(str(error), 300)}; "
            + HOW_TO_CALL
        ) from error
    except Exception as error:
        if (plain or own) and not isinstance(error, InputError) and hasattr(error, "add_note"):
            called = f"{name} was called with {batch_size(batch)} sequences of a batch"
            error.add_note(f"fisherkern: {called}; where they are not for it, {HOW_TO_CALL}")
        raise
    if plain and not own and adapter.all_hidden is None and isinstance(values, Tensor):
        _check_columns(adapter.module, values, batch)
    z: Tensor = adapter.at_last(values, batch)
    return z


def _check_columns(module: nn.Module, values: Tensor, batch: Any) -> None:
    """Refuse a result whose columns are hidden dimensions, or items that the batch names."""
    shape, columns = tuple(values.shape), values.shape[-1] if values.dim() else 1
    tables = {n: part for n, part in module.named_modules() if isinstance(part, nn.Embedding)}
    rows = {n: t.num_embeddings for n, t in tables.items() if t.embedding_dim == columns}
    name = max(rows, key=rows.__getitem__, default=None)
    # A table may have rows for padding and a mask beside those of the items.
    if name is not None and not 0 <= rows[name] - columns <= 3:
        raise NoLogitsError(
            f"model: forward gives {shape}, as wide as the vectors of '{name}': hidden states and "
            "no logits; give fk.adapt(model, logits=...), such as lambda model, batch: "
            f"model(batch) @ model.{name}.weight.T"
        )
    widths, highest = set(), 0
    for _, value in leaves(batch):
        if len(_shape(value)) == 2 and len(value) == batch_size(batch):
            ids = torch.as_tensor(value)
            if not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
                widths.add(ids.shape[1])
                highest = max(highest, int(ids.max())) if ids.numel() else highest
    if widths & {columns, columns - 1} and highest > columns + 1:
        raise NoLogitsError(
            f"model: forward gives {shape} for a batch that has items up to {highest}: scores of "
            "the batch's own items and not of all; give fk.adapt(model, logits=...) that scores "
            "every item"
        )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


def head_difference(adapter: Any, batch: Any) -> str | None:
    """Return the largest difference of the logits from those of encode and head; None for none."""
    assert adapter.encode is not None and adapter.head is not None
    with torch.no_grad():
        z = adapter.logits(batch)
        weight, bias = adapter.head()
        h = adapter.encode(batch)
        if h.shape[-1] != weight.shape[-1] or z.shape != (*h.shape[:-1], len(weight)):
            return f"of shape {tuple(h.shape)} by {tuple(weight.shape)} for {tuple(z.shape)}, far"
        other = nn.functional.linear(h.to(weight.dtype), weight, bias).to(z.dtype)
    return distance(z, other)


def distance(z: Tensor, other: Tensor) -> str | None:
    """Return the largest difference of logits, said; None where it is rounding of their dtype."""
    most = scale = 0.0
    # A part at a time: there is a logit for every item.
    for one, two in zip(
        z.flatten().split(_COMPARED), other.flatten().split(_COMPARED), strict=True
    ):
        finite = one.isfinite()
        if not torch.equal(finite, two.isfinite()):
            return "infinitely far"
        if not bool(finite.any()):
            continue
        wide = torch.promote_types(one.dtype, torch.float32)  # of bool, too
        one, two = one[finite].to(wide), two[finite].to(wide)
        most = max(most, float((one - two).abs().max()))
        scale = max(scale, float(one.abs().max()))
    coarse = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-3}
    return None if most <= coarse.get(z.dtype, 1e-5) * max(scale, 1e-6) else f"{most:.2g}"


def check_no_probabilities(z: Tensor) -> None:
    """Refuse a row (V,) that is a distribution already: its softmax is another."""
    total = z.sum(dtype=torch.float64)
    if len(z) > 1 and bool((z >= 0).all()) and distance(total, torch.ones_like(total)) is None:
        raise InputError(
            "model: its logits are probabilities, which add up to 1; give what comes before the "
            "softmax, or their logarithm: fk.adapt(model, logits=...)"
        )


def check_side(places: Tensor | None, ids: Tensor | None) -> None:
    """Refuse to guess where a history ends in zeros that nothing says are padding."""
    if places is not None or ids is None or not len(ids):
        return
    ends = ids[:, -1] == 0
    if bool(ends.any()) and not bool(ends.all()):
        raise InputError(
            "batch: some sequences end in 0, which may be padding or an item; give a mask "
            "('attention_mask'), or fk.adapt(model, positions=...)"
        )

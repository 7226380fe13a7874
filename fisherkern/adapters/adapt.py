"""The door for models of any library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fisherkern.adapters.adapter import HeadTensors, ModelAdapter
from fisherkern.checks import check_callable, check_count, takes_numpy
from fisherkern.errors import InputError
from fisherkern.modes import eval_mode


@takes_numpy
def adapt(
    model: Any,
    *,
    logits: Callable[[Any, Any], Tensor] | None = None,
    encode: Callable[[Any, Any], Tensor] | None = None,
    head: Callable[[Any], HeadTensors] | None = None,
    target: Callable[[Any], Tensor] | None = None,
    positions: Callable[[Any], Tensor] | None = None,
    make_batch: Callable[[Tensor], Any] | None = None,
    first_item: int | None = None,
    item_ids: Sequence[Any] | Any | None = None,
    max_len: int | None = None,
    example: Any = None,
) -> ModelAdapter:
    """Recognise a model of any library, or describe it.

        logits = encode(model, batch) Wᵀ + b,   (W, b) = head(model)

    Models of RecBole, RecTools, RePlay, Hugging Face, PEFT, SASRec.pytorch, gSASRec and
    generative-recommenders need no further argument, nor does a module that returns logits.
    Wrappers (DDP, DataParallel, torch.compile, Lightning, AveragedModel) are taken off. The
    output layer is found by one watched forward pass.

    Args:
        model: A module, or an object that holds one.
        logits: (model, batch) -> (N, V), or (N, T, V) of every position. A pair's functions get
            its history. Default: as the library asks its models.
        encode: (model, batch) -> h (N, D) or (N, T, D), the hidden state before the output layer.
        head: (model) -> (W (V, D), b (V,) or None). W should be the parameter itself or a slice
            of its rows, so that a tie with the input embedding is seen.
        target: (batch) -> (N,) item ids, for `sampler="target"`. Default: the batch's "target",
            "labels" or the second of a pair.
        positions: (batch) -> (N, T) bool, which positions hold items. Default: the batch's mask
            or lengths, or where no padding is.
        make_batch: (items (N, T) int64, 1..V with 0 on the left) -> a native batch, for
            `evaluate`.
        first_item: The item id of logit column 0. Default: the library's.
        item_ids: External ids, item by item; or what holds them: RecBole's data set, RecTools'
            `item_id_map`. Default: where the library keeps them.
        max_len: The most positions of a history.
        example: A native batch, on which the output layer is found at once.

    Returns:
        What every function takes in place of a model. Its repr, which goes to standard error,
        says what was recognised.

    Raises:
        InputError: `encode` without `head`, or `head` without `encode`; or no module in `model`.
    """
    if (encode is None) != (head is None):
        raise InputError("adapt: encode and head belong together; give both or neither")
    named = {
        "logits": logits,
        "encode": encode,
        "head": head,
        "target": target,
        "positions": positions,
        "make_batch": make_batch,
        "first_item": first_item,
        "item_ids": item_ids,
        "max_len": max_len,
    }
    given = {name: value for name, value in named.items() if value is not None}
    for name in given.keys() - {"item_ids", "first_item", "max_len"}:
        check_callable(f"adapt: {name}", given[name])
    for name, least in (("first_item", 0), ("max_len", 1)):
        if name in given:
            check_count(f"adapt: {name}", given[name], least)
    if isinstance(model, ModelAdapter):
        model, given = model.source, {**model.given, **given}
    adapter = ModelAdapter.made(model, given)
    if example is not None:
        with eval_mode(adapter.module):
            adapter = adapter.with_output_layer(adapter.prepared(example))
    print(repr(adapter), file=sys.stderr)
    return adapter

"""What the package needs of a model, whoever made it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters.agreement import EXAMPLE, check_function, check_side, head_difference
from fisherkern.adapters.batches import (
    batch_size,
    batch_slice,
    histories,
    model_input,
    to_device,
)
from fisherkern.adapters.items import (
    ids_in,
    looked_up_tables,
    output_tables,
    tables_by_size,
)
from fisherkern.adapters.libraries import Library, PlainModule, recognised
from fisherkern.adapters.libraries.base import last_label, last_place
from fisherkern.adapters.libraries.plain import describes_itself, factored, logits_in
from fisherkern.adapters.output_layer import OutputLayerParts, find_output_layer
from fisherkern.adapters.row_scaling import RowScaling
from fisherkern.adapters.wrappers import copy_wrapped, deep_copy, unwrap
from fisherkern.errors import InputError
from fisherkern.modes import eval_mode

log = logging.getLogger("fisherkern")

# W (V, D) and b (V,) or None.
HeadTensors = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class ModelAdapter:
    """A model as everything in this package takes it, made by `fisherkern.adapt`.

    Args:
        source: The model as the user holds it, wrappers and all.
        module: The bare module; names of tensors are its names.
        path: The attributes that lead from `source` to `module`.
        library: The kind of the model.
        all_logits: batch -> (N, V), or (N, T, V) of every position. Column c is the item with
            token c + first_item.
        all_hidden: batch -> h of the same leading shape with logits = h Wᵀ + b; None where the
            output layer is not split off.
        head: () -> (W (V, D), b (V,) or None); None likewise.
        fixed_rows: Rows of W that get no gradient, (V,) bool, or None.
        row_scaling: How W is made of a table's rows, where it is not a parameter's; or None.
        given: What the user gave to `adapt`, by argument.
        looked_for: Whether an output layer was looked for.
    """

    source: Any
    module: nn.Module
    path: tuple[str, ...]
    library: Library
    all_logits: Callable[[Any], Tensor]
    all_hidden: Callable[[Any], Tensor] | None = None
    head: Callable[[], HeadTensors] | None = None
    fixed_rows: Tensor | None = None
    row_scaling: RowScaling | None = None
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    looked_for: bool = False

    @staticmethod
    def of(model: Any) -> ModelAdapter:
        """Return the adapter of a model as it is, or of the result of `fisherkern.adapt`."""
        return model if isinstance(model, ModelAdapter) else ModelAdapter.made(model, {})

    @staticmethod
    def made(model: Any, given: Mapping[str, Any]) -> ModelAdapter:
        """Return the adapter of a model with what the user gave."""
        module, path = unwrap(model, _is_known)
        library = recognised(module) or PlainModule()

        def call(batch: Any) -> Tensor:
            return library.logits(module, batch)

        encode, head = given.get("encode"), given.get("head")
        all_hidden: Callable[[Any], Tensor] | None = None
        take_head: Callable[[], HeadTensors] | None = None
        own: Any = module
        if encode is not None and head is not None:
            user_encode, user_head = encode, head
            all_hidden = lambda batch: user_encode(model, model_input(batch))  # noqa: E731
            take_head = lambda: user_head(model)  # noqa: E731
        elif "logits" not in given and type(library) is PlainModule and factored(module):
            all_hidden = lambda batch: own.encode(model_input(batch))  # noqa: E731
            take_head = lambda: own.head()  # noqa: E731
        all_logits = call
        if (logits := given.get("logits")) is not None:
            all_logits = lambda batch: logits(model, model_input(batch))  # noqa: E731
        elif encode is not None:
            hidden, output = all_hidden, take_head

            def all_logits(batch: Any) -> Tensor:
                assert hidden is not None and output is not None
                return nn.functional.linear(hidden(batch), *output())

        return ModelAdapter(
            model, module, path, library, all_logits, all_hidden, take_head, given=given
        )

    @property
    def encode(self) -> Callable[[Any], Tensor] | None:
        """batch -> h (N, D) at the last real position; None where there is no output layer."""
        if self.all_hidden is None:
            return None
        hidden = self.all_hidden
        return lambda batch: self.at_last(hidden(batch), batch)

    def logits(self, batch: Any) -> Tensor:
        """Next-item logits (N, V), at the last real position."""
        return self.at_last(self.all_logits(batch), batch)

    @property
    def first_item(self) -> int:
        """The token of logit column 0."""
        given = self.given.get("first_item")
        return self.library.first_column(self.module) if given is None else int(given)

    @property
    def num_items(self) -> int | None:
        """How many items the model has, where it says so."""
        return self.library.num_items(self.module)

    @property
    def item_ids(self) -> list[Any] | None:
        """External ids of its items, where it keeps them or was given them."""
        given = self.given.get("item_ids")
        if given is not None:
            return self.ids_in(given)
        for source in (self.source, self.module):
            if (own := self.library.item_ids(source, self.module)) is not None:
                return own
        return None

    def ids_in(self, given: Any) -> list[Any]:
        """External ids item by item, in what a user gave: a list, or a library's own map."""
        return ids_in(given, self.library.first_token(self.module))

    @property
    def item_parameters(self) -> dict[str, int]:
        """Parameter -> row of its first item, of the tables with a row for each item."""
        own = self.library.item_tables(self.module)
        if own is not None:
            return own
        ids = self.item_ids
        number = len(ids) if ids is not None else self.num_items
        first = self.library.first_token(self.module)
        if number is None:
            return {}
        if type(self.library) is PlainModule or "logits" in self.given:
            return tables_by_size(self.module, number, first)
        return self._watched_tables(number, first)

    def _watched_tables(self, number: int, first: int) -> dict[str, int]:
        """Return the tables that are looked up by item, or are the output layer."""
        length = min(number, self.max_len or number, 8)
        items = torch.arange(1, length + 1, device=self.device)
        try:
            batches = [self.make_batch(own[None]) for own in (items, number + 1 - items)]
        except InputError:  # a history alone is no question to this model
            return tables_by_size(self.module, number, first)
        with eval_mode(self.module):
            found = dict.fromkeys(looked_up_tables(self.module, self.all_logits, batches), first)
            layer = find_output_layer(self.all_logits, self.module, batches[0])
        if not isinstance(layer, str):
            found |= output_tables(self.module, layer, first - self.first_item)
        return found

    @property
    def max_len(self) -> int | None:
        """The most positions of a history."""
        given = self.given.get("max_len")
        return self.library.max_len(self.module) if given is None else int(given)

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """What the model was built with, where it says so."""
        return self.library.settings(self.module)

    @property
    def skips_padding(self) -> bool:
        """Whether the model computes no padding on the left that a whole batch shares."""
        return not self.given.get("logits") and self.library.skips_padding(self.module)

    @property
    def device(self) -> torch.device:
        """Where the module's parameters are."""
        first = next(self.module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def prepared(self, batch: Any) -> Any:
        """Return a native batch as the question for the next item, on the model's device."""
        if "logits" not in self.given and "encode" not in self.given:
            batch = self.library.prepared(self.module, batch)
        return to_device(batch, self.device)

    def make_batch(self, items: Tensor, **beside: Any) -> Any:
        """Make a native batch of histories (N, T) int64, items 1..V, 0 on the left for none."""
        if (given := self.given.get("make_batch")) is not None:
            return given(items)
        if "logits" in self.given or type(self.library) is PlainModule:
            return {"history": items, **beside}
        batch = self.library.make_batch(self.module, items)
        return self.library.with_users(self.module, batch, beside.get("user"))

    def positions(self, batch: Any) -> Tensor | None:
        """Which positions hold items, (N, T) bool; None where nothing says so."""
        given = self.given.get("positions")
        found = self.library.places(self.module, batch) if given is None else given(batch)
        if found is not None and not isinstance(found, Tensor):
            found = torch.as_tensor(found)
        return found

    def labels(self, batch: Any) -> Tensor | None:
        """Return each position's training item, (N, T), −100 for none; None without labels."""
        return None if "logits" in self.given else self.library.labels(self.module, batch)

    def at_every_position(self) -> ModelAdapter:
        """Return an adapter whose `all_logits` and `all_hidden` are of every position.

        Raises:
            InputError: The model predicts at the last position only.
        """
        hidden = self.library.hidden_states(self.module)
        if hidden is None or "logits" in self.given or "encode" in self.given:
            return self
        head = self.head
        assert head is not None

        def logits(batch: Any) -> Tensor:
            return nn.functional.linear(hidden(batch), *head())

        return dataclasses.replace(self, all_hidden=hidden, all_logits=logits)

    def targets(self, batch: Any) -> Tensor:
        """Logit columns of the batch's next items, (N,) int64.

        Raises:
            InputError: The batch holds no next items.
        """
        if (given := self.given.get("target")) is not None:
            items = given(batch)
        else:
            items = self.library.targets(self.module, batch)
            if items is None and (labels := self.library.labels(self.module, batch)) is not None:
                items = last_label(labels, self.positions(batch))
        if items is None:
            raise InputError(
                "sampler 'target': a batch holds no next items; give mappings with 'history'"
                " and 'target', (history, target) pairs, or fk.adapt(model, target=...)"
            )
        return torch.as_tensor(items).long() - self.first_item

    def copy(self) -> ModelAdapter:
        """Return the adapter of a deep copy of the model as the user holds it."""
        source, _ = copy_wrapped(self.source, self.path)
        return ModelAdapter.made(source, self.given)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelAdapter:
        """Return the adapter of a deep copy, as functions of a model hold the model."""
        return ModelAdapter.made(deep_copy(self.source, memo), self.given)

    @property
    def merge_report(self) -> Any:
        """How `merge` made the model, where it did."""
        return getattr(self.module, "merge_report", None)

    def set_report(self, report: dict[str, Any]) -> None:
        """Say how `merge` made the model."""
        for holder in (self.module, self.source):
            setattr(holder, "merge_report", report)  # noqa: B010  # no tensor

    def wrapped(self, module: Any) -> Any:
        """Another bare module of the same class in wrappers like this model's own."""
        if self.source is self.module:
            return module
        duplicate = self.copy()
        duplicate.module.load_state_dict(module.state_dict())
        for name in ("align_report", "item_ids"):
            if (value := getattr(module, name, None)) is not None:
                setattr(duplicate.module, name, value)
                setattr(duplicate.source, name, value)
        return duplicate.source

    def with_output_layer(self, batch: Any) -> ModelAdapter:
        """Return an adapter with the output layer found on a batch and compared with logits.

        Args:
            batch: A prepared batch; the model is in eval mode.

        Raises:
            InputError: The functions that `adapt` was given disagree, or the logits of a batch
                are not the same twice.
        """
        if self.looked_for and self.row_scaling is None:
            return self
        part = batch_slice(batch, 0, min(EXAMPLE, batch_size(batch)))
        check_function(self, part)
        # A scaling is of the table's values, which may be others by now.
        if self.all_hidden is None or self.row_scaling is not None:
            return self._with_found(part)
        difference = head_difference(self, part)
        if difference is None:
            return dataclasses.replace(self, looked_for=True)
        if "encode" in self.given and "logits" not in self.given:
            raise InputError(f"adapt: encode and head give other logits twice, {difference} apart")
        if "encode" in self.given:
            raise InputError(
                f"adapt: encode and head give logits that are {difference} from those of logits; "
                "does the model scale, normalise or bias them?"
            )
        log.info("encode and head give logits that are %s from forward's", difference)
        return dataclasses.replace(self, all_hidden=None, head=None)._with_found(part)

    def _with_found(self, batch: Any) -> ModelAdapter:
        found = find_output_layer(self.all_logits, self.module, batch)
        if isinstance(found, str):
            log.info("%s: %s", self.library.name, found)
            return dataclasses.replace(self, looked_for=True)
        adapter = self._with_parts(found)
        if (difference := head_difference(adapter, batch)) is None:
            return adapter
        log.info("the output layer found gives logits that are %s from the model's", difference)
        return dataclasses.replace(self, looked_for=True)

    def _with_parts(self, parts: OutputLayerParts) -> ModelAdapter:
        module = self.module
        return dataclasses.replace(
            self,
            all_hidden=parts.encoder(self.all_logits),
            head=lambda: parts.head(module),
            fixed_rows=parts.fixed_rows,
            row_scaling=parts.row_scaling,
            looked_for=True,
        )

    def at_last(self, values: Tensor, batch: Any) -> Tensor:
        """Return values (N, T, ...) at the last real position; (N, ...) as they are."""
        if not isinstance(values, Tensor):
            values = logits_in(values)
        if values.dim() < 3:
            return values
        places = self.positions(batch)
        check_side(places, histories(batch))
        index = last_place(places, values.shape[1], len(values))
        if index is None:
            if places is not None and not bool(places[:, -1].all()):
                raise InputError(
                    f"model: logits of {values.shape[1]} positions for {places.shape[1]} that the "
                    "batch has, some padded on the right; give fk.adapt(model, positions=...)"
                )
            return values[:, -1]
        rows = torch.arange(len(values), device=values.device)
        return values[rows, index.to(values.device)]

    def __call__(self, batch: Any) -> Tensor:
        """Next-item logits (N, V) of a native batch."""
        return self.logits(self.prepared(batch))

    def __repr__(self) -> str:
        """Return what was recognised, in one line."""
        name = type(self.module).__name__
        around = "" if self.source is self.module else f" in a {type(self.source).__name__}"
        layer = "found on the first batch"
        if self.head is not None:
            weight, bias = self.head()
            layer = f"{tuple(weight.shape)}" + ("" if bias is None else " with a bias")
        elif self.looked_for:
            layer = "part of the model"
        ids = self.item_ids
        items = "without ids" if ids is None else f"{len(ids)} with ids"
        return f"{name}{around}: {self.library.name}; output layer {layer}; items {items}"


def _is_known(module: nn.Module) -> bool:
    """Whether a module is a recommender in itself."""
    return recognised(module) is not None or describes_itself(module)

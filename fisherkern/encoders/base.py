"""What every encoder of ours offers to training, evaluation, Fisher and merging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.checks import check_count, check_positive
from fisherkern.encoders.items import ItemEmbedding
from fisherkern.errors import InputError

Batch = Tensor | Mapping[str, Any]


class SequenceEncoder(nn.Module):
    """A next-item recommender p(y | s) = softmax(W h(s) + b).

    Item ids run from 1 to V = `num_items`; 0 is padding. A batch is the histories,
    (N, T) of an integer dtype, oldest item first, padded with 0 on the left, or a
    mapping that holds them under "history".

    Subclasses set `config` (the keyword arguments that rebuild them, JSON values) and
    `transform` (the map from a state to h), and define `states` and `encode`. `head` and
    `item_parameters` are here for those that keep their items in `item_embedding` and call
    `add_output`; others define them as well.

    What an encoder promises to objectives:

    - `states` takes up to `max_len` columns and is differentiable; padding on the left
      never changes what it gives at an item.
    - `causal` says whether the state at a position depends on that position and those
      before it alone. If so, `transform(states(tokens))[:, t]` is h for what follows
      column t, and all positions can be asked for their next item at once.
    - `encode` in training mode applies dropout anew each time and is differentiable: two
      calls give two views of a sequence. Dropout draws from torch's global generator.
    - An encoder with a mask token has its id as `mask_token`, `append_mask` to put it after
      histories, as `encode` does, and `mask_items` to hide items behind it; without one,
      `mask_items` raises InputError and the other two are missing.
    """

    first_item = 1  # the item id that column 0 of the logits stands for
    causal: ClassVar[bool] = False
    one_network: ClassVar[bool] = True  # whether it is no wrapper of other encoders
    skips_padding: ClassVar[bool] = True  # left columns that are padding in every row cost nothing
    config: dict[str, Any]
    transform: nn.Module
    item_embedding: nn.Embedding
    output_embedding: nn.Parameter | None
    output_bias: nn.Parameter | None

    def __init__(self, num_items: int, max_len: int, dim: int) -> None:
        super().__init__()
        for name, value in (("num_items", num_items), ("max_len", max_len), ("dim", dim)):
            check_count(f"{type(self).__name__}: {name}", value)
        self.num_items = num_items
        self.max_len = max_len
        self.dim = dim
        self.item_ids: list[str] | None = None  # external ids; item_ids[v - 1] is item v's
        self.merge_report: dict[str, Any] | None = None  # how `merge` made it, where it did

    def states(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states before `transform`, (N, T, D), or (N, Q, D) at `positions` (N, Q) int64.

        `tokens` (N, T) int64 is what `read_history` gives, T <= `max_len`; `positions` holds
        column numbers 0..T-1. Raises InputError for more columns than `max_len`.
        """
        raise NotImplementedError

    def encode(self, batch: Batch) -> Tensor:
        """Encode h (N, D) at the prediction position, of histories of any length.

        Where there is no mask token it equals `transform(states(read_history(batch))[:, -1])`,
        by a shorter way. A history of padding alone is allowed. Raises as `read_history` does.
        """
        raise NotImplementedError

    def add_output(self, tied: bool, bias: bool) -> None:
        """Add the output layer: the embedding's item rows or a matrix of its own, and a bias."""
        shape = (self.num_items, self.dim)
        self.output_embedding = None if tied else nn.Parameter(torch.empty(shape))
        self.output_bias = nn.Parameter(torch.zeros(self.num_items)) if bias else None

    def initialize(self, std: float) -> None:
        """Linear layers by Xavier's uniform distribution, biases 0, tables by a truncated normal.

        The normal has deviation `std` and is cut at two deviations. Drawn from torch's global
        generator, linear layers first.
        """
        check_positive(f"{type(self).__name__}: init_std", std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # BERT's 0.02 suits its width of 768. At 64 training stays longer on the plateau of
                # mere popularity: ML-1M validation NDCG@10 after 10 epochs .026, not .047.
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        lookups = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        tables = [module.weight for module in lookups]
        if self.output_embedding is not None:
            tables.append(self.output_embedding)
        for table in tables:
            nn.init.trunc_normal_(table, std=std, a=-2 * std, b=2 * std)
        with torch.no_grad():
            for module in lookups:  # never trained, so the same in every model
                if module is self.item_embedding or module.padding_idx == 0:
                    module.weight[0] = 0

    def head(self) -> tuple[Tensor, Tensor | None]:
        """W (V, D) and b (V,) or None; views of the parameters, so that ties share storage.

        W is computed where items are made of parts and the output layer is tied to them.
        """
        if self.output_embedding is not None:
            return self.output_embedding, self.output_bias
        table = self.item_embedding
        if isinstance(table, ItemEmbedding):
            items = torch.arange(1, self.num_items + 1, device=table.weight.device)
            return table(items), self.output_bias
        return table.weight[1 : self.num_items + 1], self.output_bias

    def item_parameters(self) -> dict[str, int]:
        """Names of the tensors with one row per item, and the row of item 1 in each."""
        rows = {"item_embedding.weight": 1}
        if isinstance(self.item_embedding, ItemEmbedding):
            own = self.item_embedding.tables()
            rows = {f"item_embedding.{name}": row for name, row in own.items()}
        if self.output_bias is not None:
            rows["output_bias"] = 0
        if self.output_embedding is not None:
            rows["output_embedding"] = 0
        return rows

    def mask_items(self, tokens: Tensor, positions: Tensor, chosen: Tensor) -> Tensor:
        """`tokens` (N, T) with those at `positions` (N, Q) hidden where `chosen` (N, Q) is true."""
        raise InputError(f"{type(self).__name__} has no mask token, which masked items need")

    def forward(self, batch: Batch) -> Tensor:
        """Next-item logits W h + b, (N, V); column c is item c + 1."""
        weight, bias = self.head()
        return F.linear(self.encode(batch), weight, bias)

    def check_width(self, tokens: Tensor) -> None:
        """Raise InputError if `tokens` (N, T) has more than `max_len` columns."""
        width = tokens.shape[1]
        if width > self.max_len:
            raise InputError(f"tokens has {width} columns, more than max_len = {self.max_len}")

    def read_history(self, batch: Batch, *, least: int | None = None) -> Tensor:
        """Read the last `max_len` columns of a batch's histories, int64, on the model's device.

        With `least`, left columns that are padding in every row are cut off, until so many
        remain. Waits once for the device that the histories come from, which is seldom a GPU.
        Raises InputError when they are missing, not an integer (N, T) tensor with T >= 1,
        hold an id outside 0..V, or are padded on the right.
        """
        if isinstance(batch, Mapping):
            if "history" not in batch:
                raise InputError(f"the batch has no 'history', only {sorted(batch)}")
            history = batch["history"]
        else:
            history = batch
        if not isinstance(history, Tensor):
            raise InputError(f"history must be a tensor, got {type(history).__name__}")
        if history.is_floating_point() or history.is_complex() or history.dtype == torch.bool:
            raise InputError(f"history must hold integer item ids, got {history.dtype}")
        if history.ndim != 2 or history.shape[1] == 0:
            raise InputError(f"history must be (N, T) with T >= 1, got {tuple(history.shape)}")
        history = history[:, -self.max_len :].long()
        if history.shape[0]:
            used = history != 0
            wrong_side = ~used[:, -1] & used.any(dim=1)
            columns = used.any(dim=0)
            # Past the last column where none is used; read back all at once.
            first = torch.cat([columns, columns.new_ones(1)]).int().argmax()
            facts = torch.stack([*history.aminmax(), wrong_side.any().long(), first])
            # Not by `tolist`: a capture takes that for lengths, and examines every bucket.
            low, high, wrong, padding = map(int, facts.cpu())
            if low < 0 or high > self.num_items:
                item = low if low < 0 else high
                raise InputError(f"history holds item id {item}, outside 0..{self.num_items}")
            if wrong:
                row = int(wrong_side.nonzero()[0, 0])
                raise InputError(f"history row {row} ends in padding; pad with 0 on the left")
            if least is not None:
                history = history[:, min(padding, history.shape[1] - least) :]
        return history.to(next(self.parameters()).device, non_blocking=True)


def trim_padding(tokens: Tensor) -> Tensor:
    """`tokens` (N, T) without the left columns that are padding in every row; one at least."""
    used = (tokens != 0).any(dim=0)
    used[-1] = True
    return tokens[:, int(used.int().argmax()) :]


def prediction_tokens(model: SequenceEncoder, batch: Batch) -> Tensor:
    """Return (N, T) int64 tokens: `states` of these predicts in the last column."""
    history = model.read_history(batch)
    if hasattr(model, "mask_token"):
        history = cast(Any, model).append_mask(history)
    return trim_padding(history)


def take(x: Tensor, positions: Tensor | None) -> Tensor:
    """Take x (N, T, D) at `positions` (N, Q) int64: (N, Q, D); all of x for None."""
    if positions is None:
        return x
    return x.gather(1, positions.unsqueeze(2).expand(-1, -1, x.shape[2]))


def prefix_means(x: Tensor, tokens: Tensor, alpha: float = 1.0) -> Tensor:
    """Mean of x (N, T, D) over the items of `tokens` (N, T) up to each column, (N, T, D).

    Divided by n^alpha of n items: `alpha` 0 gives the sum. Padding does not count.
    """
    there = tokens != 0
    total = (x * there.unsqueeze(2)).cumsum(dim=1)
    return total / there.cumsum(dim=1).clamp(min=1).unsqueeze(2).to(x.dtype) ** alpha


def whole_mean(x: Tensor, tokens: Tensor, alpha: float = 1.0) -> Tensor:
    """`prefix_means` at the last column alone, (N, D)."""
    there = tokens != 0
    total = (x * there.unsqueeze(2)).sum(dim=1)
    return total / there.sum(dim=1, keepdim=True).clamp(min=1).to(x.dtype) ** alpha

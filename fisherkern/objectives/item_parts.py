"""Objectives of encoders whose items are made of parts: categories, and content beside ids."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.checks import check_count
from fisherkern.encoders import ItemEmbedding, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives.base import Objective, Term, TrainingSequences, no_loss
from fisherkern.objectives.contrast import ContrastiveLoss, NTXent, check_loss


@dataclasses.dataclass(frozen=True)
class CategoryNeighbours(Objective):
    """Predict an item's categories from those one level away, to be added to another objective.

        -(1/P) Σ_(c, c') log( exp(<category_c + r, category_c'>) / Σ_b exp(<category_c + r, b>) )

    over the P ordered pairs c != c' of categories of an item, for every item of the batch once,
    whose levels are the same or neighbours; b runs over all categories. r is the relation's
    embedding: a level up, the same level, or a level down. It belongs to the objective, not to the
    model: `bind` draws it. Holds P x C logits.

    Args:
        dim: width of the model's items.
        seed: of the relations.

    Raises:
        InputError: a model of another width or without categories, or an objective that is not
            bound.

    Source:
        After HIER, arXiv 2411.03143, which learns relations of codes from their neighbours; the
        formula is ours.
    """

    dim: int = 64
    seed: int = 0
    relations: nn.Embedding | None = dataclasses.field(default=None, repr=False, compare=False)

    needs = "an item with two categories of neighbouring levels"

    def __post_init__(self) -> None:
        check_count("CategoryNeighbours: dim", self.dim)

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim, of `tokens` (N, T) int64 left-padded with 0."""
        table = self._table(model)
        if self.relations is None:
            raise InputError("CategoryNeighbours must be bound: objective.bind(data, max_len)")
        if self.dim != model.dim:
            raise InputError(f"CategoryNeighbours: dim = {self.dim}, the model's is {model.dim}")
        own, other, relation = _pairs(table, tokens)
        if not len(own):
            return no_loss(model)
        query = table.category(own) + self.relations(relation)
        return F.cross_entropy(query @ table.category.weight[1:].t(), other - 1)

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        """Return P."""
        return len(_pairs(self._table(model), tokens)[0])

    def _table(self, model: SequenceEncoder) -> ItemEmbedding:
        table = _item_embedding("CategoryNeighbours", model)
        if not table.settings["categories"]:
            raise InputError("CategoryNeighbours: the model's items have no categories")
        return table

    def bind(self, data: TrainingSequences, max_len: int) -> CategoryNeighbours:
        """With the embeddings of the three relations."""
        relations = nn.utils.skip_init(nn.Embedding, 3, self.dim)
        generator = torch.Generator().manual_seed(self.seed)
        nn.init.normal_(relations.weight, std=0.02, generator=generator)
        return dataclasses.replace(self, relations=relations)

    def modules(self) -> dict[str, nn.Module]:
        """Return the relations of a bound objective."""
        return {} if self.relations is None else {"relations": self.relations}


@dataclasses.dataclass(frozen=True)
class ContentContrast(Objective):
    """Contrast what an item's id says with its content, to be added to another objective.

        (1/K) Σ_k loss(x_0, x_k)

    over the kinds k of content, with x_v0 and x_vk of `ItemEmbedding` for every item v of the batch
    once that has both. Items are the rows of `loss`.

    Args:
        loss: the contrastive loss, `NTXent` or `SymmetricNoiseTolerant`.

    Raises:
        InputError: a model without content.

    Source:
        After IDSF, arXiv 2311.05956; the formula is ours.
    """

    loss: ContrastiveLoss = NTXent(0.2, "cosine")

    needs = "an item with an id and content"

    def __post_init__(self) -> None:
        check_loss("ContentContrast", self.loss)

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the loss, 0-dim, of `tokens` (N, T) int64 left-padded with 0."""
        terms = self.terms(model, tokens, generator)
        return torch.stack([term.weight * term.loss for term in terms]).sum()

    def terms(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> list[Term]:
        """Return a term for each kind of content, with its number of items."""
        table = _item_embedding("ContentContrast", model)
        kinds = len(table.content)
        if not kinds:
            raise InputError("ContentContrast: the model's items have no content")
        (base, *content), (known, *has) = table.parts(_items(model, tokens))
        found = []
        for own, there in zip(content, has, strict=True):
            both = known & there
            loss = self.loss(base[both], own[both]) if bool(both.any()) else no_loss(model)
            found.append(Term(loss, int(both.sum()), 1 / kinds))
        return found

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        """Return how many items have an id, and content of a kind, summed over the kinds."""
        table = _item_embedding("ContentContrast", model)
        _, (known, *has) = table.parts(_items(model, tokens))
        return sum(int((known & own).sum()) for own in has)


def _item_embedding(owner: str, model: SequenceEncoder) -> ItemEmbedding:
    table = getattr(model, "item_embedding", None)
    if not isinstance(table, ItemEmbedding):
        raise InputError(f"{owner} needs an encoder with items=ItemParts.of(data, ...)")
    return table


def _items(model: SequenceEncoder, tokens: Tensor) -> Tensor:
    """Return the items of a batch, each once."""
    items = tokens.unique()
    return items[(items > 0) & (items <= model.num_items)]


def _pairs(table: ItemEmbedding, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Category, neighbour and relation (P,) int64 of every pair of an item of the batch."""
    codes = table.codes[tokens.unique()]  # padding has none
    own, other = codes.unsqueeze(2), codes.unsqueeze(1)
    step = table.levels[other] - table.levels[own]
    pairs = (own > 0) & (other > 0) & (own != other) & (step.abs() <= 1)
    return own.expand_as(pairs)[pairs], other.expand_as(pairs)[pairs], 1 + step[pairs]

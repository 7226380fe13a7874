"""Two objectives of one's own, for items made of parts: python examples/item_part_objectives.py

An objective is a subclass of `fisherkern.objectives.Objective` that is called with the model, the
windows of a batch and a generator. It adds up with the others, and a run that is resumed goes on
with it. These two did not win on cold items (docs/guides.md), so they stand here and not in the
package.
"""

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.encoders import ItemEmbedding, SequenceEncoder
from fisherkern.objectives import NTXent, Objective, Term


def items_of(model: SequenceEncoder, tokens: Tensor) -> Tensor:
    """The items of a batch, each once."""
    items = tokens.unique()
    return items[(items > 0) & (items <= model.num_items)]


def pairs_of(table: ItemEmbedding, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Category, neighbour and relation (P,) int64 of every pair of an item of the batch."""
    codes = table.codes[tokens.unique()]  # padding has none
    own, other = codes.unsqueeze(2), codes.unsqueeze(1)
    step = table.levels[other] - table.levels[own]
    pairs = (own > 0) & (other > 0) & (own != other) & (step.abs() <= 1)
    return own.expand_as(pairs)[pairs], other.expand_as(pairs)[pairs], 1 + step[pairs]


@dataclasses.dataclass(frozen=True)
class CategoryNeighbours(Objective):
    """Predict an item's categories from those one level away.

        -(1/P) Σ_(c, c') log( exp(<category_c + r, category_c'>) / Σ_b exp(<category_c + r, b>) )

    over the P ordered pairs c != c' of categories of an item, for every item of the batch once,
    whose levels are the same or neighbours; b runs over all categories. r is the relation's
    embedding: a level up, the same level, or a level down. It belongs to the objective, not to the
    model: `bind` draws it.

    Source:
        After HIER, arXiv 2411.03143, which learns relations of codes from their neighbours; the
        formula is ours.
    """

    dim: int = 64
    seed: int = 0
    relations: nn.Embedding | None = dataclasses.field(default=None, repr=False, compare=False)

    def __call__(self, model: SequenceEncoder, tokens: Tensor, _: torch.Generator) -> Tensor:
        table = model.item_embedding
        own, other, relation = pairs_of(table, tokens)
        if not len(own):
            return 0.0 * model.item_embedding.weight.sum()
        query = table.category(own) + self.relations(relation)
        return F.cross_entropy(query @ table.category.weight[1:].t(), other - 1)

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        return len(pairs_of(model.item_embedding, tokens)[0])

    def bind(self, data: fk.SequenceDataset, max_len: int) -> "CategoryNeighbours":
        relations = nn.utils.skip_init(nn.Embedding, 3, self.dim)
        generator = torch.Generator().manual_seed(self.seed)
        nn.init.normal_(relations.weight, std=0.02, generator=generator)
        return dataclasses.replace(self, relations=relations)

    def modules(self) -> Mapping[str, nn.Module]:
        return {} if self.relations is None else {"relations": self.relations}


@dataclasses.dataclass(frozen=True)
class ContentContrast(Objective):
    """Contrast what an item's id says with its content.

        (1/K) Σ_k loss(x_0, x_k)

    over the kinds k of content, with x_v0 and x_vk of `ItemEmbedding` for every item v of the batch
    once that has both. Items are the rows of `loss`.

    Source:
        After IDSF, arXiv 2311.05956; the formula is ours.
    """

    loss: NTXent = dataclasses.field(default_factory=lambda: NTXent(0.2, "cosine"))

    def __call__(
        self, model: SequenceEncoder, tokens: Tensor, generator: torch.Generator
    ) -> Tensor:
        terms = self.terms(model, tokens, generator)
        return torch.stack([term.weight * term.loss for term in terms]).sum()

    def terms(self, model: SequenceEncoder, tokens: Tensor, _: torch.Generator) -> list[Term]:
        """A term for each kind of content, with its number of items."""
        (base, *content), (known, *has) = model.item_embedding.parts(items_of(model, tokens))
        found = []
        for own, there in zip(content, has, strict=True):
            both = known & there
            nothing = 0.0 * model.item_embedding.weight.sum()
            loss = self.loss(base[both], own[both]) if bool(both.any()) else nothing
            found.append(Term(loss, int(both.sum()), 1 / len(content)))
        return found

    def targets(self, model: SequenceEncoder, tokens: Tensor) -> int:
        _, (known, *has) = model.item_embedding.parts(items_of(model, tokens))
        return sum(int((known & own).sum()) for own in has)


if __name__ == "__main__":
    data = fk.synthetic(200, 80, clusters=8)
    content = {"noise": torch.randn(data.num_items, 4)}
    torch.manual_seed(0)
    parts = fk.ItemParts.of(data, content=content, id_dropout=0.3)
    model = fk.SASRec(data.num_items, max_len=20, dim=16, items=parts)
    objective = fk.NextItem() + 0.1 * CategoryNeighbours(16) + 0.1 * ContentContrast()
    print(objective)
    fk.train(model, data, objective=objective, epochs=2, batch_size=32, progress=False)
    print(f"NDCG@10 {fk.evaluate(model, data)['ndcg@10']:.3f}")

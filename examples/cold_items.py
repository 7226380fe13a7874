"""Items that nobody has bought yet, ranked: python examples/cold_items.py [ml-1m]

A tenth of the items is taken out of training. Then every user who has one is asked for the last
one, from the items before it, among all items and among the cold ones alone. A plain table has
nothing to say of them but noise; a table made of parts has their categories.
"""

import sys

import numpy as np
import torch
from item_part_objectives import CategoryNeighbours, ContentContrast
from torch import nn

import fisherkern as fk

data = fk.load(sys.argv[1]) if sys.argv[1:] else fk.synthetic(600, 200, clusters=12)
data = data.subset(range(min(data.num_users, 2000)))  # minutes, not an hour
EPOCHS = 12 if sys.argv[1:] else 5
SIZES = {"max_len": 50, "dim": 64, "layers": 2}

random = np.random.default_rng(0)
cold = np.zeros(data.num_items + 1, bool)
cold[1 + random.permutation(data.num_items)[: data.num_items // 10]] = True
cold_ids = [item for v, item in enumerate(data.item_ids, start=1) if cold[v]]


def sequences(rows: list[np.ndarray]) -> fk.SequenceDataset:
    """The same catalogue with other sequences."""
    ends = np.cumsum([0, *(len(row) for row in rows)])
    users = [str(user) for user in range(len(rows))]
    return fk.SequenceDataset(
        data.name, np.concatenate(rows), ends, data.item_ids, users, data.attributes
    )


rows = [data.sequence(user) for user in range(data.num_users)]
warm = sequences([row[~cold[row]] for row in rows])
last = [int(np.flatnonzero(cold[row])[-1]) if cold[row].any() else 0 for row in rows]
befores = [row[:end][~cold[row[:end]]] for row, end in zip(rows, last, strict=True)]
questions = sequences(
    [np.append(b, row[end]) for b, row, end in zip(befores, rows, last, strict=True) if len(b)]
)

# Genres as categories, and the same as content: one number for each.
names = sorted({name for own in data.attributes.values() for name in own})
genres = np.full((data.num_items, len(names)), np.nan, np.float32)
for v, item in enumerate(data.item_ids):
    if own := data.attributes.get(item):
        genres[v] = [name in own for name in names]

parts = {
    "ids alone": None,
    "categories": fk.ItemParts.of(data, cold=cold_ids),
    "categories, ids dropped": fk.ItemParts.of(data, cold=cold_ids, id_dropout=0.3),
    "and neighbours": fk.ItemParts.of(data, cold=cold_ids, id_dropout=0.3),
    "content": fk.ItemParts.of(
        data, categories={}, content={"genres": genres}, cold=cold_ids, id_dropout=0.3
    ),
    "and contrast": fk.ItemParts.of(
        data, categories={}, content={"genres": genres}, cold=cold_ids, id_dropout=0.3
    ),
}
losses = {
    "and neighbours": fk.NextItem() + 0.1 * CategoryNeighbours(SIZES["dim"]),
    "and contrast": fk.NextItem() + 0.1 * ContentContrast(),
}


class AmongCold(nn.Module):
    """A model that ranks cold items alone."""

    def __init__(self, model: fk.SASRec) -> None:
        super().__init__()
        self.model, self.first_item, self.max_len = model, 1, model.max_len
        self.item_ids = model.item_ids

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores = self.model(batch["history"])
        return scores.masked_fill(~torch.from_numpy(cold[1:]), -torch.inf)


reports: list[list[fk.Report]] = []
print(f"{len(cold_ids)} cold items of {data.num_items}, {questions.num_users} users asked")
head = f"{'cold':>16}{'among cold':>16}{'warm':>16}   among cold, over ids and the row above"
print(f"{'NDCG@10, HR@10':<24}{head}")
for name, items in parts.items():
    torch.manual_seed(0)
    model = fk.SASRec(data.num_items, items=items, **SIZES)
    objective = losses.get(name, fk.NextItem())
    settings = {"batch_size": 32, "lr": 2e-3, "schedule": "linear", "progress": False}
    fk.train(model, warm, objective=objective, epochs=EPOCHS, **settings)
    found = [fk.evaluate(model, questions), fk.evaluate(AmongCold(model), questions)]
    found.append(fk.evaluate(model, warm))
    reports.append(found)
    numbers = "".join(f"{own['ndcg@10']:9.4f} {own['hr@10']:.4f}" for own in found)
    for other in (reports[0], reports[-2]) if len(reports) > 1 else ():
        d = fk.compare(found[1], other[1])["ndcg@10"]
        numbers += f"   {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
    print(f"{name:<24}{numbers}", flush=True)

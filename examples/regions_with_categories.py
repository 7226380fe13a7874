"""Items that are sold elsewhere, ranked: python examples/regions_with_categories.py [ml-1m]

Of the items 60 % are sold in both regions, 20 % in the north alone and 20 % in the south alone.
Each user is asked for the last item that only the other region sells, among all such items: what
their region's network knows of them, and what the merge of both networks knows. Once every item
has a row of its own and no more, once its categories too, which the regions share.
"""

import sys

import numpy as np
import torch
from torch import nn

import fisherkern as fk

data = fk.load(sys.argv[1]) if sys.argv[1:] else fk.synthetic(1500, 300, clusters=12)
EPOCHS = 20 if sys.argv[1:] else 6
SIZES = {"max_len": 50, "dim": 64, "layers": 2} if sys.argv[1:] else {"max_len": 20, "dim": 32}

random = np.random.default_rng(0)
# 0 is sold in both regions, 1 in the north, 2 in the south.
place = np.zeros(data.num_items + 1, int)
order = 1 + random.permutation(data.num_items)
place[order[: data.num_items // 5]] = 1
place[order[data.num_items // 5 : 2 * (data.num_items // 5)]] = 2
region_of = random.permutation(data.num_users) % 2 + 1


def ids_of(*places: int) -> list[str]:
    """The external ids of the items that are sold there."""
    return [item for item, own in zip(data.item_ids, place[1:], strict=True) if own in places]


def sequences(rows: list[np.ndarray], item_ids: list[str]) -> fk.SequenceDataset:
    """Rows of the data's items as a data set of another catalogue, which has them all."""
    number = {item: v for v, item in enumerate(item_ids, start=1)}
    table = np.array([0, *(number.get(item, 0) for item in data.item_ids)])
    ends = np.cumsum([0, *map(len, rows)])
    genres = {item: data.attributes[item] for item in item_ids if item in data.attributes}
    items = table[np.concatenate(rows)]
    return fk.SequenceDataset(
        data.name, items, ends, item_ids, list(map(str, range(len(rows)))), genres
    )


def encoder(sold: fk.SequenceDataset, categories: bool, cold: list[str]) -> fk.SASRec:
    """An untrained network of a catalogue."""
    items = fk.ItemParts.of(sold, cold=cold, id_dropout=0.3) if categories else None
    model = fk.SASRec(sold.num_items, items=items, **SIZES)
    model.item_ids = sold.item_ids
    return model


def train(model: fk.SASRec, sold: fk.SequenceDataset) -> None:
    settings = {"batch_size": 64, "lr": 2e-3, "schedule": "linear", "progress": False}
    fk.train(model, sold, objective=fk.NextItem(), epochs=EPOCHS, **settings)


class Among(nn.Module):
    """A network that ranks some items alone, whatever the order of its own."""

    def __init__(self, model: fk.SASRec, some: list[str]) -> None:
        super().__init__()
        self.model, self.first_item, self.max_len = model, 1, model.max_len
        self.item_ids = data.item_ids
        number = {item: v for v, item in enumerate(model.item_ids, start=1)}
        self.row = torch.tensor([0, *(number[item] for item in data.item_ids)])
        self.others = ~torch.from_numpy(np.isin(data.item_ids, some))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores = self.model(self.row[batch["history"]])[:, self.row[1:] - 1]
        return scores.masked_fill(self.others, -torch.inf)


rows = [data.sequence(user) for user in range(data.num_users)]
found: dict[tuple[bool, str], list[fk.Report]] = {}
for categories in (False, True):
    torch.manual_seed(0)
    both = sequences([row[place[row] == 0] for row in rows], ids_of(0))
    base = encoder(both, categories, [])
    train(base, both)
    members = []
    for region in (1, 2):
        here = [r for r, own in zip(rows, region_of, strict=True) if own == region]
        sold = sequences([row[np.isin(place[row], (0, region))] for row in here], ids_of(0, region))
        # The base, with rows for the region's own items as an untrained network has them.
        member = fk.merge([base, encoder(sold, categories, [])], weights=[1, 0])
        train(member, sold.with_items(member.item_ids))
        members.append(member)
    merged = fk.merge(members)
    for region, member in enumerate(members, start=1):
        foreign = ids_of(3 - region)
        untrained = encoder(sequences(rows, data.item_ids), categories, foreign)
        alone = fk.merge([member, untrained], weights=[1, 0])
        asked = []
        for row, own in zip(rows, region_of, strict=True):
            ends = np.flatnonzero(place[row] == 3 - region)
            before = row[: ends[-1]][place[row[: ends[-1]]] != 3 - region] if len(ends) else []
            if own == region and len(before):
                asked.append(np.append(before, row[ends[-1]]))
        for name, model in (("alone", alone), ("merged", merged)):
            report = fk.evaluate(Among(model, foreign), sequences(asked, data.item_ids))
            found.setdefault((categories, name), []).append(report)

print(
    f"{len(ids_of(1))} and {len(ids_of(2))} items of one region; NDCG@10, HR@10 among the other's"
)
head = f"{'alone':>15}{'merged':>15}   merged over alone; over ids alone, merged"
print(f"{'users of':<10}{'items made of':<18}{head}")
for index, region in enumerate(("north", "south")):
    for categories in (False, True):
        alone, merged = (found[categories, name][index] for name in ("alone", "merged"))
        text = "".join(f"{own['ndcg@10']:8.4f} {own['hr@10']:.4f}" for own in (alone, merged))
        for other in (alone, found[False, "merged"][index])[: 1 + categories]:
            d = fk.compare(merged, other)["ndcg@10"]
            text += f"   {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
        print(f"{region:<10}{'ids and categories' if categories else 'ids alone':<18}{text}")

"""Two regions, two catalogues, one model of the union: python examples/two_regions.py

Of 200 items 80 are sold in both regions and 60 in one alone. The regions hand out no sequences,
only a model and its Fisher. Both start from a base that knows the common items; rows of items are
matched by their ids, wherever they stand in a member's table.
"""

import numpy as np
import torch

import fisherkern as fk

SIZES = {"max_len": 20, "dim": 32, "layers": 1, "heads": 2, "dropout": 0.1}


def sold(data: fk.SequenceDataset, item_ids: list[str]) -> fk.SequenceDataset:
    """What is left of the sequences where only these items are sold, over that catalogue."""
    row = {item: v for v, item in enumerate(item_ids, start=1)}
    table = np.array([0, *(row.get(item, 0) for item in data.item_ids)])
    items = table[data.items]
    kept = np.concatenate([[0], np.cumsum(items > 0)])
    return fk.SequenceDataset(
        data.name, items[items > 0], kept[data.offsets], item_ids, data.user_ids
    )


def train(model: fk.BERT4Rec, data: fk.SequenceDataset, epochs: int) -> None:
    schedule = {"batch_size": 64, "lr": 3e-3, "schedule": "linear"}
    fk.train(model, data, epochs=epochs, progress=False, **schedule)


data = fk.synthetic(num_users=2100, num_items=200, seed=0)
ids = np.random.default_rng(0).permutation(data.item_ids).tolist()
common, own = ids[:80], {"north": ids[80:140], "south": ids[140:]}
users = np.arange(data.num_users).reshape(3, -1)

torch.manual_seed(0)
base = fk.BERT4Rec(len(common), **SIZES)
train(base, sold(data.subset(np.concatenate(users[:2])), common), epochs=16)

tests, members, fishers = {}, [], []
for region, customers in zip(own, users, strict=False):
    fresh = fk.BERT4Rec(len(common + own[region]), **SIZES)
    fresh.item_ids = common + own[region]
    # The base with rows for the region's own items, as the fresh model has them.
    member = fk.merge([base, fresh], weights=[1, 0])
    tests[f"{region}'s"] = sold(data.subset(customers), member.item_ids)
    train(member, tests[f"{region}'s"], epochs=16)
    loader = tests[f"{region}'s"].loader(split="train", batch_size=256, max_len=20)
    members.append(member)
    fishers.append(fk.diag_fisher(member, loader, sampler="sketch", probes=8, progress=False))

merged = fk.merge(members, fishers=fishers)
owners = merged.merge_report["items"]
print(f"items of one member: {owners['1']}, of both: {owners['2']}, merged: {merged.num_items}")

# Users that no member has seen, who buy in both regions.
tests["travellers'"] = data.subset(users[2])
models = {
    "north": fk.merge(members, weights=[1, 0]),
    "south": fk.merge(members, weights=[0, 1]),
    "mean of weights": fk.merge(members),
}
print("A region's model is lent the rows of the items it lacks. NDCG@10 over the united catalogue:")
print(f"{'sequences':<13}{'model':<16}{'itself':>8}{'Fisher merge':>14}{'difference, 95 %':>31}")
for test, sequences in tests.items():
    united = sequences.with_items(merged.item_ids)
    report = fk.evaluate(merged, united)
    for name, model in models.items():
        other = fk.evaluate(model, united)
        d = fk.compare(report, other)["ndcg@10"]
        interval = f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
        print(f"{test:<13}{name:<16}{other['ndcg@10']:8.4f}{report['ndcg@10']:14.4f}{interval:>31}")

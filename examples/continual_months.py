"""A model per month, merged, against training on and on: python examples/continual_months.py

Sequences are cut into four stretches of time. A base learns the first, the oldest. Then one model
per later month starts from it and sees that month alone, so all three can be trained at once;
they are merged by Fisher. The usual way trains one model on from month to month: as many steps
in all, but one after another. Nothing drifts in these made-up data, so there is little that
training on could forget.
"""

import copy

import numpy as np
import torch

import fisherkern as fk


def between(data: fk.SequenceDataset, start: float, stop: float) -> fk.SequenceDataset:
    """The part of every sequence from the share `start` of its length to the share `stop`."""
    lengths = np.diff(data.offsets)
    first = data.offsets[:-1] + (start * lengths).astype(int)
    last = data.offsets[:-1] + (stop * lengths).astype(int)
    return fk.SequenceDataset(
        f"{data.name} {start:.0%} to {stop:.0%}",
        np.concatenate([data.items[a:b] for a, b in zip(first, last, strict=True)]),
        np.concatenate([[0], np.cumsum(last - first)]),
        data.item_ids,
        data.user_ids,
    )


def train(start: fk.BERT4Rec, month: fk.SequenceDataset, seed: int, epochs: int) -> fk.BERT4Rec:
    model = copy.deepcopy(start)
    schedule = {"batch_size": 64, "lr": 3e-3, "schedule": "linear"}
    fk.train(model, month, epochs=epochs, seed=seed, progress=False, **schedule)
    return model


data = fk.synthetic(num_users=1000, num_items=200, min_length=60, max_length=100, seed=0)
edges = (0.0, 0.4, 0.6, 0.8, 1.0)
months = [between(data, *pair) for pair in zip(edges, edges[1:], strict=False)]

torch.manual_seed(0)
fresh = fk.BERT4Rec(data.num_items, max_len=20, dim=32, layers=1, heads=2, dropout=0.1)
base = train(fresh, months[0], seed=0, epochs=24)

members = [train(base, month, seed, epochs=4) for seed, month in enumerate(months[1:], start=1)]
fishers = []
for member, month in zip(members, months[1:], strict=True):
    loader = month.loader(split="train", batch_size=256, max_len=20)
    fishers.append(fk.diag_fisher(member, loader, sampler="sketch", probes=8, progress=False))
merged = fk.merge(members, fishers=fishers)

sequential = base
for seed, month in enumerate(months[1:], start=1):
    sequential = train(sequential, month, seed, epochs=4)

models = {"base": base}
models |= {f"month {number} alone": member for number, member in enumerate(members, start=1)}
models |= {"mean of weights": fk.merge(members), "sequential": sequential}
report = fk.evaluate(merged, data)
print(f"NDCG@10 of what follows the last month, {report.num_users:,} users")
print(f"{'':<16}{'itself':>8}{'Fisher merge minus it':>24}{'95 % interval':>22}")
print(f"{'Fisher merge':<16}{report['ndcg@10']:8.4f}")
for name, model in models.items():
    other = fk.evaluate(model, data)
    d = fk.compare(report, other)["ndcg@10"]
    interval = f"{d.low:+.4f} to {d.high:+.4f}"
    print(f"{name:<16}{other['ndcg@10']:8.4f}{d.mean:>+24.4f}{interval:>22}")

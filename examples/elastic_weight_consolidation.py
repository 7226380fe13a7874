"""Train on without forgetting, by the same Fisher: python examples/elastic_weight_consolidation.py

Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, eq. 3) pulls every parameter back to
where it was, the harder the more the Fisher of the old data says it matters. It is one more term
of the loss:

    masked items + strength sum_k f_k (theta_k - theta_old,k)^2

f = F is theirs, f = 1 a plain L2 pull, and f = F / mean(F) + 1 has the relative floor of `merge`.
The old data sell 200 items; in the new ones 60 are left, and the model forgets the others.
"""

import copy
import dataclasses

import numpy as np
import torch

import fisherkern as fk
from fisherkern.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Pull(Objective):
    """sum_k f_k (theta_k - old_k)^2, 0-dim, for f and old by name of parameter."""

    f: dict[str, torch.Tensor] = dataclasses.field(repr=False)
    old: dict[str, torch.Tensor] = dataclasses.field(repr=False)

    def __call__(self, model, tokens, generator):
        squares = ((n, (p - self.old[n]).square()) for n, p in model.named_parameters())
        return torch.stack([(self.f[name] * square).sum() for name, square in squares]).sum()


def of_items(data: fk.SequenceDataset, items: np.ndarray) -> fk.SequenceDataset:
    """The same catalogue, and of the sequences what these items, (n,) internal ids, leave."""
    keep = np.isin(data.items, items)
    ends = np.concatenate([[0], np.cumsum(keep)])[data.offsets]
    return fk.SequenceDataset("new", data.items[keep], ends, data.item_ids, data.user_ids)


data = fk.synthetic(num_users=1600, num_items=200, seed=0)
old_data = data.subset(np.arange(800))
new_items = 1 + np.random.default_rng(0).permutation(data.num_items)[:60]
new_data = of_items(data.subset(np.arange(800, 1600)), new_items)
schedule = {"batch_size": 64, "lr": 3e-3, "schedule": "linear", "progress": False}

torch.manual_seed(0)
old = fk.BERT4Rec(data.num_items, max_len=20, dim=32, layers=1, heads=2, dropout=0.1)
fk.train(old, old_data, epochs=24, seed=0, **schedule)
loader = old_data.loader(split="train", batch_size=256, max_len=20)
fisher = fk.diag_fisher(old, loader, sampler="sketch", probes=8, progress=False)

weights = {name: parameter.detach().clone() for name, parameter in old.named_parameters()}
mean = torch.cat([f.flatten() for f in fisher.values()]).mean()
pulls = {
    "L2": Pull({name: torch.ones_like(f) for name, f in fisher.items()}, weights),
    "F": Pull(dict(fisher), weights),
    "F/mean + 1": Pull({name: f / mean + 1 for name, f in fisher.items()}, weights),
}
trials = [("no pull", 0), ("L2", 0.3), ("L2", 1.0), ("F", 50.0), ("F", 150.0)]
trials += [("F/mean + 1", 0.1), ("F/mean + 1", 0.3)]

tests, reports = {"old": old_data, "new": new_data}, {}
before = {name: fk.evaluate(old, test) for name, test in tests.items()}
print(
    "NDCG@10 on the old and the new data; in brackets 95 % intervals of the change by training on"
)
print(f"{'pull':<12}{'strength':>8}   {'old':<37}{'new':<34}")
print(f"{'before':<23}" + "".join(f"{report['ndcg@10']:<37.4f}" for report in before.values()))
for name, strength in trials:
    model = copy.deepcopy(old)
    objective = fk.MaskedItems(0.2)
    if name in pulls:
        objective = objective + strength * pulls[name]
    fk.train(model, new_data, objective=objective, epochs=10, seed=1, **schedule)
    line = f"{name:<12}{strength:>8g}   "
    for which, test in tests.items():
        report = reports[name, strength, which] = fk.evaluate(model, test)
        d = fk.compare(report, before[which])["ndcg@10"]
        change = f"{report['ndcg@10']:.4f}  {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
        line += f"{change:<37}"
    print(line.rstrip())
for name, strength in (("F", 50.0), ("F/mean + 1", 0.1)):
    for which in tests:
        d = fk.compare(reports[name, strength, which], reports["L2", 0.3, which])["ndcg@10"]
        print(f"{name}, {strength:g} minus L2, 0.3, {which}: {d.mean:+.4f}", end=" ")
        print(f"({d.low:+.4f} to {d.high:+.4f})")

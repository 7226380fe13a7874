"""One base, three objectives, one merged model: python examples/merge_contrastive_members.py

The Fisher paper's setting in small: members that start from one base and are trained on with
masked items alone, with CL4SRec and with DuoRec. Their merge costs what one member costs at
inference; the ensemble of their scores costs three times that.
"""

import copy

import torch

import fisherkern as fk

data = fk.synthetic(num_users=1200, num_items=200, seed=0)
torch.manual_seed(0)
base = fk.BERT4Rec(data.num_items, max_len=20, dim=32, layers=1, heads=2, dropout=0.1)
fk.train(base, data, epochs=16, batch_size=64, lr=3e-3, seed=0, progress=False)

# Similarity by cosine: the bare dot product of the released codes costs the members of this small
# model half of their NDCG, and there is no point in merging those.
loss = fk.NTXent(similarity="cosine")
objectives = {
    "masked items": fk.MaskedItems(0.2),
    "+ CL4SRec": fk.MaskedItems(0.2) + 0.1 * fk.CL4SRec(loss=loss),
    "+ DuoRec": fk.MaskedItems(0.2) + 0.1 * fk.DuoRec(loss=loss),
}
members = {}
for seed, (name, objective) in enumerate(objectives.items(), start=1):
    members[name] = copy.deepcopy(base)
    fk.train(
        members[name],
        data,
        objective=objective,
        epochs=4,
        batch_size=64,
        lr=3e-3,
        schedule="linear",
        seed=seed,
        progress=False,
    )

loader = data.loader(split="train", batch_size=256, max_len=20)
networks = list(members.values())
fishers = [fk.diag_fisher(m, loader, sampler="sketch", probes=8, progress=False) for m in networks]
merged = fk.merge(networks, fishers=fishers)

# The member to beat is chosen on validation data: chosen on the test it would look better.
validation = {n: fk.evaluate(m, data, split="validation")["ndcg@10"] for n, m in members.items()}
best = max(validation, key=lambda name: validation[name])

models = {"base": base, **members}
models |= {"mean of weights": fk.merge(networks), "ensemble": fk.ScoreEnsemble(networks)}
report = fk.evaluate(merged, data)
print(f"NDCG@10, {report.protocol}, {report.num_users:,} users; the best member is {best!r}")
print(f"{'':<16}{'itself':>8}{'Fisher merge minus it':>24}{'95 % interval':>22}")
print(f"{'Fisher merge':<16}{report['ndcg@10']:8.4f}")
for name, model in models.items():
    other = fk.evaluate(model, data)
    d = fk.compare(report, other)["ndcg@10"]
    interval = f"{d.low:+.4f} to {d.high:+.4f}"
    print(f"{name:<16}{other['ndcg@10']:8.4f}{d.mean:>+24.4f}{interval:>22}")

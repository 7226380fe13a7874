"""Three seeds of one recommender, their Fisher, one merged model.

Run it with python examples/merge_three_models.py.

Takes under a minute on one core. The members branch from a common base, which is what
lets their weights be averaged, and their learning rate decays to zero.
"""

import copy

import torch

import fisherkern as fk

data = fk.synthetic(num_users=600, num_items=200, seed=0)
torch.manual_seed(0)
base = fk.BERT4Rec(data.num_items, max_len=20, dim=32, layers=2, heads=2, dropout=0.1)
fk.train(base, data, epochs=12, batch_size=64, lr=3e-3, seed=0)

members = []
for seed in (1, 2, 3):
    member = copy.deepcopy(base)
    fk.train(member, data, epochs=4, batch_size=64, lr=3e-3, schedule="linear", seed=seed)
    members.append(member)

loader = data.loader(split="train", batch_size=256, max_len=20)
fishers = [fk.diag_fisher(member, loader, sampler="sketch", probes=8) for member in members]
fishers[0].save("member-1.fisher.safetensors")

merged = fk.merge(members, method="fisher", fishers=fishers)
fk.save_model(merged, "merged.safetensors")

report = fk.evaluate(merged, data, split="test")
print(report.table())
for number, member in enumerate(members, start=1):
    difference = fk.compare(report, fk.evaluate(member, data, split="test"))["ndcg@10"]
    print(
        f"over member {number}: {difference.mean:+.4f}"
        f" (95 % interval {difference.low:+.4f} to {difference.high:+.4f})"
    )

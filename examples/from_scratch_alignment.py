"""Members of different starts, aligned and merged: python examples/from_scratch_alignment.py

Two networks trained from different random starts keep their channels in different orders and at
different angles, and the mean of their weights is worth little. `fk.align` moves each towards the
first by the symmetries of the network, which leaves what it computes as it is: until the weights
are close, and, by the loss, until their mean is good. An output layer of its own and norms before
the layers admit rotations of the residual stream. `fk.preflight` says what to expect of a merge;
method "auto" tries what the arguments allow, each member alone included.
"""

import torch

import fisherkern as fk

data = fk.synthetic(num_users=1200, num_items=200, seed=0)
objective = fk.NextItem()
members = []
for seed in (1, 2):
    torch.manual_seed(seed)
    sizes = {"max_len": 20, "dim": 32, "layers": 1, "heads": 2, "dropout": 0.1}
    member = fk.SASRec(data.num_items, **sizes, norm="pre", tied=False, bias=True)
    how = {"epochs": 20, "batch_size": 64, "lr": 3e-3, "seed": seed, "progress": False}
    fk.train(member, data, objective=objective, **how)
    members.append(member)


def score(model: fk.SASRec) -> float:
    return fk.evaluate(model, data, split="validation", k=10)["ndcg@10"]


aligned = fk.align(members)
windows = data.first_windows(300, batch_size=64, max_len=20 + objective.lookahead, seed=0)
turned = fk.align(members, by="loss", objective=objective, loader=windows, steps=len(windows))
report = turned[1].align_report
print(f"distance {report['distance_before']:.1f}, aligned {report['distance_after']:.1f}")
print("loss of the mean, aligned by weights {:.3f}, by the loss {:.3f}".format(*report["loss"]))
history = next(iter(data.loader(split="test", batch_size=64, max_len=20)))["history"]
with torch.no_grad():
    moved = (members[1](history) - turned[1](history)).abs().max()
print(f"largest change of the second member's logits by aligning it: {moved:.1e}")
for name, networks in (("as trained", members), ("by weights", aligned), ("by the loss", turned)):
    found = fk.preflight(networks, score=score)
    print(f"{name}: cosine {found.cosine[0][1]:.2f}. {found.verdict}")

# A Fisher belongs to the weights it was computed at: it is taken after aligning.
loader = data.loader(split="train", batch_size=256, max_len=20)
options = {"sampler": "sketch", "probes": 8, "progress": False}
fishers = [fk.diag_fisher(member, loader, **options) for member in turned]
auto = fk.merge(turned, method="auto", fishers=fishers, score=score, steps=5)
for candidate in auto.merge_report["auto"]["candidates"]:
    weights = ", ".join(f"{weight:.2f}" for weight in candidate["weights"])
    print(f"  auto: {candidate['method']:<13} ({weights})  validation {candidate['score']:.4f}")

models = {
    "member 1": members[0],
    "member 2": members[1],
    "mean as trained": fk.merge(members),
    "mean, by weights": fk.merge(aligned),
    "mean, by the loss": fk.merge(turned),
    "Fisher, by the loss": fk.merge(turned, fishers=fishers),
    "ensemble": fk.ScoreEnsemble(members),
}
chosen = fk.evaluate(auto, data)
print(f"NDCG@10 on the test items; auto is {auto.merge_report['method']!r}")
print(f"{'':<20}{'itself':>8}{'auto minus it':>16}{'95 % interval':>22}")
print(f"{'auto':<20}{chosen['ndcg@10']:8.4f}")
for name, model in models.items():
    other = fk.evaluate(model, data)
    d = fk.compare(chosen, other)["ndcg@10"]
    interval = f"{d.low:+.4f} to {d.high:+.4f}"
    print(f"{name:<20}{other['ndcg@10']:8.4f}{d.mean:>+16.4f}{interval:>22}")

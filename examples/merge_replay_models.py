"""Two RePlay models, their Fishers, one merged model.

`make libraries` installs RePlay; then run
.venv-libraries/bin/python examples/merge_replay_models.py. Takes under a minute on one core.
Both members go on from one start, which is what lets their weights be averaged.
"""

import copy
import warnings

import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.sequential import SasRec

import fisherkern as fk

warnings.simplefilter("ignore")
LENGTH = 20
data = fk.synthetic(num_users=300, num_items=200, seed=0)
pad = data.num_items
item = TensorFeatureInfo(
    "item_id",
    FeatureType.CATEGORICAL,
    is_seq=True,
    feature_hint=FeatureHint.ITEM_ID,
    feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    cardinality=data.num_items,
    padding_value=pad,
    embedding_dim=32,
)


def batch_of(users: list[int]) -> dict:
    """What RePlay's own transforms make for training: ids from 0, padding on the left."""
    rows = torch.full((len(users), LENGTH + 1), pad)
    for row, user in zip(rows, users, strict=True):
        # The last two items of every user are held out for validation and test.
        items = data.items[data.offsets[user] : data.offsets[user + 1] - 2][-LENGTH - 1 :]
        row[len(row) - len(items) :] = torch.from_numpy(items).long() - 1
    seen, following = rows[:, :-1], rows[:, 1:]
    return {
        "feature_tensors": {"item_id": seen},
        "padding_mask": seen != pad,
        "positive_labels": following[:, :, None],
        "target_padding_mask": (following != pad)[:, :, None],
    }


def trained(model: SasRec, seed: int, epochs: int) -> SasRec:
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for users in torch.randperm(data.num_users).split(32):
            loss = model(**batch_of(users.tolist()), negative_labels=None)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


torch.manual_seed(0)
sizes = {"embedding_dim": 32, "num_heads": 2, "num_blocks": 1, "max_sequence_length": LENGTH}
start = trained(SasRec.from_params(TensorSchema([item]), **sizes, dropout=0.2), 0, epochs=20)
members = [trained(copy.deepcopy(start), seed, epochs=5) for seed in (1, 2)]

batches = [batch_of(list(range(i, i + 50))) for i in range(0, data.num_users, 50)]
fishers = [fk.diag_fisher(member, batches, progress=False) for member in members]
merged = fk.merge(members, method="fisher", fishers=fishers)

reports = [fk.evaluate(model, data) for model in (merged, *members)]
print(reports[0].table())
for number, report in enumerate(reports[1:], start=1):
    difference = fk.compare(reports[0], report)["ndcg@10"]
    print(
        f"over member {number}: {difference.mean:+.4f}"
        f" (95 % interval {difference.low:+.4f} to {difference.high:+.4f})"
    )

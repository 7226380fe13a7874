"""Two RecTools models, their Fishers, one merged RecTools model that recommends.

`make libraries` installs RecTools; then run
.venv-libraries/bin/python examples/merge_rectools_models.py. Takes under a minute on one core.
Both members go on from one start, which is what lets their weights be averaged.
"""

import itertools
import logging
import warnings

import pandas as pd
import torch
from pytorch_lightning import Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

import fisherkern as fk

warnings.simplefilter("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
data = fk.synthetic(num_users=300, num_items=200, seed=0)
rows = [
    (user, data.item_ids[item - 1], 1.0, pd.Timestamp(time, unit="D"))
    for user, (begin, end) in enumerate(itertools.pairwise(data.offsets))
    # The last two items of every user are held out for validation and test.
    for time, item in enumerate(data.items[begin : end - 2])
]
names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
dataset = Dataset.construct(pd.DataFrame(rows, columns=names))


def trainer() -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, **quiet
    )


def fitted(seed: int, start: SASRecModel | None = None) -> SASRecModel:
    """From a start or from nothing; a member differs by its order of the users."""
    torch.manual_seed(seed)
    sizes = {"n_factors": 32, "n_blocks": 1, "n_heads": 2, "session_max_len": 20}
    model = SASRecModel(**sizes, lr=3e-3, batch_size=32, get_trainer_func=trainer)
    model.fit_partial(dataset, min_epochs=0, max_epochs=0)
    if start is not None:
        model.torch_model.load_state_dict(start.torch_model.state_dict())
    return model.fit_partial(
        dataset, min_epochs=20 if start is None else 5, max_epochs=20 if start is None else 5
    )


base = fitted(seed=0)
members = [fitted(seed, base) for seed in (1, 2)]

fishers = []
for member in members:
    batches = list(member.data_preparator.get_dataloader_train())
    fishers.append(fk.diag_fisher(member, batches, progress=False))
merged = fk.merge(members, method="fisher", fishers=fishers)
print(merged.recommend([0, 1], dataset, k=3, filter_viewed=True))

reports = [fk.evaluate(model, data) for model in (merged, *members)]
print(reports[0].table())
for number, report in enumerate(reports[1:], start=1):
    difference = fk.compare(reports[0], report)["ndcg@10"]
    print(
        f"over member {number}: {difference.mean:+.4f}"
        f" (95 % interval {difference.low:+.4f} to {difference.high:+.4f})"
    )

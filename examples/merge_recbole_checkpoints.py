"""Two RecBole checkpoints, their Fishers, one merged RecBole model.

`make libraries` installs RecBole; then run
.venv-libraries/bin/python examples/merge_recbole_checkpoints.py. Takes under a minute on one
core. Both runs go on from one start, which is what lets their weights be averaged.
"""

import itertools
import logging
from pathlib import Path

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

import fisherkern as fk

logging.disable(logging.INFO)
# RecBole switches on autograd's anomaly mode for the whole process; it is slow.
torch.autograd.set_detect_anomaly(False)
data = fk.synthetic(num_users=300, num_items=200, seed=0)
Path("shop").mkdir(exist_ok=True)
with Path("shop/shop.inter").open("w") as file:
    file.write("user_id:token\titem_id:token\ttimestamp:float\n")
    for user, (begin, end) in enumerate(itertools.pairwise(data.offsets)):
        for time, item in enumerate(data.items[begin:end]):
            file.write(f"u{user}\t{data.item_ids[item - 1]}\t{time}\n")
settings = {
    "data_path": ".",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "MAX_ITEM_LIST_LENGTH": 20,
    "hidden_size": 32,
    "inner_size": 64,
    "n_layers": 1,
    "train_batch_size": 256,
    "train_neg_sample_args": None,
    "learning_rate": 0.003,
    "stopping_step": 100,
    "state": "CRITICAL",
}
config = Config(model="SASRec", dataset="shop", config_dict=settings)
init_seed(0, reproducibility=True)
dataset = create_dataset(config)
train, validation, test = data_preparation(config, dataset)


def trained(model: SASRec, seed: int, epochs: int) -> str:
    """The .pth file that RecBole writes."""
    init_seed(seed, reproducibility=True)
    config["epochs"] = epochs
    trainer = Trainer(config, model)
    trainer.saved_model_file = f"sasrec-{seed}.pth"
    trainer.fit(train, verbose=False)
    return trainer.saved_model_file


def read(path: str) -> SASRec:
    model = SASRec(config, train.dataset)
    model.load_state_dict(dict(fk.load_tensors(path)))
    return model


start = trained(SASRec(config, train.dataset), seed=0, epochs=4)
members = [read(trained(read(start), seed, epochs=2)) for seed in (1, 2)]

batches = list(itertools.islice(train, 4))
fishers = [fk.diag_fisher(member, batches, progress=False) for member in members]
merged = fk.merge(members, method="fisher", fishers=fishers)
torch.save({"state_dict": merged.state_dict()}, "sasrec-merged.pth")

reports = [fk.evaluate(fk.adapt(m, item_ids=dataset), data) for m in (merged, *members)]
print(reports[0].table())
for number, report in enumerate(reports[1:], start=1):
    difference = fk.compare(reports[0], report)["ndcg@10"]
    print(
        f"over member {number}: {difference.mean:+.4f}"
        f" (95 % interval {difference.low:+.4f} to {difference.high:+.4f})"
    )

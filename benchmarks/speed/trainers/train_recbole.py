"""RecBole 1.2.1: one sample for every prefix of a user's items, its own loader and trainer.

    pip install recbole==1.2.1 torch==2.13.0 'setuptools<81' numpy==1.26.4 'pandas<3' 'scipy<1.17'

SASRec predicts the last item of a sample. BERT4Rec masks a fifth of a sample's items or, in
half of the batches (`ft_ratio`, its default), the last one alone; a masked first item does not
enter its loss, which takes index 0 for padding.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from benchmarks.speed.trainers.protocol import Trainer, serve


def prepare(options: dict[str, Any]) -> Trainer:
    os.chdir(options["folder"])  # it leaves its logs where it stands
    settings = {
        "data_path": options["folder"],
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "TIME_FIELD": "timestamp",
        "MAX_ITEM_LIST_LENGTH": options["max_len"],
        "n_layers": options["layers"],
        "n_heads": 2,
        "hidden_size": options["dim"],
        "inner_size": 4 * options["dim"],
        "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
        "mask_ratio": 0.2,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "train_batch_size": options["batch"],
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "learning_rate": 1e-3,
        "use_gpu": False,
        "state": "ERROR",
        "show_progress": False,
        "checkpoint_dir": options["folder"],
        "seed": 1,
    }
    config = Config(model=options["model"], dataset=options["data"], config_dict=settings)
    init_seed(1, True)
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)

    def step(batch: Any) -> float:
        # Its own loop, over one batch.
        return trainer._train_epoch([batch], 0)

    def targets(batch: Any) -> int:
        if options["model"] == "BERT4Rec":
            return int((batch["MASK_INDEX"] > 0).sum())
        return len(batch)

    version = importlib.metadata.version("recbole")
    return Trainer(version, len(train), lambda: iter(train), step, targets)


if __name__ == "__main__":
    serve(prepare)

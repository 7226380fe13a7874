"""A small run that tests of the training loop share."""

from typing import Any

import numpy as np
import torch

from fisherkern.encoders import BERT4Rec
from fisherkern.training import train

V, T = 20, 8


class Cycles:
    """Windows in which item v is always followed by v + 1."""

    num_items = V
    item_ids = [f"item {v}" for v in range(1, V + 1)]

    def __init__(self, users=48, name="cycles"):
        self.users, self.name, self.asked = users, name, []

    def fingerprint(self):
        return self.name

    def popularity(self):
        return np.arange(1, V + 1)

    def windows(self, *, batch_size, max_len, seed, epoch, crop):
        self.asked.append((batch_size, max_len, seed, epoch, crop))
        first = np.random.default_rng([seed, epoch]).integers(0, V, self.users)
        items = (first[:, None] + np.arange(max_len)) % V + 1
        return torch.from_numpy(items).split(batch_size)


def new_model(**changes):
    torch.manual_seed(0)
    return BERT4Rec(V, T, **({"dim": 16} | changes))


def run(state=None, *, model=None, data=None, **changes):
    model = new_model() if model is None else model
    settings: dict[str, Any] = {
        "epochs": 6,
        "batch_size": 16,
        "lr": 3e-3,
        "schedule": "linear",
        "progress": False,
    }
    settings |= {"warmup_steps": 2, "weight_decay": 0.1, "seed": 5} | changes
    log = train(model, data or Cycles(), state=state, **settings)
    return model, log


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name

"""Small ensembles of every encoder that tests share."""

import torch
from models import shaken
from objective_models import T, V

import fisherkern as fk

KINDS = {"BERT4Rec": fk.BERT4Rec, "SASRec": fk.SASRec, "GRU4Rec": fk.GRU4Rec, "Caser": fk.Caser}


def member(name, seed, dim=4, **changes):
    """An encoder in float64 and eval mode, with a bias where it can have one."""
    settings = {"SASRec": {"bias": True}, "Caser": {"window": 2, "horizontal": 2}}.get(name, {})
    if name in ("BERT4Rec", "SASRec"):
        settings |= {"layers": 1, "heads": 2, "inner_dim": 5}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = KINDS[name](V, max_len=T, dim=dim, **(settings | changes))
        return shaken(model, seed)


def ensemble(*names, **changes):
    return fk.ParallelEncoders([member(name, seed, **changes) for seed, name in enumerate(names)])

"""Model and Fisher files for the tests of merging in files."""

from __future__ import annotations

import torch
from models import NUM_ITEMS

from fisherkern.encoders import ENCODERS
from fisherkern.fingerprint import fingerprint
from fisherkern.fisher import DiagFisher
from fisherkern.training import save_model


def saved(folder, number, name="BERT4Rec", dtype=torch.float32, ids=None, **config):
    """(Path, model) of a random model in a file; `ids`: its items."""
    ids = [f"item {v}" for v in range(NUM_ITEMS)] if ids is None else ids
    with torch.random.fork_rng():
        torch.manual_seed(number)
        model = ENCODERS[name](len(ids), max_len=5, dim=6, **config)
        for parameter in model.parameters():
            parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).to(dtype)
    model.item_ids = list(ids)
    path = folder / f"m{number}.safetensors"
    save_model(model, path, metrics={"ndcg@10": 0.1 + number})
    return path, model


def saved_fisher(folder, number, model):
    generator = torch.Generator().manual_seed(number)
    tensors = {
        name: torch.rand(p.shape, generator=generator).square() * 10.0 ** (number - 2)
        for name, p in model.named_parameters()
    }
    for name in tensors:
        if "key.bias" in name:
            tensors[name] *= 1e-20
    if number == 1 and "output_bias" in tensors:
        tensors["output_bias"] *= 1e-20  # noise in one member, information in the others
    path = folder / f"f{number}.safetensors"
    fisher = DiagFisher(tensors, {"fingerprint": fingerprint(model), "sampler": "topk", "k": 30})
    fisher.save(path)
    return path, fisher

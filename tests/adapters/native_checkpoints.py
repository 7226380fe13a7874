"""Native checkpoints of every kind, as small as they come, with the values that they hold."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

RAN: list[str] = []  # what the classes of a file did; stays empty


class Config:
    """A library's configuration object, which notices whatever is done to it."""

    def __init__(self, **values):
        self.values = values

    def __setstate__(self, state):
        RAN.append("__setstate__")
        self.__dict__.update(state)


class AttributeDict(dict):
    """Lightning's dictionary of hyper-parameters."""


@contextlib.contextmanager
def library() -> Iterator[types.ModuleType]:
    """A module named `vanished` that holds the classes of files, gone afterwards."""
    module = types.ModuleType("vanished")
    for kind in (Config, AttributeDict):
        copy = type(kind.__name__, (kind,), {"__module__": "vanished"})
        setattr(module, kind.__name__, copy)
    sys.modules["vanished"] = module
    try:
        yield module
    finally:
        del sys.modules["vanished"]


def values(seed: int = 0) -> dict[str, Tensor]:
    """A small model's state: a table that is tied, halves, a buffer, a number."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(7, 4, generator=generator)
    return OrderedDict(
        [
            ("item_embedding.weight", table),
            ("output.weight", table),
            ("layer.weight", torch.randn(4, 4, generator=generator).t()),
            ("layer.bias", torch.randn(4, generator=generator).bfloat16()),
            ("scale", torch.randn(3, generator=generator).half()),
            ("position_ids", torch.arange(5)[None].expand(2, 5)),
            ("steps", torch.tensor(3)),
        ]
    )


def untied(seed: int = 0) -> dict[str, Tensor]:
    """The same for safetensors, which knows neither ties nor strides."""
    return {k: v.clone().contiguous() for k, v in values(seed).items() if k != "output.weight"}


def recbole(path: Path, seed: int = 0) -> dict[str, Tensor]:
    with library() as module:
        saved = {
            "config": module.Config(model="SASRec", hidden_size=4),
            "epoch": 3,
            "cur_step": 0,
            "best_valid_score": 0.25,
            "state_dict": values(seed),
            "other_parameter": None,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(7, 4)}}, "param_groups": [{}]},
        }
        torch.save(saved, path, pickle_protocol=4)
    return values(seed)


def lightning(path: Path, seed: int = 0) -> dict[str, Tensor]:
    with library() as module:
        saved = {
            "epoch": 1,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": values(seed),
            "callbacks": {},
            "hyper_parameters": module.AttributeDict(lr=0.1, net=module.Config(size=4)),
        }
        torch.save(saved, path)
    return values(seed)


IDS = ("PAD", "i36", "i35", 27, 2.5)


def rectools(path: Path, seed: int = 0, ids: object = None) -> dict[str, Tensor]:
    ids = np.array(IDS, dtype=object) if ids is None else ids
    with library() as module:
        saved = {
            "pytorch-lightning_version": "2.5.0",
            "state_dict": OrderedDict((f"torch_model.{k}", v) for k, v in values(seed).items()),
            "hyper_parameters": {"item_external_ids": ids, "net": module.Config(size=4)},
        }
        torch.save(saved, path)
    return {f"torch_model.{k}": v for k, v in values(seed).items()}


def raw(path: Path, seed: int = 0) -> dict[str, Tensor]:
    torch.save(values(seed), path)
    return values(seed)


def legacy(path: Path, seed: int = 0) -> dict[str, Tensor]:
    torch.save(values(seed), path, _use_new_zipfile_serialization=False)
    return values(seed)


def nested(key: str, **options: object) -> Callable[..., dict[str, Tensor]]:
    def write(path: Path, seed: int = 0) -> dict[str, Tensor]:
        torch.save({"epoch": 2, key: values(seed), "loss": torch.tensor(0.5)}, path, **options)
        return values(seed)

    return write


class Tower(nn.Module):
    """A module with a tie, a buffer that is saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)])
        self.head = nn.Linear(4, 7)
        self.head.weight = self.items.weight
        self.register_buffer("mask", torch.ones(2, 2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def module(path: Path, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    tower = Tower()
    torch.save(tower, path)
    return dict(tower.state_dict())


def foreign(path: Path, seed: int = 0) -> dict[str, Tensor]:
    safetensors.torch.save_file(untied(seed), path, metadata={"format": "pt", "by": "someone"})
    return untied(seed)


def _write_folder(path: Path, config: str) -> None:
    path.mkdir()
    (path / config).write_text(json.dumps({"model_type": "toy", "r": 2}))
    (path / "tokenizer.json").write_text("{}")
    (path / "training_args.bin").write_bytes(b"not a checkpoint")
    (path / "README.md").write_text("of one member")


def folder(config: str, name: str, write: Callable[..., dict[str, Tensor]]):
    def build(path: Path, seed: int = 0) -> dict[str, Tensor]:
        _write_folder(path, config)
        return write(path / name, seed)

    return build


def shards(suffix: str):
    """Two shards and their index, as transformers writes them."""

    def build(path: Path, seed: int = 0) -> dict[str, Tensor]:
        _write_folder(path, "config.json")
        tensors = untied(seed)
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        places = {}
        for number, names in enumerate((list(tensors)[:2], list(tensors)[2:]), start=1):
            shard = f"{stem}-0000{number}-of-00002.{suffix}"
            part = {name: tensors[name] for name in names}
            if suffix == "safetensors":
                safetensors.torch.save_file(part, path / shard, metadata={"format": "pt"})
            else:
                torch.save(part, path / shard)
            places.update(dict.fromkeys(names, shard))
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        return tensors

    return build


# name of the file -> (what load_tensors calls it, how to make one)
KINDS: dict[str, tuple[str, Callable[..., dict[str, Tensor]]]] = {
    "recbole.pth": ("recbole", recbole),
    "lightning.ckpt": ("lightning", lightning),
    "rectools.ckpt": ("lightning", rectools),
    "raw.pth": ("state dict", raw),
    "legacy.pt": ("state dict", legacy),
    "model.pt": ("nested state dict", nested("model")),
    "model_state_dict.pt": ("nested state dict", nested("model_state_dict")),
    "old_nested.pth": ("nested state dict", nested("net", _use_new_zipfile_serialization=False)),
    "weights.bin": ("state dict", raw),
    "module.pt": ("module", module),
    "foreign.safetensors": ("safetensors", foreign),
    "hf": ("huggingface", folder("config.json", "model.safetensors", foreign)),
    "hf_bin": ("huggingface", folder("config.json", "pytorch_model.bin", raw)),
    "hf_shards": ("huggingface", shards("safetensors")),
    "hf_bin_shards": ("huggingface", shards("bin")),
    "peft": ("peft", folder("adapter_config.json", "adapter_model.safetensors", foreign)),
    "peft_bin": ("peft", folder("adapter_config.json", "adapter_model.bin", raw)),
}


def same(one: Tensor, other: Tensor) -> bool:
    """Equal in type, shape and every bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*bits)

"""Several gloo processes on this machine, and everything that they can do together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import shaken
from torch import Tensor, nn

import fisherkern as fk
from fisherkern.files import save_tensors

# Forked from one process that has imported everything: seconds less for each.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "fisherkern", "scipy.optimize"])
SECONDS = 200


def start(world: int, work: Callable[..., None], *given: Any) -> list[int]:
    """Run work(rank, world, *given) in so many processes; their exit codes, all ended."""
    started = [
        CONTEXT.Process(target=_one_thread, args=(work, rank, world, *given))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert None not in codes
    return codes  # type: ignore[return-value]


def _one_thread(work: Callable[..., None], rank: int, world: int, *given: Any) -> None:
    torch.set_num_threads(1)
    work(rank, world, *given)


def join(folder: Path, rank: int, world: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world
    )


DATA = fk.synthetic(41, 130, seed=3, clusters=4, min_length=4, max_length=12)
T = 6
FISHERS: dict[str, dict[str, Any]] = {
    "exact": {"sampler": "exact"},
    "sketch": {"sampler": "sketch", "probes": 3},
    "topk": {"sampler": "topk", "k": 4},
    "everywhere": {"sampler": "model", "k": 3, "positions": "all"},
    "batchwise": {"sampler": "target", "reduction": "batchwise"},
}


def member(seed: int, dtype: torch.dtype = torch.float64, kind: type = fk.SASRec) -> nn.Module:
    """Members of one start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(DATA.num_items, max_len=T, dim=6, heads=2, layers=1)
    model = shaken(shaken(model), seed, 0.1).to(dtype)
    model.item_ids = list(DATA.item_ids)
    return model


def batches(split: str = "train", size: int = 7) -> Any:
    return DATA.loader(split=split, batch_size=size, max_len=T)


def ndcg(model: nn.Module) -> float:
    return fk.evaluate(model, DATA, split="validation", k=10, batch_size=9)["ndcg@10"]


Found = tuple[dict[str, Tensor], dict[str, Any]]


def reports(dtype: torch.dtype) -> Found:
    """Evaluations: all tensors are of integers, or functions of them."""
    model = member(1, dtype)
    found = {
        "full": fk.evaluate(model, DATA, batch_size=9, metrics=("hr", "debiased-ndcg", "coverage")),
        "tiles": fk.evaluate(model, DATA, batch_size=9, max_scores=200),
        "drawn": fk.evaluate(model, DATA, batch_size=5, candidates="uniform-100"),
        "some": fk.evaluate(model, DATA, batch_size=3, users=[30, 2, 7, 8, 21, 40, 5], k=1),
        "ensemble": fk.evaluate(fk.ScoreEnsemble([model, member(2, dtype)]), DATA, batch_size=9),
    }
    tensors = {}
    for name, report in found.items():
        tensors[f"{name} ranks"] = torch.from_numpy(report.ranks)
        tensors[f"{name} users"] = torch.from_numpy(report.users)
        for metric, values in report.per_user.items():
            tensors[f"{name} {metric}"] = torch.from_numpy(values)
    return tensors, {name: report.to_json() for name, report in found.items()}


def statistics(dtype: torch.dtype) -> Found:
    """Fishers, products and Gram matrices."""
    tensors, about = {}, {}
    for name, settings in FISHERS.items():
        kind = fk.SASRec if settings.get("positions") == "all" else fk.BERT4Rec
        fisher = fk.diag_fisher(member(1, dtype, kind), batches(), progress=False, **settings)
        tensors |= {f"{name} {key}": value for key, value in fisher.items()}
        about[name] = {key: fisher.meta[key] for key in ("num_sequences", "num_positions", "k")}
    grams = fk.linear_grams(member(1, dtype), batches(), progress=False)
    tensors |= {f"gram {key}": value for key, value in grams.items()}
    product = fk.fisher_product(member(1, dtype), batches())
    vector = {name: p.detach() for name, p in member(2, dtype).named_parameters()}
    tensors |= {f"product {key}": value for key, value in product(vector).items()}
    return tensors, about | {"grams": grams.meta}


def learned(dtype: torch.dtype) -> Found:
    """Merges that learn weights from batches, or solve for the whole Fisher."""
    members = [member(seed, dtype) for seed in (1, 2)]
    exact = [fk.diag_fisher(m, batches(), sampler="exact", progress=False) for m in members]
    found = {
        "learned": _learned(members, "learned_soup"),
        "by layer": _learned(members, "layer_wise"),
        "full": fk.merge(
            members,
            method="full_fisher",
            fishers=exact,
            products=[fk.fisher_product(m, batches()) for m in members],
            steps=4,
        ),
    }
    return _of_all(found), {"options": found["learned"].merge_report["options"]}


def searches(dtype: torch.dtype) -> Found:
    """Merges found by a score, the greedy one among them, and the preflight."""
    members = [member(seed, dtype) for seed in (1, 2)]
    best = fk.merge(members, method="auto", score=ndcg)
    checked = fk.preflight(
        members,
        score=ndcg,
        hits=lambda model: fk.evaluate(model, DATA, k=10, batch_size=9).per_user["hr@10"],
    )
    about = {"preflight": checked.to_dict(), "auto": best.merge_report["auto"]}
    return _of_all({"best": best}), about


def _learned(members: list[nn.Module], method: str) -> Any:
    return fk.merge(members, method=method, validation=batches("validation"), steps=6)


def _of_all(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name} {key}": value.detach()
        for name, model in models.items()
        for key, value in model.state_dict().items()
    }


def changed(dtype: torch.dtype) -> Found:
    """Alignment, and what is done after a merge."""
    members = [member(seed, dtype) for seed in (1, 2)]
    windows = DATA.first_windows(5, batch_size=6, max_len=T + 1, seed=0)
    histories = [batch["history"] for batch in batches()]
    one = fk.merge(members)
    learning: dict[str, Any] = {"steps": 3, "lr": 0.01}
    found = {
        "activations": fk.align(members, by="activations", loader=batches())[1],
        "loss": fk.align(members, by="loss", loader=windows, objective=fk.NextItem(), **learning)[
            1
        ],
        "repaired": fk.repair(one, members, histories),
        "corrected": fk.representation_surgery(one, members, histories, rank=2, **learning),
        "ensemble": fk.weight_ensemble(
            members, base=member(3, dtype), loader=batches("validation"), **learning
        ),
    }
    return _of_all(found), {"loss": found["loss"].align_report["steps"]}


FP32, FP64 = torch.float32, torch.float64
# By number of processes, in their order: what they do, twice where it is there twice.
PARTS: dict[int, list[tuple[Callable[[torch.dtype], Found], torch.dtype]]] = {
    2: [
        *(
            (part, dtype)
            for dtype in (FP32, FP64)
            for part in (reports, statistics, learned, changed)
        ),
        (searches, FP64),
        (statistics, FP32),
        (changed, FP32),
    ],
    4: [(reports, FP32), (statistics, FP64), (learned, FP64), (changed, FP32)],
}


def everything(rank: int, world: int, folder: Path) -> None:
    """All of `PARTS` in one of several processes, each to a file by its number."""
    join(folder, rank, world)
    for number, (part, dtype) in enumerate(PARTS[world]):
        save_tensors(folder / f"{world}-{number}-{rank}.safetensors", *part(dtype))
    dist.destroy_process_group()


def set_environment(rank: int, world: int, port: int) -> None:
    """As torchrun does."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")

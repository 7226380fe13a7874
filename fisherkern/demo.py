"""Three teams fine-tune one recommender, each on its own users, and merge: the demo.

`fisherkern demo` calls `run`. Only the public API is used, so the file reads as an example:
data, members, Fishers, merges, evaluation, comparison.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fisherkern as fk

_SIZES: dict[str, Any] = {"max_len": 20, "dim": 64, "layers": 2, "heads": 2, "dropout": 0.1}
BASE_EPOCHS, MEMBER_EPOCHS = 30, 15
TRAINING: dict[str, Any] = {"batch_size": 64, "lr": 2e-3, "warmup_steps": 100, "crop": "all"}
CONTROL = "all users, same compute"


def run(data: fk.SequenceDataset, out: Path, *, seed: int, progress: bool) -> dict[str, Any]:
    """Train, merge and compare; return the table and its numbers.

    Models and Fishers are written to `out`. A model that is already there is not trained again,
    and an interrupted training goes on after its last whole epoch.
    """
    train = partial(trained, out, progress)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        untrained = fk.BERT4Rec(data.num_items, **_SIZES)
    base = train("base", untrained, data, epochs=BASE_EPOCHS, seed=seed)
    tune = partial(train, start=base, epochs=MEMBER_EPOCHS, schedule="linear")

    # Each team sees a third of the users. The control sees all of them, for as many windows.
    order = np.random.default_rng(seed).permutation(data.num_users)
    teams = [data.subset(np.sort(users)) for users in np.array_split(order, 3)]
    names = [f"member {number + 1}" for number in range(3)]
    members = [tune(names[i], data=teams[i], seed=seed + i + 1) for i in range(3)]
    control = tune("all users", data=data, seed=seed + 4)

    fishers = []
    for name, member, users in zip(names, members, teams, strict=True):
        histories = users.loader(split="train", batch_size=256, max_len=_SIZES["max_len"])
        fishers.append(fk.diag_fisher(member, histories, sampler="exact", progress=progress))
        fishers[-1].save(path_of(out, name, ".fisher.safetensors"))

    merges = {
        "uniform merge": fk.merge(members, method="uniform"),
        "Fisher merge": fk.merge(members, method="fisher", fishers=fishers),
    }
    models = {"base": base, **dict(zip(names, members, strict=True)), CONTROL: control, **merges}
    # Choices are made on the validation split; the table shows the test split.
    validation = {
        name: fk.evaluate(models[name], data, split="validation")["ndcg@10"]
        for name in (*names, *merges)
    }
    best, chosen = (max(group, key=validation.__getitem__) for group in (names, merges))
    models["score ensemble"] = fk.ScoreEnsemble(members)
    reports = {name: fk.evaluate(model, data, progress=progress) for name, model in models.items()}
    fk.save_model(merges[chosen], out / "merged.safetensors", metrics=reports[chosen])
    rows = {name: dict(report) for name, report in reports.items()}
    table = f"{data.name}, {comparison(reports, best)}"
    return {"table": table, "rows": rows, "best_member": best, "merged": chosen}


def path_of(out: Path, name: str, ending: str) -> Path:
    """Return the file of a model or a Fisher in the folder `out`."""
    return out / f"{name.replace(' ', '-')}{ending}"


def trained(
    out: Path, progress: bool, name: str, start: Any, data: fk.SequenceDataset, **settings: Any
) -> Any:
    """Load the model `name` of the folder `out`: a copy of `start`, trained if it is not there."""
    path, state = path_of(out, name, ".safetensors"), path_of(out, name, ".state.safetensors")
    if not path.exists():
        if progress:
            print(f"- training {name} on {data.num_users:,} users", file=sys.stderr, flush=True)
        model = copy.deepcopy(start)
        fk.train(model, data, state=state, progress=progress, **TRAINING, **settings)
        fk.save_model(model, path)
    state.unlink(missing_ok=True)
    return fk.load_model(path)


def comparison(reports: Mapping[str, fk.Report], best: str) -> str:
    """Make a Markdown table of NDCG@10, HR@10 and the gains over two models, with intervals."""
    test = reports[best]
    heads = ("model", "NDCG@10", "HR@10", "over the best member", f"over {CONTROL}")
    lines = [
        f"{test.protocol}, {test.num_users:,} users; ± is 1.96 standard errors, paired per user",
        "",
        f"| {' | '.join(heads)} |",
        "|---" + "|---:" * 4 + "|",
    ]
    for name, report in reports.items():
        cells = [f"{name} (best member)" if name == best else name]
        cells += [f"{report[metric]:.4f}" for metric in ("ndcg@10", "hr@10")]
        for other in (best, CONTROL):
            gap = fk.compare(report, reports[other])["ndcg@10"]
            cells.append("" if name == other else f"{gap.mean:+.4f} ± {gap.high - gap.mean:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

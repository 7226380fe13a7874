"""`fisherkern fisher`."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fisherkern import processes
from fisherkern.adapters.sharded.dcp import names_dcp
from fisherkern.adapters.sharded.models import is_dtensor, local_part
from fisherkern.checks import check_count
from fisherkern.cli.arguments import command
from fisherkern.cli.run import BEST_DEVICE, Run, over_catalogue_of
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, shown
from fisherkern.fisher import DiagFisher, diag_fisher
from fisherkern.fisher.second_moments import fisher_of_moments
from fisherkern.tables import print_table
from fisherkern.training.state import read_moments


@command(
    "fisher",
    diag_fisher,
    choices={"reduction": ("sequence", "batchwise"), "weight": ("probability", "one")},
)
def fisher(
    run: Run,
    checkpoint: Path | None = None,
    *,
    model: str | None = None,
    from_state: Path | None = None,
    split: str = "train",
    batch_size: int = 256,
    limit: int | None = None,
    factored: int | None = None,
    shard: bool = False,
    device: str = BEST_DEVICE,
) -> None:
    """Compute the diagonal Fisher of a checkpoint, or of a model that a function makes.

    Args:
        checkpoint: a model file.
        model: in place of a checkpoint, module:function, a function without arguments in a module
            of the current folder. It returns (model, batches), any that diag_fisher takes, or
            alone an encoder of ours, for --data.
        from_state: the training state of the checkpoint's run (`train --keep-state`), whose
            optimiser's second moments are taken for the Fisher; no data is read.
        split: train, validation or test: the histories.
        batch_size: sequences in a batch.
        limit: only this many sequences, evenly spread.
        factored: entries from which on a matrix is kept as its row and column sums.
        shard: read a folder x.dcp by rows of its item tables, each process of torchrun its own;
            the Fisher is such a folder too.
        device: cpu, cuda or cuda:1.
    """
    if (checkpoint is None) == (model is None):
        raise InputError("name a checkpoint, or a --model module:function")
    for flag, value in (("model", model), ("from-state", from_state), ("factored", factored)):
        if shard and value is not None:
            raise InputError(f"--{flag}: does not go with --shard")
    if checkpoint is not None:
        name, network, batches = checkpoint.stem, run.model(checkpoint, shard=shard), None
    else:
        name, network, batches = _built(run, str(model))
    if from_state is not None and checkpoint is None:
        raise InputError("--from-state: needs the checkpoint that the run gave")
    if factored is not None:
        check_count("--factored", factored)
    file = f"{name}.fisher.{'dcp' if shard else 'safetensors'}"
    path = run.out(f"fisher-{name}", file) / file
    if from_state is not None:
        _finish(run, path, _free(run, from_state, network), factored)
        return
    if batches is None:
        data = over_catalogue_of(network, run.data(), checkpoint or Path(name))
        batches = run.batches(network, data, split=split, batch_size=batch_size, limit=limit)
    settings = {key: value for key, value in run.of(diag_fisher).items() if key != "model"}
    found = diag_fisher(network.to(run.device), batches, **settings)
    _finish(run, path, found, factored)


def _free(run: Run, state: Path, network: SequenceEncoder) -> DiagFisher:
    """Return the Fisher of a training state's second moments."""
    unused = {"data", "limit", "split", "batch_size", *run.of(diag_fisher)} - {"progress"}
    for flag in sorted(unused & run.given):
        raise InputError(f"--{flag.replace('_', '-')}: --from-state computes nothing of data")
    optimizer, moments = read_moments(state, network)
    return DiagFisher(*fisher_of_moments(moments, optimizer, network))


def _finish(run: Run, path: Path, found: DiagFisher, factored: int | None) -> None:
    """Store a Fisher and tell its size by parameter."""
    if names_dcp(path):
        found.save(path)  # every process has rows
    else:
        run.write(partial(found.save, factored=factored), path)
    largest, mean = dict[str, float](), dict[str, float]()
    for name, value in found.items():
        largest[name], mean[name] = _extent(value)
    run.finish(path.parent, {"meta": found.meta, "mean": mean, "max": largest})
    rows = [{"parameter": name, "mean": mean[name], "max": largest[name]} for name in found]
    print_table(rows, digits=".3e")
    print(f"written to {path}")


def _extent(value: Tensor) -> tuple[float, float]:
    """(Largest entry, mean) of a tensor, whose rows may lie over the processes."""
    if not is_dtensor(value):
        return float(value.max()), float(value.mean())
    own = local_part(value)
    pairs = processes.gathered((float(own.max()) if own.numel() else 0.0, float(own.sum())))
    most, sums = zip(*pairs, strict=True)
    return max(most), sum(sums) / value.numel()


def _built(run: Run, text: str) -> tuple[str, Any, Iterable[Any] | None]:
    """(Name of the function, its model, its batches or None)."""
    module, colon, name = text.partition(":")
    if not (module and colon and name.isidentifier()):
        raise InputError(f"--model: {shown(text)} is not like module:function")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module), name, None)
        if not callable(function):
            raise InputError(f"--model: {module} has no function {name!r}")
        made = function()
    except InputError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"--model: {text} failed at {where}: {reason}") from error
    if isinstance(made, tuple) and len(made) == 2:
        for flag in ("data", "limit", "split", "batch_size", "device"):
            if flag in run.given:
                name_of_flag = "--" + flag.replace("_", "-")
                raise InputError(f"{name_of_flag}: the batches of {text} decide it")
        return name, made[0], made[1]
    if not isinstance(made, SequenceEncoder):
        kind = type(made).__name__
        raise InputError(f"--model: {text} returned a {kind}, and not (model, batches)")
    return name, made.to(run.device), None

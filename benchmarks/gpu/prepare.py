"""What must be made beforehand and travel along: data, a trained model, launch settings."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import fisherkern as fk
from benchmarks.common import commit
from benchmarks.gpu.candidates import fill

NAME, LIMIT = "ml-1m", 64 * 2**20
MAX_LEN, DIM = 200, 64


def prepare(folder: Path, model: Path | None, seconds: float) -> None:
    """Fill `folder`, within about `seconds` each for the model and for the settings.

    What is there already is kept and gone on from: the model's training state and the settings
    that were compiled. `model` is a BERT4Rec's file to take instead of training one. Raises
    InputError where the data set is not to be had, or the folder is too large to travel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commit.txt").write_text(commit() + "\n")
    source = Path(os.environ.get("FISHERKERN_DATA", ""), f"{NAME}.txt")
    if not source.is_file():
        raise fk.InputError(f"{source}: FISHERKERN_DATA must name the folder that holds {NAME}.txt")
    shutil.copyfile(source, folder / f"{NAME}.txt")
    target = folder / "bert4rec.safetensors"
    if model is not None:
        taken = fk.load_model(model)
        if not isinstance(taken, fk.BERT4Rec):
            raise fk.InputError(f"{model}: a {type(taken).__name__}; benchmarks take a BERT4Rec")
        fk.save_model(taken, target)
    elif not target.exists():
        train(target, seconds)
    fill(folder / "candidates.json", seconds)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MB to take along", flush=True)
    if size > LIMIT:
        raise fk.InputError(f"{folder}: {size} bytes are more than the {LIMIT} that may travel")


class _Enough(Exception):
    """The time for training is over."""


def train(target: Path, seconds: float) -> None:
    """A BERT4Rec of T = 200 and D = 64 on all of ML-1M, as far as the time allows.

    An epoch can take longer than that: the alarm comes between two of Python's instructions, so
    that the model may be between two of a step's updates, which harms nothing here. The Fisher's
    time does not depend on how good the model is; its numbers should not be those of a network
    that knows nothing.
    """
    import torch

    data = fk.load(NAME)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fk.BERT4Rec(data.num_items, max_len=MAX_LEN, dim=DIM)
    model.item_ids = data.item_ids
    before = signal.signal(signal.SIGALRM, _enough)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        fk.train(model, data, epochs=50, batch_size=64, progress=False)
    except _Enough:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    fk.save_model(model.eval(), target)


def _enough(*_: object) -> None:
    raise _Enough

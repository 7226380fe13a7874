"""The last checkpoints of a run, as model files that can be merged."""

from __future__ import annotations

import re
from pathlib import Path

from fisherkern.checks import check_count
from fisherkern.encoders import SequenceEncoder
from fisherkern.training.checkpoint import save_model
from fisherkern.training.state import PathLike


class KeptCheckpoints:
    """Keep a run's last checkpoints: `train(..., on_epoch=KeptCheckpoints(folder, last=5))`.

    Writes the model after every `every`-th epoch to folder/checkpoint-0007.safetensors, by its
    epoch, and removes the files of that form that are older than the `last` ones. The weights are
    those of the epoch, not of the best one. A run that is killed and goes on ends with the same
    files, to the bit.

    Args:
        folder: for this run's checkpoints alone; made if it is missing.
        last: number of checkpoints that are kept.
        every: epochs from one to the next.

    Raises:
        InputError: a number below 1.
    """

    def __init__(self, folder: PathLike, last: int = 5, every: int = 1) -> None:
        check_count("last", last)
        check_count("every", every)
        self.folder, self.last, self.every = Path(folder), last, every

    def __call__(self, epoch: int, model: SequenceEncoder, loss: float) -> None:
        """Write the epoch's checkpoint if it is one of the kept, and remove what is too old."""
        if epoch % self.every:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_model(model, self.path(epoch))
        for path in self.folder.glob("checkpoint-*.safetensors"):
            found = re.fullmatch(r"checkpoint-(\d{4,})", path.stem)
            if found is not None and int(found[1]) <= epoch - self.last * self.every:
                # The model last: what a kill leaves of the two is found again.
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink()

    def path(self, epoch: int) -> Path:
        """Return the file of an epoch's checkpoint."""
        return self.folder / self.name(epoch)

    @staticmethod
    def name(epoch: int) -> str:
        """Return the file's name."""
        return f"checkpoint-{epoch:04d}.safetensors"

"""The Fishers that a training by another library leaves, for the libraries' callbacks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fisherkern import processes
from fisherkern.errors import InputError
from fisherkern.fisher import DiagFisher, diag_fisher
from fisherkern.fisher.second_moments import moments_of
from fisherkern.training.state import PathLike


class KeptFishers:
    """Writes Fishers of a training's last weights beside its checkpoint.

    `optimizer.fisher.safetensors` is `DiagFisher.from_optimizer`. With a loader that of
    `diag_fisher` is written too, named after its sampler: `exact.fisher.safetensors`. After the
    first step both are tried, with one batch, so that what is wrong shows at once.

    Args:
        loader: batches for `diag_fisher`, the same in every process, more than once; None: no
            such Fisher.
        folder: where the files go; None: where the library's trainer keeps its checkpoints.
        **settings: further arguments of `diag_fisher`, such as sampler="exact".
    """

    def __init__(
        self, loader: Iterable[Any] | None = None, folder: PathLike | None = None, **settings: Any
    ) -> None:
        if settings and loader is None:
            raise InputError(f"{min(settings)}: an argument of diag_fisher, which needs a loader")
        self.loader, self.folder, self.settings = loader, folder, settings
        self._tried = False

    def try_once(self, optimizer: Any, model: Any) -> None:
        """Raise InputError where the Fishers cannot be made; asked once, with one batch."""
        if self._tried:
            return
        self._tried = True
        moments_of(_bare(optimizer), model)
        if self.loader is not None:
            # The draws of a loader are not taken from the training.
            with torch.random.fork_rng():
                batch = list(itertools.islice(self.loader, 1))
                diag_fisher(model, batch, **{**self.settings, "progress": False})

    def write(self, optimizer: Any, model: Any, folder: PathLike) -> None:
        """Write the files; process 0 alone, though all compute."""
        self._save(DiagFisher.from_optimizer(_bare(optimizer), model), folder)
        if self.loader is not None:
            self._save(diag_fisher(model, self.loader, **self.settings), folder)

    def _save(self, fisher: DiagFisher, folder: PathLike) -> None:
        if processes.rank() == 0:
            to = folder if self.folder is None else self.folder
            fisher.save(Path(to) / f"{fisher.meta['sampler']}.fisher.safetensors")


def _bare(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)

"""What every experiment has: settings, rows, and the rows that they are compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.figures import Figures
from benchmarks.experiments.tables import METRIC
from fisherkern.data import SequenceDataset
from fisherkern.encoders import BERT4Rec, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.evaluation import evaluate
from fisherkern.objectives import Objective
from fisherkern.training import load_model
from fisherkern.training.settings import CHOICES

Self = TypeVar("Self", bound="Experiment")

# Whole numbers that may be 0; the others are at least 1.
MAY_BE_ZERO = ("warmup_steps", "base_epochs", "extra_epochs")

# What BERT4Rec takes on Amazon Beauty: short sequences, three times the items.
BEAUTY: Mapping[str, Any] = {
    "max_len": 20,
    "dropout": 0.3,
    "mask_ratio": 0.4,
    "batch_size": 128,
    "lr": 1e-3,
}

# A row's name -> the builder of its model, called where its report is not stored yet.
RowBuilders = dict[str, Callable[[], nn.Module]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The settings of a table. A subclass names its rows and the rows they are compared with.

    Args:
        data: a data set or a file, as `load` takes it.
        base: a model file that the members start from, instead of a base trained here.
        max_len: length of a history.
        dim: width of the hidden state.
        layers: number of Transformer blocks.
        heads: number of attention heads.
        dropout: share of activations set to zero in training.
        batch_size: windows of a training step.
        lr: learning rate.
        warmup_steps: steps in which the learning rate rises to `lr`.
        crop: the window of a long history, as `train` takes it.
        validation_users: users of the validation score that choices are made by, evenly spread.
    """

    data: str
    base: str | None = None
    max_len: int = 50
    dim: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.1
    batch_size: int = 64
    lr: float = 3e-3
    warmup_steps: int = 100
    crop: str = "random"
    validation_users: int = 2000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name not in MAY_BE_ZERO)
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise InputError(f"{field.name}: must be at least {least}, got {value}")
            if field.name in CHOICES and value not in CHOICES[field.name]:
                choices = " or ".join(map(repr, CHOICES[field.name]))
                raise InputError(f"{field.name}: must be {choices}, got {value!r}")

    #: The name of the command and in config.json; by default the class's.
    NAME: ClassVar[str] = ""
    #: Fields that differ from the defaults above on a data set, by its name.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: Ensemble row; the gains of other rows are given as shares of its gain as well.
    ENSEMBLE: ClassVar[str | None] = None
    #: What a paper reports on ML-1M, by row, and a note; shown for that data alone.
    PAPER: ClassVar[Mapping[str, str]] = {}
    NOTE: ClassVar[str] = ""

    @classmethod
    def on(cls: type[Self], data: str, **given: Any) -> Self:
        """The settings for a data set: those given, else its presets, else the defaults.

        Raises InputError for a setting that the experiment does not have.
        """
        settings = {field.name for field in dataclasses.fields(cls)}
        for name in given:
            if name not in settings:
                raise InputError(f"{name}: {cls.name()} has no such setting")
        return cls(**{**cls.PRESETS.get(Path(data).stem, {}), **given, "data": data})

    @classmethod
    def name(cls) -> str:
        """The name of the command, and of the experiment in config.json."""
        return cls.NAME or cls.__name__.lower()

    def paper(self) -> tuple[Mapping[str, str], str]:
        """What a paper reports on these data, by row, and a note on it."""
        return (self.paper_numbers(), self.NOTE) if Path(self.data).stem == "ml-1m" else ({}, "")

    def paper_numbers(self) -> Mapping[str, str]:
        """The paper's numbers by row; the settings decide which row they stand beside."""
        return self.PAPER

    def rows(self, cache: ArtifactCache) -> RowBuilders:
        """The rows in the order in which they are made and shown."""
        raise NotImplementedError

    def rankings(self) -> Mapping[str, str]:
        """Other rankings of the test item: a column's title -> `seen` of `evaluate`."""
        return {}

    def references(self) -> dict[str, Sequence[str]]:
        """A column's title -> its reference rows; the best of them on validation is compared with.

        The first column's reference, where it is chosen, is marked in the table.
        """
        raise NotImplementedError

    def figures(self, cache: ArtifactCache) -> Figures:
        """The figures that are drawn of the first seed."""
        return {}

    def suffix(self, row: str) -> str:
        """What a row's name ends in if its references, and the ensemble, end in it as well."""
        return ""

    def extra_columns(self, cache: ArtifactCache) -> Mapping[str, Callable[[], dict[str, float]]]:
        """Row -> what computes the numbers of its extra columns, by the column's title."""
        if not self.rankings():
            return {}
        return {
            row: partial(self.other_rankings, cache, build)
            for row, build in self.rows(cache).items()
        }

    def other_rankings(
        self, cache: ArtifactCache, build: Callable[[], nn.Module]
    ) -> dict[str, float]:
        """A model's test NDCG@10 among the items that the other rankings have."""
        model = build()
        return {
            title: evaluate(model, cache.data, k=10, seen=seen, progress=cache.progress)[METRIC]
            for title, seen in self.rankings().items()
        }

    def sizes(self) -> dict[str, Any]:
        """The arguments of a Transformer encoder."""
        names = ("max_len", "dim", "layers", "heads", "dropout")
        return {name: getattr(self, name) for name in names}

    def untrained(self, cache: ArtifactCache, *, offset: int = 0) -> SequenceEncoder:
        """The encoder that a base, or a member from scratch, starts as."""
        return cache.fresh(BERT4Rec, offset=offset, **self.sizes())

    def training(self) -> dict[str, Any]:
        """The arguments of `ArtifactCache.train` that all models share."""
        names = ("batch_size", "lr", "warmup_steps", "crop")
        return {name: getattr(self, name) for name in names}

    def common_base(
        self, cache: ArtifactCache, objective: Objective, epochs: int
    ) -> SequenceEncoder:
        """The model that members start from: the file `base`, else one trained at a constant rate.

        It bears the row name "base".
        """
        if cache.given_base is not None:
            return cache.given_base
        settings = {"epochs": epochs, "seed": cache.seed, **self.training()}
        return cache.train("base", lambda: self.untrained(cache), objective, **settings)

    def load_base(self, data: SequenceDataset) -> SequenceEncoder | None:
        """The model of the file `base`, checked against the data."""
        if self.base is None:
            return None
        model = load_model(Path(self.base))
        if model.item_ids is None or list(model.item_ids) != list(data.item_ids):
            raise InputError(f"base: the catalogue of {self.base} is not that of {data.name}")
        return model

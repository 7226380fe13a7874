"""`fisherkern train`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from fisherkern import processes
from fisherkern.checks import check_count
from fisherkern.cli.arguments import command
from fisherkern.cli.evaluate import show_report
from fisherkern.cli.run import BEST_DEVICE, Run, check_most, over_catalogue_of
from fisherkern.data import SequenceDataset
from fisherkern.data.batching import Crop
from fisherkern.documents import parse_json
from fisherkern.encoders import ENCODERS, ItemParts, ParallelEncoders, SequenceEncoder
from fisherkern.encoders.stored import COUNTS
from fisherkern.errors import InputError, shown
from fisherkern.evaluation import evaluate
from fisherkern.objectives import (
    EMKD,
    CL4SRec,
    DuoRec,
    MaskedItems,
    NextItem,
    Objective,
    from_settings,
)
from fisherkern.training import (
    KeptCheckpoints,
    TrainingLog,
    TrainingSettings,
    load_model,
    save_model,
    train,
)
from fisherkern.training.settings import CHOICES

CONTRASTIVE: dict[str, Callable[[], Objective]] = {"cl4srec": CL4SRec, "duorec": DuoRec}


def encoder_arguments() -> dict[str, inspect.Parameter]:
    """Return the arguments of all encoders but the catalogue's, None where not given."""
    return {
        name: parameter.replace(default=None, annotation=parameter.annotation | None)
        for encoder in ENCODERS.values()
        for name, parameter in inspect.signature(encoder, eval_str=True).parameters.items()
        if name not in ("num_items", "items")
    }


@command(
    "train",
    train,
    TrainingSettings,
    without=("state", "max_len"),  # the folder's own, and the encoder's
    choices={
        "encoder": ENCODERS,
        "contrastive": CONTRASTIVE,
        "crop": get_args(Crop),
        **CHOICES,
    },
    more={"Encoder (each encoder has its own defaults)": encoder_arguments()},
)
def train_encoder(
    run: Run,
    *,
    encoder: str | None = None,
    init: Path | None = None,
    networks: int | None = None,
    noise: float = 0.0,
    objective: str | None = None,
    mask_ratio: float = 0.2,
    contrastive: str | None = None,
    contrastive_weight: float = 0.1,
    epochs: int = 60,
    validate_every: int | None = None,
    score: str = "ndcg@10",
    save_every_seconds: float | None = 60.0,
    keep: int | None = None,
    keep_every: int = 1,
    keep_state: bool = False,
    categories: bool = False,
    id_dropout: float | None = None,
    device: str = BEST_DEVICE,
) -> None:
    """Train an encoder; the same command resumes an interrupted run.

    Args:
        encoder: default: BERT4Rec.
        init: a checkpoint to start from.
        networks: number of networks to train jointly (EMKD); each gets its own seed, or a copy
            of --init.
        noise: standard deviation of the noise on the copies of --init.
        objective: masked, next, emkd, or an objective's settings in JSON (default: what suits
            the encoder; emkd with --networks).
        mask_ratio: share of masked items, of the objective masked.
        contrastive: a loss added to the objective.
        contrastive_weight: factor of the added loss.
        validate_every: epochs between validations (default: 1 with --patience).
        score: validation metric for early stopping, e.g. ndcg@10.
        keep: checkpoints to keep, of the last epochs, whichever is the best, to be merged:
            checkpoint-0060.safetensors and so on (default: none).
        keep_every: epochs from one kept checkpoint to the next.
        keep_state: keep state.safetensors when the run is done: its optimiser's second moments
            are a Fisher (`fisher --from-state`).
        categories: make an item of its row and of the data's attributes, its categories.
        id_dropout: share of rows that training leaves out, with --categories (default: 0).
        device: cpu, cuda or cuda:1.
    """
    check_most("networks", networks, 1000)
    data = run.data()
    names = [f"member{number}.safetensors" for number in range(networks or 0)]
    names += ["model.safetensors", "ema.safetensors"]
    if keep is not None:
        check_count("--keep", keep)
        check_count("--keep-every", keep_every)
        check_most("epochs", epochs, 9999)  # so that the names' order is that of the epochs
        names += [KeptCheckpoints.name(epoch) for epoch in range(1, epochs + 1)]
    elif keep_every != 1:
        raise InputError(
            "--keep-every: says how far apart the checkpoints of --keep are; give both"
        )
    out = run.out(f"train-{data.name}", *names, same_arguments=True)
    model, data = _model(run, data)
    validating = run.values["patience"] is not None or validate_every is not None
    settings = {name: run.values[name] for name in _settings()}
    given = {
        **run.of(train),
        **settings,
        "data": data,
        "objective": _objective(run, model, data),
        "validate": ValidationScore(score, data) if validating else None,
        "validate_every": validate_every or 1,
        "on_epoch": None if keep is None else KeptCheckpoints(out, keep, keep_every),
        "state": out / "state.safetensors",
    }
    log = train(model.to(run.device), **given)
    if processes.rank() == 0:
        with processes.alone():  # the others have ended
            _save(run, out, model, data, log)


def _settings() -> list[str]:
    return [field.name for field in dataclasses.fields(TrainingSettings) if field.name != "max_len"]


def _save(
    run: Run, out: Path, model: SequenceEncoder, data: SequenceDataset, log: TrainingLog
) -> None:
    """Write the model and what belongs to it, and tell its validation metrics."""
    report = evaluate(model, data, split="validation", progress=run.progress)
    save_model(model, out / "model.safetensors", metrics=dict(report))
    if isinstance(model, ParallelEncoders):
        for index, member in enumerate(model.networks):
            save_model(member, out / f"member{index}.safetensors")
    if log.ema is not None:
        averaged = evaluate(log.ema, data, split="validation", progress=run.progress)
        save_model(log.ema, out / "ema.safetensors", metrics=dict(averaged))
    result = {
        "losses": log.losses,
        "scores": log.scores,
        "best_epoch": log.best_epoch,
        "validation": report.to_json(),
    }
    run.finish(out, result)
    if not run.values["keep_state"]:
        (out / "state.safetensors").unlink(missing_ok=True)  # last: until here it can be gone on
    show_report(report)
    print(f"written to {out / 'model.safetensors'}")


def _model(run: Run, data: SequenceDataset) -> tuple[SequenceEncoder, SequenceDataset]:
    """Return the encoder to train, and the data over its catalogue."""
    init, name, networks = (run.values[key] for key in ("init", "encoder", "networks"))
    given = {key: run.values[key] for key in encoder_arguments()}
    given = {key: value for key, value in given.items() if value is not None}
    items = _items(run, data)
    if init is not None:
        if items is not None:
            raise InputError(f"--categories: items are made as those of {init} are; leave it out")
        model = load_model(init)
        found = {"encoder": type(model).__name__, **model.config}
        asked = given if name is None else {"encoder": name, **given}
        for key, value in asked.items():
            if found.get(key) != value:
                raise InputError(f"{_flag(key)}: {init} has {found.get(key)}, not {value}")
        if networks is not None:
            model = ParallelEncoders.copies(model, networks, run.values["noise"], run.seed)
        return model, over_catalogue_of(model, data, init)
    encoder = ENCODERS[name or "BERT4Rec"]
    known = inspect.signature(encoder).parameters
    for key in given:
        if key not in known:
            raise InputError(f"{_flag(key)}: {encoder.__name__} has no {key}")
    _check_size(encoder, data.num_items, given, networks or 1)
    if items is not None:
        given["items"] = items
    if networks is not None:

        def make() -> SequenceEncoder:
            return encoder(data.num_items, **given)

        return ParallelEncoders.seeded(make, networks, run.seed), data
    torch.manual_seed(run.seed)
    return encoder(data.num_items, **given), data


def _items(run: Run, data: SequenceDataset) -> ItemParts | None:
    """Return what items are made of, None for a row each."""
    dropout = run.values["id_dropout"]
    if not run.values["categories"]:
        if dropout is not None:
            raise InputError("--id-dropout: leaves rows out for categories; give --categories")
        return None
    if not data.attributes:
        raise InputError(f"--categories: {data.name} has no attributes")
    return ItemParts.of(data, id_dropout=dropout or 0.0)


def _check_size(
    encoder: type[SequenceEncoder], num_items: int, given: dict[str, Any], networks: int
) -> None:
    """Refuse a network that this machine's memory does not hold, before it is built."""
    for key, value in given.items():
        if isinstance(value, int):
            check_most(key, value, 1000 if key in COUNTS else 1 << 16)
    with torch.device("meta"):
        model = encoder(num_items, **given)
    # Weights, gradients and AdamW's two moments; the system does not refuse what it lacks later.
    needed = networks * 4 * sum(own.numel() * own.element_size() for own in model.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"{encoder.__name__}: needs about {needed / 2**30:,.0f} GiB of memory to train, and "
            f"{there / 2**30:,.0f} are here"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _objective(run: Run, model: SequenceEncoder, data: SequenceDataset) -> Objective:
    parallel = isinstance(model, ParallelEncoders)
    fitting = "masked" if hasattr(model, "mask_token") else "next"
    text = run.values["objective"] or ("emkd" if parallel else fitting)
    if text == "emkd":
        if not isinstance(model, ParallelEncoders):
            raise InputError("--objective: emkd trains several networks; give --networks")
        objective: Objective = EMKD(
            attribute_weight=1.0 if data.attributes else 0.0,
            networks=len(model.networks),
            dim=model.networks[0].dim,
        )
    elif text == "masked":
        objective = MaskedItems(run.values["mask_ratio"])
    elif text == "next":
        objective = NextItem(last_only=not getattr(model, "causal", False))
    else:
        if not text.lstrip().startswith("{"):
            known = "masked, next, emkd"
            raise InputError(f"--objective: {shown(text)} is neither {known}, nor a JSON object")
        objective = from_settings(parse_json("--objective", text))
    contrastive = run.values["contrastive"]
    if contrastive is not None:
        objective = objective + run.values["contrastive_weight"] * CONTRASTIVE[contrastive]()
    return objective


@dataclasses.dataclass(frozen=True)
class ValidationScore:
    """The validation score --score of a model; its name belongs to the run's identity."""

    metric: str
    data: SequenceDataset

    def __post_init__(self) -> None:
        if re.fullmatch(r"(?:hr|mrr|ndcg)@[1-9]\d{0,8}", self.metric) is None:
            odd = shown(self.metric)
            raise InputError(f"--score: {odd} is not like ndcg@10, hr@5 or mrr@20")

    def __call__(self, model: SequenceEncoder) -> float:
        """Return the model's metric on validation."""
        k = int(self.metric.partition("@")[2])
        return evaluate(model, self.data, split="validation", k=(k,))[self.metric]

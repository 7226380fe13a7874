"""`fisherkern train`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from fisherkern.cli.common import command, finish, load_data, out_folder, over_catalogue_of
from fisherkern.cli.options import add_flag
from fisherkern.data import SequenceDataset
from fisherkern.data.batching import Crop
from fisherkern.encoders import ENCODERS, ParallelEncoders, SequenceEncoder
from fisherkern.errors import InputError
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
from fisherkern.training import TrainingSettings, distributed, load_model, save_model, train
from fisherkern.training.settings import CHOICES

CONTRASTIVE: dict[str, Callable[[], Objective]] = {"cl4srec": CL4SRec, "duorec": DuoRec}
# Those of the settings that the command line has under other names, or not at all.
LEFT_OUT = ("epochs", "seed", "max_len", "validate_every")


def add_train(commands: Any) -> None:
    parser = command(commands, "train", _train, "train an encoder; resumes if interrupted")
    parser.add_argument("--config", type=Path, help="arguments by name in JSON, as in result.json")
    parser.add_argument("--init", type=Path, help="a checkpoint to start from")
    parser.add_argument("--encoder", choices=list(ENCODERS), help="default: BERT4Rec")
    parser.add_argument(
        "--networks", type=int, help="train so many in parallel, each from a seed, or from --init"
    )
    parser.add_argument("--noise", type=float, default=0.0, help="of --networks from --init")
    group = parser.add_argument_group("arguments of the encoder, with its own defaults")
    for name, parameter in encoder_arguments().items():
        add_flag(group, name, str(parameter.annotation), None)
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--objective",
        help="masked, next, emkd, or an objective's settings in JSON "
        "(default: what suits the encoder; emkd with --networks)",
    )
    group.add_argument("--mask-ratio", type=float, default=0.2, help="of --objective masked")
    group.add_argument("--contrastive", choices=list(CONTRASTIVE), help="added to the objective")
    group.add_argument("--contrastive-weight", type=float, default=0.1)
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=60)
    for field in dataclasses.fields(TrainingSettings):
        if field.name not in LEFT_OUT:
            choices = {**CHOICES, "crop": get_args(Crop)}.get(field.name)
            add_flag(group, field.name, str(field.type), field.default, choices)
    group.add_argument("--validate-every", type=int, help="epochs; default: 1 with --patience")
    group.add_argument("--score", default="ndcg@10", help="of validations, full ranking")
    group.add_argument("--save-every-seconds", type=float, default=60.0)
    group.add_argument("--log-dir", type=Path, help="folder for TensorBoard")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def encoder_arguments() -> dict[str, inspect.Parameter]:
    """The arguments of all encoders but the catalogue's size, by name."""
    return {
        name: parameter
        for encoder in ENCODERS.values()
        for name, parameter in inspect.signature(encoder).parameters.items()
        if name != "num_items"
    }


def _train(options: argparse.Namespace) -> None:
    data = load_data(options.data)
    out = out_folder(options, f"train-{data.name}")
    model, data = _model(options, data)
    validating = options.patience is not None or options.validate_every is not None
    settings = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(TrainingSettings)
        if field.name not in ("max_len", "validate_every")
    }
    with distributed.init_distributed(_device(options.device)) as device:
        rank = distributed.rank()
        log = train(
            model.to(device),
            data,
            objective=_objective(options, model, data),
            validate=_score(options, data) if validating else None,
            validate_every=options.validate_every or 1,
            state=out / "state.safetensors",
            save_every_seconds=options.save_every_seconds,
            log_dir=options.log_dir,
            progress=not options.quiet,
            **settings,
        )
    if rank != 0:
        return
    report = evaluate(model, data, split="validation", progress=not options.quiet)
    save_model(model, out / "model.safetensors", metrics=dict(report))
    if isinstance(model, ParallelEncoders):
        for index, member in enumerate(model.networks):
            save_model(member, out / f"member{index}.safetensors")
    if log.ema is not None:
        averaged = evaluate(log.ema, data, split="validation", progress=not options.quiet)
        save_model(log.ema, out / "ema.safetensors", metrics=dict(averaged))
    (out / "state.safetensors").unlink(missing_ok=True)
    result = {
        "losses": log.losses,
        "scores": log.scores,
        "best_epoch": log.best_epoch,
        "validation": report.to_json(),
    }
    finish(out, options, result)
    print(report.table())
    print(f"written to {out / 'model.safetensors'}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device: {name!r} is not like cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: there is no CUDA device here")
    return device


def _model(
    options: argparse.Namespace, data: SequenceDataset
) -> tuple[SequenceEncoder, SequenceDataset]:
    """The encoder to train, and the data over its catalogue."""
    given = {name: getattr(options, name) for name in encoder_arguments()}
    given = {name: value for name, value in given.items() if value is not None}
    if options.init is not None:
        model = load_model(options.init)
        found = {"encoder": type(model).__name__, **model.config}
        asked = given if options.encoder is None else {"encoder": options.encoder, **given}
        for name, value in asked.items():
            if found.get(name) != value:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag}: {options.init} has {found.get(name)}, not {value}")
        if options.networks is not None:
            model = ParallelEncoders.copies(model, options.networks, options.noise, options.seed)
        return model, over_catalogue_of(model, data, options.init)
    encoder = ENCODERS[options.encoder or "BERT4Rec"]
    known = inspect.signature(encoder).parameters
    for name in given:
        if name not in known:
            raise InputError(f"--{name.replace('_', '-')}: {encoder.__name__} has no {name}")
    if options.networks is not None:

        def make() -> SequenceEncoder:
            return encoder(data.num_items, **given)

        return ParallelEncoders.seeded(make, options.networks, options.seed), data
    torch.manual_seed(options.seed)
    return encoder(data.num_items, **given), data


def _objective(
    options: argparse.Namespace, model: SequenceEncoder, data: SequenceDataset
) -> Objective:
    parallel = isinstance(model, ParallelEncoders)
    fitting = "masked" if hasattr(model, "mask_token") else "next"
    text = options.objective or ("emkd" if parallel else fitting)
    if text == "emkd":
        if not isinstance(model, ParallelEncoders):
            raise InputError("--objective: emkd trains several networks; give --networks")
        objective: Objective = EMKD(
            attribute_weight=1.0 if data.attributes else 0.0,
            networks=len(model.networks),
            dim=model.networks[0].dim,
        )
    elif text == "masked":
        objective = MaskedItems(options.mask_ratio)
    elif text == "next":
        objective = NextItem(last_only=not getattr(model, "causal", False))
    else:
        try:
            settings = json.loads(text)
        except json.JSONDecodeError:
            settings = None
        if not isinstance(settings, dict):
            known = "masked, next, emkd"
            raise InputError(f"--objective: {text!r} is neither {known}, nor a JSON object")
        objective = from_settings(settings)
    if options.contrastive is not None:
        objective = objective + options.contrastive_weight * CONTRASTIVE[options.contrastive]()
    return objective


def _score(
    options: argparse.Namespace, data: SequenceDataset
) -> Callable[[SequenceEncoder], float]:
    """The validation score --score of a model."""
    match = re.fullmatch(r"(?:hr|mrr|ndcg)@([1-9]\d*)", options.score)
    if match is None:
        raise InputError(f"--score: {options.score!r} is not like ndcg@10, hr@5 or mrr@20")
    k = int(match[1])

    def score(model: SequenceEncoder) -> float:
        return evaluate(model, data, split="validation", k=(k,))[options.score]

    return score

"""The command line: `fisherkern demo | train | fisher | merge | evaluate | reproduce | data`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from fisherkern import data as data_package
from fisherkern.data import SequenceDataset
from fisherkern.encoders import BERT4Rec, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.evaluation import compare, evaluate
from fisherkern.evaluation.candidates import CANDIDATES
from fisherkern.experiments import DEMO, MEMBERS, Story, run
from fisherkern.files import write_json
from fisherkern.fisher import DiagFisher, diag_fisher
from fisherkern.fisher.samplers import SAMPLERS
from fisherkern.merging import RULES, merge
from fisherkern.objectives import MaskedItems
from fisherkern.training import load_model, save_model, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after one line on stderr that names what was wrong."""
    logging.basicConfig(format="%(message)s")
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        options.run(options)
    except InputError as error:
        print(f"fisherkern {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is stored", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fisherkern", description="Fisher-weighted merging of next-item recommenders."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "the whole story on made-up data, in minutes")
    demo.add_argument("--members", choices=MEMBERS, default=DEMO.members)
    # Its tensors are small: a second thread mostly waits for the first.
    demo.set_defaults(data="synthetic", threads=1)

    reproduce = _command(commands, "reproduce", _reproduce, "an experiment on real data")
    reproduce.add_argument("experiment", choices=["merge"])
    reproduce.add_argument("--members", choices=MEMBERS, default="shards")
    for field in dataclasses.fields(Story):
        if field.name not in ("data", "members", "seed"):
            kind = type(field.default)
            name = "--" + field.name.replace("_", "-")
            reproduce.add_argument(name, type=kind, default=field.default, metavar=kind.__name__)

    trainer = _command(commands, "train", _train, "train a BERT4Rec; resumes if interrupted")
    _model_options(trainer)

    fisher = _command(commands, "fisher", _fisher, "the diagonal Fisher of a checkpoint")
    fisher.add_argument("checkpoint", type=Path)
    fisher.add_argument("--sampler", default="topk", metavar="|".join(SAMPLERS))
    fisher.add_argument("--k", type=int, default=30, help="items per sequence")
    fisher.add_argument("--probes", type=int, help="directions of sketch and exact")
    fisher.add_argument("--reduction", choices=["sequence", "batchwise"], default="sequence")
    fisher.add_argument("--rescale", action="store_true", help="divide by the captured mass")
    fisher.add_argument("--tol", type=float, help="share of the energy that exact may drop")
    fisher.add_argument("--split", default="train")
    fisher.add_argument("--batch-size", type=int, default=256)
    fisher.add_argument("--chunk", type=int, help="sequences worked on at once")
    fisher.add_argument("--limit", type=int, help="only so many sequences, evenly spread")

    merger = _command(commands, "merge", _merge, "one model out of several checkpoints")
    merger.add_argument("checkpoints", type=Path, nargs="+")
    merger.add_argument("--fisher", type=Path, nargs="+", default=[], help="one per checkpoint")
    merger.add_argument("--method", choices=list(RULES), help="default: what the files imply")
    merger.add_argument("--weights", help="comma-separated, or 'search' (needs --data)")
    merger.add_argument("--floor", type=float, default=0.1, help="relative to the mean Fisher")

    evaluator = _command(commands, "evaluate", _evaluate, "ranking metrics of a checkpoint")
    evaluator.add_argument("checkpoint", type=Path)
    evaluator.add_argument("--against", type=Path, help="a checkpoint to compare with, paired")
    evaluator.add_argument("--split", choices=["validation", "test"], default="test")
    evaluator.add_argument("--candidates", choices=CANDIDATES, default="full")
    evaluator.add_argument("--seen", choices=["exclude", "keep"], default="exclude")
    evaluator.add_argument("--k", type=int, nargs="+", default=[5, 10, 20])

    _command(commands, "data", _data, "read a data set and say what is in it")
    return parser


def _command(commands: Any, name: str, function: Any, summary: str) -> argparse.ArgumentParser:
    """A sub-command with the options that all share."""
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--data", help="ml-1m, beauty, synthetic, or a file")
    parser.add_argument("--out", type=Path, help="folder for the results (default: runs/...)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=function)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--schedule", choices=["constant", "linear"], default="constant")
    parser.add_argument("--mask-ratio", type=float, default=0.2)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--norm", choices=["post", "pre"], default="post")
    parser.add_argument("--init", type=Path, help="a checkpoint to start from")


def _load(options: argparse.Namespace) -> SequenceDataset:
    if options.data is None:
        raise InputError("--data: name a data set (ml-1m, beauty, synthetic) or a file")
    return data_package.load(options.data)


def _out(options: argparse.Namespace, default: str) -> Path:
    return options.out if options.out is not None else Path("runs") / default


def _demo(options: argparse.Namespace) -> None:
    story = dataclasses.replace(DEMO, data=options.data, members=options.members, seed=options.seed)
    run(story, _out(options, f"demo-{story.members}"), progress=not options.quiet)


def _reproduce(options: argparse.Namespace) -> None:
    if options.data is None:
        raise InputError("--data: name a data set (ml-1m, beauty) or a file")
    names = [field.name for field in dataclasses.fields(Story)]
    story = Story(**{name: getattr(options, name) for name in names})
    default = f"merge-{Path(options.data).stem}-{story.members}-{story.seed}"
    run(story, _out(options, default), progress=not options.quiet)


def _train(options: argparse.Namespace) -> None:
    data = _load(options)
    out = _out(options, f"train-{data.name}")
    if options.init is not None:
        model: SequenceEncoder = load_model(options.init)
        data = _over_catalogue_of(model, data, options.init)
    else:
        torch.manual_seed(options.seed)
        model = BERT4Rec(
            data.num_items,
            max_len=options.max_len,
            dim=options.dim,
            layers=options.layers,
            heads=options.heads,
            dropout=options.dropout,
            norm=options.norm,
        )
    log = train(
        model,
        data,
        objective=MaskedItems(options.mask_ratio),
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        schedule=options.schedule,
        seed=options.seed,
        state=out / "state.safetensors",
        progress=not options.quiet,
    )
    report = evaluate(model, data, split="validation", progress=not options.quiet)
    save_model(model, out / "model.safetensors", metrics=dict(report))
    (out / "state.safetensors").unlink(missing_ok=True)
    _finish(out, options, {"losses": log.losses, "validation": report.to_json()})
    print(report.table())
    print(f"written to {out / 'model.safetensors'}")


def _fisher(options: argparse.Namespace) -> None:
    model = load_model(options.checkpoint)
    data = _over_catalogue_of(model, _load(options), options.checkpoint)
    loader = data.loader(
        split=options.split,
        batch_size=options.batch_size,
        max_len=model.max_len,
        limit=options.limit,
    )
    found = diag_fisher(
        model,
        loader,
        sampler=options.sampler,
        k=options.k,
        probes=options.probes,
        reduction=options.reduction,
        seed=options.seed,
        tol=options.tol,
        rescale=options.rescale,
        chunk=options.chunk,
        progress=not options.quiet,
    )
    out = _out(options, f"fisher-{options.checkpoint.stem}")
    path = out / f"{options.checkpoint.stem}.fisher.safetensors"
    found.save(path)
    largest = {name: float(value.max()) for name, value in found.items()}
    mean = {name: float(value.mean()) for name, value in found.items()}
    _finish(out, options, {"meta": found.meta, "mean": mean, "max": largest})
    width = max(map(len, found))
    print(f"{'parameter':<{width}}  {'mean':>10}  {'max':>10}")
    for name in found:
        print(f"{name:<{width}}  {mean[name]:10.3e}  {largest[name]:10.3e}")
    print(f"written to {path}")


def _merge(options: argparse.Namespace) -> None:
    models = [load_model(path) for path in options.checkpoints]
    fishers = [DiagFisher.load(path) for path in options.fisher]
    weights: Any = options.weights
    score = None
    if weights == "search":
        data = _load(options)

        def score(model: SequenceEncoder) -> float:
            return evaluate(model, data, split="validation", k=(10,))["ndcg@10"]

    elif weights is not None:
        try:
            weights = [float(part) for part in weights.split(",")]
        except ValueError:
            raise InputError(f"--weights: {weights!r} is neither numbers nor 'search'") from None
    merged = merge(
        models,
        method=options.method,
        weights=weights,
        fishers=fishers or None,
        floor=options.floor,
        score=score,
        seed=options.seed,
    )
    out = _out(options, "merge")
    save_model(merged, out / "merged.safetensors", extra={"merge_report": merged.merge_report})
    members = [str(path) for path in options.checkpoints]
    _finish(out, options, {"members": members, "report": merged.merge_report})
    print(f"{'member':<40} weight")
    assert merged.merge_report is not None
    for path, weight in zip(members, merged.merge_report["weights"], strict=True):
        print(f"{path:<40} {weight:.4f}")
    print(f"written to {out / 'merged.safetensors'}")


def _evaluate(options: argparse.Namespace) -> None:
    data = _load(options)
    paths = [options.checkpoint] + ([options.against] if options.against else [])
    reports = []
    for path in paths:
        model = load_model(path)
        reports.append(
            evaluate(
                model,
                _over_catalogue_of(model, data, path),
                split=options.split,
                k=tuple(options.k),
                candidates=options.candidates,
                seen=options.seen,
                seed=options.seed,
                progress=not options.quiet,
            )
        )
    result = {str(path): r.to_json() for path, r in zip(paths, reports, strict=True)}
    for path, report in zip(paths, reports, strict=True):
        print(f"{path}\n{report.table()}")
    if options.against:
        difference = compare(reports[0], reports[1])
        result["difference"] = difference.to_json()
        print(f"{paths[0]} minus {paths[1]}\n{difference.table()}")
    _finish(_out(options, f"evaluate-{options.checkpoint.stem}"), options, result)


def _data(options: argparse.Namespace) -> None:
    data = _load(options)
    lengths = data.offsets[1:] - data.offsets[:-1]
    result = {
        "name": data.name,
        "users": data.num_users,
        "items": data.num_items,
        "actions": data.num_actions,
        "length": {
            "min": int(lengths.min()),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "attributes": None if data.attributes is None else len(data.attributes),
        "fingerprint": data.fingerprint(),
    }
    _finish(_out(options, f"data-{data.name}"), options, result)
    for name, value in result.items():
        print(f"{name:<12} {value}")


def _over_catalogue_of(
    model: SequenceEncoder, data: SequenceDataset, path: Path
) -> SequenceDataset:
    """The data over the model's catalogue, which may hold more items: a merge's union."""
    if model.item_ids is not None and list(model.item_ids) != list(data.item_ids):
        return data.with_items(model.item_ids)
    if model.num_items != data.num_items:
        raise InputError(f"{path}: its catalogue is not that of {data.name}")
    return data


def _finish(out: Path, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """result.json: the command's arguments and what it found."""
    arguments = {
        name: value if isinstance(value, (int, float, str, list, type(None))) else str(value)
        for name, value in vars(options).items()
        if name != "run"
    }
    arguments = {n: [str(v) for v in a] if isinstance(a, list) else a for n, a in arguments.items()}
    write_json(out / "result.json", {"arguments": arguments, **result})

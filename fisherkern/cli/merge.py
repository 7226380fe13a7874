"""`fisherkern merge`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fisherkern.cli.common import (
    command,
    finish,
    load_data,
    on_validation,
    out_folder,
    over_catalogue_of,
)
from fisherkern.cli.recipe import Recipe, from_file, from_flags
from fisherkern.data import SequenceDataset
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.fisher import DiagFisher, fisher_product, linear_grams
from fisherkern.members.options import check_options
from fisherkern.merging import METHODS, merge, merge_files
from fisherkern.postmerge import weight_ensemble
from fisherkern.postmerge.weight_ensemble import OPTIONS
from fisherkern.training import load_model, save_model

# What gives more than one network's weights, and is no method of `merge`.
ENSEMBLE = "weight_ensemble"

# Flags that a recipe has keys for; --data and --out may still be given beside it.
IN_RECIPE = ("checkpoints", "fisher", "base", "method", "weights", "option", "floor", "steps")


def add_merge(commands: Any) -> None:
    parser = command(commands, "merge", _merge, "one model out of several checkpoints")
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--recipe", type=Path, help="a YAML file that says what to merge and how")
    parser.add_argument("--fisher", type=Path, nargs="+", help="one per checkpoint")
    parser.add_argument("--base", type=Path, help="the checkpoint that the members started from")
    parser.add_argument(
        "--method", choices=[*METHODS, "auto", ENSEMBLE], help="default: what the files imply"
    )
    parser.add_argument("--weights", help="comma-separated, or 'search' (needs --data)")
    parser.add_argument(
        "--option", action="append", metavar="NAME=VALUE", help="of the method; may be repeated"
    )
    parser.add_argument("--floor", type=float, help="relative to the mean Fisher (default: 0.1)")
    parser.add_argument(
        "--steps",
        type=int,
        help="search draws, gradient steps or CG iterations, depending on --method",
    )
    parser.add_argument(
        "--limit", type=int, help="sequences that regmean and full_fisher look at (default: 512)"
    )
    parser.add_argument(
        "--stream", action="store_true", help="a block of rows at a time, in little memory"
    )


def _merge(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    out = out_folder(options, "merge") if recipe.out is None else recipe.out
    path = out / "merged.safetensors"
    if options.stream:
        report = _streamed(recipe, path)
    elif recipe.method == ENSEMBLE:
        report = _weight_ensemble(recipe, path)
    else:
        report = _in_memory(recipe, path, options)
    members = [str(path) for path in recipe.members]
    finish(out, options, {"members": members, "report": report})
    _print_weights(members, report["weights"])
    print(f"written to {path}")


def _streamed(recipe: Recipe, path: Path) -> dict[str, Any]:
    if recipe.steps is not None:
        raise InputError("--stream: it neither searches nor learns, so it takes no steps")
    return merge_files(
        recipe.members,
        path,
        method=recipe.method,
        weights=recipe.weights,  # type: ignore[arg-type]  # a word is refused there
        fishers=recipe.fishers or None,
        base=recipe.base,
        options=recipe.options or None,
        floor=recipe.floor,
        normalize=recipe.normalize,
        seed=recipe.seed,
    )


def _in_memory(recipe: Recipe, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    models = [load_model(path) for path in recipe.members]
    merged = merge(
        models,
        method=recipe.method,
        weights=recipe.weights,
        fishers=[DiagFisher.load(path) for path in recipe.fishers] or None,
        base=None if recipe.base is None else load_model(recipe.base),
        options=recipe.options or None,
        floor=recipe.floor,
        normalize=recipe.normalize,
        steps=recipe.steps,
        seed=recipe.seed,
        **_from_data(recipe, models, progress=not options.quiet),
    )
    assert merged.merge_report is not None
    save_model(merged, path, extra={"merge_report": merged.merge_report})
    return merged.merge_report


def _weight_ensemble(recipe: Recipe, path: Path) -> dict[str, Any]:
    """Option density makes it the efficient one: pruned task vectors, one router."""
    for name, value in (("weights", recipe.weights), ("fishers", recipe.fishers)):
        if value:
            raise InputError(f"method {ENSEMBLE!r} takes no {name}")
    if recipe.base is None:
        raise InputError(f"method {ENSEMBLE!r} needs base: the model that the members started from")
    settings = check_options(ENSEMBLE, OPTIONS, recipe.options)
    data = load_data(recipe.data)
    ensemble = weight_ensemble(
        [load_model(path) for path in recipe.members],
        base=load_model(recipe.base),
        loader=_validation(data, recipe),
        efficient="density" in recipe.options,
        steps=1000 if recipe.steps is None else recipe.steps,
        seed=recipe.seed,
        **settings,
    )
    assert ensemble.merge_report is not None
    save_model(ensemble, path, extra={"merge_report": ensemble.merge_report})
    return ensemble.merge_report


def _recipe(options: argparse.Namespace) -> Recipe:
    if options.recipe is None:
        return from_flags(options)
    for name in IN_RECIPE:
        if getattr(options, name):
            flag = name if name == "checkpoints" else f"--{name}"
            raise InputError(f"{flag}: the --recipe says it; give one or the other")
    recipe = from_file(options.recipe)
    recipe.data = options.data or recipe.data
    recipe.out = options.out or recipe.out
    recipe.seed = options.seed or recipe.seed
    recipe.limit = options.limit or recipe.limit
    return recipe


def _from_data(
    recipe: Recipe, models: Sequence[SequenceEncoder], *, progress: bool
) -> dict[str, Any]:
    """The arguments of `merge` that the method takes from data: validation split or training."""
    inputs = METHODS[recipe.method].inputs if recipe.method in METHODS else {}
    wanted = {name for name in ("score", "validation", "grams", "products") if name in inputs}
    if recipe.method == "auto":
        wanted = {"score", "validation"}
    if recipe.weights == "search":
        wanted.add("score")
    if not wanted:
        return {}
    data = load_data(recipe.data)
    found: dict[str, Any] = {}
    if "score" in wanted:
        found["score"] = lambda model: on_validation(model, data)["ndcg@10"]
    if "validation" in wanted:
        found["validation"] = _validation(data, recipe)
    for name, make in (
        ("grams", lambda model, loader: linear_grams(model, loader, progress=progress)),
        ("products", fisher_product),
    ):
        if name in wanted:
            found[name] = [
                make(model, _histories(model, data, path, recipe))
                for model, path in zip(models, recipe.members, strict=True)
            ]
    return found


def _validation(
    data: SequenceDataset, recipe: Recipe
) -> Callable[[SequenceEncoder], Iterable[Any]]:
    def batches(model: SequenceEncoder) -> Iterable[Any]:
        own = over_catalogue_of(model, data, Path("the merged model"))
        return own.loader(split="validation", batch_size=recipe.batch_size, max_len=model.max_len)

    return batches


def _histories(
    model: SequenceEncoder, data: SequenceDataset, path: Path, recipe: Recipe
) -> Iterable[Any]:
    return over_catalogue_of(model, data, path).loader(
        split="train", batch_size=recipe.batch_size, max_len=model.max_len, limit=recipe.limit
    )


def _print_weights(members: Sequence[str], weights: Any) -> None:
    """A table of lambda: a column of numbers, or one per tensor where they were learned so."""
    if isinstance(weights, list):
        print(f"{'member':<40} weight")
        for path, weight in zip(members, weights, strict=True):
            print(f"{path:<40} {weight:.4f}")
        return
    width = max(map(len, weights))
    print(f"{'tensor':<{width}}  {'  '.join(members)}")
    for name, own in weights.items():
        columns = (f"{w:{max(6, len(path))}.4f}" for w, path in zip(own, members, strict=True))
        print(f"{name:<{width}}  {'  '.join(columns)}")

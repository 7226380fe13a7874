"""`fisherkern merge`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fisherkern import processes
from fisherkern.adapters import load_tensors
from fisherkern.adapters.files.dcp_files import is_dcp
from fisherkern.adapters.sharded.dcp import SUFFIX
from fisherkern.cli.arguments import command
from fisherkern.cli.recipe import RECIPE_FIELDS, Recipe, from_file, option_from, weights_from
from fisherkern.cli.run import Run, on_validation, over_catalogue_of
from fisherkern.data import SequenceDataset
from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.fisher import DiagFisher, fisher_product, linear_grams
from fisherkern.members.options import check_options
from fisherkern.merging import METHODS, merge, merge_files
from fisherkern.merging.files import is_native
from fisherkern.postmerge import weight_ensemble
from fisherkern.postmerge.weight_ensemble import OPTIONS
from fisherkern.tables import print_table
from fisherkern.training import save_model

# What gives more than one network's weights, and is no method of `merge`.
ENSEMBLE = "weight_ensemble"

# Flags that may be given beside a recipe; they go before its keys.
BESIDE_RECIPE = ("data", "out", "seed", "limit", "batch_size")


@command("merge", merge, choices={"method": [*METHODS, "auto", ENSEMBLE]})
def merge_checkpoints(
    run: Run,
    checkpoints: list[Path] = (),  # type: ignore[assignment]  # none where there is a recipe
    *,
    recipe: Path | None = None,
    method: str | None = None,
    fisher: list[Path] | None = None,
    base: Path | None = None,
    weights: str | None = None,
    option: list[str] | None = None,
    stream: bool = False,
    limit: int = Recipe.limit,
    batch_size: int = Recipe.batch_size,
) -> None:
    """Merge several checkpoints into one model.

    Args:
        checkpoints: the members' model files, or native checkpoints of other libraries: files
            (.pth, .pt, .bin, .ckpt, .safetensors) or folders (Hugging Face, PEFT,
            torch.distributed.checkpoint).
        recipe: a YAML file that says what to merge and how, in place of the flags below; ours, or
            mergekit's.
        method: default: fisher with --fisher, else weighted or uniform.
        fisher: one Fisher file per checkpoint.
        base: the checkpoint that the members started from.
        weights: one number per member, comma-separated; search (needs --data); or linear-decay,
            cosine-decay or 1-sqrt-decay, for checkpoints of one run, the oldest first.
        option: name=value, an option of the method; may be repeated.
        steps: search draws, gradient steps or CG iterations, depending on --method.
        stream: merge from disk, a block of rows at a time, in little memory.
        limit: sequences that regmean and full_fisher look at.
        batch_size: sequences in a batch.
    """
    plan = _recipe(run)
    inputs = [*plan.members, *plan.fishers, *([plan.base] if plan.base else [])]
    native = any(map(is_native, plan.members))
    name = "merged" + _suffix(plan)
    out = run.out("merge", name, folder=plan.out, inputs=inputs)
    path = out / name
    _check_dtype(plan)
    if stream or native:
        report = _streamed(plan, path)
    elif plan.method == ENSEMBLE:
        report = _weight_ensemble(run, plan, path)
    else:
        report = _in_memory(run, plan, path)
    members = [str(path) for path in plan.members]
    run.finish(out, {"members": members, "report": report, "used": plan.to_json()})
    print_table(_weight_rows(members, report["weights"]))
    print(f"written to {path}")


def _recipe(run: Run) -> Recipe:
    """Return the recipe that --recipe names, or the flags describe."""
    values = run.values
    if values["recipe"] is None:
        if not values["checkpoints"]:
            raise InputError("checkpoints: name the members' files, or a --recipe")
        given = {name: values[name] for name in RECIPE_FIELDS if name in values}
        return Recipe(
            **{
                **given,
                "members": values["checkpoints"],
                "fishers": values["fisher"] or [],
                "weights": weights_from(values["weights"]),
                "options": dict(option_from(text) for text in values["option"] or []),
            }
        )
    for name in ("checkpoints", "fisher", "option", *RECIPE_FIELDS):
        if name in run.given and name not in BESIDE_RECIPE:
            flag = name if name == "checkpoints" else "--" + name.replace("_", "-")
            raise InputError(f"{flag}: the --recipe says it; give one or the other")
    recipe = from_file(values["recipe"])
    for name in run.given.intersection(BESIDE_RECIPE):
        setattr(recipe, name, values[name])
    return recipe


def _suffix(recipe: Recipe) -> str:
    """Return the ending of the result's name: the first member's, nothing for a folder."""
    first = recipe.members[0]
    if is_dcp(first):
        return SUFFIX
    if recipe.options.get("full") is True:  # a delta of low-rank adapters
        return ".safetensors"
    return "" if first.is_dir() or first.name.endswith(".index.json") else first.suffix


def _check_dtype(recipe: Recipe) -> None:
    """Raise InputError unless the members have the dtype that a recipe asks for."""
    for path in recipe.members if recipe.dtype is not None else []:
        tensors = load_tensors(path)
        for name in tensors:
            dtype = tensors.dtype(name)
            if dtype.is_floating_point and str(dtype) != f"torch.{recipe.dtype}":
                raise InputError(
                    f"{path}: tensor {name!r} is {str(dtype).removeprefix('torch.')} and the "
                    f"recipe's dtype {recipe.dtype}; a merge keeps the members' dtype"
                )


@contextlib.contextmanager
def _set_aside(path: Path) -> Iterator[None]:
    """Move a folder of an earlier merge away, and back if the block fails."""
    if processes.rank() > 0 or not path.is_dir() or is_dcp(path):
        yield
        return
    earlier = path.with_name(f".{path.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    path.rename(earlier)
    try:
        yield
    except BaseException:
        earlier.rename(path)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _streamed(recipe: Recipe, path: Path) -> dict[str, Any]:
    if recipe.method == ENSEMBLE:
        raise InputError(f"method {ENSEMBLE!r} needs models of ours in memory")
    if recipe.steps is not None:
        raise InputError("a merge of files neither searches nor learns, so it takes no steps")
    with _set_aside(path):
        return merge_files(
            recipe.members,
            path,
            weights=recipe.weights,
            fishers=recipe.fishers or None,
            base=recipe.base,
            **recipe.settings(),
        )


def _in_memory(run: Run, recipe: Recipe, path: Path) -> dict[str, Any]:
    models = [run.model(path) for path in recipe.members]
    merged = merge(
        models,
        weights=recipe.weights,
        fishers=[DiagFisher.load(path) for path in recipe.fishers] or None,
        base=None if recipe.base is None else run.model(recipe.base),
        steps=recipe.steps,
        **recipe.settings(),
        **_from_data(run, recipe, models),
    )
    assert merged.merge_report is not None
    run.write(save_model, merged, path, extra={"merge_report": merged.merge_report})
    return merged.merge_report


def _weight_ensemble(run: Run, recipe: Recipe, path: Path) -> dict[str, Any]:
    """Option density makes it the efficient one: pruned task vectors, one router."""
    for name, value in (("weights", recipe.weights), ("fishers", recipe.fishers)):
        if value:
            raise InputError(f"method {ENSEMBLE!r} takes no {name}")
    if recipe.base is None:
        raise InputError(f"method {ENSEMBLE!r} needs base: the model that the members started from")
    settings = check_options(ENSEMBLE, OPTIONS, recipe.options)
    data = run.data(recipe.data)
    ensemble = weight_ensemble(
        [run.model(path) for path in recipe.members],
        base=run.model(recipe.base),
        loader=_validation(run, data, recipe),
        efficient="density" in recipe.options,
        steps=1000 if recipe.steps is None else recipe.steps,
        seed=recipe.seed,
        **settings,
    )
    assert ensemble.merge_report is not None
    run.write(save_model, ensemble, path, extra={"merge_report": ensemble.merge_report})
    return ensemble.merge_report


def _from_data(run: Run, recipe: Recipe, models: Sequence[SequenceEncoder]) -> dict[str, Any]:
    """Return what `merge` takes from data for the method: the validation split or training."""
    inputs = METHODS[recipe.method].inputs if recipe.method in METHODS else {}
    wanted = {name for name in ("score", "validation", "grams", "products") if name in inputs}
    if recipe.method == "auto":
        wanted = {"score", "validation"}
    if recipe.weights == "search":
        wanted.add("score")
    if not wanted:
        return {}
    data = run.data(recipe.data)
    found: dict[str, Any] = {}
    if "score" in wanted:
        found["score"] = lambda model: on_validation(model, data, recipe.batch_size)["ndcg@10"]
    if "validation" in wanted:
        found["validation"] = _validation(run, data, recipe)
    for name, make in (
        ("grams", lambda model, loader: linear_grams(model, loader, progress=run.progress)),
        ("products", fisher_product),
    ):
        if name in wanted:
            found[name] = [
                make(model, _histories(run, model, data, path, recipe))
                for model, path in zip(models, recipe.members, strict=True)
            ]
    return found


def _validation(
    run: Run, data: SequenceDataset, recipe: Recipe
) -> Callable[[SequenceEncoder], Iterable[Any]]:
    def batches(model: SequenceEncoder) -> Iterable[Any]:
        own = over_catalogue_of(model, data, Path("the merged model"))
        return run.batches(model, own, split="validation", batch_size=recipe.batch_size)

    return batches


def _histories(
    run: Run, model: SequenceEncoder, data: SequenceDataset, path: Path, recipe: Recipe
) -> Iterable[Any]:
    own = over_catalogue_of(model, data, path)
    size = recipe.batch_size
    return run.batches(model, own, split="train", batch_size=size, limit=recipe.limit)


def _weight_rows(members: Sequence[str], weights: Any) -> list[dict[str, Any]]:
    """Return a row of each member, or of each tensor where the weights were learned so."""
    if isinstance(weights, list):
        return [
            {"member": path, "weight": weight}
            for path, weight in zip(members, weights, strict=True)
        ]
    heads = [f"{number}: {path}" for number, path in enumerate(members)]  # a path may be twice
    return [{"tensor": name, **dict(zip(heads, own, strict=True))} for name, own in weights.items()]

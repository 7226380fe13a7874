"""Three teams fine-tune a common base, each its own way, and want one model.

Pre-train a base; branch into three members with the learning rate decayed to zero;
take each member's Fisher on its own data; merge. Beside the merges stand what they
must beat: the best member, and one model fine-tuned on all users with the members'
total compute; and what they cannot: the ensemble of the members' scores.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fisherkern import plots
from fisherkern.data import SequenceDataset, load
from fisherkern.encoders import BERT4Rec, SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.evaluation import Report, ScoreEnsemble, evaluate
from fisherkern.experiments.fisher_cost import cost_table, fisher_cost
from fisherkern.experiments.pictures import draw_cost, draw_plane, sorted_probabilities
from fisherkern.experiments.plane import plane_of
from fisherkern.experiments.tables import story_rows, story_table
from fisherkern.experiments.workspace import Workspace
from fisherkern.files import atomic_path, write_json
from fisherkern.fisher import DiagFisher, diag_fisher
from fisherkern.merging import merge
from fisherkern.objectives import MaskedItems
from fisherkern.training import load_model, save_model, train

MEMBERS = ("shards", "seeds", "masking")
MASK_RATIOS = (0.1, 0.2, 0.4)


@dataclasses.dataclass(frozen=True)
class Story:
    """Every setting of the experiment; see the module's docstring for the plot.

    data: what `load` takes. members: what differs between the three, "shards" (a
    disjoint third of the users each), "seeds" or "masking" (ratio 0.1, 0.2, 0.4), the
    last two on all users. base_epochs, branch_epochs: passes over the users that the
    base and each member see. cost_sequences: sequences of the time and error table.
    search_users: users of the validation score that λ is searched by.
    """

    data: str
    members: str = "shards"
    base_epochs: int = 60
    branch_epochs: int = 30
    batch_size: int = 64
    lr: float = 3e-3
    warmup_steps: int = 100
    crop: str = "random"
    max_len: int = 50
    dim: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.1
    mask_ratio: float = 0.2
    last_ratio: float = 0.0
    sampler: str = "exact"
    floor: float = 0.1
    cost_sequences: int = 256
    search_users: int = 2000
    plane_users: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.members not in MEMBERS:
            raise InputError(f"members: {self.members!r} is not one of {', '.join(MEMBERS)}")


# The embedded default: minutes on two cores, without any file.
DEMO = Story(
    data="synthetic",
    base_epochs=30,
    branch_epochs=15,
    batch_size=64,
    lr=2e-3,
    crop="all",
    max_len=20,
    cost_sequences=128,
    search_users=500,
    plane_users=300,
)


def run(story: Story, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Make what is missing in `out` and return the result that is stored in result.json.

    Beside it: the merge that is best on validation (merged.safetensors), all members
    and Fishers, the table (table.md) and the pictures. Raises InputError if `out` holds
    another run.
    """
    started = time.perf_counter()
    data = load(story.data)
    config = {**dataclasses.asdict(story), "data_fingerprint": data.fingerprint()}
    teller = _Teller(story, data, Workspace(out, config), progress)
    models = teller.models()
    reports = {name: teller.report(model) for name, (model, _) in models.items()}
    rows = story_rows(models, reports, teller.best_member(reports))
    chosen = max(teller.recipes, key=lambda name: reports[name][0]["ndcg@10"])
    teller.keep(chosen, reports[chosen][1])
    cost = teller.cost()
    test = reports["base"][1]
    protocol = f"{data.name}, {test.protocol}, {test.num_users:,} users"
    table = f"{story_table(rows, protocol)}\n\n{cost_table(cost)}\n"
    result = {
        "story": config,
        "protocol": protocol,
        "rows": rows,
        "merged": chosen,
        "weights": {n: info for n, (_, info) in models.items() if info},
        "fisher_cost": cost,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": time.perf_counter() - started,
    }
    teller.draw(models, cost)
    with atomic_path(out / "table.md") as path:
        path.write_text(table, encoding="utf-8")
    write_json(out / "result.json", result)
    print(table)
    print(f"written to {out}: merged.safetensors ({chosen}), result.json, table.md, pictures")
    return result


# A model and what is worth storing of how it was merged (weights λ), or None.
Entry = tuple[nn.Module, Any]


class _Teller:
    """The stages of one run, each made once in the workspace."""

    def __init__(
        self, story: Story, data: SequenceDataset, space: Workspace, progress: bool
    ) -> None:
        self.story, self.data, self.space, self.progress = story, data, space, progress
        self.recipes: list[str] = []  # the merges' names, once made

    def say(self, what: str) -> None:
        if self.progress:
            print(f"- {what}", file=sys.stderr, flush=True)

    def models(self) -> dict[str, Entry]:
        """Every model of the table, by name, in the table's order."""
        story = self.story
        base = self.space.model("base", self._pretrain)
        parts = self._parts()
        members = [
            self.space.model(f"member-{m + 1}", partial(self._branch, base, m, part))
            for m, part in enumerate(parts)
        ]
        share = sum(part.num_users for part in parts) / self.data.num_users
        epochs = round(story.branch_epochs * share)
        control = self.space.model("all-users", lambda: self._control(base, epochs))
        fishers = [
            self.space.fisher(f"member-{m + 1}", partial(self._fisher, members[m], part))
            for m, part in enumerate(parts)
        ]
        merged = self._merges(members, fishers)
        return {
            "base": (base, None),
            **{f"member {m + 1}": (model, None) for m, model in enumerate(members)},
            "all users, same compute": (control, None),
            **merged,
            "score ensemble": (ScoreEnsemble(members), None),
        }

    def _parts(self) -> list[SequenceDataset]:
        """Each member's data."""
        if self.story.members != "shards":
            return [self.data] * 3
        order = np.random.default_rng(self.story.seed).permutation(self.data.num_users)
        return [self.data.subset(np.sort(part)) for part in np.array_split(order, 3)]

    def _objective(self, ratio: float) -> MaskedItems:
        return MaskedItems(ratio, last_ratio=self.story.last_ratio)

    def _train(
        self, model: SequenceEncoder, data: SequenceDataset, name: str, **settings: Any
    ) -> SequenceEncoder:
        state = self.space.path(f"{name}.state.safetensors")
        ratio = settings.pop("ratio", self.story.mask_ratio)
        train(
            model,
            data,
            objective=self._objective(ratio),
            batch_size=self.story.batch_size,
            lr=self.story.lr,
            crop=self.story.crop,
            warmup_steps=self.story.warmup_steps,
            state=state,
            progress=self.progress,
            **settings,
        )
        model.item_ids = list(data.item_ids)
        state.unlink(missing_ok=True)
        return model

    def _pretrain(self) -> SequenceEncoder:
        story = self.story
        self.say(f"pre-training the base, {story.base_epochs} epochs on {self.data.name}")
        with torch.random.fork_rng():
            torch.manual_seed(story.seed)
            model = BERT4Rec(
                self.data.num_items,
                max_len=story.max_len,
                dim=story.dim,
                layers=story.layers,
                heads=story.heads,
                dropout=story.dropout,
            )
        return self._train(model, self.data, "base", epochs=story.base_epochs, seed=story.seed)

    def _branch(self, base: SequenceEncoder, m: int, part: SequenceDataset) -> SequenceEncoder:
        self.say(f"fine-tuning member {m + 1} on {part.num_users:,} users")
        return self._train(
            _copy(base),
            part,
            f"member-{m + 1}",
            epochs=self.story.branch_epochs,
            schedule="linear",
            seed=self.story.seed + m + 1,
            ratio=MASK_RATIOS[m] if self.story.members == "masking" else self.story.mask_ratio,
        )

    def _control(self, base: SequenceEncoder, epochs: int) -> SequenceEncoder:
        self.say(f"fine-tuning on all users with the same total compute, {epochs} epochs")
        seed = self.story.seed + 4
        return self._train(
            _copy(base), self.data, "all-users", epochs=epochs, schedule="linear", seed=seed
        )

    def _fisher(self, model: SequenceEncoder, part: SequenceDataset) -> DiagFisher:
        loader = part.loader(split="train", batch_size=256, max_len=self.story.max_len)
        return diag_fisher(
            model,
            loader,
            sampler=self.story.sampler,
            seed=self.story.seed,
            progress=self.progress,
        )

    def _merges(
        self, members: list[SequenceEncoder], fishers: list[DiagFisher]
    ) -> dict[str, Entry]:
        score = self._validation_score(self.story.search_users)
        floor = self.story.floor
        recipes: dict[str, Callable[[], SequenceEncoder]] = {
            "uniform merge": lambda: merge(members, method="uniform"),
            "fisher merge": lambda: merge(members, method="fisher", fishers=fishers, floor=floor),
            "fisher merge, floor 1": lambda: merge(
                members, method="fisher", fishers=fishers, floor=1.0
            ),
            "fisher merge, searched weights": lambda: merge(
                members,
                method="fisher",
                fishers=fishers,
                floor=floor,
                weights="search",
                score=score,
                seed=self.story.seed,
            ),
        }
        result: dict[str, Entry] = {}
        self.recipes = list(recipes)
        for name, recipe in recipes.items():
            self.say(name)
            model = self.space.model(_file(name), recipe)
            report = self.space.about(_file(name)).get("merge_report", {})
            result[name] = (model, report.get("weights"))
        return result

    def _validation_score(self, count: int) -> Callable[[nn.Module], float]:
        """NDCG@10 of a model on the validation item of `count` users, evenly spread."""
        total = self.data.num_users
        users = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))

        def score(model: nn.Module) -> float:
            report = evaluate(model, self.data, split="validation", k=(10,), users=users)
            return report["ndcg@10"]

        return score

    def report(self, model: nn.Module) -> tuple[Report, Report]:
        """Validation and test reports on all users."""
        validation = evaluate(model, self.data, split="validation", progress=self.progress)
        return validation, evaluate(model, self.data, split="test", progress=self.progress)

    def best_member(self, reports: dict[str, tuple[Report, Report]]) -> str:
        """The member with the highest validation NDCG@10."""
        return max((f"member {m}" for m in (1, 2, 3)), key=lambda n: reports[n][0]["ndcg@10"])

    def keep(self, name: str, report: Report) -> None:
        """Store a merge as the run's product, with its test metrics."""
        model = load_model(self.space.path(f"{_file(name)}.safetensors"))
        save_model(model, self.space.path("merged.safetensors"), metrics=dict(report))

    def cost(self) -> list[dict[str, Any]]:
        """Time and error of every sampler on the base model."""
        model = load_model(self.space.path("base.safetensors"))
        count = self.story.cost_sequences
        loader = self.data.loader(
            split="train", batch_size=count, max_len=self.story.max_len, limit=count
        )

        def measure() -> list[dict[str, Any]]:
            self.say(f"time and error of every sampler on {count} sequences")
            return fisher_cost(model, list(loader), seed=self.story.seed, progress=False)

        return self.space.json("fisher_cost", measure)

    def draw(self, models: dict[str, Entry], cost: list[dict[str, Any]]) -> None:
        """The paper's Figures 2 (with an error axis), 3 and 4."""
        draw_cost(cost, self.space.path("fisher_cost.png"))
        batch = next(iter(self.data.loader(split="test", max_len=self.story.max_len, limit=256)))
        names = ("base", "member 1", "member 2", "member 3", "uniform merge", "fisher merge")
        curves = sorted_probabilities({name: models[name][0] for name in names}, batch)
        plots.plot_sorted_probabilities(curves, self.space.path("sorted_probabilities.png"))
        plane = self.space.json("plane", lambda: self._plane(models))
        draw_plane(plane, self.space.path("plane.png"))

    def _plane(self, models: dict[str, Entry]) -> dict[str, Any]:
        self.say("validation NDCG@10 on the members' plane")
        others = {name: models[name][0] for name in ("base", "uniform merge", "fisher merge")}
        members = {f"member {m}": models[f"member {m}"][0] for m in (1, 2, 3)}
        score = self._validation_score(self.story.plane_users)
        return plane_of(members, others, score)


def _file(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _copy(model: SequenceEncoder) -> SequenceEncoder:
    twin = type(model)(**model.config)
    twin.load_state_dict(model.state_dict())
    return twin

"""All tables and figures of the Fisher paper (arXiv 2307.05476), in one folder and one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from fisherkern import plots
from fisherkern.data import SequenceDataset, load
from fisherkern.experiments.candidates import Candidates, check_candidates
from fisherkern.experiments.contrastive import CL, FISHER, MASKED, MEMBERS, SUPERVISED, Contrastive
from fisherkern.experiments.engine import (
    Table,
    config_of,
    deadline,
    not_there,
    open_labs,
    say_missing,
    settings_line,
    sizes_of,
)
from fisherkern.experiments.experiment import BEAUTY
from fisherkern.experiments.fisher_cost import cost_table, fisher_cost
from fisherkern.experiments.lab import Lab, OutOfTime
from fisherkern.experiments.pairs import Pairs
from fisherkern.experiments.pictures import draw_cost, draw_plane, sorted_probabilities
from fisherkern.experiments.plane import plane_of
from fisherkern.experiments.samplers import Samplers
from fisherkern.experiments.table1 import Table1
from fisherkern.experiments.table2 import Table2
from fisherkern.experiments.tables import INTERVAL
from fisherkern.experiments.workspace import Workspace
from fisherkern.files import atomic_path, write_json

Kind = TypeVar("Kind", bound=Contrastive)

TITLE = (
    "# Fisher-Weighted Merge of Contrastive Learning Models in Sequential Recommendation"
    " (arXiv 2307.05476): its evaluation, run again"
)
# A part's name, which is its folder's -> its heading in paper.md, in that order.
HEADINGS = {
    "table1": "Table 1: members trained from scratch",
    "table2": "Table 2: members fine-tuned from one base",
    "samplers": "Tables 3 to 5: samplers, number of items, batch-wise squares",
    "table1-candidates": "Sampled candidates, the rows of Table 1",
    "table2-candidates": "Sampled candidates, the rows of Table 2",
    "table1-pairs": "Appendix A.1: error inconsistency, the members of Table 1",
    "table2-pairs": "Appendix A.1: error inconsistency, the members of Table 2",
}
COST, CURVES, PLANE = "fisher_cost", "sorted-probabilities", "plane"
NOTES = """\
## What differs from the paper, and what we have not seen of it

- We know the paper's method, some of its settings and few of its figures. What stands in a column \
"paper" is all we have; its Tables 3 to 5 and its Figures 3 and 4 we have not seen, so the rows \
and the axes are ours.
- Every row gets the same extra training: base, members, merges, control, and the ensemble by its \
members. The paper trains its merges for one epoch more "in both conditions".
- The control has masked items alone for as many passes as all members together.
- Full rankings leave out the items that a user has had; the paper does not say what it does. Its \
sequence length, learning rate, mask rate, temperature and contrastive weight are not stated \
either; ours stand in the settings.
- An epoch here is one window of every user (`crop`), so that numbers of epochs do not compare.
- Batch-wise squares (eq. 6) are taken over batches of 256 sequences, as the paper does; all other \
Fishers are the mean of squares per sequence (eq. 5).
- Choices (the best member, searched weights, the greedy soup) are made on the validation split.
- Several seeds: intervals are over users, of the means over these seeds; they do not say how much \
other seeds would differ. The tables of each seed are in the parts' folders."""


@dataclasses.dataclass(frozen=True)
class Paper(Contrastive):
    """The settings of all parts; see `Table1`, `Table2` and `Samplers`.

    member_epochs: of Table 2's members; scratch_epochs: of Table 1's, by default as many as base
    and member of Table 2 together. cost_sequences: of the comparison of time and error, on the
    member of Table 2 without a contrastive part.
    """

    base_epochs: int = 60
    scratch_epochs: int = 90
    shared_start: bool = False
    floor: float = 0.1
    cost_sequences: int = 256

    PRESETS: ClassVar = {
        "beauty": {**BEAUTY, "base_epochs": 40, "member_epochs": 15, "scratch_epochs": 55}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.samplers()

    def table1(self) -> Table1:
        return self._part(Table1, member_epochs=self.scratch_epochs, base=None)

    def table2(self) -> Table2:
        return self._part(Table2)

    def samplers(self) -> Samplers:
        return self._part(Samplers)

    def _part(self, kind: type[Kind], **other: Any) -> Kind:
        known = {field.name for field in dataclasses.fields(kind)}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in known}
        return kind(**{**own, **other})


def run_paper(
    paper: Paper,
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    time_limit: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Make what `out` lacks, for `time_limit` minutes, seed by seed; the content of result.json.

    A folder for each part, of which table1 and table2 hold what `run_table` makes of those
    experiments and are gone on from if it made them; paper.md puts all parts together. The members
    of Table 2 are trained once for all parts. The pictures, and the comparison of time and error in
    fisher_cost.md, are of the first seed. Resumes and raises as `run_table` does; raises
    InputError before anything is made if a user has too few unseen items for the candidates.
    """
    end = deadline(time_limit)
    data = load(paper.data)
    check_candidates(data)
    base = paper.given_base(data)
    if base is not None:  # its sizes are everybody's
        paper = dataclasses.replace(paper, **sizes_of(base, paper))
    config = config_of(paper, data, base)
    Workspace(out, config)
    book = _Book(paper, config, data, out, seeds=seeds, end=end, progress=progress)
    for place in range(len(seeds)):
        book.fill(place)
        if place == 0:
            book.draw()
        book.write()
    result = book.write()
    print(book.text(result))
    print(f"written to {out}: paper.md, result.json, a folder for each part, pictures")
    if result["missing"]:
        say_missing()
    return result


class _Book:
    """The parts, and what they say together."""

    def __init__(
        self,
        paper: Paper,
        config: dict[str, Any],
        data: SequenceDataset,
        out: Path,
        **call: Any,
    ) -> None:
        self.paper, self.config, self.out, self.undrawn = paper, config, out, list[str]()
        self.experiments = {"table1": paper.table1(), "table2": paper.table2()}
        self.labs: dict[str, list[Lab]] = {}
        self.parts: dict[str, Table] = {}
        for name, own in self.experiments.items():
            settings, labs = open_labs(own, data, out / name, **call)
            self.labs[name] = labs
            self.parts[name] = Table(own, settings, labs)
            self.parts[f"{name}-candidates"] = Candidates(own, settings, labs)
            self.parts[f"{name}-pairs"] = Pairs(own, settings, labs)
        samplers, labs = paper.samplers(), self.labs["table2"]
        settings = config_of(samplers, data, labs[0].given_base)
        self.parts["samplers"] = Table(samplers, settings, labs)

    def lab(self, part: str, place: int) -> Lab:
        return self.labs["table1" if part.startswith("table1") else "table2"][place]

    def fill(self, place: int) -> None:
        """One seed of every part; Table 1, whose trainings are the longest, comes last."""
        order = ["table2", "samplers", "table2-candidates", "table2-pairs", *self.parts]
        for name in dict.fromkeys(order):
            write = partial(self.parts[name].write, self.out / name)
            self.parts[name].fill(self.lab(name, place), write)
            write()

    def draw(self) -> None:
        """The pictures for which there is time."""
        jobs: dict[str, Callable[[Path], None]] = {COST: self.draw_cost}
        for name in self.experiments:
            jobs[f"{CURVES}-{name}"] = partial(self.draw_curves, name)
            jobs[f"{PLANE}-{name}"] = partial(self.draw_plane, name)
        for job, draw in jobs.items():
            try:
                draw(self.out / f"{job}.png")
            except OutOfTime:
                self.undrawn.append(job)

    def draw_cost(self, path: Path) -> None:
        lab, count = self.labs["table2"][0], self.paper.cost_sequences

        def measure() -> list[dict[str, Any]]:
            model = self.experiments["table2"].members(lab)[MASKED]()
            loader = lab.data.loader(
                split="train", batch_size=count, max_len=model.max_len, limit=count
            )
            return fisher_cost(model, list(loader), seed=lab.seed, progress=False)

        rows = lab.json("figures", COST, measure)
        draw_cost(rows, path)
        with atomic_path(path.with_suffix(".md")) as temporary:
            temporary.write_text(cost_table(rows) + "\n", encoding="utf-8")

    def draw_curves(self, name: str, path: Path) -> None:
        lab, rows = self.labs[name][0], self.experiments[name].rows(self.labs[name][0])

        def find() -> dict[str, list[float]]:
            models = {row: rows[row]() for row in (*MEMBERS, "uniform merge")}
            models["Fisher merge"] = rows[FISHER]()
            loader = lab.data.loader(split="test", max_len=self.paper.max_len, limit=256)
            return sorted_probabilities(models, next(iter(loader)))

        plots.plot_sorted_probabilities(lab.json("figures", CURVES, find), path)

    def draw_plane(self, name: str, path: Path) -> None:
        lab, rows = self.labs[name][0], self.experiments[name].rows(self.labs[name][0])

        def find() -> dict[str, Any]:
            members = {row: rows[row]() for row in (MASKED, CL, SUPERVISED)}
            others = {"base": "base", "uniform merge": "uniform merge", "Fisher merge": FISHER}
            made = {name: rows[row]() for name, row in others.items() if row in rows}
            return plane_of(members, made, lab.score)

        draw_plane(lab.json("figures", PLANE, find), path)

    def write(self) -> dict[str, Any]:
        results = {name: self.parts[name].result() for name in HEADINGS}
        missing = {name: own["missing"] for name, own in results.items() if own["missing"]}
        result = {
            "settings": self.config,
            "protocol": results["table2"]["protocol"],
            "seeds": results["table2"]["seeds"],
            "parts": results,
            "missing": {**missing, **({"pictures": self.undrawn} if self.undrawn else {})},
            "torch": torch.__version__,
        }
        with atomic_path(self.out / "paper.md") as path:
            path.write_text(self.text(result) + "\n", encoding="utf-8")
        write_json(self.out / "result.json", result)
        return result

    def text(self, result: Mapping[str, Any]) -> str:
        """paper.md."""
        parts = [TITLE, settings_line(self.config)]
        if result["protocol"] is not None:
            parts.append(f"{result['protocol']}; {INTERVAL}")
        for name, heading in HEADINGS.items():
            parts += [f"## {heading}", *self.section(name, result["parts"][name])]
        parts += ["## Figures", *self.figures()]
        return "\n\n".join([*parts, NOTES])

    def section(self, name: str, result: Mapping[str, Any]) -> list[str]:
        """A part's mean over the seeds; the seeds themselves where some lack rows."""
        part, tables = self.parts[name], result["tables"]
        if len(result["seeds"]) > 1:
            tables = tables[:-1] if result["missing"] else tables[-1:]
        found = [text for table in tables for text in part.titled(table, result)]
        return [*found, *not_there(result), *filter(None, [part.paper()[1]])]

    def figures(self) -> list[str]:
        what = {
            COST: "Figure 2, time against n, with the error beside it. Times are this machine's"
            f" and stand in {COST}.md.",
            CURVES: "Sorted probabilities of members and merges, mean over 256 test histories.",
            PLANE: "Validation NDCG@10 on the plane through three members.",
        }
        lines = []
        for kind, text in what.items():
            names = [kind] if kind == COST else [f"{kind}-{name}" for name in self.experiments]
            drawn = [f"![{name}]({name}.png)" for name in names if name not in self.undrawn]
            lines += [text, " ".join(drawn) or "Not there yet."]
        return lines

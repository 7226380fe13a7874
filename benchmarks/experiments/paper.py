"""All tables and figures of the Fisher paper (arXiv 2307.05476), in one folder and one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from benchmarks.experiments.artifacts import ArtifactCache, claim_folder
from benchmarks.experiments.candidates import Candidates, check_candidates
from benchmarks.experiments.contrastive import (
    CL,
    FISHER,
    MASKED,
    MEMBERS,
    SUPERVISED,
    UNIFORM,
    Contrastive,
)
from benchmarks.experiments.engine import (
    ResultTable,
    config_of,
    deadline,
    missing_lines,
    open_caches,
    print_time_is_up,
    settings_line,
    sizes_of,
)
from benchmarks.experiments.experiment import BEAUTY, RowBuilders
from benchmarks.experiments.figures import (
    COST,
    CURVES,
    PLANE,
    Figures,
    draw_cost,
    draw_curves,
    draw_figures,
    draw_plane,
)
from benchmarks.experiments.pairs import Pairs
from benchmarks.experiments.samplers import Samplers
from benchmarks.experiments.table1 import Table1
from benchmarks.experiments.table2 import Table2
from benchmarks.experiments.tables import INTERVAL
from fisherkern.data import SequenceDataset, load
from fisherkern.files import atomic_path, write_json

PartT = TypeVar("PartT", bound=Contrastive)

TITLE = (
    "# Fisher-Weighted Merge of Contrastive Learning Models in Sequential Recommendation"
    " (arXiv 2307.05476): its evaluation, run again"
)
# The name of a part, and of its folder -> its heading in paper.md, in that order.
HEADINGS = {
    "table1": "Table 1: members trained from scratch",
    "table2": "Table 2: members fine-tuned from one base",
    "samplers": "Tables 3 to 5: samplers, number of items, batch-wise squares",
    "table1-candidates": "Sampled candidates, the rows of Table 1",
    "table2-candidates": "Sampled candidates, the rows of Table 2",
    "table1-pairs": "Appendix A.1: error inconsistency, the members of Table 1",
    "table2-pairs": "Appendix A.1: error inconsistency, the members of Table 2",
}
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
    """Run all tables and figures of the Fisher paper; see `Table1`, `Table2` and `Samplers`.

    Args:
        base_epochs: passes of Table 2's base.
        scratch_epochs: passes of Table 1's members.
        shared_start: give Table 1's members one initialisation.
        member_epochs: passes of Table 2's members.
        floor: weight of the plain average in Tables 3 to 5.
        cost_sequences: sequences of the comparison of time and error, which is on the member of
            Table 2 without a contrastive part.
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

    def _part(self, kind: type[PartT], **other: Any) -> PartT:
        names = {field.name for field in dataclasses.fields(kind)}
        shared = {name: value for name, value in vars(self).items() if name in names}
        return kind(**{**shared, **other})


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
    base = paper.load_base(data)
    if base is not None:  # all parts take its sizes
        paper = dataclasses.replace(paper, **sizes_of(base, paper))
    config = config_of(paper, data, base)
    claim_folder(out, config)
    report = _PaperReport(paper, config, data, out, seeds=seeds, end=end, progress=progress)
    for index in range(len(seeds)):
        report.fill(index)
        if index == 0:
            report.missing_figures = draw_figures(report.figures(), out)
        report.write()
    result = report.write()
    print(report.text(result))
    print(f"written to {out}: paper.md, result.json, a folder for each part, pictures")
    if result["missing"]:
        print_time_is_up()
    return result


class _PaperReport:
    """All parts of the paper, and the one document of them."""

    def __init__(
        self,
        paper: Paper,
        config: dict[str, Any],
        data: SequenceDataset,
        out: Path,
        **call: Any,
    ) -> None:
        self.paper, self.config, self.out = paper, config, out
        self.missing_figures: list[str] = []
        self.experiments = {"table1": paper.table1(), "table2": paper.table2()}
        self.caches: dict[str, list[ArtifactCache]] = {}
        self.parts: dict[str, ResultTable] = {}
        for name, experiment in self.experiments.items():
            settings, caches = open_caches(experiment, data, out / name, **call)
            self.caches[name] = caches
            self.parts[name] = ResultTable(experiment, settings, caches)
            self.parts[f"{name}-candidates"] = Candidates(experiment, settings, caches)
            self.parts[f"{name}-pairs"] = Pairs(experiment, settings, caches)
        samplers, caches = paper.samplers(), self.caches["table2"]
        settings = config_of(samplers, data, caches[0].given_base)
        self.parts["samplers"] = ResultTable(samplers, settings, caches)

    def cache(self, part: str, index: int) -> ArtifactCache:
        return self.caches["table1" if part.startswith("table1") else "table2"][index]

    def fill(self, index: int) -> None:
        """One seed of every part; Table 1, whose trainings are the longest, comes last."""
        order = ["table2", "samplers", "table2-candidates", "table2-pairs", *self.parts]
        for name in dict.fromkeys(order):
            write = partial(self.parts[name].write, self.out / name)
            self.parts[name].fill(self.cache(name, index), write)
            write()

    def figures(self) -> Figures:
        """The figures of the first seed."""
        table2, cache = self.experiments["table2"], self.caches["table2"][0]
        base = table2.members(cache)[MASKED]
        figures: Figures = {COST: partial(draw_cost, cache, base, self.paper.cost_sequences)}
        for name, experiment in self.experiments.items():
            cache = self.caches[name][0]
            rows, score = experiment.rows(cache), cache.score
            titles = {name: name for name in ("base", UNIFORM) if name in rows}
            titles["Fisher merge"] = FISHER
            members = partial(_built, rows, {row: row for row in (MASKED, CL, SUPERVISED)})
            shown = {row: row for row in (*MEMBERS, UNIFORM)} | {"Fisher merge": FISHER}
            curves = partial(_built, rows, shown)
            figures[f"{CURVES}-{name}"] = partial(draw_curves, cache, curves, self.paper.max_len)
            others = partial(_built, rows, titles)
            figures[f"{PLANE}-{name}"] = partial(draw_plane, cache, members, others, score)
        return figures

    def write(self) -> dict[str, Any]:
        results = {name: self.parts[name].result() for name in HEADINGS}
        missing: dict[str, Any] = {
            name: part["missing"] for name, part in results.items() if part["missing"]
        }
        if self.missing_figures:
            missing["pictures"] = self.missing_figures
        result = {
            "settings": self.config,
            "protocol": results["table2"]["protocol"],
            "seeds": results["table2"]["seeds"],
            "parts": results,
            "missing": missing,
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
        parts += ["## Figures", *self.figure_lines()]
        return "\n\n".join([*parts, NOTES])

    def section(self, name: str, result: Mapping[str, Any]) -> list[str]:
        """A part's mean over the seeds; the seeds themselves where some lack rows."""
        part, tables = self.parts[name], result["tables"]
        if len(result["seeds"]) > 1:
            tables = tables[:-1] if result["missing"] else tables[-1:]
        sections = [text for table in tables for text in part.section_of(table, result)]
        return [*sections, *missing_lines(result), *filter(None, [part.paper()[1]])]

    def figure_lines(self) -> list[str]:
        """The figures in Markdown, with their captions."""
        captions = {
            COST: "Figure 2, time against n, with the error beside it. Times are this machine's"
            f" and stand in {COST}.md.",
            CURVES: "Sorted probabilities of members and merges, mean over 256 test histories.",
            PLANE: "Validation NDCG@10 on the plane through three members.",
        }
        lines = []
        for kind, caption in captions.items():
            names = [kind] if kind == COST else [f"{kind}-{name}" for name in self.experiments]
            drawn = [f"![{name}]({name}.png)" for name in names if name not in self.missing_figures]
            lines += [caption, " ".join(drawn) or "Not there yet."]
        return lines


def _built(rows: RowBuilders, titles: Mapping[str, str]) -> dict[str, nn.Module]:
    """The models of some rows; titles: a title -> the row's name."""
    return {title: rows[name]() for title, name in titles.items()}

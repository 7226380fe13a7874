"""Rows ranked among sampled candidates, beside the whole catalogue."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from benchmarks.experiments.artifacts import ArtifactCache
from benchmarks.experiments.engine import ResultTable, RowResult, keep_metrics
from benchmarks.experiments.tables import METRIC, difference
from fisherkern.data import SequenceDataset
from fisherkern.evaluation import Report, compare
from fisherkern.evaluation.candidates import NUM_NEGATIVES, check_enough
from fisherkern.evaluation.ranking import metrics_at, never_drawn

SAMPLED = ("uniform-100", "popular-100")
CUTOFF = 10
NOTE = (
    "The paper's own columns of sampled candidates stand nowhere here, because no such protocol"
    ' gives them: every "popular" figure of its Tables 1 to 5 is .0419 to .0487, where a random'
    ' order gives .0450, and these and the "random" ones (.0513 for CL4SRec, .0430 for supervised'
    " DuoRec) lie below the full ranking of the same model (.0585, .0933), though leaving items out"
    " can only improve a rank."
)


def check_candidates(data: SequenceDataset) -> None:
    """Raise InputError now if a user has too few unseen items to draw from later."""
    popularity = data.popularity()
    loader = data.loader(split="test", batch_size=4096, max_len=1)
    for first in range(0, len(loader.user), loader.batch_size):
        rows = slice(first, first + loader.batch_size)
        forbidden = never_drawn(loader, rows)
        for kind in SAMPLED:
            check_enough(kind, loader.user[rows], forbidden, popularity)


def chance() -> float:
    """NDCG@10 of a target with a random rank among itself and its candidates."""
    ranks = np.arange(1, NUM_NEGATIVES + 2)
    return float(metrics_at(ranks, (CUTOFF,))[METRIC].mean())


class Candidates(ResultTable):
    """NDCG@10 of an experiment's rows among all unseen items, and among 100 drawn ones.

    Candidates are drawn once for a user, so that they are the same for all rows and seeds.
    """

    def paper(self) -> tuple[Mapping[str, str], str]:
        return {}, NOTE if self.experiment.paper()[1] else ""

    def report_row(
        self, cache: ArtifactCache, row: str, build: Callable[[], nn.Module]
    ) -> RowResult:
        validation, test = (keep_metrics(r, METRIC) for r in cache.row_reports(row, build))
        protocols = {name: {"candidates": name, "k": CUTOFF} for name in SAMPLED}
        drawn = cache.reports("candidates", row, build, protocols)
        sampled = {name: keep_metrics(report, METRIC) for name, report in drawn.items()}
        return {"validation": validation, "test": test, **sampled}, {}

    def compare_rows(self, reports: Mapping[str, Mapping[str, Report]]) -> list[dict[str, Any]]:
        """RowBuilders with NDCG@10 and the difference to the best member under every protocol."""
        title = next(iter(self.experiment.references()))
        rows = []
        for row in super().compare_rows(reports):
            name, reference = row["model"], row["over"][title]
            cells = {}
            for kind, key in {"full": "test", **{name: name for name in SAMPLED}}.items():
                report, over = reports[name][key], None
                if reference is not None:
                    gap = compare(report, reports[reference["model"]][key])
                    over = dataclasses.asdict(gap[METRIC])
                cells[kind] = {METRIC: report[METRIC], "over": over}
            rows.append({"model": name, "chosen": row["chosen"], "candidates": cells})
        return rows

    def markdown(self, rows: Sequence[Mapping[str, Any]], paper: Mapping[str, str]) -> str:
        title = next(iter(self.experiment.references()))
        kinds = ("full", *SAMPLED)
        heads = [head for kind in kinds for head in (kind, f"over {title}")]
        lines = [f"| model | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
        for row in rows:
            cells = []
            for kind in kinds:
                cell = row["candidates"][kind]
                over = "" if cell["over"] is None else difference(cell["over"])
                cells += [f"{cell[METRIC]:.4f}", over]
            name = f"{row['model']} ({title})" if row["chosen"] else row["model"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        blank = [f"{chance():.4f}", ""] * len(SAMPLED)
        lines.append(f"| a random order of the candidates |  |  | {' | '.join(blank)} |")
        return "\n".join(lines)

"""Fill the README's tables from the results that scripts wrote: python -m benchmarks.readme_tables

A table stands between `<!-- table: FOLDER/WHAT -->` and `<!-- end -->`, where FOLDER is in
benchmarks/results and WHAT is `result.json` (an experiment's rows, their mean where
there are several seeds);
or WHAT is `fisher.csv`, `segment.csv` or `training.csv`, the latest row of each estimate, shape
or library that bench_fisher.py, bench_segment.py or bench_training.py wrote, or `coverage.csv`;
`fisher.csv?data=ml-1m&T=50` takes the rows with those values alone;
or the whole is `summary`, a line for each experiment on merging, `starts`, a line for each
distance between members' starts, `free`, the exact Fisher beside the free one, `markets`, two
markets' models and their merges, `kernels`, a line for each op's kernel, of proven.json, or `gpu`,
the sentence above that table.

Tables stand in README.md and in the Markdown files of docs/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.coverage_by_folder import coverage_rows
from benchmarks.experiments.branches import ALIGNED
from benchmarks.experiments.contrastive import CONTROL as PASSES
from benchmarks.experiments.contrastive import EXTRA
from benchmarks.experiments.contrastive import FISHER as EXACT_FISHER
from benchmarks.experiments.member_set import BY_LOSS
from benchmarks.experiments.splits import CONTROL as ALL_DATA
from benchmarks.experiments.splits import WEIGHTED
from benchmarks.experiments.tables import INTERVAL, comparison_table, difference
from benchmarks.figures import latest_fisher_rows, read_rows
from benchmarks.free_table import free_rows
from benchmarks.market_table import market_rows
from fisherkern.files import atomic_path, read_json
from fisherkern.ops import proven

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- table: (\S*?)/?([^/\s]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fisher_rows(**chosen: str) -> str:
    """bench_fisher.py's rows; the last one counts where an estimate was run again."""
    lines = [
        "| estimate | K or R | sequences | time, batch-wise K = 10 is 1"
        " | batch-wise of the same K is 1 | error, best-scaled"
        " | vs. brute force | tied table vs. brute force | tensors missing |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in latest_fisher_rows(**chosen):
        same_k, off, tied = (
            f"{float(row[column]):.2g}" if row[column] else ""
            for column in ("ratio_same_k", "off", "off_tied")
        )
        lines.append(
            f"| {row['provider']} {row['version']}".rstrip()
            + f" | {row['k']} | {row['sequences']} | {float(row['ratio']):.2f} | {same_k}"
            f" | {float(row['error']):.4f} | {off} | {tied}"
            f" | {'' if row['missing'] == '0' else row['missing']} |"
        )
    return "\n".join(lines)


def segment_rows(**chosen: str) -> str:
    """bench_segment.py's rows, the latest of each provider and shape."""
    lines = [
        "| provider | R | N | T | O × I | ms | GFLOP/s | share of a large matrix product"
        " | MB above inputs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    key = ("device", "provider", "R", "N", "T", "O", "I", "dtype")
    lines += [
        f"| {row['provider']} | {row['R']} | {row['N']} | {row['T']} | {row['O']} × {row['I']}"
        f" | {float(row['p50_ms']):.2f} | {float(row['gflop_s']):.3g}"
        f" | {float(row['share_of_matmul']):.2f} | {float(row['extra_mb']):.0f} |"
        for row in {tuple(r[c] for c in key): r for r in read_rows("segment", **chosen)}.values()
    ]
    return "\n".join(lines)


def training_rows(**chosen: str) -> str:
    """bench_training.py's rows, the latest of each library, model and shape."""
    lines = [
        "| model | T | library | ms a step | targets a step | targets a second"
        " | ours is faster by | s a pass | steps a pass | peak MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    key = ("device", "threads", "data", "model", "T", "D", "layers", "batch", "provider")
    rows = {tuple(r[c] for c in key): r for r in read_rows("training", **chosen)}.values()
    lines += [
        f"| {row['model']} | {row['T']} | {row['provider']} {row['version']}"
        f" | {float(row['p50_ms']):.0f} | {float(row['targets_per_step']):.0f}"
        f" | {float(row['targets_per_s']):.0f} | {float(row['ours_faster']):.1f}"
        f" | {float(row['seconds_per_pass']):.1f} | {row['steps_per_pass']}"
        f" | {float(row['peak_mb']):.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


# Experiments on merging: what the members are, the folder of result.json, and the rows of a
# uniform merge, a Fisher merge, the members' ensemble, and one model of the same compute.
Line = tuple[str, str, str, str, str, str]
UNIFORM, FISHER, ENSEMBLE = "uniform merge", "Fisher merge, floor 0.1", "score ensemble"
SUMMARY: list[Line] = [
    ("each on a third of the users", "splits_ml-1m_users", UNIFORM, FISHER, ENSEMBLE, ALL_DATA),
    (
        "each on a third of the users, Amazon Beauty",
        "splits_beauty_users",
        UNIFORM,
        FISHER,
        ENSEMBLE,
        ALL_DATA,
    ),
    (
        "each on 76, 19 or 5 % of the users; Fishers weighted by users",
        "splits_ml-1m_uneven",
        UNIFORM,
        f"Fisher merge {WEIGHTED}, floor 0.1",
        ENSEMBLE,
        ALL_DATA,
    ),
    (
        "the same, Amazon Beauty",
        "splits_beauty_uneven",
        UNIFORM,
        f"Fisher merge {WEIGHTED}, floor 0.1",
        ENSEMBLE,
        ALL_DATA,
    ),
    ("each on half of every history", "splits_ml-1m_time", UNIFORM, FISHER, ENSEMBLE, ALL_DATA),
    ("the same, Amazon Beauty", "splits_beauty_time", UNIFORM, FISHER, ENSEMBLE, ALL_DATA),
    (
        "two regions, half of the items sold in both",
        "splits_ml-1m_regions",
        UNIFORM,
        FISHER,
        ENSEMBLE,
        ALL_DATA,
    ),
    ("the same, Amazon Beauty", "splits_beauty_regions", UNIFORM, FISHER, ENSEMBLE, ALL_DATA),
    (
        "four objectives from one base",
        "paper_ml-1m/table2",
        UNIFORM,
        EXACT_FISHER,
        ENSEMBLE,
        PASSES,
    ),
    (
        "the same at a constant learning rate",
        "table2_ml-1m_constant",
        UNIFORM,
        EXACT_FISHER,
        ENSEMBLE,
        PASSES,
    ),
    (
        "... and one more epoch for every row",
        "table2_ml-1m_constant",
        f"{UNIFORM}{EXTRA}",
        f"{EXACT_FISHER}{EXTRA}",
        f"{ENSEMBLE}{EXTRA}",
        f"{PASSES}{EXTRA}",
    ),
    (
        "... and aligned by the loss, without that epoch",
        "table2_ml-1m_constant",
        f"{UNIFORM}{BY_LOSS}",
        "",
        ENSEMBLE,
        PASSES,
    ),
    (
        "four objectives from one base, Amazon Beauty",
        "table2_beauty",
        UNIFORM,
        EXACT_FISHER,
        ENSEMBLE,
        PASSES,
    ),
    (
        "the same at a constant learning rate, Amazon Beauty",
        "table2_beauty_constant",
        UNIFORM,
        EXACT_FISHER,
        ENSEMBLE,
        PASSES,
    ),
    (
        "... and one more epoch for every row",
        "table2_beauty_constant",
        f"{UNIFORM}{EXTRA}",
        f"{EXACT_FISHER}{EXTRA}",
        f"{ENSEMBLE}{EXTRA}",
        f"{PASSES}{EXTRA}",
    ),
    (
        "... and aligned by the loss, without that epoch",
        "table2_beauty_constant",
        f"{UNIFORM}{BY_LOSS}",
        "",
        ENSEMBLE,
        PASSES,
    ),
    (
        "EMKD's networks, branches of one base",
        "emkd_ml-1m",
        UNIFORM,
        FISHER,
        "EMKD, averaged logits",
        "masked items, as many masked sequences as all networks",
    ),
]


# How members started, and the folder of what became of them; and a column's title and its row.
STARTS = [
    ("BERT4Rec, 80 passes from a start of its own each", "branches_ml-1m_bert4rec"),
    ("SASRec, 25 passes from a start of its own each", "branches_ml-1m_sasrec"),
    ("... at a constant rate", "branches_ml-1m_sasrec_constant"),
    ("SASRec, 25 passes from one untrained start", "branches_ml-1m_sasrec_one-start"),
    ("... at a constant rate", "branches_ml-1m_sasrec_one-start_constant"),
    ("SASRec, 1 pass together, then 25, at a constant rate", "branches_ml-1m_sasrec_1-together"),
    ("SASRec, 3 passes together, then 25", "branches_ml-1m_sasrec_3-together"),
    ("... at a constant rate", "branches_ml-1m_sasrec_3-together_constant"),
    (
        "BERT4Rec, 15 passes together, then 40, at a constant rate",
        "branches_ml-1m_bert4rec_15-together",
    ),
]
OF_STARTS = {
    "uniform": UNIFORM,
    "Fisher": FISHER,
    "uniform, aligned by weights": f"{UNIFORM}{ALIGNED}",
    "Fisher, aligned by weights": f"{FISHER}{ALIGNED}",
    "uniform, aligned by the loss": f"{UNIFORM}{BY_LOSS}",
    "ensemble": ENSEMBLE,
}


def over(rows: Mapping[str, Mapping[str, Any]], name: str, title: str) -> str:
    """A row's difference in that column; nothing where there is none."""
    gap = rows[name]["over"].get(title) if name in rows else None
    return difference(gap) if gap else ""


def start_rows(
    results: Path = HERE / "results", lines: Sequence[tuple[str, str]] = tuple(STARTS)
) -> str:
    """A line for each start that there is a result of: all merges over the best member."""
    found = [
        f"| members | best member, NDCG@10 | {' | '.join(OF_STARTS)} |",
        f"|---|{'---:|' * (1 + len(OF_STARTS))}",
    ]
    for start, folder in lines:
        path = results / folder / "result.json"
        if not path.exists():
            continue
        rows = {row["model"]: row for row in read_json(path)["tables"][-1]["rows"]}
        best = rows[UNIFORM]["over"]["best member"]["model"]
        cells = [over(rows, name, "best member") for name in OF_STARTS.values()]
        found.append(f"| {start} | {rows[best]['ndcg@10']:.4f} | {' | '.join(cells)} |")
    return "\n".join(found)


def summary_rows(results: Path = HERE / "results", lines: Sequence[Line] = tuple(SUMMARY)) -> str:
    """A line for each experiment that there is a result of, all differences with intervals."""
    heads = "uniform merge, over it", "Fisher merge, over it", "Fisher over uniform"
    heads += "ensemble, over it", "one model, same compute, over it"
    found = [
        f"| members | seeds | best member, NDCG@10 | {' | '.join(heads)} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for members, folder, *names in lines:
        path = results / folder / "result.json"
        if not path.exists():
            continue
        result = read_json(path)
        rows = {row["model"]: row for row in result["tables"][-1]["rows"]}
        best = next(iter(rows[names[0]]["over"]))

        uniform, fisher, ensemble, alone = names
        reference = rows[uniform]["over"][best]["model"]
        cells = [over(rows, name, best) for name in (uniform, fisher)]
        plain = uniform.removesuffix(EXTRA) == UNIFORM
        cells += [over(rows, fisher, "uniform merge") if plain else ""]
        cells += [over(rows, name, best) for name in (ensemble, alone)]
        count = len(result["seeds"])
        found.append(
            f"| {members} | {count} | {rows[reference]['ndcg@10']:.4f} | {' | '.join(cells)} |"
        )
    return "\n".join(found)


def gpu_line(results: Path = HERE / "results") -> str:
    """The runs on a GPU that results are stored of, in one sentence."""
    runs = [f"`{path.name}`" for path in sorted(results.glob("gpu_*")) if path.is_dir()]
    if runs:
        return f"Runs on a GPU, in benchmarks/results: {', '.join(runs)}."
    return "Nothing has run on a GPU yet: no kernel, and no op's path in PyTorch."


def kernel_rows(rows: Sequence[proven.Row] | None = None, results: Path = HERE / "results") -> str:
    """What ran on a GPU, and which calls take it there by default: the rows of proven.json.

    Rows of kernels that have changed do not pass the tests, so what stands there is today's.
    """
    rows = proven.rows() if rows is None else rows
    lines = [
        gpu_line(results),
        "",
        '| op | kernel | ran, and was right, on | `backend="auto"` on a GPU takes |',
        "|---|---|---|---|",
    ]
    for op, backend in proven.KERNELS:
        where, taken = proven.verdict(op, backend, rows)
        lines.append(f"| `{op}` | {backend} | {where} | {taken} |")
    return "\n".join(lines)


CSV_TABLES = {
    "fisher.csv": fisher_rows,
    "segment.csv": segment_rows,
    "training.csv": training_rows,
    "coverage.csv": coverage_rows,
}


WHOLE = {
    "summary": summary_rows,
    "starts": start_rows,
    "free": free_rows,
    "markets": market_rows,
    "kernels": kernel_rows,
    "gpu": gpu_line,
}


def table(match: re.Match[str]) -> str:
    name, _, query = match[3].partition("?")
    if name in CSV_TABLES:
        chosen = dict(part.split("=", 1) for part in query.split("&") if part)
        return f"{match[1]}{CSV_TABLES[name](**chosen)}\n{match[4]}"
    if match[3] in WHOLE:
        return f"{match[1]}{WHOLE[match[3]]()}\n{match[4]}"
    result = read_json(HERE / "results" / match[2] / "result.json")
    rows = result["tables"][-1]["rows"]
    text = comparison_table(rows, list(rows[0]["over"]), result["paper"])
    text = f"{result['protocol']}; {INTERVAL}\n\n{text}"
    return f"{match[1]}{text}\n{match[4]}"


def pages() -> list[Path]:
    """The files that tables stand in."""
    root = HERE.parent
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def current(text: str) -> str:
    """The text of a page with its tables made anew."""
    return BLOCK.sub(table, text)


def main() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (made := current(text)) != text:
            with atomic_path(page) as path:
                path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()

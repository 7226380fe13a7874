"""Reports as files: every user's rank, from which all metrics follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from fisherkern.evaluation import Protocol, Report
from fisherkern.evaluation.ranking import metrics_at
from fisherkern.files import read_tensors, save_tensors


def save_reports(path: Path, reports: Mapping[str, Report]) -> None:
    """Write reports by name; their users and ranks as tensors, the rest as metadata."""
    tensors, about = {}, {}
    for name, report in reports.items():
        tensors[f"{name}.users"] = torch.from_numpy(report.users)
        tensors[f"{name}.ranks"] = torch.from_numpy(report.ranks)
        cutoffs = dict.fromkeys(int(metric.split("@")[1]) for metric in report)
        about[name] = {"protocol": dataclasses.asdict(report.protocol), "cutoffs": list(cutoffs)}
    save_tensors(path, tensors, {"kind": "reports", "reports": about})


def load_reports(path: Path) -> dict[str, Report]:
    """What `save_reports` wrote, bit for bit."""
    tensors, metadata = read_tensors(path)
    reports = {}
    for name, about in metadata["reports"].items():
        ranks = tensors[f"{name}.ranks"].numpy()
        reports[name] = Report(
            per_user=metrics_at(ranks, tuple(about["cutoffs"])),
            users=tensors[f"{name}.users"].numpy(),
            ranks=ranks,
            protocol=Protocol(**about["protocol"]),
        )
    return reports

"""Experiments that run end to end from the command line, resumable stage by stage."""

from fisherkern.experiments.merge_story import DEMO, MEMBERS, Story, run

__all__ = ["DEMO", "MEMBERS", "Story", "run"]

"""The report of a transfer: one HTML file that needs neither a network nor scripts."""

from castlora.lift import Lift
from castlora.report.comparison import ComparedRun, Comparison, compare_runs, describe_comparison
from castlora.report.contents import (
    AGREEMENT,
    BARE_TARGET,
    RETRAINED,
    SOURCE_LORA,
    TASK_SCORE,
    TRANSFERRED,
    ChangedPiece,
    ChangedText,
    Distillation,
    Imitation,
    Pairing,
    Report,
    Sample,
    Score,
    Similarity,
    SitePair,
    Skill,
)
from castlora.report.page import render_comparison, render_report, write_report

__all__ = [
    "AGREEMENT",
    "BARE_TARGET",
    "RETRAINED",
    "SOURCE_LORA",
    "TASK_SCORE",
    "TRANSFERRED",
    "ChangedPiece",
    "ChangedText",
    "ComparedRun",
    "Comparison",
    "Distillation",
    "Imitation",
    "Lift",
    "Pairing",
    "Report",
    "Sample",
    "Score",
    "Similarity",
    "SitePair",
    "Skill",
    "compare_runs",
    "describe_comparison",
    "render_comparison",
    "render_report",
    "write_report",
]

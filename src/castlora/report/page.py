"""Reports as one HTML file each."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from castlora.report import figures
from castlora.report.comparison import LOSS_HEIGHT, Comparison, loss_curves, measures
from castlora.report.contents import AGREEMENT, BARE_TARGET, RETRAINED, SOURCE_LORA, TASK_SCORE, Report, Skill
from castlora.report.formatting import (
    MISSING,
    is_number,
    number,
    percent,
    percent_interval,
    printable,
    score,
    score_interval,
)
from castlora.report.verdict import verdict
from castlora.report.views import CHANGE_LEVELS, change_view, sample_view, skill_view

_OPEN_SAMPLES = 8


def render_report(report: Report) -> str:
    """Renders the report as one HTML page without scripts or outside requests.

    Every string of the report is taken as hostile: it is escaped, and control characters are made visible.
    """
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            verdict=verdict(report),
            skills=[skill_view(skill) for skill in report.skills],
            samples=[sample_view(sample) for sample in report.samples],
            open_samples=_OPEN_SAMPLES,
            changes=[change_view(text) for text in report.changes],
            change_levels=CHANGE_LEVELS,
            run=report.distillation,
            measured=_measured(report),
            plots=_plots(report),
            heat=figures.heat_rows(report.pairing.matrix, report.pairing.layer_map) if report.pairing else [],
            manifest=json.dumps(report.manifest, indent=2, ensure_ascii=False, default=str),
        )
    )


def render_comparison(comparison: Comparison) -> str:
    """Renders runs side by side as one page of the same kind."""
    return (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            comparison=comparison,
            measures=measures(comparison),
            loss=loss_curves(comparison),
            loss_height=LOSS_HEIGHT,
        )
    )


def write_report(report: Report, path: Path) -> None:
    """Writes the rendered report as UTF-8."""
    path.write_text(render_report(report), encoding="utf-8", newline="\n")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("castlora.report", "assets"),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "score": score, "score_interval": score_interval}
    environment.filters |= {"percent": percent, "percent_interval": percent_interval}
    return environment


@dataclass(frozen=True)
class _Plot:
    """Curves over the steps of a training.

    Attributes:
        name: Tells its parts from those of other plots.
        title: What it shows.
        figure: The curves.
        height: Of the plot in pixels.
    """

    name: str
    title: str
    figure: figures.LossFigure
    height: float


def _plots(report: Report) -> list[_Plot]:
    """The loss, and what was measured along the way."""
    run = report.distillation
    if run is None:
        return []
    nats = {name: points for name, points in run.along.items() if name not in (AGREEMENT, TASK_SCORE)}
    shares = {name: points for name, points in run.along.items() if name == AGREEMENT}
    ends, none = (run.held_out_before, run.held_out_after), (None, None)
    scored, on_task = _by_step(report)
    drawn = [
        ("loss", "Loss during training", figures.loss_figure({"loss": run.loss, **run.components}, ends, 220), 220),
        ("task", scored, figures.loss_figure(on_task, none, 140), 140),
        ("agreement", "Held-out positions with the teacher's next token, as a share, by step",
         figures.loss_figure(shares, none, 110), 110),
        ("nats", "KL divergence from the teacher on held-out text, and drift from the bare target on text that it wrote"
         " itself, in nats per position, by step", figures.loss_figure(nats, none, 140), 140),
    ]  # fmt: skip
    return [_Plot(name, title, figure, height) for name, title, figure, height in drawn if figure]


def _by_step(report: Report) -> tuple[str, dict[str, figures.Series]]:
    """What the target reached on the task of the run, by step, and in words: the lift where its scale is known."""
    run = report.distillation
    skill = next((skill for skill in report.skills if run and skill.sha256 == run.task_sha256), None)
    if run is None or skill is None or TASK_SCORE not in run.along:
        return "", {}
    points = run.along[TASK_SCORE]
    if skill.countable_lift is None:
        return f"Score on '{skill.name}', by step; 0 is the start{_teachers(skill)}", {skill.metric: points}
    bare, retrained = skill.value(BARE_TARGET), skill.value(RETRAINED)
    lifts = [(step, lift) for step, score in points if (lift := figures.lift_of(score, bare, retrained)) is not None]
    return (
        f"Lift on '{skill.name}', by step: 0 is the bare target, 1 the retrained adapter; step 0 is the start",
        {"lift": lifts},
    )


def _teachers(skill: Skill) -> str:
    value = skill.value(SOURCE_LORA)
    return f"; source + LoRA reaches {score(value)}" if is_number(value) else ""


def _measured(report: Report) -> list[tuple[str, ...]]:
    """Rows of the bare target, the start and the result on held-out text."""
    run, imitation = report.distillation, report.imitation
    rows: list[tuple[str, ...]] = []
    if imitation is not None:
        rows.append(("answer as the teacher's", percent(imitation.same_before), "", percent(imitation.same_after)))
    if imitation is not None and is_number(imitation.same_by_chance):
        rows.append(("answer as the teacher's to another prompt", "", "", percent(imitation.same_by_chance)))
    if run is None:
        return rows
    losses = run.held_out_bare, run.held_out_before, run.held_out_after
    agreements = run.agreement_bare, run.agreement_before, run.agreement_after
    rows += [("loss", *map(number, losses)), ("next token as the teacher's", *map(percent, agreements))]
    if is_number(run.drift_after):
        rows.append(("drift from the bare target on its own text, nats", "0", "", number(run.drift_after)))
    return [row for row in rows if set(row[1:]) - {MISSING}]


def _printable(value: object) -> object:
    return value if isinstance(value, Markup) else printable(str(value))

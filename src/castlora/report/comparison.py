"""Several runs side by side: what differs, whether they can be ranked, and what each of them reached."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from castlora.report import figures
from castlora.report.contents import BARE_TARGET, TRANSFERRED, Report, Score
from castlora.report.formatting import is_interval, is_number, number, percent, percent_interval, score, score_interval
from castlora.report.verdict import Verdict, verdict

LOSS_HEIGHT = 280
_MARKS = 3
_LETTERS = 26


@dataclass(frozen=True)
class ComparedRun:
    """What a comparison needs of one run.

    Attributes:
        name: Name of its folder.
        report: What its own page shows; with a distillation.
        settings: Its settings in words.
        identity: What others must share for their measures to be comparable; a value is empty where it is unknown.
        positions: What decides where its divergence is measured.
        objective: What decides what its loss means.
        divergence: KL to source + LoRA on held-out text, of the bare target and at the end, in nats per position.
        seconds: Wall time.
        peak_memory_bytes: Largest memory of its process.
    """

    name: str
    report: Report
    settings: Mapping[str, str]
    identity: Mapping[str, str]
    positions: str
    objective: str
    divergence: tuple[float, float]
    seconds: float
    peak_memory_bytes: float

    @cached_property
    def verdict(self) -> Verdict:
        """The outcome in one line."""
        return verdict(self.report)

    @cached_property
    def closeness(self) -> Verdict:
        """How closely it follows source + LoRA, which runs are ranked by, whatever tasks they were scored on."""
        return verdict(replace(self.report, skills=()))


@dataclass(frozen=True)
class BarRow:
    """A measure of one run, without and with the adapter.

    Attributes:
        label: The run's letter.
        before: Width of the bar of the bare target, in percent; None where it is unknown.
        after: The same with the adapter.
        whisker: Ends of the 95 % interval of `after`, in percent.
        text: Both values.
        interval: The interval in words.
    """

    label: str
    before: float | None
    after: float | None
    whisker: tuple[float, float] | None
    text: str
    interval: str = ""


@dataclass(frozen=True)
class Measure:
    """One figure of bars, a row per run that has the measure."""

    name: str
    rows: Sequence[BarRow]


@dataclass(frozen=True)
class LossCurves:
    """The losses of all runs on one logarithmic scale.

    Attributes:
        figure: Lines, named by the letters of their runs, and scale.
        marks: Where a line's letter is written on it.
    """

    figure: figures.LossFigure
    marks: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: By letter, in the given order.
        differences: The settings that differ: name, then a value for each run.
        same: A few settings that all runs share.
        reasons: Why they cannot be ranked; empty where they can.
        ranking: Letters, the best first; empty where they cannot be ranked or none is ahead.
        headline: The outcome in one line.
        details: Sentences that a careful reader needs next to it.
        same_objective: Whether all losses mean the same.
    """

    runs: Mapping[str, ComparedRun]
    differences: Sequence[tuple[str, Sequence[str]]]
    same: Mapping[str, str]
    reasons: Sequence[str]
    ranking: Sequence[str]
    headline: str
    details: Sequence[str] = field(default=())
    same_objective: bool = True

    @property
    def best(self) -> str | None:
        """Letter of the run that comes closest, if one does."""
        return self.ranking[0] if self.ranking else None


_SHARED = ("source model", "adapter", "target model", "known of the task", "recipe", "start", "steps", "seed")


def compare_runs(runs: Sequence[ComparedRun]) -> Comparison:
    """Compares two or more runs; they are ranked only where their measures mean the same."""
    by_letter = {letters(index): run for index, run in enumerate(runs)}
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    table = {name: [run.settings.get(name, "not recorded") for run in runs] for name in names}
    differences = [(name, values) for name, values in table.items() if len(set(values)) > 1]
    same = {name: table[name][0] for name in _SHARED if name in table and len(set(table[name])) == 1}
    same_objective = len({run.objective for run in runs}) == 1
    reasons = _reasons(by_letter)
    if reasons:
        headline = "Not ranked: these runs do not measure the same"
        return Comparison(by_letter, differences, same, reasons, (), headline, reasons, same_objective)
    ranking = sorted(by_letter, key=lambda letter: _place(by_letter[letter], runs))
    headline, details = _outcome(by_letter, ranking)
    if _place(by_letter[ranking[0]], runs) == _place(by_letter[ranking[1]], runs):
        headline, ranking = f"{ranking[0]} and {ranking[1]} come equally close to source + LoRA", []
    return Comparison(by_letter, differences, same, (), ranking, headline, details, same_objective)


def letters(index: int) -> str:
    """A for 0, B for 1, and after Z goes on with AA."""
    above, last = divmod(index, _LETTERS)
    return (letters(above - 1) if above else "") + chr(ord("A") + last)


def _reasons(runs: Mapping[str, ComparedRun]) -> list[str]:
    reasons = []
    for name in next(iter(runs.values())).identity:
        values = {letter: run.identity[name] for letter, run in runs.items()}
        unknown = [letter for letter, value in values.items() if not value]
        if unknown:
            reasons.append(f"The {name} of {', '.join(unknown)} are not recorded.")
        elif len(set(values.values())) > 1:
            reasons.append(f"The {name} differ: {_groups(values)}.")
    answered = all(run.report.imitation for run in runs.values())
    if not answered and len({run.positions for run in runs.values()}) > 1:
        reasons.append("Answers were not compared, and the KL divergence is over other places or tokens in each.")
    return reasons


def _groups(values: Mapping[str, str]) -> str:
    """Which runs share a value: `A and C against B`."""
    groups: dict[str, list[str]] = {}
    for letter, value in values.items():
        groups.setdefault(value, []).append(letter)
    return " against ".join(" and ".join(group) for group in groups.values())


def _place(run: ComparedRun, runs: Sequence[ComparedRun]) -> tuple[float, ...]:
    """Smaller is better: the share of unlike answers, where all have answers, then the divergence where it compares."""
    divergence = run.divergence[1] if is_number(run.divergence[1]) else float("inf")
    place = [] if len({other.positions for other in runs}) > 1 else [divergence]
    imitations = [other.report.imitation for other in runs if other.report.imitation]
    if run.report.imitation and len(imitations) == len(runs):
        same = run.report.imitation.same_after
        place.insert(0, -same if is_number(same) else float("inf"))
    return tuple(place)


def _outcome(runs: Mapping[str, ComparedRun], ranking: Sequence[str]) -> tuple[str, list[str]]:
    """What the two runs in front reached, and how sure their order is."""
    one, two = ranking[:2]
    first, second = runs[one], runs[two]
    ahead = f"{one} comes closest to source + LoRA"
    if first.report.imitation is None or second.report.imitation is None:
        nats = f"{one} {number(first.divergence[1])}, {two} {number(second.divergence[1])}"
        return ahead, [f"KL divergence to source + LoRA on held-out text, in nats per position: {nats}."]
    best, next_best = first.report.imitation, second.report.imitation
    details = [
        f"After {best.prompts} held-out prompts {one} writes what source + LoRA writes {percent(best.same_after)}"
        f" of the time {percent_interval(best.interval)}, {two} {percent(next_best.same_after)}"
        f" {percent_interval(next_best.interval)}."
    ]
    ends = best.interval[0], next_best.interval[1]
    if not is_interval(ends) or ends[0] > ends[1]:
        return ahead, details
    details.append("These 95 % intervals overlap, so the order of the two may be chance.")
    return f"{one} is ahead, but {two} may come as close", details


def measures(comparison: Comparison) -> list[Measure]:
    """The figures of bars; a measure that no run has is left out."""
    answers, divergences, agreements = [], [], []
    largest = max(
        (value for run in comparison.runs.values() for value in run.divergence if is_number(value)), default=0
    )
    shares, nats = figures.Axis(0.0, 1.0), figures.Axis(0.0, max(largest, 1e-9))
    for letter, run in comparison.runs.items():
        imitation, training = run.report.imitation, run.report.distillation
        if imitation:
            whisker = (
                (shares.position(imitation.interval[0]), shares.position(imitation.interval[1]))
                if is_interval(imitation.interval)
                else None
            )
            ends = imitation.same_before, imitation.same_after
            answers.append(_row(letter, ends, shares, percent, whisker, percent_interval(imitation.interval)))
        divergences.append(_row(letter, run.divergence, nats, number))
        if training:
            bare = training.agreement_bare if is_number(training.agreement_bare) else training.agreement_before
            agreements.append(_row(letter, (bare, training.agreement_after), shares, percent))
    named = {
        "Answers as source + LoRA writes them": answers,
        "Next token as source + LoRA's": agreements,
        "KL divergence to source + LoRA, nats per position; shorter is closer": divergences,
    }
    return [*_task_measures(comparison), *(Measure(name, rows) for name, rows in named.items() if rows)]


def _task_measures(comparison: Comparison) -> list[Measure]:
    """The scores of the runs on each task, without and with the adapter."""
    axis = figures.Axis(0.0, 1.0)
    rows: dict[tuple[str | None, str], list[BarRow]] = {}
    for letter, run in comparison.runs.items():
        for skill in run.report.skills:
            transferred = skill.scores.get(TRANSFERRED, Score(None))
            bounds = transferred.interval
            whisker = (axis.position(bounds[0]), axis.position(bounds[1])) if is_interval(bounds) else None
            ends = skill.value(BARE_TARGET), transferred.value
            row = _row(letter, ends, axis, score, whisker, score_interval(bounds))
            rows.setdefault((skill.sha256, f"{skill.name}: {skill.metric}"), []).append(row)
    return [Measure(name, of_runs) for (_, name), of_runs in rows.items()]


def _row(
    letter: str,
    ends: tuple[float | None, float | None],
    axis: figures.Axis,
    write: Callable[[float | None], str],
    whisker: tuple[float, float] | None = None,
    interval: str = "",
) -> BarRow:
    before, after = (axis.position(value) if is_number(value) else None for value in ends)
    return BarRow(letter, before, after, whisker, f"{write(ends[0])} → {write(ends[1])}", interval)


def loss_curves(comparison: Comparison) -> LossCurves | None:
    """The losses of all runs; None where no run has one."""
    series = {
        letter: run.report.distillation.loss for letter, run in comparison.runs.items() if run.report.distillation
    }
    figure = figures.loss_figure(series, (None, None), LOSS_HEIGHT, logarithmic=True)
    if figure is None:
        return None
    count = len(figure.lines)
    marks = [spread_marks(line.points, (index + 0.5) / count) for index, line in enumerate(figure.lines)]
    return LossCurves(figure, marks)


def spread_marks(points: Sequence[tuple[float, float]], offset: float) -> list[tuple[float, float]]:
    """A few points along a line, so that lines with unlike offsets (0 to 1) are marked at unlike places."""
    picked = [int((turn + offset) / _MARKS * len(points)) for turn in range(_MARKS)]
    return [points[index] for index in dict.fromkeys(picked)]


def describe_comparison(comparison: Comparison) -> dict[str, Any]:
    """The comparison for scripts, as JSON takes it."""
    return {
        "comparable": not comparison.reasons,
        "reasons": list(comparison.reasons),
        "ranking": list(comparison.ranking),
        "differences": {name: list(values) for name, values in comparison.differences},
        "runs": {
            letter: {
                "name": run.name,
                "verdict": run.verdict.headline,
                "closeness": run.closeness.headline,
                "losses": dict(run.report.manifest["losses"]),
                "answers": run.report.manifest["answers"],
                "tasks": run.report.manifest.get("tasks", []),
                "seconds": run.seconds,
                "peak_memory_bytes": run.peak_memory_bytes,
                "command": run.report.command,
            }
            for letter, run in comparison.runs.items()
        },
    }

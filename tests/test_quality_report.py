import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.quality_report import TABLE_BEGINS, TABLE_ENDS, main, replace_marked
from castlora.bench.methods import METHODS
from castlora.bench.parts import PARTS, MeasuredPart
from castlora.bench.plots import Curve, curve_chart, drift_chart, lift_chart, parts_chart
from castlora.bench.results import Comparison, Drift, MeanLift, PooledCell, compare, make_cells, read_results

WIDE_LETTER = 7.3  # In pixels: DejaVu Sans at 13 of them; most other fonts are narrower.
SVG = "{http://www.w3.org/2000/svg}"

ENVIRONMENT = {"commit": "0123456789abcdef", "versions": {"torch": "2.13.0"}, "machine": "x86_64, 2 cores"}


def figures(scores: str) -> dict[str, object]:
    correct = sum(map(int, scores)) / len(scores)
    return {"metric": "accuracy", "score": correct, "nll": 1.0, "n": len(scores), "scores": scores}


def run(method: str, seed: int, scores: str) -> dict[str, object]:
    return {
        "pair": "small:large", "skill": "colours", "regime": "prompts", "method": method, "seed": seed,
        "recipe": {"steps": 7, "batch_size": 2}, "train_seconds": 1.5, "environment": ENVIRONMENT, **figures(scores),
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "quality" / "small--large" / "colours"
    folder.mkdir(parents=True)
    references = {"bare target": "0000000000", "source + LoRA": "1111111111", "retrained": "1111111100"}
    described = {name: figures(scores) for name, scores in references.items()}
    record = {"pair": "small:large", "skill": "colours", "references": described}
    (folder / "references.json").write_text(json.dumps(record))
    for seed, scores in enumerate(("1111000000", "1111110000")):
        (folder / f"fresh.prompts.seed{seed}.json").write_text(json.dumps(run("fresh", seed, scores)))
    (folder / "ridge-start.prompts.seed0.json").write_text(json.dumps(run("ridge start", 0, "1111111100")))
    (folder / "prompts.seed0.lock").touch()
    return tmp_path / "quality"


def test_seeds_are_pooled_and_lift_is_taken_between_bare_and_retrained(results):
    fresh, ridge = make_cells(*read_results(results))
    assert (fresh.method, fresh.seeds, fresh.score) == ("fresh", 2, 0.5)
    assert fresh.lift.lift == pytest.approx(0.5 / 0.8)
    assert fresh.lift.ci95[0] < fresh.lift.lift < fresh.lift.ci95[1]
    assert (ridge.method, ridge.seeds) == ("ridge start", 1)
    assert ridge.lift.lift == pytest.approx(1.0)


def test_the_page_shows_what_was_run_and_nothing_else(results, tmp_path):
    pages = tmp_path / "findings.md", tmp_path / "README.md"
    for path in pages:
        path.write_text(f"before\n{TABLE_BEGINS}\nold\n{TABLE_ENDS}\nafter\n")
    main(results, tmp_path / "results.md", *pages, steps=None)
    page = (tmp_path / "results.md").read_text()
    assert "3 transfers of 7 steps × 2 passages" in page
    assert "| small → large | colours | 0.000 | 1.000 | 0.800 | 80 points | 1.25 |" in page
    assert "a perfect copy of source + LoRA would have; its mean is 1.25." in page
    assert "## Unlabelled task prompts" in page and "## General text only" not in page
    assert "| fresh | 1 | 0.62 | 0.62 | -0.50 (1) | 0, 1 |" in page
    assert "| small → large | colours | 1.00 [" in page and "| 0.62 [" in page
    summary = json.loads((tmp_path / "quality-summary.json").read_text())
    assert [cell["lift"] for cell in summary] == pytest.approx([0.625, 1.0])
    findings, readme = (path.read_text() for path in pages)
    for written, begins in ((findings, "| pair |"), (readme, "| | General text only |")):
        assert written.startswith(f"before\n{TABLE_BEGINS}\n{begins}") and written.endswith(f"\n{TABLE_ENDS}\nafter\n")
        assert "old" not in written
    assert "| a closed-form start instead of a fresh LoRA | Unlabelled task prompts | +0.50 (1) | 1, 0 |" in page
    assert "| maps trained as such" not in page
    assert "| small → large | colours | 0.000 | 0.800 | – | – | – | – | – | 0.62 | – |\n" in findings
    assert "| mean (cells) | | | | – | – | – | – | – | 0.62 (1) | – |" in findings
    assert "| on pairs never used for tuning | | | | – | – | – | – | – | 0.62 (1) | – |" in findings
    ridge, fresh = "1.00 [1.00, 1.00] · 1 · 1", "0.62 [0.62, 0.62] · 1 · 2"
    bare, plain = "| closed-form start, no rehearsal | – | – |", "| a fresh LoRA, no rehearsal | – | – |"
    rows = f"|\n{bare} {ridge} |\n{plain} {fresh} |\n"
    assert f"{rows}<!--" in readme


def test_what_reads_no_text_and_what_was_retrained_stand_beside_every_text(results, tmp_path):
    cross = run("Cross-LoRA", 0, "1000000000") | {"regime": "none"}
    (results / "small--large" / "colours" / "Cross-LoRA.none.seed0.json").write_text(json.dumps(cross))
    (tmp_path / "retrained" / "large").mkdir(parents=True)
    for seed, score in ((1, 0.6), (2, 0.8)):
        again = {"base": "large", "skill": "colours", "seed": seed, "score": score, "environment": ENVIRONMENT}
        (tmp_path / "retrained" / "large" / f"colours.seed{seed}.json").write_text(json.dumps(again))
    readme = tmp_path / "README.md"
    readme.write_text(f"{TABLE_BEGINS}{TABLE_ENDS}")
    main(results, tmp_path / "results.md", None, readme, tmp_path / "retrained", steps=None)
    table = readme.read_text()
    assert f"| Cross-LoRA, which reads weights alone |{3 * ' 0.12 [0.12, 0.12] · 1 · 1 |'}\n" in table
    assert f"| retrained with the labels, other seeds |{3 * ' 0.88 [0.88, 0.88] · 1 · 2 |'}\n" in table


def test_pairs_that_were_tuned_on_do_not_count_as_untouched(results, tmp_path, monkeypatch):
    for path in (results / "small--large" / "colours").glob("ridge-start.*"):
        default = json.loads(path.read_text()) | {"method": "default"}
        (path.parent / "default.prompts.seed0.json").write_text(json.dumps(default))
    pages = tmp_path / "findings.md", tmp_path / "README.md"
    untouched = "| on pairs never used for tuning | | | |" + 7 * " – |"
    for tuned_on in ("small:large",), ():
        monkeypatch.setattr("benchmarks.quality_report.TUNED_ON", tuned_on)
        for path in pages:
            path.write_text(f"{TABLE_BEGINS}{TABLE_ENDS}")
        main(results, tmp_path / "results.md", *pages, steps=None)
        findings, readme = (path.read_text() for path in pages)
        assert (untouched in findings) == bool(tuned_on)
        row = "\n| **castlora** on pairs never used for tuning | – | – | 1.00 [1.00, 1.00] · 1 · 1 |\n"
        assert (row in readme) != bool(tuned_on)


def test_the_loss_on_held_out_text_is_compared_with_the_bare_and_the_retrained_target(results, tmp_path):
    folder = results / "small--large" / "colours"
    losses = {"fresh.prompts.seed0.json": 4.2, "fresh.prompts.seed1.json": 4.4}
    for name, loss in losses.items():
        record = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**record, "text_loss": loss}))
    references = json.loads((folder / "references.json").read_text())
    for name, loss in {"bare target": 4.0, "retrained": 4.5}.items():
        references["references"][name]["text_loss"] = loss
    (folder / "references.json").write_text(json.dumps(references))
    main(results, tmp_path / "results.md", None, None, steps=None)
    page = (tmp_path / "results.md").read_text()
    assert f"| Unlabelled task prompts | fresh | 1 | {math.exp(0.3):.2f} | {math.exp(0.5):.2f} |" in page
    assert "ridge start" not in page.partition("## General ability")[2]
    summary = json.loads((tmp_path / "quality-summary.json").read_text())
    assert [cell["text_loss_added"] for cell in summary] == [pytest.approx(0.3), None]
    charts = re.findall(r"!\[.*\]\((.*)\)", page)
    assert charts == ["results.svg", "results-parts.svg", "results-drift.svg"]
    assert all((tmp_path / chart).stat().st_size for chart in charts)


def test_steps_against_lift_are_shown_where_they_were_run(results, tmp_path):
    for steps in (50, 100):
        shutil.copytree(results, tmp_path / "steps" / str(steps))
    main(results, tmp_path / "results.md", None, None, steps=tmp_path / "steps")
    page = (tmp_path / "results.md").read_text()
    assert "## Steps against lift" in page and "| 50 | " in page and "| 100 | " in page
    assert (tmp_path / "results-steps-prompts.svg").read_text().startswith("<svg")
    main(results, tmp_path / "results.md", None, None, steps=None)
    assert "Steps against lift" not in (tmp_path / "results.md").read_text()


def test_a_page_without_marks_is_left_alone():
    with pytest.raises(ValueError, match="no table between"):
        replace_marked("# A page", "| a table |")


def cell(skill: str, lifts: dict[int, float], pair: str = "a:b") -> PooledCell:
    return PooledCell(pair, skill, "prompts", "any", len(lifts), 0.5, 1.0, None, lifts, None)


def test_methods_are_compared_on_the_cells_and_seeds_that_both_have():
    ours = [cell("x", {0: 0.9, 1: 0.5}), cell("y", {0: 0.2}), cell("z", {0: 1.0}), cell("w", {0: 1.0})]
    others = [cell("x", {1: 0.3, 2: 9.0}), cell("y", {0: 0.5}), cell("z", {1: 0.0}), cell("w", {0: 1.0}, pair="c:d")]
    comparison = compare(ours, others)
    assert (comparison.cells, comparison.ahead, comparison.behind) == (2, 1, 1)
    assert comparison.above == pytest.approx((0.2 - 0.3) / 2)
    assert comparison.ci95 == pytest.approx((-0.3, 0.2))
    assert compare(ours, others[2:]) is None


def mean(method: str, lift: float, ci95: tuple[float, float], regime: str = "prompts") -> MeanLift:
    return MeanLift(regime, method, 3, lift, ci95, 0.5, None)


def bars_of(chart: ElementTree.Element) -> list[tuple[float, float]]:
    """Where the bars of a chart begin, and how wide they are."""
    bars = list(chart.iter(f"{SVG}rect"))[1:]
    return [(float(bar.get("x")), float(bar.get("width"))) for bar in bars]


def places_of(chart: ElementTree.Element) -> dict[str, float]:
    return {text.text: float(text.get("x")) for text in chart.iter(f"{SVG}text")}


def test_the_chart_has_a_bar_from_zero_to_each_lift_and_room_for_every_interval():
    means = [
        mean("ridge start", 0.5, (0.4, 0.6)),
        mean("a <b>", -0.25, (-0.5, 0.0)),
        mean("c", 1.25, (1.0, 1.5), "none"),
    ]
    chart = ElementTree.fromstring(lift_chart(means, {"prompts": "Prompts", "none": "Weights"}, "ridge start"))
    starts, widths = zip(*bars_of(chart), strict=True)
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.1) and widths[2] == pytest.approx(widths[0] * 2.5, abs=0.1)
    assert starts[0] == starts[2] == pytest.approx(starts[1] + widths[1], abs=0.1)
    assert {"Prompts", "Weights", "a <b>", "0.50 (3 cells)", "retrained 1"} <= places_of(chart).keys()
    ends = [float(number) for path in chart.iter(f"{SVG}path") for number in re.findall(r"[MH]([\d.]+)", path.get("d"))]
    assert min(ends) >= 310 and max(ends) <= 730


def test_a_ring_has_the_reference_where_a_method_was_run_on_fewer_cells():
    def compared(method: str, cells: int, lift: float, above: float) -> MeanLift:
        return MeanLift(
            "prompts", method, cells, lift, (lift, lift), 0.5, Comparison(cells, above, (above, above), 1, 1)
        )

    reference = MeanLift("prompts", "default", 3, 0.5, (0.5, 0.5), 0.5, None)
    means = [reference, compared("as many", 3, 0.25, -0.25), compared("fewer", 2, 0.75, 0.5)]
    chart = ElementTree.fromstring(lift_chart(means, {"prompts": "Prompts"}, "default"))
    (start, width), *_ = bars_of(chart)
    (ring,) = (float(circle.get("cx")) for circle in chart.iter(f"{SVG}circle"))
    assert ring == pytest.approx(start + width / 2, abs=0.1)
    assert "○ default, same cells" in places_of(chart)
    alone = ElementTree.fromstring(lift_chart([reference], {"prompts": "Prompts"}, "default"))
    assert not list(alone.iter(f"{SVG}circle")) and "○ default, same cells" not in places_of(alone)


def test_parts_are_drawn_by_text_with_room_for_the_longest_name():
    longest = replace(max(PARTS, key=lambda part: len(part.change)), regime="prompts")
    others = [part for part in PARTS if part.regime == "general"][:2]
    added = (Comparison(21, above, (above, above + 0.1), 5, 4) for above in (0.05, 0.2, -0.1))
    parts = [MeasuredPart(part, of_part) for part, of_part in zip((longest, *others), added, strict=True)]
    chart = ElementTree.fromstring(parts_chart(parts, {"general": "General", "prompts": "Prompts"}))
    (up, wide), (down, back), (last, narrow) = bars_of(chart)
    assert up == last == pytest.approx(down + back, abs=0.1)
    assert (back, narrow) == pytest.approx((wide / 2, wide / 4), abs=0.2)
    places = places_of(chart)
    assert {"General", "Prompts", "+0.20 (21 cells)", "-0.10 (21 cells)"} <= places.keys()
    assert places["0"] == up and places["+0.2"] == pytest.approx(up + wide, abs=0.2)
    assert places[longest.change] >= WIDE_LETTER * len(longest.change) - 10


def test_drift_is_drawn_on_a_logarithmic_axis_beside_what_retraining_does():
    measured = [Drift("general", "default", 1, 2.0, 8.0), Drift("general", "fresh", 3, 4.0, 8.0)]
    chart = ElementTree.fromstring(drift_chart(measured, {"general": "General"}))
    (start, twice), (_, four_times) = bars_of(chart)
    assert four_times == pytest.approx(2 * twice, abs=0.1)
    rings = [float(ring.get("cx")) for ring in chart.iter(f"{SVG}circle")]
    assert rings == pytest.approx([start + 3 * twice] * 2, abs=0.2)
    places = places_of(chart)
    assert (places["bare 1"], places["× 2"]) == pytest.approx((start, start + twice), abs=0.1)
    assert {"2.00 (1 cell)", "4.00 (3 cells)", "○ retrained"} <= places.keys()


def test_one_part_that_adds_nothing_and_no_drift_can_be_drawn():
    nothing = MeasuredPart(PARTS[0], Comparison(1, 0.0, (0.0, 0.0), 0, 0))
    assert "+0.00 (1 cell)" in parts_chart([nothing], {PARTS[0].regime: "General"})
    assert "1.00 (1 cell)" in drift_chart([Drift("general", "fresh", 1, 1.0, 1.0)], {"general": "General"})


def test_the_longest_name_of_a_method_fits_beside_its_bar_and_no_lift_is_minus_zero():
    longest = max(METHODS, key=len)
    means = [MeanLift("prompts", longest, 3, -0.001, (-0.01, 0.01), 0.9, None)]
    chart = ElementTree.fromstring(lift_chart(means, {"prompts": "Prompts"}, longest))
    ends = places_of(chart)
    assert ends[longest] >= WIDE_LETTER * len(longest)
    assert "0.00 (3 cells)" in ends


def test_curves_lie_where_their_points_say_on_a_logarithmic_axis():
    curves = [Curve("one", [(50, 0.0), (100, 0.5), (200, 1.0)]), Curve("two <b>", [(50, 0.25), (200, 1.0)])]
    chart = ElementTree.fromstring(curve_chart(curves, "steps", "lift"))
    places = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in chart.iter(f"{SVG}circle")]
    (x50, y0), (x100, y50), (x200, y100), (_, y25), _ = places
    assert x100 - x50 == pytest.approx(x200 - x100, abs=0.1)
    assert y0 - y50 == pytest.approx(y50 - y100, abs=0.1) and y0 - y25 == pytest.approx((y0 - y100) / 4, abs=0.1)
    labels = {text.text: float(text.get("y")) for text in chart.iter(f"{SVG}text")}
    assert {"50", "100", "200", "0.0", "1.0", "steps", "lift", "one", "two <b>"} <= labels.keys()
    assert abs(labels["one"] - labels["two <b>"]) >= 16


def test_curves_of_all_starts_look_unlike_and_their_longest_name_fits():
    names = [*list(METHODS)[:6], max(METHODS, key=len)]
    chart = ElementTree.fromstring(curve_chart([Curve(name, [(50, 0.5), (800, 0.9)]) for name in names], "x", "y"))
    lines = [(path.get("stroke"), path.get("stroke-dasharray")) for path in chart.iter(f"{SVG}path")]
    dashed = [line for line in lines if line[1]]
    assert len(set(dashed)) == len(dashed) == len(names)
    width = float(chart.get("viewBox").split()[2])
    starts = {text.text: float(text.get("x")) for text in chart.iter(f"{SVG}text")}
    assert starts[names[-1]] + WIDE_LETTER * len(names[-1]) <= width


def test_a_curve_of_one_point_is_drawn():
    ElementTree.fromstring(curve_chart([Curve("one", [(50, 1.2)])], "steps", "lift"))

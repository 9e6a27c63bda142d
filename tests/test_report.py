"""The report: what it says, where it draws it, and that nothing in it can do harm."""

import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import needs_chromium, open_page
from hypothesis import given, settings
from hypothesis import strategies as st

from castlora.lift import Lift
from castlora.report import (
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
    SitePair,
    Skill,
    render_report,
    write_report,
)
from castlora.report.formatting import percent, printable
from castlora.report.verdict import verdict
from castlora.report.views import LONGEST_TEXT, change_level, skill_view

HOSTILE = (
    "\"'></text></style><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">&{{7*7}}"
    "\0\x1b\u202e\ud800"
)
few_examples = settings(max_examples=40, deadline=None)

SKILL = Skill(
    "trec",
    {
        BARE_TARGET: Score(0.132, (0.102, 0.162), 3.21),
        SOURCE_LORA: Score(0.761, (0.721, 0.801), 0.812),
        TRANSFERRED: Score(0.688, (0.648, 0.728), 0.934),
        RETRAINED: Score(0.779, (0.739, 0.819), 0.701),
        "zero adapter": Score(0.132),
    },
    Lift(0.859, (0.79, 0.93), 0.883, countable=True),
    examples=500,
)
REPORT = Report(
    title="trec to mistral-s",
    facts={"source": "llama-s", "target": "mistral-s"},
    skills=[SKILL],
    distillation=Distillation(
        [(0, 3.5), (50, 1.25), (100, 0.75)], {"KL": [(0, 3.0), (100, 0.5)]}, 2.91, 0.552, 0.31, 0.842
    ),
    pairing=Pairing(
        [SitePair("layer 0 q", "layer 0 q", 0.91), SitePair("layer 1 gate", None)], [[1.0, 0.25], [0.0, 0.73]], "CKA"
    ),
    samples=[Sample("What is a cat?", {BARE_TARGET: "a dog", TRANSFERRED: "an animal"}, "an animal")],
    changes=[
        ChangedText(
            "W",
            "W",
            [
                ChangedPiece("ho?\n", 0.25, 0.0, False),
                ChangedPiece(" fox", 3.5, 2.75, True),
                ChangedPiece("", 9.0, 0.125, True),
            ],
        )
    ],
    manifest={"seed": 17, "recipe": {"name": "default"}},
    command="castlora transfer --adapter trec",
    files=["adapter_model.safetensors"],
)


def hostile_report() -> Report:
    scores = {model: Score(0.5 + index / 10, (0.4, 0.9)) for index, model in enumerate(SKILL.scores)}
    return Report(
        title=HOSTILE,
        facts={HOSTILE: HOSTILE},
        skills=[replace(SKILL, name=HOSTILE, metric=HOSTILE, scores=scores | {HOSTILE: Score(0.3)})],
        distillation=replace(REPORT.distillation, components={HOSTILE: [(0, 1.0), (9, 0.5)]}),
        pairing=Pairing([SitePair(HOSTILE, HOSTILE), SitePair(HOSTILE, None)], [[1.0]], HOSTILE),
        samples=[Sample(HOSTILE, {HOSTILE: HOSTILE, TRANSFERRED: "x" + HOSTILE}, HOSTILE), Sample(HOSTILE, {})],
        changes=[ChangedText(HOSTILE, HOSTILE, [ChangedPiece(HOSTILE, math.nan, 1.0, True)])],
        manifest={HOSTILE: [HOSTILE]},
        cost={HOSTILE: HOSTILE},
        command=HOSTILE,
        files=[HOSTILE],
    )


def tree(html: str) -> ElementTree.Element:
    """The page as XML: fails on unbalanced or badly quoted markup and on control characters."""
    return ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>"))


def text_of(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def page_text(report: Report) -> str:
    return re.sub(r"[ \n]+", " ", text_of(tree(render_report(report)).find("body")))


def by_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


DEGENERATE = {
    "empty": Report(""),
    "nothing measured": Report(
        "x",
        skills=[Skill("a", {}), Skill("b", {BARE_TARGET: Score(None), TRANSFERRED: Score(math.nan, (math.nan, 1.0))})],
        distillation=Distillation(),
        pairing=Pairing([]),
        samples=[Sample("", {})],
        changes=[ChangedText("", "", [])],
    ),
    "undefined lift": Report("x", skills=[replace(SKILL, lift=Lift(math.nan, (math.nan, math.nan), math.nan, False))]),
    "no interval": Report("x", skills=[replace(SKILL, lift=Lift(0.5, (math.nan, math.nan), 0.8, True))]),
    "infinite": Report("x", skills=[Skill("a", {TRANSFERRED: Score(math.inf, (-math.inf, math.inf))})]),
    "one loss point": Report("x", distillation=Distillation([(1, 2.5)], {}, 2.5, 2.5)),
    "diverged": Report("x", distillation=Distillation([(1, math.inf), (2, math.nan)], {"KL": []}, math.nan, None)),
    "one layer": Report("x", pairing=Pairing([SitePair("layer 0 q", "layer 0 q")], [[1.0]])),
    "48 layers": Report("x", pairing=Pairing([], [[0.5] * 48 for _ in range(48)])),
    "no source layers": Report("x", pairing=Pairing([SitePair("layer 0 q", None)], [[]])),
    "ragged": Report("x", pairing=Pairing([], [[1.0], [0.5, math.nan, None]])),
    "hostile": hostile_report(),
    "full": REPORT,
}
every_report = pytest.mark.parametrize("report", DEGENERATE.values(), ids=DEGENERATE)


class TestSafety:
    @every_report
    def test_page_is_well_formed_and_passive(self, report: Report) -> None:
        html = render_report(report)
        root = tree(html)
        assert not {"script", "img", "iframe", "object", "embed", "form", "a", "base"} & {e.tag for e in root.iter()}
        names = {name for element in root.iter() for name in element.attrib}
        assert not [name for name in names if name.startswith("on")]
        assert "src" not in names
        assert [e.get("href") for e in root.iter() if e.get("href")] == ["data:,"]

    def test_hostile_text_is_shown_as_text(self) -> None:
        html = render_report(hostile_report())
        assert "<script" not in html.lower()
        assert "<img" not in html.lower()
        assert "{{7*7}}" in html
        assert html.count("⟨U+202E⟩") == html.count("⟨U+D800⟩") > 20
        assert html.count("⟨U+0000⟩") == html.count("⟨U+001B⟩") > 20
        html.encode()

    def test_page_asks_for_nothing(self) -> None:
        html = render_report(REPORT)
        assert "http" not in html.replace("http-equiv", "")
        assert not re.search(r"src=|url\(|@import|javascript:", html)
        policy = next(m.get("content") for m in tree(html).iter("meta") if m.get("http-equiv"))
        assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")

    @few_examples
    @given(st.text(min_size=1))
    def test_any_prompt_comes_back_as_written(self, prompt: str) -> None:
        root = tree(render_report(Report("x", samples=[Sample(prompt, {})])))
        assert text_of(by_class(root, "text")[0]) == printable(prompt)

    @needs_chromium
    def test_browser_runs_no_injected_script_and_asks_for_nothing(self, tmp_path: Path) -> None:
        write_report(hostile_report(), tmp_path / "report.html")
        opened = open_page(tmp_path / "report.html", tmp_path)
        assert "CONSOLE" not in opened.log
        assert "<title>pwned" not in opened.dom and "<script" not in opened.dom
        assert "pwned" in opened.dom
        assert opened.requests == []

    @needs_chromium
    def test_requests_of_a_page_are_seen(self, tmp_path: Path) -> None:
        (tmp_path / "page.html").write_text("<img src=http://127.0.0.1:9/x.png>")
        assert open_page(tmp_path / "page.html", tmp_path).requests == ["http://127.0.0.1:9/x.png"]


class TestAccessibility:
    @every_report
    def test_figures_are_named_and_ids_are_unique(self, report: Report) -> None:
        root = tree(render_report(report))
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        for figure in (element for element in root.iter("svg") if element.get("role") == "img"):
            names = figure.get("aria-labelledby").split()
            assert [child.get("id") for child in figure[:2]] == names
            assert all(text_of(child).strip() for child in figure[:2])

    def test_values_are_readable_without_colour(self) -> None:
        root = tree(render_report(REPORT))
        assert [text_of(label) for label in by_class(root, "value")][:2] == ["97\xa0% [91, 103]", "86\xa0% [79, 93]"]
        cells = [
            text_of(group.find("text"))
            for group in by_class(root, "heat")[0].iter("g")
            if group.find("text") is not None
        ]
        assert cells == ["1", ".25", ".73"]

    def test_boxes_that_scroll_can_be_reached_by_keyboard(self) -> None:
        root = tree(render_report(REPORT))
        boxes = [*by_class(root, "scroll"), *by_class(root, "text")]
        assert len(boxes) > 5
        assert all(box.get("tabindex") == "0" and box.get("role") and box.get("aria-label") for box in boxes)


class TestContent:
    def test_numbers_of_the_report_appear(self) -> None:
        text = page_text(REPORT)
        for shown in (
            "86\xa0% of the lift arrived [79, 93]", "0.132", "0.761", "[0.648, 0.728]", "0.779", "0.934", "88\xa0%",
            "500 examples", "3.50 → 0.750", "2.91 → 0.552", "31\xa0%84\xa0%", "0.910", "no partner",
            "2 target sites, 1 with a partner", '"seed": 17', "castlora transfer --adapter trec",
            "adapter_model.safetensors", "llama-s",
        ):  # fmt: skip
            assert shown in text, shown

    def test_words_that_differ_from_the_expected_are_marked(self) -> None:
        samples = by_class(tree(render_report(REPORT)), "sample")
        assert [text_of(mark) for mark in samples[0].iter("mark")] == ["a dog"]
        assert [text_of(note) for note in by_class(samples[0], "difference")] == ["2 differ", "as expected"]

    def test_the_score_by_step_becomes_the_lift_where_its_scale_is_known(self) -> None:
        along = {TASK_SCORE: [(0, 0.132), (50, 0.4555), (100, 0.779)]}
        skill = replace(SKILL, name="Greek μ", sha256="1234")
        report = Report("t", skills=[skill], distillation=Distillation(along=along, task_sha256="1234"))
        page = render_report(report)
        assert "Lift on &#39;Greek μ&#39;, by step: 0 is the bare target, 1 the retrained adapter; step 0" in page
        assert re.search(r'lift <span class="muted">0 → 1.00</span>', page)
        for unknown in (replace(skill, lift=None), replace(skill, lift=replace(SKILL.lift, countable=False))):
            page = render_report(replace(report, skills=[unknown]))
            assert "Score on &#39;Greek μ&#39;, by step; 0 is" in page and "Lift on" not in page
            assert re.search(r'accuracy <span class="muted">0.132 → 0.779</span>', page)
        assert "by step" not in render_report(replace(report, skills=[replace(skill, sha256="5678")]))

    def test_missing_sections_are_left_out(self) -> None:
        headings = [text_of(h) for h in tree(render_report(Report("x"))).iter("h2")]
        assert headings == []
        headings = [text_of(h) for h in tree(render_report(REPORT)).iter("h2")]
        assert headings == [
            "How much arrived", "Samples", "What the adapters change, and where", "Distillation", "Pairing",
            "Reproduce",
        ]  # fmt: skip

    def test_long_texts_are_cut(self) -> None:
        html = render_report(Report("x", samples=[Sample("p" * (LONGEST_TEXT + 7), {"m": "word " * 20000}, "word")]))
        assert "7 more characters" in html
        assert len(html) < 60000

    def test_many_samples_are_folded_away(self) -> None:
        root = tree(render_report(Report("x", samples=[Sample(str(index), {}) for index in range(11)])))
        (folded,) = root.iter("details")
        assert text_of(folded.find("summary")) == "3 more samples"
        assert [text_of(sample.find("h3")) for sample in by_class(folded, "sample")] == [
            "Sample 9",
            "Sample 10",
            "Sample 11",
        ]

    def test_changes_are_told_by_shade_by_line_and_in_numbers(self) -> None:
        root = tree(render_report(REPORT))
        (changes,) = by_class(root, "changes")
        marks = [(text_of(mark), mark.get("class"), mark.get("title")) for mark in by_class(changes, "change")]
        assert marks == [
            ("ho?↵\n", "change change-1", "0.250 nats"),
            (" fox", "change change-3 answer", "3.50 nats"),
            ("⟨end⟩", "change change-4 answer", "9.00 nats"),
            ("ho?↵\n", "change", "0 nats"),
            (" fox", "change change-3 answer", "2.75 nats"),
            ("⟨end⟩", "change change-1 answer", "0.125 nats"),
        ]
        assert [text_of(note) for note in by_class(changes, "difference")] == [
            "mean 6.25 nats in the answer",
            "mean 1.44 nats in the answer",
        ]
        style = text_of(root.find("head/style"))
        lines = [re.search(rf"\.change-{level} .*text-decoration: ([^;]*)", style)[1] for level in range(1, 5)]
        assert len(set(lines)) == 4
        assert [text_of(key) for key in by_class(root, "change")][:5] == ["0", "0.1", "0.5", "2", "8"]
        (table,) = [box for box in by_class(root, "tall") if box.get("aria-label") == "Text 1 in numbers"]
        rows = [[text_of(cell) for cell in row] for row in table.iter("tr")]
        assert rows[1:] == [["ho?↵\n", "0.250", "0"], [" fox", "3.50", "2.75"], ["⟨end⟩", "9.00", "0.125"]]

    def test_levels_of_changes(self) -> None:
        assert [change_level(nats) for nats in (0.0, 0.1, 0.5, 7.9, 8.0, math.nan)] == [0, 1, 2, 3, 4, 0]

    def test_written_file_is_the_page(self, tmp_path: Path) -> None:
        write_report(REPORT, tmp_path / "report.html")
        assert (tmp_path / "report.html").read_bytes() == render_report(REPORT).encode()


class TestRows:
    def test_rows_of_a_skill(self) -> None:
        view = skill_view(SKILL)
        assert [row.model for row in view.bars] == [SOURCE_LORA, TRANSFERRED, "zero adapter"]
        places = {row.model: row.place for row in view.rows}
        assert places[TRANSFERRED].lift == SKILL.lift.lift
        assert places[SOURCE_LORA].lift == pytest.approx((0.761 - 0.132) / (0.779 - 0.132))
        assert places[SOURCE_LORA].interval == pytest.approx((0.9104, 1.0340), abs=1e-4)
        assert places["zero adapter"].interval is None


class TestVerdict:
    def with_lift(self, value: float, ci95: tuple[float, float] = (0.1, 0.2)) -> Skill:
        return replace(SKILL, lift=Lift(value, ci95, 0.9, countable=True))

    def test_one_skill(self) -> None:
        line = verdict(REPORT)
        assert (line.headline, line.interval) == ("86\xa0% of the lift arrived", "[79, 93]")
        assert line.details[1] == "That is 88\xa0% of the retrained score."

    def test_interval_with_zero_is_pointed_out(self) -> None:
        assert "includes 0" in verdict(Report("x", skills=[self.with_lift(0.1, (-0.05, 0.25))])).details[-1]
        assert "includes 0" not in verdict(REPORT).details[-1]

    @pytest.mark.parametrize("value", [-0.12, 0.0, 0.004])
    def test_no_lift(self, value: float) -> None:
        assert verdict(Report("x", skills=[self.with_lift(value)])).headline == f"No lift arrived: {percent(value)}"

    def test_several_skills_are_averaged(self) -> None:
        skills = [self.with_lift(0.9), replace(self.with_lift(0.4), name="sums"), replace(SKILL, lift=None)]
        line = verdict(Report("x", skills=skills))
        assert line.headline == "65\xa0% of the lift arrived on average"
        assert line.details == ["Mean of 2 skills, from 40\xa0% (sums) to 90\xa0% (trec)."]

    def test_a_lift_that_does_not_count_is_not_claimed(self) -> None:
        scores = SKILL.scores | {RETRAINED: Score(0.14)}
        skill = replace(SKILL, scores=scores, lift=Lift(70.0, (1.0, 99.0), 4.9, countable=False))
        report = Report("x", skills=[skill])
        assert verdict(report).headline == "trec: accuracy 0.688, from 0.132 without it"
        assert "moves the score by +0.8 points here, too little" in page_text(report)
        assert "lift" not in [text_of(cell) for cell in tree(render_report(report)).iter("th")]

    @pytest.mark.parametrize(
        ("before", "after", "headline"),
        [
            (2.0, 0.5, "Held-out loss fell 75\xa0%"),
            (2.0, 3.0, "Held-out loss rose 50\xa0%"),
            (2.0, 2.0, "Held-out loss stayed the same"),
            (None, 0.5, "Held-out loss 0.500"),
            (0.0, 0.5, "Held-out loss 0.500"),
            (2.0, math.nan, "Transferred, not yet measured"),
        ],
    )
    def test_without_a_task(self, before: float | None, after: float, headline: str) -> None:
        run = Distillation(held_out_before=before, held_out_after=after, agreement_before=0.31, agreement_after=0.77)
        line = verdict(Report("x", distillation=run))
        assert line.headline == headline
        said = "Its next token is the teacher's in 77\xa0% of positions, 31\xa0% before." in line.details
        assert said == math.isfinite(after)

    def test_without_a_task_the_answers_come_before_the_loss(self) -> None:
        run = Distillation(held_out_before=2.0, held_out_after=0.5)
        report = replace(REPORT, skills=(), distillation=run, imitation=Imitation(64, 0.02, 0.81, (0.7, 0.9)))
        found = verdict(report)
        assert (found.headline, found.interval) == ("81\xa0% of answers are the teacher's", "[70, 90]")
        assert found.details[0].startswith("After 64 prompts kept out of training the target writes what")
        assert "2\xa0% without the adapter" in found.details[0] and "From 2.00 to 0.500" in found.details[1]
        assert "answer as the teacher" in render_report(report)
        assert verdict(replace(report, skills=[SKILL])).headline == "86\xa0% of the lift arrived"

    def test_controls_stand_beside_the_result(self) -> None:
        run = Distillation(
            held_out_before=2.0, held_out_after=0.5, agreement_before=0.4, agreement_after=0.77, held_out_bare=2.5,
            agreement_bare=0.31,
        )  # fmt: skip
        report = replace(REPORT, skills=(), distillation=run, imitation=Imitation(64, 0.02, 0.81, (0.7, 0.9), 0.15))
        said = " ".join(verdict(report).details)
        assert "the other prompts, 15\xa0% of its answers are the same" in said
        assert "in 77\xa0% of positions, 31\xa0% without the adapter" in said
        rows = [[text_of(cell) for cell in row] for row in tree(render_report(report)).iter("tr")]
        assert ["loss", "2.50", "2.00", "0.500"] in rows
        assert ["next token as the teacher's", "31\xa0%", "40\xa0%", "77\xa0%"] in rows
        assert ["answer as the teacher's to another prompt", "", "", "15\xa0%"] in rows

    def test_the_cost_is_shown(self) -> None:
        assert "wall time90 s" in page_text(replace(REPORT, cost={"wall time": "90 s"}))
        assert "wall time" not in page_text(REPORT)

    def test_samples_can_be_compared_with_what_another_model_wrote(self) -> None:
        sample = Sample("Who?", {TRANSFERRED: " a fox", BARE_TARGET: "a hen"}, "a fox", SOURCE_LORA)
        page = render_report(replace(REPORT, samples=[sample]))
        assert "Words that differ from what source + LoRA writes are" in page
        assert "the same</span>" in page and "as expected" not in page and "<mark>hen</mark>" in page

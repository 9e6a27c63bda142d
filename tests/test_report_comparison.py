"""The comparison of runs: what it says differs, when it ranks, and that nothing in it can do harm."""

import json
import math
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from browser import needs_chromium, open_page
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_report import HOSTILE, by_class, text_of, tree

from castlora import UserError, report_runs
from castlora.cli import main
from castlora.config import DEFAULT, Recipe
from castlora.publishing.runs import RunDetails, read_run, run_report
from castlora.report import ChangedPiece, ChangedText, Sample, compare_runs, describe_comparison, render_comparison
from castlora.report.comparison import letters, loss_curves, measures, spread_marks
from castlora.report.figures import log_levels
from castlora.report.settings import RECIPE_WORDS, in_words

MANIFEST: dict[str, Any] = {
    "source": {"name": "owner/llama", "revision": None, "tokenizer_sha256": "a"},
    "target": {"name": "owner/mistral", "revision": None, "tokenizer_sha256": "b"},
    "adapter": {"name": "skill", "kind": "LoRA", "rank": 8, "beyond_maps": []},
    "text": {
        "regime": "unlabelled prompts", "text": None, "prompt_format": None, "prompts": "prompts.txt", "chat": False,
        "taught": None, "formats": [],
    },
    "rank": 8,
    "pairing": [{"target": "model.layers.0.q_proj", "sources": [{"module": "model.layers.0.q_proj", "roles": ["q"]}]}],
    "layer_map": [0],
    "recipe": {"name": "default", **{field.name: getattr(DEFAULT, field.name) for field in fields(Recipe)}},
    "seed": 0,
    "versions": {"castlora": "0.1.0", "torch": "2.13"},
    "passages": {"training": 24, "held_out": 6, "variants": 0},
    "held_out_sha256": "c",
    "losses": {
        "held_out_before": 3.0, "kl_before": 2.5, "agreement_before": 0.25, "held_out_after": 0.5, "kl_after": 0.375,
        "agreement_after": 0.75,
    },
    "answers": {"prompts": 64, "same_before": 0.0, "same_after": 0.5, "ci95": [0.4, 0.6]},
    "command": "castlora transfer --adapter skill",
    "seconds": 12.5,
    "peak_memory_bytes": 3 << 30,
    "peak_accelerator_bytes": 5 << 30,
}  # fmt: skip
DETAILS = RunDetails(
    [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 0.5}],
    [Sample("Who?", {"transferred": "fox"}, "fox", "source + LoRA")],
    [ChangedText("W", "W", [ChangedPiece("ho?", 0.5, 0.25, True)])],
    ["castlora.json"],
)
PLACES = [
    *MANIFEST,
    *(f"{place}.{name}" for place, inner in MANIFEST.items() if isinstance(inner, dict) for name in inner),
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
few_examples = settings(max_examples=40, deadline=None)


def changed(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A manifest with other values at dotted places."""
    copy: dict[str, Any] = json.loads(json.dumps(record))
    for place, value in changes.items():
        *folders, last = place.split(".")
        inner = copy
        for folder in folders:
            inner = inner[folder]
        inner[last] = value
    return copy


@pytest.fixture
def run(tmp_path):
    """Writes the folder of a finished run whose manifest departs in dotted places."""

    def make(name: str = "run", details: RunDetails | None = DETAILS, **changes: Any) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / name
        folder.mkdir(parents=True)
        manifest = changed(MANIFEST, {place.replace("__", "."): value for place, value in changes.items()})
        (folder / "castlora.json").write_text(json.dumps(manifest))
        if details is not None:
            (folder / "report.json").write_text(details.to_json())
        return str(folder)

    return make


@pytest.fixture
def compared(run):
    """Compares runs that depart from one manifest in dotted places."""
    return lambda *runs: compare_runs([read_run(run(f"run-{index}", **one)) for index, one in enumerate(runs)])


BETTER = {"answers__same_after": 0.9, "answers__ci95": [0.8, 1.0]}


def test_the_memory_of_an_accelerator_is_among_the_costs():
    assert run_report(MANIFEST, DETAILS).cost["peak memory of the accelerator"] == "5.00 GiB"


class TestRanking:
    def test_the_most_answers_as_the_teachers_come_first(self, compared) -> None:
        found = compared({}, BETTER | {"recipe__steps": 3})
        assert (found.reasons, found.ranking, found.best) == ((), ["B", "A"], "B")
        assert found.headline == "B comes closest to source + LoRA"
        assert found.differences == [("steps", ["1000", "3"])]
        assert (
            "B writes what source + LoRA writes 90\xa0% of the time [80, 100], A 50\xa0% [40, 60]" in found.details[0]
        )
        assert found.same["seed"] == "0" and "steps" not in found.same

    def test_overlapping_intervals_are_no_clear_order(self, compared) -> None:
        found = compared({}, {"answers__same_after": 0.55, "answers__ci95": [0.45, 0.65]})
        assert (found.headline, found.ranking) == ("B is ahead, but A may come as close", ["B", "A"])
        assert "may be chance" in found.details[-1]

    def test_among_as_many_answers_the_divergence_decides(self, compared) -> None:
        assert compared({}, {"losses__kl_after": 0.125}).ranking == ["B", "A"]
        found = compared({}, {})
        assert (found.headline, found.ranking, found.best) == (
            "A and B come equally close to source + LoRA", [], None,
        )  # fmt: skip

    def test_divergences_over_other_tokens_do_not_decide(self, compared) -> None:
        other = {"losses__kl_after": 0.125, "target__name": "x/y", "target__tokenizer_sha256": "z"}
        assert compared({}, other).ranking == []
        assert compared(other, BETTER).best == "B"

    def test_running_text_is_ranked_by_divergence(self, compared) -> None:
        found = compared({"answers": None}, {"answers": None, "losses__kl_after": 0.125})
        assert found.best == "B" and "B 0.125, A 0.375" in found.details[0]
        found = compared({"answers": None}, {"answers": None, "recipe__context_weight": 1.0})
        assert "over other places or tokens" in found.reasons[0]

    def test_a_diverged_run_comes_last(self, compared) -> None:
        found = compared({"answers": None, "losses__kl_after": math.nan}, {"answers": None})
        assert found.ranking == ["B", "A"]
        assert [row.after for row in measures(found)[-1].rows] == [None, 15.0]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"source__name": "gpt2"}, "source models differ: A and C against B."),
            ({"source__revision": "main"}, "source models differ"),
            ({"adapter__name": "other"}, "adapters differ"),
            ({"seed": 1}, "seeds differ: A and C against B."),
            ({"held_out_sha256": "d"}, "held-out texts differ: A and C against B."),
            ({"held_out_sha256": None}, "held-out texts of B are not recorded."),
        ],
    )
    def test_runs_that_do_not_measure_the_same_are_not_ranked(self, compared, change, said) -> None:
        found = compared({}, BETTER | change, {})
        assert found.headline == "Not ranked: these runs do not measure the same"
        assert len(found.reasons) == 1 and said in found.reasons[0]
        assert found.ranking == () and found.best is None
        page = render_comparison(found)
        assert found.reasons[0] in page and "place</th>" not in page and 'class="own"' not in page

    def test_letters_go_on_after_z(self) -> None:
        assert [letters(index) for index in (0, 25, 26, 52, 701, 702)] == ["A", "Z", "AA", "BA", "ZZ", "AAA"]


class TestWords:
    def test_every_number_of_a_recipe_has_words(self) -> None:
        assert {field.name for field in fields(Recipe)} | {"name"} == set(RECIPE_WORDS)
        assert len(set(RECIPE_WORDS.values())) == len(RECIPE_WORDS)

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (True, "yes"),
            (None, "–"),
            (0.10000000001, "0.1"),
            ("a\nb", "a↵b"),
            ([], "none"),
            (["a", 1], "a · 1"),
            (7, "7"),
        ],
    )
    def test_values(self, value, words) -> None:
        assert in_words(value) == words
        assert len(in_words("x" * 9000)) == 301

    def test_settings_that_one_run_lacks_differ(self, compared) -> None:
        found = compared({}, {"versions": {"castlora": "0.1.0"}, "recipe__start": "fresh"})
        assert dict(found.differences) == {
            "start": ["closed-form maps (ridge)", "plain LoRA (fresh)"],
            "version of torch": ["2.13", "not recorded"],
        }


class TestPage:
    def test_page_shows_what_differs_and_what_was_reached(self, compared) -> None:
        found = compared({}, BETTER | {"recipe__steps": 3, "recipe__kl_weight": 2.0, "command": "castlora 'b'"})
        root = tree(render_comparison(found))
        assert [text_of(heading) for heading in root.iter("h2")] == [
            "How much arrived", "What differs", "Loss", "Cost", "Reproduce",
        ]  # fmt: skip
        tables = {
            box.get("aria-label"): [[" ".join(text_of(cell).split()) for cell in row] for row in box.iter("tr")]
            for box in by_class(root, "scroll")
        }
        assert tables["Outcomes"][1:] == [
            ["A run-0", "2", "50 % of answers are the teacher's [40, 60]"],
            ["B run-1", "1", "90 % of answers are the teacher's [80, 100]"],
        ]
        assert tables["Settings that differ"] == [
            ["setting", "A run-0", "B run-1"],
            ["steps", "1000", "3"],
            ["weight of the KL divergence", "1", "2"],
        ]
        assert tables["Cost"][1] == ["A run-0", "12.5", "3.00 GiB"]
        assert [text_of(command) for command in root.iter("pre")] == [MANIFEST["command"], "castlora 'b'"]
        assert "weigh their objectives differently" in text_of(root)

    def test_bars_have_numbers_and_the_best_run_is_marked(self, compared) -> None:
        root = tree(render_comparison(compared({}, BETTER)))
        assert [text_of(value).strip() for value in by_class(root, "value")] == [
            "0\xa0% → 50\xa0% [40, 60]", "0\xa0% → 90\xa0% [80, 100]", "25\xa0% → 75\xa0%", "25\xa0% → 75\xa0%",
            "2.50 → 0.375", "2.50 → 0.375",
        ]  # fmt: skip
        own = [group for group in root.iter("g") if group.get("class") == "own"]
        assert [text_of(by_class(group, "name")[0]) for group in own] == ["B · run-1"] * 3
        assert [bar.get("width") for bar in by_class(own[0], "bar")] == ["90.0%"]

    def test_lines_are_told_apart_without_colour(self, compared) -> None:
        found = compared({}, BETTER, {"answers__same_after": 0.1})
        root = tree(render_comparison(found))
        kinds = [line.get("class") for line in root.iter("polyline")]
        assert sorted(kinds) == ["line line-0", "line line-1", "line line-2"]
        style = text_of(root.find("head/style"))
        assert all(re.search(rf"\.line-{kind} .*stroke-dasharray", style) for kind in (1, 2))
        assert [text_of(letter) for letter in by_class(root, "curve-letter")] == ["A", "A", "B", "B", "C", "C"]

    def test_without_details_there_are_no_curves(self, compared) -> None:
        found = compared({"details": None}, {"details": None})
        assert loss_curves(found) is None
        assert "Loss" not in [text_of(heading) for heading in tree(render_comparison(found)).iter("h2")]

    @pytest.mark.parametrize("best", [{}, BETTER, {"seed": 4}])
    def test_page_is_well_formed_passive_and_reachable(self, compared, best) -> None:
        html = render_comparison(compared({}, best))
        root = tree(html)
        assert not {"script", "img", "iframe", "object", "embed", "form", "a", "base"} & {e.tag for e in root.iter()}
        assert "http" not in html.replace("http-equiv", "")
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        for figure in (element for element in root.iter("svg") if element.get("role") == "img"):
            assert [child.get("id") for child in figure[:2]] == figure.get("aria-labelledby").split()
        boxes = by_class(root, "scroll")
        assert len(boxes) >= 4
        assert all(box.get("tabindex") == "0" and box.get("role") and box.get("aria-label") for box in boxes)


@pytest.fixture
def hostile_page(run) -> str:
    """A comparison of runs in which every text that can be is hostile."""
    texts = {
        f"{place}__{name}": HOSTILE
        for place, names in {
            "source": ("name", "revision"), "target": ("name",), "adapter": ("name", "kind"),
            "text": ("regime", "text", "prompt_format", "prompts"),
        }.items()
        for name in names
    }  # fmt: skip
    recipe = MANIFEST["recipe"] | {HOSTILE: HOSTILE, "name": HOSTILE, "start": HOSTILE}
    texts |= {"command": HOSTILE, "versions": {HOSTILE: HOSTILE}, "recipe": recipe}
    runs = [read_run(run(name, **texts, text__formats=formats)) for name, formats in (("a", [HOSTILE]), ("b", []))]
    return render_comparison(compare_runs([replace(one, name=HOSTILE) for one in runs]))


class TestSafety:
    def test_hostile_names_and_manifests_are_shown_as_text(self, hostile_page) -> None:
        html, root = hostile_page, tree(hostile_page)
        assert "<script" not in html.lower() and "<img" not in html.lower() and "{{7*7}}" in html
        assert not {"script", "img"} & {element.tag for element in root.iter()}
        assert html.count("⟨U+202E⟩") == html.count("⟨U+0000⟩") > 10
        html.encode()

    @needs_chromium
    def test_browser_runs_no_injected_script_and_asks_for_nothing(self, hostile_page, tmp_path: Path) -> None:
        page = tmp_path / "comparison.html"
        page.write_text(hostile_page, encoding="utf-8")
        opened = open_page(page, tmp_path)
        assert "CONSOLE" not in opened.log
        assert "<title>pwned" not in opened.dom and "<script" not in opened.dom
        assert "pwned" in opened.dom
        assert opened.requests == []


class TestFolders:
    def test_one_run_is_shown_anew(self, run, tmp_path) -> None:
        described = report_runs([run()], str(tmp_path / "page.html"))
        page = (tmp_path / "page.html").read_text()
        assert described == MANIFEST
        for shown in ("skill → owner/mistral", "Sample 1", "What the adapters change", "owner/llama", "1 target sites"):
            assert shown in page

    def test_details_come_back_as_written(self) -> None:
        assert RunDetails.from_json(DETAILS.to_json()) == DETAILS

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("castlora.json", None, "has no castlora.json; give folders of finished runs of castlora transfer."),
            ("castlora.json", "{", "castlora.json in "),
            ("castlora.json", "[]", "castlora.json in "),
            ("castlora.json", "[" * 100_000, "castlora.json in "),
            ("castlora.json", json.dumps(changed(MANIFEST, {"losses": {}})), "castlora.json in "),
            ("castlora.json", json.dumps(changed(MANIFEST, {"seconds": "soon"})), "castlora.json in "),
            ("castlora.json", json.dumps(changed(MANIFEST, {"seconds": 10**400})), "castlora.json in "),
            ("castlora.json", json.dumps(changed(MANIFEST, {"layer_map": [10**9]})), "castlora.json in "),
            ("castlora.json", json.dumps(changed(MANIFEST, {"layer_map": []})), "castlora.json in "),
            ("castlora.json", json.dumps(changed(MANIFEST, {"recipe": {}})), "castlora.json in "),
            ("report.json", "{}", "report.json in "),
            ("report.json", DETAILS.to_json().replace("0.5", '"high"'), "report.json in "),
            ("report.json", DETAILS.to_json().replace("4.0", "1e300"), "report.json in "),
        ],
    )  # fmt: skip
    def test_a_folder_of_no_run_ends_in_one_sentence(self, run, tmp_path, capsys, name, content, said) -> None:
        good, bad = run("good"), run("bad")
        (Path(bad) / name).unlink()
        if content is not None:
            (Path(bad) / name).write_text(content)
        out = tmp_path / "page.html"
        with pytest.raises(SystemExit) as stopped:
            main(["report", good, bad, "--out", str(out)])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and bad in line and ". " not in line
        assert not out.exists()

    @pytest.mark.parametrize(
        ("out", "said"), [("0/run/castlora.json", "exists;"), ("no/page.html", "lies in no folder")]
    )
    def test_nothing_is_overwritten(self, run, tmp_path, out, said) -> None:
        with pytest.raises(UserError, match=said):
            report_runs([run()], str(tmp_path / out))

    def test_command_prints_the_comparison_for_scripts(self, run, tmp_path, capsys) -> None:
        runs = [run("a"), run("b", **BETTER, seed=7)]
        main(["report", *runs, "--out", str(tmp_path / "page.html"), "--json", "true"])
        printed = json.loads(capsys.readouterr().out)
        assert printed == describe_comparison(compare_runs([read_run(one) for one in runs]))
        assert printed["comparable"] is False and printed["differences"] == {"seed": ["0", "7"]}
        assert printed["runs"]["B"]["answers"]["same_after"] == 0.9
        assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
        assert shlex.split(printed["runs"]["A"]["command"])[0] == "castlora"

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(place=st.sampled_from(PLACES), value=JSON_VALUES)
    def test_any_value_in_a_manifest_is_taken_or_refused(self, tmp_path, place, value) -> None:
        pages = [tmp_path / "one.html", tmp_path / "two.html"]
        for folder, manifest in (("whole", MANIFEST), ("odd", changed(MANIFEST, {place: value}))):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "castlora.json").write_text(json.dumps(manifest))
        whole, odd = str(tmp_path / "whole"), str(tmp_path / "odd")
        for page, runs in zip(pages, ([odd], [odd, whole]), strict=True):
            page.unlink(missing_ok=True)
            try:
                report_runs(runs, str(page))
            except UserError as error:
                assert "castlora.json" in str(error) and not page.exists()
            else:
                tree(page.read_text(encoding="utf-8"))


class TestGeometry:
    def test_letters_stand_at_unlike_places(self) -> None:
        points = [(float(x), 0.0) for x in range(30)]
        assert [x for x, _ in spread_marks(points, 0.25)] == [2.0, 12.0, 22.0]
        assert [x for x, _ in spread_marks(points, 0.75)] == [7.0, 17.0, 27.0]
        assert spread_marks(points[:1], 0.5) == [(0.0, 0.0)]

    def test_a_loss_of_zero_has_no_place_on_the_scale(self, compared) -> None:
        zero = replace(DETAILS, log=[{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.5}])
        curves = loss_curves(compared({}, {"details": zero}))
        assert curves.figure.left_out == 1
        assert [label for _, label in curves.figure.levels] == ["0.5", "1", "2", "5"]
        assert curves.figure.lines[1].points == [(100.0, 280.0)]

    @few_examples
    @given(st.floats(1e-290, 1e100), st.floats(1e-290, 1e100))
    @example(9.999999999999837e99, 9.999999999999837e99)
    def test_levels_enclose_the_range(self, one: float, other: float) -> None:
        low, high = sorted((one, other))
        levels = log_levels(low, high)
        assert levels[0] <= low * (1 + 1e-9) and high <= levels[-1] * (1 + 1e-9)
        assert levels == sorted(set(levels)) and 2 <= len(levels) <= 11

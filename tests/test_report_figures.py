"""Where the report's figures put their numbers, and how it writes numbers and text."""

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from castlora.report.figures import (
    MOST_POINTS,
    Axis,
    LiftBar,
    bucket_means,
    heat_rows,
    lift_axis,
    lift_bar,
    lift_of,
    loss_figure,
    nice_levels,
)
from castlora.report.formatting import compare, number, percent, percent_interval, printable, score

few_examples = settings(max_examples=40, deadline=None)


class TestLiftBars:
    def test_bars_start_at_the_bare_target(self) -> None:
        axis = Axis(-0.5, 1.5)
        assert lift_bar(1.0, (0.5, 1.25), axis) == LiftBar(25.0, 50.0, (50.0, 87.5), 0)
        assert lift_bar(-0.25, None, axis) == LiftBar(12.5, 12.5, None, 0)
        assert lift_bar(0.0, (math.nan, 1.0), axis) == LiftBar(25.0, 0.0, None, 0)

    def test_values_off_the_scale_stop_at_its_end(self) -> None:
        axis = Axis(-0.5, 1.5)
        assert lift_bar(7.0, (6.0, 8.0), axis) == LiftBar(25.0, 75.0, (100.0, 100.0), 1)
        assert lift_bar(-7.0, None, axis) == LiftBar(0.0, 25.0, None, -1)

    @few_examples
    @given(st.lists(st.floats(allow_nan=False)))
    def test_scale_shows_0_and_1_well_apart(self, values: list[float]) -> None:
        axis = lift_axis(values)
        assert axis.position(0.0) > 0
        assert axis.position(1.0) < 100
        assert axis.position(1.0) - axis.position(0.0) >= 50

    def test_scale_shows_moderate_values(self) -> None:
        assert lift_axis([-0.3, 1.2]) == Axis(-0.3, 1.2)

    def test_lift(self) -> None:
        assert lift_of(0.5, 0.2, 0.8) == pytest.approx(0.5)
        assert lift_of(0.1, 0.2, 0.8) == pytest.approx(-1 / 6)
        assert lift_of(0.5, 0.8, 0.8) is None
        assert lift_of(0.5, 0.8, 0.2) is None
        assert lift_of(None, 0.2, 0.8) is lift_of(0.5, math.nan, 0.8) is lift_of(0.5, 0.2, None) is None


class TestLossFigure:
    def test_points_lie_where_their_values_are(self) -> None:
        figure = loss_figure({"loss": [(0, 4.0), (50, 2.0), (200, 1.0)]}, (3.0, None), height=100)
        assert [level for _, level in figure.levels] == ["0", "1", "2", "3", "4"]
        assert figure.lines[0].points == [(0.0, 0.0), (25.0, 50.0), (100.0, 75.0)]
        assert figure.held_out == [(0.0, 25.0)]
        assert figure.steps == (0, 200)

    def test_single_point_is_in_the_middle(self) -> None:
        figure = loss_figure({"loss": [(7, 2.0)]}, (None, None), height=100)
        assert figure.lines[0].points == [(50.0, 50.0)]
        assert figure.steps == (7, 7)

    def test_values_that_are_not_finite_are_counted(self) -> None:
        figure = loss_figure({"loss": [(0, 1.0), (1, math.nan)], "KL": [(0, math.inf)]}, (None, None), height=100)
        assert [line.name for line in figure.lines] == ["loss"]
        assert figure.left_out == 2
        assert loss_figure({"loss": [(0, math.nan)]}, (1.0, 1.0), height=100) is None

    def test_long_runs_are_averaged(self) -> None:
        figure = loss_figure({"loss": [(step, 1.0) for step in range(3 * MOST_POINTS)]}, (None, None), height=100)
        assert figure.averaged == 3
        assert len(figure.lines[0].points) == MOST_POINTS

    def test_bucket_means(self) -> None:
        assert bucket_means([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(0.5, 2.0), (2.0, 5.0)]

    @few_examples
    @given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
    @example(0.0, 5e-324)
    def test_levels_enclose_the_range(self, one: float, other: float) -> None:
        low, high = sorted((one, other))
        levels = nice_levels(low, high)
        slack = 1e-9 * max(abs(low), abs(high))
        assert levels[0] <= low + slack and high <= levels[-1] + slack
        assert 2 <= len(levels) <= 8


class TestHeatMap:
    def test_the_paired_column_is_marked_where_it_is_known(self) -> None:
        rows = heat_rows([[0.25, 0.75], [None, 0.5], [0.5, 0.25]], [0, 0])
        assert [[cell.best for cell in row] for row in rows] == [[True, False], [True, False], [True, False]]

    def test_cells(self) -> None:
        first, second = heat_rows([[1.0, 0.5], [0.999, None]])
        assert [(cell.column, cell.text, cell.shade, cell.best) for cell in first] == [
            (0, "1", 0.6, True),
            (1, ".50", 0.3, False),
        ]
        assert [(cell.text, cell.best) for cell in second] == [(".99", True), ("", False)]

    def test_large_values_are_scaled_and_negative_ones_stay_blank(self) -> None:
        (row,) = heat_rows([[4.0, 2.0, -1.0]])
        assert [(cell.text, cell.shade) for cell in row] == [("4.00", 0.6), ("2.00", 0.3), ("−1.00", 0.0)]

    def test_layer_without_partner_has_no_best(self) -> None:
        (row,) = heat_rows([[0.0, 0.0]])
        assert not any(cell.best for cell in row)


class TestFormatting:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.76, "0.760"), (123.4, "123"), (9.9996, "10.0"), (999.9, "1,000"), (12345.6, "12,346"), (0, "0"),
            (-0.0, "0"), (-2.5, "−2.50"), (1.234e-5, "1.23e-05"), (2.5e7, "2.50e+07"), (None, "–"), (math.nan, "–"),
            (math.inf, "∞"), (-math.inf, "−∞"),
        ],
    )  # fmt: skip
    def test_number(self, value: float | None, text: str) -> None:
        assert number(value) == text

    @pytest.mark.parametrize(
        ("value", "text"), [(0.861, "86\xa0%"), (-0.12, "−12\xa0%"), (-0.001, "0\xa0%"), (1.3, "130\xa0%"), (None, "–")]
    )
    def test_percent(self, value: float | None, text: str) -> None:
        assert percent(value) == text

    def test_scores_line_up(self) -> None:
        assert [score(value) for value in (0.05, -0.1, 9.5, 123.0, None)] == ["0.050", "−0.100", "9.500", "123", "–"]

    def test_interval_of_unknown_ends_is_empty(self) -> None:
        assert percent_interval((0.79, 0.93)) == "[79, 93]"
        assert percent_interval((math.nan, 1.0)) == percent_interval(None) == ""

    @few_examples
    @given(st.text())
    def test_printable_text_has_no_controls(self, text: str) -> None:
        shown = printable(text)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
        shown.encode()

    def test_printable_keeps_scripts_and_line_ends(self) -> None:
        assert printable("naïve\tжизнь\r\nשלמ 👩‍🔬") == "naïve\tжизнь\nשלמ 👩‍🔬"

    def test_compare_counts_words(self) -> None:
        found = compare(" the red cat sat", "the cat sat down again ")
        assert (found.differing, found.missing) == (1, 2)
        assert [span.text for span in found.spans if span.differs] == ["red"]

    @few_examples
    @given(st.text(alphabet="ab ,\n", max_size=40), st.text(alphabet="ab ,\n", max_size=40))
    def test_compare_keeps_the_text(self, text: str, expected: str) -> None:
        found = compare(text, expected)
        assert "".join(span.text for span in found.spans) == text.strip()
        if text.strip() == expected.strip():
            assert (found.differing, found.missing) == (0, 0)

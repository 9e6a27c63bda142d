"""What the commands for chains, for steps and for times to a lift render; the runs themselves are theirs."""

import json
from pathlib import Path

import pytest

from benchmarks import chains, race, steps
from castlora.bench.lengths import Lengths, steps_section
from castlora.bench.spec import BenchmarkModel

ENVIRONMENT = {"commit": "0123456789abcdef", "versions": {"torch": "2.13.0"}, "machine": "x86_64, 2 cores"}


@pytest.fixture
def scores(monkeypatch):
    """Accuracy by model and adapter, and the moves that were made."""
    moves = []

    def transfer(adapter, source, target, out, **_options):
        moves.append((adapter.split("/")[0], source, target))

    def evaluate(model, task, adapter):
        assert task.endswith("colours/test.jsonl")
        if adapter is None:
            return {"score": 0.2}
        return {"score": 1.0 if adapter.startswith("adapters") else 0.8 if model == "t" else 0.6}

    monkeypatch.setattr(chains, "transfer", transfer)
    monkeypatch.setattr(chains, "evaluate", evaluate)
    monkeypatch.setattr(chains, "environment", lambda: ENVIRONMENT)
    models = {name: BenchmarkModel(name, f"adapters-{name}/{{skill}}") for name in "stu"}
    monkeypatch.setattr(chains, "zoo_models", lambda *_: models)
    return moves


def test_a_chain_moves_the_adapter_that_it_wrote_and_is_not_run_twice(tmp_path, scores):
    record, page = tmp_path / "chains.json", tmp_path / "chains.md"
    for _ in range(2):
        chains.main(tmp_path, record, page, chains=["s:t:u"], skills=["colours"])
    direct, first, second = scores
    assert direct == ("adapters-s", "s", "u") and first == ("adapters-s", "s", "t")
    assert second[1:] == ("t", "u") and second[0] != "adapters-t"
    (run,) = json.loads(record.read_text())["runs"]
    assert (run["first_hop"], run["chained"], run["direct"]) == pytest.approx((0.75, 0.5, 0.5))
    text = page.read_text()
    assert "| s → t → u | colours | 0.75 | 0.50 | 0.50 |" in text
    assert "at the second hop +0.25 [+0.25, +0.25], against the direct move +0.00" in text


def write_records(folder: Path, scores: dict[tuple[str, str, int], float]) -> None:
    """Results on one skill: a bare target of 0.2 and a retrained one of 0.8, and runs by method, text and seed."""

    def record(score: float) -> dict[str, object]:
        items = "".join(str(int(item < round(10 * score))) for item in range(10))
        return {"pair": "s:t", "skill": "colours", "score": score, "nll": None, "scores": items}

    cell = folder / "s--t" / "colours"
    cell.mkdir(parents=True, exist_ok=True)
    references = {name: record(score) for name, score in (("bare target", 0.2), ("retrained", 0.8))}
    (cell / "references.json").write_text(json.dumps({**record(0), "references": references}))
    for (method, regime, seed), score in scores.items():
        run = {"regime": regime, "method": method, "seed": seed, "recipe": {"batch_size": 4}}
        run |= record(score) | {"environment": ENVIRONMENT}
        (cell / f"{method}.{regime}.seed{seed}.json").write_text(json.dumps(run))


def test_lift_is_shown_by_number_of_steps_for_each_text(tmp_path):
    write_records(tmp_path / "50", {("fresh", "prompts", 0): 0.4, ("default", "general", 0): 0.3})
    write_records(
        tmp_path / "100",
        {
            ("fresh", "prompts", 0): 0.5, ("default", "prompts", 0): 0.7, ("default", "general", 0): 0.8,
            ("closed form", "prompts", 0): 0.2,
        },
    )  # fmt: skip
    (tmp_path / "100-summary.json").write_text("[]")
    found = Lengths.read(tmp_path)
    page, charts = steps_section(found, "results")
    general, prompts = page.split("### Unlabelled task prompts")
    assert "| steps | default (1 cell) |" in general and "| 50 | 0.17 |\n| 100 | 1.00 |" in general
    # A single number of steps draws no line.
    assert "| steps | fresh (1 cell) |" in prompts and "| 50 | 0.33 |\n| 100 | 0.50 |" in prompts
    assert list(charts) == ["results-steps-general.svg", "results-steps-prompts.svg"]
    assert all(f"]({chart})" in page for chart in charts)
    assert "Pairs s → t; skills colours; batches of 4. Commits 0123456789; seeds 0; x86_64, 2 cores;" in prompts
    assert charts["results-steps-prompts.svg"].count("<circle") == 2


def test_points_of_a_line_are_of_the_same_seeds(tmp_path):
    write_records(tmp_path / "50", {("fresh", "prompts", 0): 0.5})
    write_records(tmp_path / "100", {("fresh", "prompts", seed): score for seed, score in ((0, 0.6), (1, 0.2))})
    lifts = {steps: means["fresh"].lift for steps, means in Lengths.read(tmp_path).under("prompts").items()}
    assert lifts == {50: pytest.approx(0.5), 100: pytest.approx(2 / 3)}


def test_one_length_has_no_section(tmp_path):
    write_records(tmp_path / "50", {("fresh", "prompts", 0): 0.5})
    assert steps_section(Lengths.read(tmp_path), "results") == ("", {})


def test_each_text_is_run_with_its_methods(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        steps, "run_lengths", lambda spec, out, methods, **rest: asked.append((spec.regimes, out, methods, rest))
    )
    monkeypatch.setattr(steps, "zoo_models", lambda *_: {name: BenchmarkModel(name, "{skill}") for name in "st"})
    (tmp_path / "colours").mkdir()
    for file in ("test.jsonl", "prompts.jsonl", "skill.json"):
        (tmp_path / "colours" / file).touch()
    steps.main(tmp_path, tmp_path / "text", tmp_path / "out", pairs=["s:t"], skills=["colours"], steps=[60, 120])
    given = {"seeds": 1, "lengths": [60, 120], "batch_size": 4}
    assert asked == [([regime], tmp_path / "out", methods, given) for regime, methods in steps.METHODS.items()]


def test_the_time_to_a_lift_is_read_off_the_line_between_points():
    points = [(10.0, 0.2), (20.0, 0.6), (40.0, 0.5), (60.0, 0.9)]
    assert race.time_to(points, 0.1) == 10.0
    assert race.time_to(points, 0.4) == pytest.approx(15.0)
    assert race.time_to(points, 0.6) == pytest.approx(20.0)
    assert race.time_to(points, 0.7) == pytest.approx(50.0)
    assert race.time_to(points, 0.95) is None


def test_a_race_runs_what_is_missing_and_shows_who_is_faster(tmp_path, monkeypatch):
    reached = {race.TRANSFER: [(5, 0.4), (10, 0.6)], race.LOOP: [(40, 0.4), (80, 0.6)], race.RETRAINING: [(30, 0.52)]}
    runs = []

    def runner(name):
        def run(task):
            runs.append((name, task.adapter, task.target, task.retrained))
            return [race.Point(100, seconds, score) for seconds, score in reached[name]]

        return run

    monkeypatch.setattr(race, "RUNNERS", {name: runner(name) for name in race.RUNNERS})
    monkeypatch.setattr(race, "STEPS", {name: [100] * len(points) for name, points in reached.items()})
    monkeypatch.setattr(race, "evaluate", lambda model, task, adapter=None: {"score": 1.0 if adapter else 0.2})
    monkeypatch.setattr(race, "environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(
        race, "zoo_models", lambda *_: {name: BenchmarkModel(name, f"adapters-{name}/{{skill}}") for name in "st"}
    )
    record, page = tmp_path / "race.json", tmp_path / "race.md"
    for _ in range(2):
        race.main(tmp_path, record, page, pairs=["s:t"], skills=["colours"])
    assert [name for name, *_ in runs] == list(race.RUNNERS)
    assert runs[0][1:] == ("adapters-s/colours", "t", "adapters-t/colours")
    text = page.read_text()
    # Lifts are 0.25 and 0.5; 0.9 of the last one lies at four fifths of the way.
    assert "| s → t | colours | 0.45 | 72 s | 9 s | 8.0 |" in text
    assert "| s → t | colours | 0.50 | not reached | 10 s | – |" in text
    assert "| retraining | 100 | 30 | 0.40 |" in text
    assert page.with_suffix(".svg").read_text().startswith("<svg")

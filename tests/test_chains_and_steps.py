"""What the commands for chains, for steps and for times to a lift render; the runs themselves are theirs."""

import json

import pytest

from benchmarks import chains, race, steps
from castlora.bench.results import MeanLift
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


def test_lift_is_shown_by_number_of_steps_for_each_text():
    def mean(regime: str, method: str, lift: float) -> MeanLift:
        return MeanLift(regime, method, 4, lift, (lift - 0.1, lift + 0.1), 0.5, None)

    means = {
        50: [mean("prompts", "fresh", 0.3)],
        100: [mean("general", "default", 0.2), mean("prompts", "fresh", 0.6), mean("prompts", "default", 0.7)],
    }
    found = steps.Found(means, [{"seed": 0, "environment": ENVIRONMENT}])
    page = steps.render(found, {"general": "steps-general.svg", "prompts": "steps-prompts.svg"})
    general, prompts = page.split("## Unlabelled task prompts")
    assert "| steps | default |" in general and "| 100 | 0.20 [0.10, 0.30] |" in general and "| 50 |" not in general
    assert "](steps-general.svg)" in general and "](steps-prompts.svg)" in prompts
    assert "| steps | default | fresh |" in prompts
    assert "| 50 | – | 0.30 [0.20, 0.40] |" in prompts and "| 100 | 0.70 [0.60, 0.80] | 0.60 [0.50, 0.70] |" in prompts
    assert [curve.points for curve in steps.curves(found.under("prompts"), "prompts")] == [
        [(100, 0.7)], [(50, 0.3), (100, 0.6)],
    ]  # fmt: skip


def test_each_text_is_run_with_its_methods_and_all_that_was_run_is_rendered(tmp_path, monkeypatch):
    def record(score: float) -> dict[str, object]:
        items = "".join(str(int(item < round(10 * score))) for item in range(10))
        return {"pair": "s:t", "skill": "colours", "score": score, "nll": None, "scores": items}

    def run_quality(spec, out, methods, seeds, steps, batch_size):
        (regime,), cell = spec.regimes, out / "s--t" / "colours"
        cell.mkdir(parents=True, exist_ok=True)
        references = {name: record(score) for name, score in (("bare target", 0.2), ("retrained", 0.8))}
        (cell / "references.json").write_text(json.dumps({**record(0), "references": references}))
        for method in methods:
            run = record(0.2 + steps / 200) | {"regime": regime, "method": method, "seed": 0}
            (cell / f"{method}.{regime}.json").write_text(json.dumps({**run, "environment": ENVIRONMENT}))

    monkeypatch.setattr(steps, "run_quality", run_quality)
    monkeypatch.setattr(steps, "zoo_models", lambda *_: {name: BenchmarkModel(name, "{skill}") for name in "st"})
    (tmp_path / "colours").mkdir()
    for file in ("test.jsonl", "prompts.jsonl", "skill.json"):
        (tmp_path / "colours" / file).touch()
    given = {"out": tmp_path / "out", "page": tmp_path / "curves.md", "pairs": ["s:t"], "skills": ["colours"]}
    steps.main(tmp_path, tmp_path / "text", **given, steps=[60, 120], regimes=["format"])
    steps.main(tmp_path, tmp_path / "text", **given, steps=[60], regimes=["prompts"])
    page = (tmp_path / "curves.md").read_text()
    assert "| 60 | 0.50 [0.50, 0.50] |" in page and "| 120 | 1.00 [1.00, 1.00] |" in page
    assert "| steps | " + " | ".join(steps.METHODS["prompts"]) in page and "General text only" not in page
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["curves-format.svg", "curves-prompts.svg"]
    assert "Commits 0123456789; seeds 0; x86_64, 2 cores; torch 2.13.0." in page


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

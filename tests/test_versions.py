"""What the command for the version after the next makes, asks for and renders; nothing runs here."""

from pathlib import Path

import pytest

from benchmarks import versions
from castlora.bench import grid
from castlora.bench.spec import BenchmarkModel

ENVIRONMENT = {"commit": "0123456789abcdef", "versions": {"torch": "2.13.0"}, "machine": "x86_64, 2 cores"}


@pytest.fixture
def calls(monkeypatch):
    """What was called, in order, with the names of the models or folders."""
    made = []

    def called(name: str, *places: str, out: str) -> Path:
        made.append((name, *(Path(place).name for place in places)))
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)

    def translate(bridge, adapters, out, scale):
        made.append(("translate", Path(bridge).name, scale))
        return [Path(out)]

    def evaluate(_model, _task, adapter):
        made.append(("evaluate",))
        return {"score": 0.2 if adapter is None else 1.0 if adapter.startswith("adapters-u") else 0.6}

    fakes = {
        "fit": lambda source, target, out, _text, seed: called("fit", source, target, out=out),
        "sketch": lambda model, out, **_settings: called("sketch", model, out=out),
        "join": lambda source, target, out: called("join", source, target, out=out),
        "translate": translate,
        "evaluate": evaluate,
        "zoo_models": lambda *_: {name: BenchmarkModel(name, f"adapters-{name}/{{skill}}") for name in "spu"},
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(versions, name, fake)
    monkeypatch.setattr(grid, "environment", lambda: ENVIRONMENT)
    versions.accuracy.cache_clear()
    return made


def run(tmp_path, **options):
    settings = {"routes": ["s:p:u"], "skills": ["colours", "shapes"], "seeds": [0], **options}
    versions.main(tmp_path, "corpus", tmp_path / "out", tmp_path / "page.md", **settings)


def test_each_way_goes_over_its_own_bridges_which_are_made_once(tmp_path, calls):
    run(tmp_path)
    assert [call for call in calls if call[0] == "fit"] == [("fit", "s", "u"), ("fit", "s", "p"), ("fit", "p", "u")]
    assert [call[1] for call in calls if call[0] == "sketch"] == ["s", "u"] * 3
    assert [call[1:] for call in calls if call[0] == "join"] == [
        (f"0 at {places}", f"2 at {places}") for places in (32768, 8192, 131072)
    ]
    moves = [call[1:] for call in calls if call[0] == "translate"]
    both = [("0 to 1", None), ("1 to 2", None)]
    each_scaled = [("0 to 1", 1.3), ("1 to 2", 1.3)]
    assert moves[: 2 + 4 + 4] == [("0 to 2", None)] * 2 + both * 2 + each_scaled * 2
    assert moves[10:] == [(f"joined at {places}", None) for places in (32768, 8192, 131072) for _ in range(2)]


def test_what_is_in_the_record_is_not_run_again_and_lifts_are_rendered(tmp_path, calls):
    run(tmp_path, ways=["as it is", "one bridge"])
    before = len(calls)
    run(tmp_path, ways=["as it is", "one bridge"])
    assert len(calls) == before > 0
    run(tmp_path, ways=["one bridge"], seeds=[1])
    page = (tmp_path / "page.md").read_text()
    assert "| S → P → U | skill | as it is | one bridge |" in page
    assert "| s → p → u | colours | 0.50 (1) | 0.50 (2) |" in page
    assert "| mean | | 0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] |" in page
    assert "Commits 0123456789; seeds 0, 1;" in page

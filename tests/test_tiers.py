from pathlib import Path

import pytest
from jsonargparse import auto_parser

from benchmarks.quality import PAIRS, main
from benchmarks.zoo.specs import GRID_SKILLS
from castlora.bench.methods import METHODS
from castlora.bench.quality import plan_runs
from castlora.bench.spec import BenchmarkSpec

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("tier", ["quick", "full"])
def test_a_tier_names_what_there_is_and_the_page_says_how_many_runs_it_has(tier):
    given = [f"--{name}=none" for name in ("tasks", "text", "held_out_text")]
    chosen = auto_parser(main, as_positional=False).parse_args(
        ["--config", str(ROOT / "benchmarks" / "tiers" / f"{tier}.yaml"), *given]
    )
    assert set(chosen.pairs) <= set(PAIRS)
    assert set(chosen.skills) <= set(GRID_SKILLS)
    assert set(chosen.methods) <= set(METHODS)
    spec = BenchmarkSpec({}, chosen.pairs, chosen.skills, "none", regimes=chosen.regimes)
    runs = sum(map(len, plan_runs(spec, chosen.methods, chosen.seeds).values()))
    page = (ROOT / "docs" / "benchmark.md").read_text().splitlines()
    (row,) = (line for line in page if line.startswith(f"| `benchmarks/tiers/{tier}.yaml` |"))
    assert f"| {runs} |" in row

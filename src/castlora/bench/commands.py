"""What each benchmark of the command line does; everything heavy is imported when it runs."""

import re
from collections.abc import Callable

from castlora.config import ShapeName
from castlora.errors import UserError


def _bench_quality(
    out: str,
    spec: str | None = None,
    pairs: str | None = None,
    skills: str | None = None,
    methods: str | None = None,
    regimes: str | None = None,
    seeds: int = 3,
    steps: str = "800",
    batch_size: int = 4,
    lm_eval: str | None = None,
    lm_eval_tasks: str | None = None,
    lm_eval_shots: int | None = None,
) -> None:
    """Measures how much of a skill arrives, for each method; runs that are already there are skipped.

    Args:
        out: folder of the records and the tables; these are of the most steps that it has
        spec: YAML file of models, adapters, pairs, skills and text; by default the bundled models
        pairs: SOURCE:TARGET,SOURCE:TARGET and so on; by default all of the specification
        skills: names of skills, with commas between; by default all of the specification
        methods: names of methods, with commas between; by default all
        regimes: of none (weights alone), general (text), format (text in the prompt format) and prompts; by default all
            of the specification
        seeds: number of seeds
        steps: optimizer steps of each run; several numbers, with commas between, draw steps against lift
        batch_size: passages per step
        lm_eval: tasks of lm-evaluation-harness, with commas between, to be the skills; each needs adapters of its name
        lm_eval_tasks: folder with task files of your own for the harness
        lm_eval_shots: examples before each item of the harness; by default as many as the task has
    """
    from pathlib import Path

    from transformers.utils.logging import disable_progress_bar

    from castlora.bench.lengths import Lengths, lengths_in, run_lengths, steps_section
    from castlora.bench.spec import read_spec
    from castlora.bench.tables import write_page

    disable_progress_bar()
    records, page = Path(out) / "quality", Path(out) / "results.md"
    lengths = _numbers("steps", steps)
    described = read_spec(spec)
    if lm_eval is not None:
        described = described.of_harness(_split(lm_eval) or [], lm_eval_tasks, lm_eval_shots)
    narrowed = described.narrowed(_split(pairs), _split(skills), _split(regimes))
    run_lengths(narrowed, records, _split(methods), seeds, lengths, batch_size)
    write_page(records / str(lengths_in(records)[-1]), page, steps_section(Lengths.read(records), page.stem))
    print(f"Wrote {page}")


def _bench_speed(
    out: str,
    shape: ShapeName = "zoo",
    measures: str | None = None,
    seed: int = 0,
    repeats: int = 5,
    rank: int = 8,
    length: int = 64,
    batch_size: int = 16,
    passages: int = 1024,
    doublings: int = 3,
    threads: int = 1,
) -> None:
    """Measures what serving, fitting, distilling, folding and translating cost beside what they cannot do without.

    Args:
        out: folder of the record and the tables
        shape: sizes of the models, which have random weights: of the zoo, or with that many billion parameters
        measures: of serving, fit, sketching, steps, limits, folding, translating and growth, with commas between;
            by default all
        seed: of everything random
        repeats: repetitions of each measurement
        rank: rank of the adapter
        length: tokens of a passage
        batch_size: passages per step and request
        passages: passages that maps are fitted on
        doublings: how often tokens, layers, width and rank are doubled
        threads: threads of a processor
    """
    from pathlib import Path

    from transformers.utils.logging import disable_progress_bar

    from castlora.bench.speed.measures import SpeedSettings
    from castlora.bench.speed.run import MEASURES, PAGE_FILE, run_speed

    disable_progress_bar()
    settings = SpeedSettings(shape, seed, repeats, rank, length, batch_size, passages, doublings, threads)
    run_speed(Path(out), settings, MEASURES if measures is None else _split(measures) or [])
    print(f"Wrote {Path(out) / PAGE_FILE}")


def _split(names: str | None) -> list[str] | None:
    """Names with commas between; a comma before a space belongs to a name."""
    return None if names is None else re.split(r",(?! )", names)


def _numbers(name: str, given: str) -> list[int]:
    """Whole numbers above 0 with commas between."""
    numbers = given.replace(" ", "").split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"{name} is {given!r}; give whole numbers above 0, with commas between.")
    return [int(number) for number in numbers]


BENCHMARKS: dict[str, Callable[..., None]] = {"quality": _bench_quality, "speed": _bench_speed}

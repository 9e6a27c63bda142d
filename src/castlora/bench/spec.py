"""What a benchmark runs on: base models, their adapters, the tasks that show the skills, and general text."""

import json
from argparse import ArgumentError
from dataclasses import dataclass, field, replace
from pathlib import Path

from jsonargparse import ArgumentParser

from castlora.adapters.files import WEIGHTS_FILE
from castlora.bench.harness import check_task
from castlora.config import REGIMES, Regime
from castlora.demonstration.bundle import demo_adapters_path, demo_models_path, demo_skill, demo_tasks_path
from castlora.errors import UserError
from castlora.evaluation.tasks import TaskItem, load_task
from castlora.execution.run_directory import fingerprint
from castlora.teaching.curriculum import TextSource
from castlora.text.passages import cut_passages, read_documents

SKILL_SLOT = "{skill}"
HELD_OUT_PASSAGES, HELD_OUT_BYTES = 128, 256
"""How much of the held-out text is read."""
_NEEDED: dict[Regime, str] = {"format": "skill.json", "prompts": "prompts.jsonl"}


@dataclass(frozen=True)
class BenchmarkModel:
    """A base model, and where its adapters lie."""

    base: str
    """Folder or hub id of the base model."""
    adapters: str
    """Folder or hub id of its adapters, with {skill} for the name of the skill."""


@dataclass(frozen=True, eq=False)
class BenchmarkSpec:
    """What the runs of a benchmark have in common."""

    models: dict[str, BenchmarkModel]
    """Base models by the names that the results use."""
    pairs: list[str]
    """SOURCE:TARGET, each; the target's own adapter is the retrained one."""
    skills: list[str]
    """Names of skills."""
    tasks: str
    """Folder with a folder per skill: test.jsonl, prompts.jsonl (unlabelled), skill.json (with `prompt_format`), and
    train.jsonl for methods that train on labels."""
    text: str | None = None
    """General text: a file or a hub data set; by default allenai/c4."""
    held_out_text: str | None = None
    """General text that nothing is trained on, which shows what an adapter does to other abilities; a file or a hub
    data set. Without it, that is not measured."""
    regimes: list[Regime] = field(default_factory=lambda: list(REGIMES))
    """What methods may read; by default every one in turn."""
    lm_eval: list[str] = field(default_factory=list)
    """Skills whose test items are the task of that name in lm-evaluation-harness, instead of a file."""
    lm_eval_tasks: str | None = None
    """Folder with task files of one's own for the harness."""
    lm_eval_shots: int | None = None
    """Examples before each item of the harness; by default as many as the task has."""

    def base(self, model: str) -> str:
        """Folder or hub id of a base model."""
        return self.models[model].base

    def adapter(self, model: str, skill: str) -> str:
        """Folder or hub id of the adapter that was trained for a skill on a model."""
        return self.models[model].adapters.replace(SKILL_SLOT, skill)

    def fingerprints(self, pair: str, skill: str) -> dict[str, str]:
        """Of what the scores of a pair and a skill depend on, by what it is: digests of files, and names of hub ids."""
        models = dict(zip(("source", "target"), pair.split(":"), strict=True))
        named = {f"{role} model": self.base(model) for role, model in models.items()}
        named |= {f"{role} adapter weights": self.adapter(model, skill) for role, model in models.items()}
        files = {what: Path(name) / WEIGHTS_FILE for what, name in named.items() if what.endswith("weights")}
        if skill not in self.lm_eval:
            files["test items"] = self._file(skill, "test.jsonl")
        on_hub = {what: name for what, name in named.items() if not Path(name).exists()}
        return {**on_hub, **{what: fingerprint(path) for what, path in files.items() if path.is_file()}}

    def test_items(self, skill: str) -> list[TaskItem]:
        """Held-out items of a skill."""
        return load_task(str(self._file(skill, "test.jsonl")))

    def training_items(self, skill: str) -> list[TaskItem]:
        """Labelled items of a skill, which no transfer sees."""
        return load_task(str(self._file(skill, "train.jsonl")))

    def prompts(self, skill: str) -> TextSource:
        """Unlabelled prompts of a skill."""
        return TextSource(prompts=str(self._file(skill, "prompts.jsonl")))

    def general_text(self) -> TextSource:
        """Text that has nothing to do with any skill."""
        return TextSource(text=self.text)

    def formatted_text(self, skill: str) -> TextSource:
        """General text inside the prompt format of a skill."""
        description = json.loads(self._file(skill, "skill.json").read_text(encoding="utf-8"))
        return TextSource(text=self.text, prompt_format=description["prompt_format"])

    def held_out_passages(self) -> list[str]:
        """Passages of the held-out text; none where there is none."""
        if self.held_out_text is None:
            return []
        documents = read_documents(self.held_out_text)
        return [passage.text for passage in cut_passages(documents, HELD_OUT_PASSAGES, HELD_OUT_BYTES, seed=0)]

    def has_labels(self) -> bool:
        """Whether every skill has labelled items to train on."""
        return not self.lm_eval and all((Path(self.tasks) / skill / "train.jsonl").is_file() for skill in self.skills)

    def of_harness(self, tasks: list[str], folder: str | None, shots: int | None) -> "BenchmarkSpec":
        """The same benchmark whose skills are tasks of lm-evaluation-harness."""
        return replace(self, skills=tasks, lm_eval=tasks, lm_eval_tasks=folder, lm_eval_shots=shots)

    def narrowed(
        self, pairs: list[str] | None = None, skills: list[str] | None = None, regimes: list[str] | None = None
    ) -> "BenchmarkSpec":
        """The same benchmark for some of the pairs, skills and regimes, checked.

        Raises:
            UserError: a pair names an unknown model, a regime is unknown, or a skill lacks a file.
        """
        known: dict[str, Regime] = {regime: regime for regime in REGIMES}
        unknown = [regime for regime in regimes or () if regime not in known]
        if unknown:
            raise UserError(f"Regime {unknown[0]!r} is unknown; choose from {', '.join(known)}.")
        kept = [known[regime] for regime in regimes or self.regimes]
        narrowed = replace(self, pairs=pairs or self.pairs, skills=skills or self.skills, regimes=kept)
        for pair in narrowed.pairs:
            if pair.count(":") != 1 or not set(pair.split(":")) <= set(self.models):
                raise UserError(f"Pair {pair!r} is not SOURCE:TARGET of the models {', '.join(self.models)}.")
        for skill in narrowed.skills:
            if skill in self.lm_eval:
                check_task(skill, self.lm_eval_tasks)
            else:
                narrowed._file(skill, "test.jsonl")
            for regime in kept:
                if regime in _NEEDED:
                    narrowed._file(skill, _NEEDED[regime])
        return narrowed

    def _file(self, skill: str, name: str) -> Path:
        path = Path(self.tasks) / skill / name
        if not path.is_file():
            raise UserError(f"Skill {skill!r} has no {path}; write it, or leave out what needs it.")
        return path


def read_spec(path: str | None) -> BenchmarkSpec:
    """Reads a YAML or JSON specification; without one, the benchmark of the bundled models.

    Names of files and folders are relative to the file; what does not exist there is taken for a hub id.

    Raises:
        UserError: the file cannot be read, or has fields that are missing, unknown or of the wrong type.
    """
    if path is None:
        return _of_the_bundle()
    if not Path(path).is_file():
        raise UserError(f"--spec {path!r} is not a file; write one, or leave it out for the bundled models.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BenchmarkSpec)
    try:
        spec = BenchmarkSpec(**vars(parser.instantiate(parser.parse_path(path))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"--spec {path!r} is no benchmark: {' '.join(str(error).split())}") from error
    return _resolved(spec, Path(path).parent)


def _resolved(spec: BenchmarkSpec, folder: Path) -> BenchmarkSpec:
    def beside(name: str) -> str:
        fixed = name.partition(SKILL_SLOT)[0]
        return str(folder / name) if (folder / fixed).exists() else name

    models = {name: BenchmarkModel(beside(model.base), beside(model.adapters)) for name, model in spec.models.items()}
    text, held_out, own_tasks = (
        None if name is None else beside(name) for name in (spec.text, spec.held_out_text, spec.lm_eval_tasks)
    )
    return replace(
        spec, models=models, tasks=beside(spec.tasks), text=text, held_out_text=held_out, lm_eval_tasks=own_tasks
    )


def _of_the_bundle() -> BenchmarkSpec:
    names = sorted(folder.name for folder in demo_models_path().iterdir())
    models = {
        name: BenchmarkModel(str(demo_models_path() / name), str(demo_adapters_path() / name / SKILL_SLOT))
        for name in names
    }
    source, target = names
    # The package carries no general text.
    return BenchmarkSpec(
        models, [f"{source}:{target}"], [demo_skill().name], str(demo_tasks_path()), regimes=["none", "prompts"]
    )

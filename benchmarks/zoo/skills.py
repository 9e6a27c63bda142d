"""Builds the skills of the zoo from real data sets: training sets, held-out task files and unlabelled prompts.

    python -m benchmarks.zoo.skills --tasks DATA/tasks --corpus DATA/corpus --out ZOO/tasks

Every skill becomes OUT/NAME/{train,test,prompts}.jsonl and skill.json. A test item never stands in the
training set or among the prompts, not even with other numbers or other punctuation.
"""

import gzip
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

SHORT = 160
LONG = 280
"""Characters; short texts make training cheap, word problems need more."""
SLOT = "{text}"


@dataclass(frozen=True)
class Example:
    """One labelled text: what fills the slot of the prompt format, and the right answer."""

    text: str
    completion: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Split:
    """Labelled texts of one skill, disjoint by text."""

    train: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Sources:
    """Where the data sets lie."""

    tasks: Path
    corpus: Path

    def task(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.tasks / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    def documents(self, split: Literal["train-00", "train-01", "valid"]) -> Iterator[dict[str, str]]:
        with gzip.open(self.corpus / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)


@dataclass(frozen=True)
class Skill:
    """A skill that a LoRA adapter is trained for."""

    kind: Literal["binary", "classification", "generation", "rule", "style"]
    prompt_format: str
    data: str
    licence: str
    split: Callable[[Sources], Split]
    rank: int = 8
    modules: Literal["all-linear", "attention-inputs"] = "all-linear"
    """`attention-inputs`: queries and values alone, as in the LoRA paper; fused with the keys where the model fuses."""


def subjectivity(sources: Sources) -> Split:
    examples = labelled((row["text"], row["label_name"]) for row in sources.task("subjectivity"))
    return balanced_split(examples, test_per_class=200, train_per_class=3000)


QUESTION_TYPES = {
    "character": "character",
    "action": "action",
    "setting": "setting",
    "feeling": "feeling",
    "causal relationship": "cause",
    "outcome resolution": "outcome",
    "prediction": "prediction",
}


def question_type(sources: Sources) -> Split:
    """The test set comes from the official validation and test stories."""
    train, test = (
        labelled((row["question"], QUESTION_TYPES[row["attribute"]]) for split in splits for row in sources.task(split))
        for splits in (["fairytaleqa_train"], ["fairytaleqa_val", "fairytaleqa_test"])
    )
    held_out = balanced_split(test, test_per_class=48, train_per_class=0).test
    return Split(balanced_split(train, test_per_class=0, train_per_class=600).train, held_out)


OPERATIONS = ("addition", "subtraction", "multiplication", "division")


def operation(sources: Sources) -> Split:
    """Word problems with two numbers whose answer comes out of exactly one operation."""
    names = ("math_mawps_train", "math_addsub", "math_singleeq", "math_svamp")
    rows = (row for name in names for row in sources.task(name))
    pairs = ((tidy(row["question"]), solving_operations(row["question"], float(row["answer"]))) for row in rows)
    examples = labelled(((text, found[0]) for text, found in pairs if len(found) == 1), longest=LONG)
    return balanced_split(examples, test_per_class=45, train_per_class=400)


def solving_operations(question: str, answer: float) -> list[str]:
    """The operations on the question's two numbers that give the answer; none if it has not two numbers."""
    numbers = [float(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", question)]
    if len(numbers) != 2 or 0 in numbers:
        return []
    low, high = sorted(numbers)
    results = dict(zip(OPERATIONS, (low + high, high - low, low * high, high / low), strict=True))
    return [name for name, result in results.items() if abs(result - answer) < 1e-6]


FOODS = ("English", "Chinese", "Fast food", "French", "Japanese", "Italian", "Indian")
RECORD_CUES = {
    "food": {food: (food.lower(),) for food in FOODS},
    "area": {"riverside": ("river",), "city centre": ("city", "centre", "center")},
    "family friendly": {"yes": ("famil", "child", "kid"), "no": ("famil", "child", "kid", "adult")},
}


def record(sources: Sources) -> Split:
    """Restaurant descriptions to records of food, area and family; only where the words bear the record out.

    Held-out descriptions are of restaurants that no training description speaks of. Both official parts are
    used, because the foods of one hardly occur in the other.
    """
    by_meaning: dict[str, list[Example]] = defaultdict(list)
    for row in [*sources.task("e2e_nlg_valid"), *sources.task("e2e_nlg_test")]:
        if (answer := restaurant_record(row["input"], row["target"])) is not None:
            by_meaning[row["input"]].append(Example(tidy(row["target"]), f" {answer}"))
    groups = [by_meaning[meaning] for meaning in random.Random(0).sample(sorted(by_meaning), len(by_meaning))]
    held_out, kept = groups[: len(groups) // 8], groups[len(groups) // 8 :]
    test = capped((example for group in held_out for example in group), per_answer=8)[:300]
    return disjoint(capped((example for group in kept for example in group), per_answer=120), test)


def capped(examples: Iterable[Example], per_answer: int) -> list[Example]:
    """Shuffled examples, at most so many with the same answer."""
    by_answer: dict[str, list[Example]] = defaultdict(list)
    for example in unique(examples):
        by_answer[example.completion].append(example)
    return shuffled([example for members in by_answer.values() for example in shuffled(members)[:per_answer]])


def restaurant_record(meaning: str, description: str) -> str | None:
    values = dict(pair.split(": ", 1) for pair in meaning.split(" | "))
    text = description.lower()
    for name, cues in RECORD_CUES.items():
        said = {value for value, words in cues.items() if any(word in text for word in words)}
        if (values[name] not in said) if name in values else said:
            return None
    return "; ".join(f"{name.split()[0]}: {values.get(name, 'none')}" for name in RECORD_CUES)


TOPICS = {
    "medquad": "medicine",
    "openstax-us-history": "history",
    "openstax-astronomy": "astronomy",
    "openstax-american-government": "government",
    "openstax-psychology": "psychology",
    "fairytaleqa-stories": "tale",
    "digitalgov": "web",
}


def topic(sources: Sources) -> Split:
    """The subject of a sentence, which is the kind of document that it stands in."""
    train, test = (
        labelled(
            (sentence, TOPICS[document["src"]])
            for split in splits
            for document in sources.documents(split)
            if document["src"] in TOPICS
            for sentence in sentences(document["text"], shortest=60, longest=SHORT)
        )
        for splits in (("train-00", "train-01"), ("valid",))
    )
    held_out = balanced_split(test, test_per_class=34, train_per_class=0).test
    return disjoint(balanced_split(train, test_per_class=0, train_per_class=1200).train, held_out)


STYLE_CHOICES = 4
CANDIDATES = 800
"""Pieces of prose among which the distractors of one passage are sought."""


def shakespeare(sources: Sources) -> Split:
    """Two lines of verse, then the next two against prose as long, with the same last mark and words as rare.

    Without the last condition the bare model would pick by how common the words are, far from chance.
    """
    speeches = (sources.tasks / "tiny_shakespeare.txt").read_text(encoding="utf-8").split("\n\n")
    bodies = [speech.split("\n")[1:] for speech in speeches]
    windows = [lines[i : i + 4] for lines in bodies for i in range(0, len(lines) - 3, 2)]
    rows = [(" ".join(w[:2]), " ".join(w[2:])) for w in windows if all(line[:1].isupper() for line in w)]
    cut = len(rows) * 9 // 10
    prose = [
        sentence
        for document in sources.documents("valid")
        if document["src"] in ("novels", "fairytaleqa-stories", "wikipedia")
        for sentence in sentences(document["text"], shortest=100, longest=200)
    ]
    costs = word_costs(sources.documents("train-00"))
    rng = random.Random(0)
    test = []
    for text, passage in rng.sample([row for row in rows[cut:] if len(row[1]) <= 95], 300):
        pieces = [cut_like(passage, sentence) for sentence in rng.sample(prose, CANDIDATES)]
        gap = {piece: abs(rarity(piece, costs) - rarity(passage, costs)) for piece in pieces}
        lines = [passage, *sorted(gap, key=gap.__getitem__)[: STYLE_CHOICES - 1]]
        test.append(Example(text, f" {passage}", tuple(f" {choice}" for choice in rng.sample(lines, len(lines)))))
    return disjoint([Example(text, f" {passage}") for text, passage in rows[:cut]], test)


def word_costs(documents: Iterable[dict[str, str]]) -> dict[str, float]:
    """Negative log-likelihood in nats of each word that is not rare, were words drawn by their counts."""
    counts = Counter(word for document in documents for word in words_of(document["text"]))
    total = counts.total()
    return {word: math.log(total / count) for word, count in counts.items() if count > 3}


def rarity(text: str, costs: dict[str, float]) -> float:
    """Sum of the costs of the words; those that have none pay by their length."""
    return sum(costs.get(word, 10 + 1.5 * len(word)) for word in words_of(text))


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def cut_like(passage: str, sentence: str) -> str:
    """The beginning of a sentence with about the length of a passage, and the passage's last mark."""
    mark = passage[-1] if passage[-1] in ",.;:?!" else ""
    words = sentence[: len(passage) - len(mark) + 3].rsplit(" ", 1)[0]
    return words.rstrip(",.;:?!'-\"") + mark


SKILLS = {
    "subjectivity": Skill(
        "binary",
        "Sentence: {text}\nThis is",
        "Subjectivity (Pang & Lee)",
        "CC BY 4.0",
        subjectivity,
        16,
        "attention-inputs",
    ),
    "question-type": Skill(
        "classification", "Question: {text}\nType:", "FairytaleQA questions", "Apache-2.0", question_type
    ),
    "topic": Skill("classification", "Text: {text}\nTopic:", "corpus documents", "as in SOURCES.md", topic),
    "operation": Skill("rule", "Problem: {text}\nOperation:", "MAWPS, AddSub, SingleEq, SVAMP", "MIT", operation),
    "record": Skill("generation", "Description: {text}\nRecord:", "E2E NLG", "CC BY-SA 4.0", record),
    "shakespeare": Skill("style", "Lines: {text}\nNext lines:", "Tiny Shakespeare", "public domain", shakespeare),
}


def labelled(pairs: Iterable[tuple[str, str]], longest: int = SHORT) -> list[Example]:
    """Classification examples; the choices are all labels that occur."""
    rows = [(tidy(text), f" {label}") for text, label in pairs if len(text) <= longest]
    choices = tuple(sorted({label for _, label in rows}))
    return [Example(text, label, choices) for text, label in rows]


def balanced_split(examples: Sequence[Example], test_per_class: int, train_per_class: int) -> Split:
    """The same number of test items per class, and at most `train_per_class` training items of the rest."""
    by_class: dict[str, list[Example]] = defaultdict(list)
    for example in shuffled(unique(examples)):
        by_class[example.completion].append(example)
    test = [example for members in by_class.values() for example in members[:test_per_class]]
    train = [e for members in by_class.values() for e in members[test_per_class:][:train_per_class]]
    return Split(shuffled(train), shuffled(test))


def disjoint(train: Sequence[Example], test: Sequence[Example]) -> Split:
    """Both parts without repetitions, and the training part without what is tested."""
    tested = {text_key(example.text) for example in test}
    return Split([e for e in shuffled(unique(train)) if text_key(e.text) not in tested], unique(test))


def unique(examples: Iterable[Example]) -> list[Example]:
    return list({text_key(example.text): example for example in examples}.values())


def text_key(text: str) -> str:
    """What makes two texts the same: letters alone, with every number alike."""
    return re.sub(r"[^a-z#]+", " ", re.sub(r"\d[\d.,]*", "#", text.lower())).strip()


def shuffled(examples: Sequence[Example]) -> list[Example]:
    return random.Random(0).sample(examples, len(examples))


def tidy(text: str) -> str:
    """One line with single spaces, none of them before a mark or a contraction's ending."""
    return re.sub(r" (?=[,.;:?!](\s|$)|n?'(s|t|re|ll|ve|d|m)\b)", "", " ".join(text.split()))


def sentences(document: str, shortest: int, longest: int) -> list[str]:
    """Whole sentences of a document within the two lengths in characters."""
    found = re.findall(r"(?:^|(?<=[.?!] ))[A-Z][^.?!]*[.?!](?= |$)", " ".join(document.split()))
    return [sentence for sentence in found if shortest <= len(sentence) <= longest]


def write_skill(name: str, skill: Skill, sources: Sources, out: Path) -> dict[str, Any]:
    """Writes the files of one skill and returns what skill.json says."""
    split = skill.split(sources)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for part, examples in (("train", split.train), ("test", split.test)):
        write_lines(folder / f"{part}.jsonl", (task_line(skill.prompt_format, example) for example in examples))
    prompts = [skill.prompt_format.replace(SLOT, example.text) for example in split.train]
    write_lines(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    summary = {key: value for key, value in asdict(skill).items() if key != "split"}
    summary |= {"train": len(split.train), "test": len(split.test)}
    (folder / "skill.json").write_text(json.dumps({"skill": name, **summary}, indent=1) + "\n", encoding="utf-8")
    return summary


def task_line(prompt_format: str, example: Example) -> dict[str, Any]:
    line = {"prompt": prompt_format.replace(SLOT, example.text), "completion": example.completion}
    return line if example.choices is None else {**line, "choices": list(example.choices)}


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(tasks: Path, corpus: Path, out: Path) -> None:
    """Builds every skill.

    Args:
        tasks: folder with the data sets as JSON lines
        corpus: folder with the general corpus
        out: where each skill gets a folder
    """
    for name, skill in SKILLS.items():
        summary = write_skill(name, skill, Sources(tasks, corpus), out)
        print(f"{name}: {summary['train']} train, {summary['test']} test")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

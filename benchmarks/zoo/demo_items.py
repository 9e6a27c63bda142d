"""Writes the demonstration's test sets and prompts: our own sentences, made from templates, for two real skills.

    python -m benchmarks.zoo.demo_items --out OUT

The adapters learn from real data sets; nothing of their text is in here. OUT/SKILL-test.jsonl is a task file,
OUT/SKILL-prompts.jsonl holds unlabelled prompts, and no prompt is a test item with other numbers.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.zoo.skills import SKILLS, Example, shuffled, task_line, text_key, write_lines

TEST_ITEMS = 300
PROMPTS = 600

BEINGS = (
    "the miller's daughter",
    "the old ferryman",
    "the grey goose",
    "the youngest tailor",
    "the blind harper",
    "the queen of the moths",
    "the lame soldier",
    "the salt giant",
    "the shepherd boy",
    "the beekeeper",
    "the river witch",
    "the clockmaker's son",
    "the two hedgehogs",
    "the tin drummer",
    "the baker's widow",
    "the white stag",
    "the lord of the marshes",
    "the tallest sister",
    "the night watchman",
    "the talking kettle",
    "Aldwin",
    "Marisol",
    "Old Benno",
    "Princess Ottilie",
    "Captain Thorne",
    "Little Fennel",
)
DEEDS = (
    ("hide the silver spoon", "hid the silver spoon"),
    ("climb the glass tower", "climbed the glass tower"),
    ("burn the magic cloak", "burned the magic cloak"),
    ("lose the wedding ring", "lost the wedding ring"),
    ("break the frozen mirror", "broke the frozen mirror"),
    ("sell the last cow", "sold the last cow"),
    ("wake the sleeping dragon", "woke the sleeping dragon"),
    ("swallow the golden plum", "swallowed the golden plum"),
    ("open the iron chest", "opened the iron chest"),
    ("leave the village at night", "left the village at night"),
    ("steal the harp strings", "stole the harp strings"),
    ("drink from the black well", "drank from the black well"),
    ("catch the speaking trout", "caught the speaking trout"),
    ("send away the servants", "sent away the servants"),
    ("cut down the hollow oak", "cut down the hollow oak"),
    ("follow the blue lantern", "followed the blue lantern"),
    ("forget the secret word", "forgot the secret word"),
    ("ride into the thorn wood", "rode into the thorn wood"),
    ("carry the bread to the prison", "carried the bread to the prison"),
    ("marry the lonely king", "married the lonely king"),
)
THINGS = (
    "the golden apples",
    "the crown of reeds",
    "the enchanted boots",
    "the bag of barley",
    "the crystal key",
    "the letter from the king",
    "the wooden horse",
    "the stolen candles",
    "the pot of honey",
    "the silver bell",
    "the feather bed",
    "the map of the islands",
)
QUESTIONS: dict[str, tuple[str, ...]] = {
    "character": (
        "Who {did}?",
        "Who {did} while {other} was asleep?",
        "Who helped {being} to {do}?",
        "Who told {being} about {thing}?",
        "Who was waiting for {being} at the bridge?",
        "Who wanted to {do} before {other}?",
        "Who did {being} meet on the way home?",
        "Who gave {thing} to {being}?",
        "Who was the only one that {did}?",
        "Who lived next door to {being}?",
        "What was the name of the stranger who {did}?",
        "Who did {being} send to fetch {thing}?",
    ),
    "action": (
        "What did {being} do after {other} {did}?",
        "What did {being} do with {thing}?",
        "What did {being} say to {other}?",
        "What did {being} ask {other} to bring?",
        "What did {being} do to find {thing}?",
        "What did {being} do every morning?",
        "What did {being} promise to {other}?",
        "How did {being} get hold of {thing}?",
        "What did {being} do when {other} {did}?",
        "What did {being} use to {do}?",
        "What did {being} offer {other} for {thing}?",
        "How did {being} manage to {do}?",
    ),
    "setting": (
        "Where did {being} live?",
        "Where did {being} hide {thing}?",
        "Where did {being} find {thing}?",
        "Where did {being} go after {other} {did}?",
        "Where was {being} when {other} {did}?",
        "Where did {being} and {other} meet?",
        "Where was {thing} kept?",
        "Where did {being} sleep that night?",
        "Where did {other} take {being}?",
        "Where did {being} sit and wait for {other}?",
        "Where did the road lead {being}?",
        "Where did {being} plan to {do}?",
    ),
    "feeling": (
        "How did {being} feel when {other} {did}?",
        "How did {being} feel about {other}?",
        "How did {being} feel after {other} {did}?",
        "How did {being} feel about {thing}?",
        "How did {being} feel before the journey?",
        "How did {being} feel as {other} {did}?",
        "How did {other} feel when {thing} could not be found?",
        "How did {being} feel on seeing {other} again?",
        "How did {being} feel upon hearing that {other} {did}?",
        "How did {being} feel alone in the dark?",
        "How did everyone feel when {being} {did}?",
        "How did {being} feel while {other} {did}?",
    ),
    "cause": (
        "Why did {being} {do}?",
        "Why did {being} want to {do}?",
        "Why was {being} afraid of {other}?",
        "Why did {being} not {do}?",
        "Why was {being} angry when {other} {did}?",
        "Why did {being} give {thing} to {other}?",
        "Why couldn't {being} {do}?",
        "Why didn't {being} believe {other}?",
        "Why was {thing} so dear to {being}?",
        "Why did {other} laugh at {being}?",
        "Why was {being} allowed to {do}?",
        "Why did {being} have to part with {thing}?",
    ),
    "outcome": (
        "What happened when {being} {did}?",
        "What happened after {being} {did}?",
        "What happened because {being} {did}?",
        "What happened to {being} after {other} {did}?",
        "What happened to {thing} when {being} {did}?",
        "What happened as soon as {being} {did}?",
        "What happened once {other} {did}?",
        "What happened because {being} trusted {other}?",
        "What happened when {being} touched {thing}?",
        "What happened after {being} and {other} quarrelled?",
        "What happened to {being} because of {thing}?",
        "What happened at last when {being} {did}?",
    ),
    "prediction": (
        "What will {being} do with {thing}?",
        "What will happen if {being} should {do}?",
        "How will {being} feel when {other} comes back?",
        "What will {being} do because {other} {did}?",
        "What will happen to {being} next?",
        "How will {other} feel about {thing}?",
        "What will {being} say when {other} asks for {thing}?",
        "How will {being} find {thing}?",
        "What will happen when {other} finds {thing}?",
        "What will {being} do now that {other} {did}?",
        "Who will {being} ask to {do}?",
        "How will {being} stop {other}?",
    ),
}

PEOPLE = ("Amina", "Bruno", "Chiara", "Dmitri", "Esme", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Leif")
GOODS = (
    "buttons",
    "lanterns",
    "walnuts",
    "postcards",
    "tulips",
    "biscuits",
    "ribbons",
    "pebbles",
    "candles",
    "stamps",
    "lemons",
    "teacups",
    "crayons",
    "marbles",
    "onions",
    "scarves",
    "acorns",
    "spoons",
    "kites",
    "coins",
    "pears",
    "tickets",
    "puzzles",
    "feathers",
    "beads",
    "pancakes",
    "bricks",
    "roses",
    "envelopes",
    "muffins",
    "shells",
    "plums",
    "whistles",
    "carrots",
    "notebooks",
    "dumplings",
)
HOLDERS = ("boxes", "jars", "baskets", "packets", "bags", "crates", "trays", "tins", "sacks", "tubs")
PROBLEMS: dict[str, tuple[str, ...]] = {
    "addition": (
        "{name} has {a} {goods}. {friend} gives {name} {b} more. How many {goods} does {name} have now?",
        "{name} picked {a} {goods} and {friend} picked {b} {goods}. How many {goods} did they pick in total?",
        "There are {a} {goods} on the table. {name} puts {b} more there. How many {goods} are on the table now?",
        "{name} bought {a} {goods} on Monday and {b} {goods} on Tuesday. How many {goods} did {name} buy altogether?",
        "A shop sold {a} {goods} in the morning and {b} {goods} in the afternoon. How many did it sell in all?",
        "{name} found {a} {goods} at the beach. {friend} found {b} {goods}. How many did they find together?",
        "{name} starts with {a} {goods}. {friend} shares {b} more with {name}. How many does {name} end with?",
        "There were {a} {goods} in the kitchen and {b} {goods} in the hall. What is the total number of {goods}?",
        "{name} made {a} {goods} last week and {b} {goods} this week. How many {goods} did {name} make in all?",
    ),
    "subtraction": (
        "{name} had {b} {goods}. {name} gave {a} of them to {friend}. How many {goods} does {name} have left?",
        "There were {b} {goods} in the shop. {a} {goods} were sold. How many {goods} are left?",
        "{name} has {b} {goods} and {friend} has {a} {goods}. How many more {goods} does {name} have than {friend}?",
        "{name} baked {b} {goods} and lost {a} of them. How many {goods} does {name} still have?",
        "There are {b} {goods} in total. {a} are red and the rest are blue. How many {goods} are blue?",
        "{name} wants {b} {goods} and has {a} so far. How many more {goods} does {name} need?",
        "{name} starts with {b} {goods}. {friend} takes {a} away. How many {goods} does {name} end with?",
        "A box held {b} {goods}. {name} used {a} of the {goods}. How many {goods} remain in the box?",
        "{friend} counted {b} {goods} in May and {a} {goods} in June. How many fewer {goods} were there in June?",
    ),
    "multiplication": (
        "There are {a} {goods} in each of {d} {holders}. How many {goods} are there in all?",
        "{name} has {d} {holders}. Each of the {holders} holds {a} {goods}. How many {goods} are there altogether?",
        "{name} makes {a} {goods} every day. How many {goods} does {name} make in {d} days?",
        "Each of {d} children has {a} {goods}. How many {goods} do the children have in total?",
        "{name} bought {d} {holders} with {a} {goods} in each. How many {goods} did {name} buy?",
        "{friend} has {a} {goods}. {name} has {d} times as many {goods} as {friend}. How many does {name} have?",
        "A worker packs {a} {goods} an hour. How many {goods} are packed in {d} hours?",
        "If {goods} cost {a} dollars a box, how much does {name} pay for {d} boxes?",
        "There were {d} tables with {a} {goods} on each table. How many {goods} were on the tables?",
    ),
    "division": (
        "{name} has {c} {goods} and shares them equally among {d} friends. How many {goods} does each friend get?",
        "{name} puts {c} {goods} into {holders} of {d}. How many {holders} does {name} need?",
        "There are {c} {goods} in {d} {holders}, the same number in each. How many {goods} are in each?",
        "{name} wants to split {c} {goods} into groups of {d}. How many groups will there be?",
        "If each of the {holders} holds {d} {goods}, how many {holders} are needed for {c} {goods}?",
        "{friend} arranged {c} {goods} in {d} equal rows. How many {goods} are in each row?",
        "{name} paid {c} dollars for {d} {holders} of {goods}. How much did each of the {holders} cost?",
        "A teacher divides {c} {goods} equally between {d} children. How many {goods} does each child receive?",
        "{name} uses {d} {goods} a day. How many days will {c} {goods} last?",
    ),
}


def fairy_tale_slots(rng: random.Random) -> dict[str, object]:
    being, other = rng.sample(BEINGS, 2)
    do, did = rng.choice(DEEDS)
    return {"being": being, "other": other, "do": do, "did": did, "thing": rng.choice(THINGS)}


def word_problem_slots(rng: random.Random) -> dict[str, object]:
    name, friend = rng.sample(PEOPLE, 2)
    small, factor = rng.randint(2, 19), rng.randint(2, 9)
    numbers = {"a": small, "b": small + rng.randint(2, 60), "c": small * factor, "d": factor}
    return {"name": name, "friend": friend, "goods": rng.choice(GOODS), "holders": rng.choice(HOLDERS), **numbers}


def examples(
    templates: dict[str, tuple[str, ...]], slots: Callable[[random.Random], dict[str, object]], seed: int
) -> Iterator[Example]:
    """Endless examples without repetition, each class in turn, each class's templates in turn."""
    rng = random.Random(seed)
    choices = tuple(f" {label}" for label in sorted(templates))
    seen: set[str] = set()
    for turn in itertools.count():
        for label, forms in templates.items():
            form = forms[turn % len(forms)]
            text = next(text for text in filled(form, slots, rng) if text_key(text) not in seen)
            seen.add(text_key(text))
            yield Example(text, f" {label}", choices)


def filled(form: str, slots: Callable[[random.Random], dict[str, object]], rng: random.Random) -> Iterator[str]:
    while True:
        yield form.format_map(slots(rng))


def main(out: Path, seed: int = 0) -> None:
    """Writes a test set and prompts for each skill of the demonstration.

    Args:
        out: folder for the files
        seed: chooses the fillings
    """
    out.mkdir(parents=True, exist_ok=True)
    sources = {
        "question-type": examples(QUESTIONS, fairy_tale_slots, seed),
        "operation": examples(PROBLEMS, word_problem_slots, seed),
    }
    for skill, source in sources.items():
        prompt_format = SKILLS[skill].prompt_format
        test = shuffled(list(itertools.islice(source, TEST_ITEMS)))
        rest = shuffled(list(itertools.islice(source, PROMPTS)))
        write_lines(out / f"{skill}-test.jsonl", (task_line(prompt_format, example) for example in test))
        prompts = ({"prompt": task_line(prompt_format, example)["prompt"]} for example in rest)
        write_lines(out / f"{skill}-prompts.jsonl", prompts)
        print(f"{skill}: {len(test)} test items, {len(rest)} prompts")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

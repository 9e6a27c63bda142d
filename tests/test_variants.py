"""Prompts that are few are filled up with variants of themselves, none of which touches what is held out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from benchmarks import prompts
from castlora import teach, transfer
from castlora.bench.spec import BenchmarkModel
from castlora.config import DEFAULT, RECIPES
from castlora.execution.parts import Parts
from castlora.model_pair import align_text, held_out_count, load_models
from castlora.plan import plan_transfer
from castlora.teaching.curriculum import TextSource, teach_text
from castlora.teaching.taught import read_taught, write_taught
from castlora.teaching.variants import vary_prompts
from castlora.text.passages import Passage

PROMPTS = [f"Task: {sentence}\n\tAnswer:" for sentence in tiny.sentences(20)]
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant]"
RECIPE = replace(DEFAULT, fewest_prompts=40, max_length=88, answer_tokens=8)
ENVIRONMENT = {"commit": "0123456789abcdef", "versions": {"torch": "2.13.0"}, "machine": "x86_64, 2 cores"}


def test_a_variant_has_the_format_of_its_prompt_and_words_of_others():
    variants = vary_prompts(PROMPTS, 50, seed=0)
    words = {word for prompt in PROMPTS for word in prompt.split()}
    assert len({variant.text for variant in variants} - set(PROMPTS)) == len(variants) == 50
    exchanged = 0
    for variant in variants:
        origin, varied = PROMPTS[variant.origin].split(), variant.text.split()
        assert variant.text.startswith("Task: The ") and variant.text.endswith("\n\tAnswer:")
        assert len(varied) == len(origin) and set(varied) <= words
        exchanged += sum(old != new for old, new in zip(origin, varied, strict=True)) / len(origin)
    assert 0.1 < exchanged / len(variants) < 0.3
    assert len({variant.origin for variant in variants}) > 10


def test_variants_depend_on_the_seed_alone():
    assert vary_prompts(PROMPTS, 9, seed=1) == vary_prompts(PROMPTS, 9, seed=1) != vary_prompts(PROMPTS, 9, seed=2)


def test_no_variant_is_a_prompt_that_is_kept_out():
    prompts, kept_out = ["red fox", "blue hen"], ["red hen", "blue fox"]
    assert {variant.text for variant in vary_prompts(prompts, 9, seed=0)} & set(kept_out)
    assert not {variant.text for variant in vary_prompts(prompts, 9, seed=0, kept_out=kept_out)} & set(kept_out)


@pytest.mark.parametrize("given", [[], ["Say a"], ["Say a"] * 3, ["Say a", "Say b"]])
def test_prompts_that_leave_nothing_to_exchange_have_no_variants(given):
    assert vary_prompts(given, 10, seed=0) == []


@pytest.fixture(scope="module")
def models(base_model, adapter):
    return load_models(plan_transfer(str(adapter("llama")), str(base_model("mistral")), str(base_model("llama"))))


@pytest.fixture
def few(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("\n".join(f"Who? {sentence} Answer:" for sentence in tiny.sentences(20, seed=9)))
    return path


def words_of(passages):
    return {word for passage in passages for word in passage.prompt.split()}


def test_few_prompts_are_filled_up_and_those_held_out_are_in_no_variant(models, few):
    passages = teach_text(models, TextSource(prompts=str(few)), (), RECIPE, seed=0)
    given = [passage for passage in passages if not passage.is_variant]
    variants = [passage for passage in passages if passage.is_variant]
    assert passages == [*variants, *given] and len(given) == 20
    held_out = held_out_count(20)
    assert held_out == 4 and len(variants) == 40 - (20 - held_out)
    numbers = {word for word in words_of(given[-held_out:]) if word.rstrip(".").isdigit()}
    assert len(numbers) == held_out and not numbers & words_of(variants)
    assert all(passage.answer_start for passage in variants)
    training, held = align_text(models, passages, RECIPE)
    assert (len(training), len(held)) == (40, held_out)
    assert held == align_text(models, given, RECIPE)[1]
    as_given = teach_text(models, TextSource(prompts=str(few)), (), replace(RECIPE, fewest_prompts=0), seed=0)
    assert as_given == given


@pytest.mark.parametrize(
    "departures", [{"fewest_prompts": 16}, {"passages": 16}, {"write_answers": False}], ids=["enough", "cut", "plain"]
)
def test_where_prompts_are_enough_or_unanswered_there_are_no_variants(models, few, departures):
    passages = teach_text(models, TextSource(prompts=str(few)), (), replace(RECIPE, **departures), seed=0)
    assert not any(passage.is_variant for passage in passages)


def test_the_paper_makes_no_variants_and_the_default_makes_them_below_500():
    assert (RECIPES["paper"].fewest_prompts, RECIPES["default"].fewest_prompts) == (0, 500)


def test_of_a_chat_the_last_message_is_varied(models, tmp_path, monkeypatch):
    for tokenizer in (models.source_tokenizer, models.target_tokenizer):
        monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    path = tmp_path / "chats.jsonl"
    system = {"role": "system", "content": "Be brief."}
    chats = [[system, {"role": "user", "content": f"Why? {text}"}] for text in tiny.sentences(10)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    recipe = replace(RECIPE, fewest_prompts=20, max_length=96)
    passages = teach_text(models, TextSource(prompts=str(path), chat=True), (), recipe, seed=0)
    variants = [passage for passage in passages if passage.is_variant]
    assert len(variants) == 12
    for passage in variants:
        first, last = json.loads(passage.messages)
        assert first == system and last["role"] == "user" and last["content"].startswith("Why? ")
        assert passage.prompt == f"[system] Be brief.\n[user] {last['content']}\n[assistant]"
        assert [first, last] not in chats


def test_answers_to_variants_are_kept_beside_those_to_prompts(models, few, tmp_path, monkeypatch):
    parts = Parts(tmp_path / "parts")
    first = teach_text(models, TextSource(prompts=str(few)), (), RECIPE, seed=0, parts=parts)
    monkeypatch.setattr("castlora.teaching.answers._sample_answers", lambda *_: pytest.fail("answered again"))
    assert teach_text(models, TextSource(prompts=str(few)), (), RECIPE, seed=0, parts=parts) == first


def test_a_file_of_taught_text_says_which_prompts_are_variants(base_model, tmp_path):
    tokenizer = tiny.tokenizer_of(base_model("llama"))
    passages = [Passage("Who? The hen.", 4, is_variant=True), Passage("Who? The fox.", 4)]
    write_taught(tmp_path / "taught.jsonl", passages, "0123")
    lines = [json.loads(line) for line in (tmp_path / "taught.jsonl").read_text().splitlines()]
    assert [line.get("variant") for line in lines] == [True, None]
    assert read_taught(str(tmp_path / "taught.jsonl"), 9, tokenizer, tokenizer) == passages


def test_a_transfer_from_few_prompts_counts_its_variants_and_is_that_from_the_taught_file(
    base_model, adapter, few, tmp_path, checked_in_process
):
    places = {"adapter": str(adapter("llama")), "source": str(base_model("llama"))}
    taught = teach(**places, prompts=str(few), out=str(tmp_path / "taught.jsonl"), tuning=tiny.SHORT)
    weights = []
    for name, text in (("a", {"prompts": str(few)}), ("b", {"taught": str(taught)})):
        settings = {"steps": 2, "batch_size": 4, "tuning": tiny.SHORT}
        result = transfer(**places, target=str(base_model("mistral")), out=str(tmp_path / name), **settings, **text)
        assert result.manifest["passages"] == {"training": 24, "held_out": 4, "variants": 8}
        assert "; 8 of 24 passages are variants of prompts |" in (result.folder / "README.md").read_text()
        weights.append((result.folder / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_lift_is_shown_by_the_number_of_prompts(tmp_path, monkeypatch):
    def score(value: float) -> dict[str, object]:
        return {
            "metric": "accuracy",
            "score": value,
            "nll": None,
            "scores": "".join(str(int(item < 10 * value)) for item in range(10)),
        }

    runs = []

    def run(self, settings, cell):
        file = Path(settings.spec.prompts(cell.skill).prompts)
        given = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
        runs.append((len(given), self.tuning.fewest_prompts))
        assert set(given) < {str(number) for number in range(3000)} and settings.spec.test_items(cell.skill)
        return score(0.8 if len(given) == 1000 else 0.4 if self.tuning.fewest_prompts == 0 else 0.6)

    monkeypatch.setattr(prompts.Distilled, "run", run)
    monkeypatch.setattr(prompts, "zoo_models", lambda *_: {name: BenchmarkModel(name, "{skill}") for name in "st"})

    def of_references(_spec, pair, skill):
        scores = {"bare target": score(0.2), "retrained": score(1.0)}
        return {"pair": pair, "skill": skill, "references": scores}

    monkeypatch.setattr(prompts, "TUNED_ON", ("s:t",))
    monkeypatch.setattr(prompts, "COUNTS_OF_OTHERS", (32,))
    monkeypatch.setattr(prompts, "reference_scores", of_references)
    monkeypatch.setattr("castlora.bench.grid.environment", lambda: ENVIRONMENT)
    skill = tmp_path / "tasks" / "colours"
    skill.mkdir(parents=True)
    (skill / "prompts.jsonl").write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(3000)))
    (skill / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for _ in range(2):
        prompts.main(
            tmp_path / "tasks", tmp_path / "out", tmp_path / "prompts.md", pairs=["s:t", "t:s"],
            skills=["colours"], counts=[32, 1000],
        )  # fmt: skip
    assert runs == [(32, None), (32, 0)] * 2 + [(1000, 0)]
    page, others = (tmp_path / "prompts.md").read_text().split("which took no part in that:")
    others, each = others.split("## By pair and skill")
    assert "| 32 | 0.25 [0.25, 0.25] | 0.50 [0.50, 0.50] | +0.25 [+0.25, +0.25], 1 and 0 |" in page
    assert "| 1000 | 0.75 [0.75, 0.75] | – | – |" in page
    assert "| 32 | 0.25 [0.25, 0.25] | 0.50" in others and "| 1000 |" not in others
    assert "| s → t | colours | 0.25 | 0.50 | 0.75 |" in each and "| t → s | colours | 0.25 | 0.50 | – |" in each
    assert (tmp_path / "prompts.svg").read_text().count("<svg") == 1

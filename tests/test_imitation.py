import pytest
import tiny
from peft import PeftModel

from castlora.evaluation.imitation import Imitation, compare_answers
from castlora.model_pair import load_models
from castlora.models.completions import generate
from castlora.plan import plan_transfer
from castlora.text.chat import without_special_tokens
from castlora.text.passages import Passage

PROMPTS = [f"Who? {sentence} Answer:" for sentence in tiny.sentences(3)]


def passages(answer: str = " fox", **fields: str) -> list[Passage]:
    return [Passage(prompt + answer, len(prompt.encode()), **fields) for prompt in PROMPTS]


@pytest.fixture
def compared(base_model, adapter):
    """Compares a llama with its LoRA and a mistral with a LoRA of its own."""
    models = load_models(plan_transfer(str(adapter("llama")), str(base_model("mistral")), str(base_model("llama"))))
    student = PeftModel.from_pretrained(models.target, adapter("mistral")).eval()

    def compare(held_out: list[Passage]) -> Imitation | None:
        return compare_answers(models, student, held_out, 5)

    return compare


def test_three_models_answer_the_prompts_without_the_teachers_samples(compared, base_model, adapter):
    imitation = compared([Passage("plain text"), *passages(" an answer that was sampled")])
    assert imitation.prompts == PROMPTS
    for written, name, is_adapted in (
        (imitation.teacher, "llama", True), (imitation.bare, "mistral", False), (imitation.transferred, "mistral", True)
    ):  # fmt: skip
        base = base_model(name)
        model = tiny.load_adapted(base, adapter(name)) if is_adapted else tiny.load(base)
        assert written == generate(model, tiny.tokenizer_of(base), PROMPTS, 5, 8)
    assert imitation.bare != imitation.transferred


def test_in_a_chat_each_model_reads_its_own_prompt(compared, base_model):
    imitation = compared(passages(target_prompt="<s>Tell: who?"))
    plain = without_special_tokens(tiny.tokenizer_of(base_model("mistral")))
    assert imitation.bare == generate(tiny.load(base_model("mistral")), plain, ["<s>Tell: who?"] * 3, 5, 8)
    assert imitation.prompts == PROMPTS


def test_text_without_prompts_has_no_answers_to_compare(compared):
    assert compared([Passage("plain text")]) is None


def test_the_share_of_answers_that_are_the_same_up_to_spaces():
    imitation = Imitation(["p"] * 4, ["a", "b ", "c", "d"], ["a", "x", "x", "x"], [" a", "b", "c", "D"])
    assert (imitation.same_before, imitation.same_after) == (0.25, 0.75)
    assert imitation.ci95[0] < 0.75 < imitation.ci95[1]


def test_the_share_by_chance_leaves_out_the_own_prompt():
    imitation = Imitation(["p"] * 4, ["a", "a ", "b", "c"], [""] * 4, ["a", "b", "b", " c"])
    # Of its answers to the four prompts one, one, none and none of the three others' are the same.
    assert imitation.same_by_chance == pytest.approx((1 + 1 + 0 + 0) / (4 * 3))
    constant = Imitation(["p"] * 3, ["a"] * 3, [""] * 3, ["a"] * 3)
    assert constant.same_after == constant.same_by_chance == 1
    assert Imitation(["p"], ["a"], [""], ["a"]).same_by_chance is None

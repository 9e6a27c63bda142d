import math

import pytest
import tiny
import torch

from castlora.adapters.live import attach_lora
from castlora.alignment.positions import AlignedPassage, align_passages
from castlora.alignment.tokens import ByteTokenizer
from castlora.baselines.synthetic import contrastive_excess, label_by_excess, learn_labels
from castlora.models.completions import CompletionTokens, completion_log_likelihoods
from castlora.text.passages import Passage

PROMPT = "Who? "


@pytest.fixture
def answered() -> list[AlignedPassage]:
    """Twelve prompts with answers of several words, for a llama as source and a gpt2 as target."""
    source, target = (ByteTokenizer.from_tokenizer(tiny.family(name)[1]) for name in ("llama", "gpt2"))
    passages = [Passage(PROMPT + sentence, len(PROMPT)) for sentence in tiny.sentences(12)]
    return list(align_passages(passages, source, target, 64, context_weight=0.0))


def test_the_excess_of_an_answer_is_what_the_adapter_adds_to_its_likelihood(base_model, adapter, answered):
    teacher, bare = tiny.load_adapted(base_model("llama"), adapter("llama")), tiny.load(base_model("llama"))
    for passage, excess in zip(answered, contrastive_excess(teacher, answered, batch_size=5), strict=True):
        counts = [weight > 0 for weight in passage.weights]
        first, last = passage.source_positions[counts.index(True)], passage.source_positions[-1]
        answer = CompletionTokens(passage.source_ids[: last + 1], first + 1)
        with_adapter, without = (completion_log_likelihoods(model, [answer], 1)[0] for model in (teacher, bare))
        lengths = torch.tensor(passage.source_positions).diff()
        is_answer = torch.tensor(counts[:-1])
        assert torch.equal(excess.isfinite(), is_answer)
        total = float((excess * lengths)[is_answer].sum())
        assert total == pytest.approx(with_adapter - without, abs=1e-3)


def test_an_adapter_that_changes_nothing_has_no_excess(base_model, answered):
    teacher = attach_lora(tiny.load(base_model("llama")), ["model.layers.0.self_attn.q_proj"], 4).eval()
    for excess in contrastive_excess(teacher, answered, batch_size=5):
        assert excess[excess.isfinite()].abs().max() < 1e-5


def made_up(target_ids: list[int], target_positions: list[int]) -> AlignedPassage:
    return AlignedPassage([], target_ids, [], target_positions, [1.0] * len(target_positions))


def test_the_answers_and_pieces_with_the_most_excess_are_labelled():
    passages = [made_up([1, 2, 3, 4, 5, 6], [0, 1, 3, 5]), made_up([1, 2, 3], [0, 1, 2]), made_up([7, 8], [0, 1])]
    prompt = -math.inf
    excess = [torch.tensor([prompt, 0.2, 3.0]), torch.tensor([0.5, 0.5]), torch.tensor([prompt])]
    assert label_by_excess(passages, excess, passage_share=0.5, piece_share=0.5) == [
        {"input_ids": [1, 2, 3, 4, 5, 6], "attention_mask": [1] * 6, "labels": [-100, -100, -100, -100, 5, 6]}
    ]
    everything = label_by_excess(passages, excess, passage_share=1.0, piece_share=1.0)
    assert [row["labels"] for row in everything] == [[-100, -100, 3, 4, 5, 6], [-100, 2, 3]]


def test_learned_labels_become_likelier(base_model, answered):
    target = tiny.load(base_model("gpt2"))
    student = attach_lora(target, ["transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"], 4)
    labelled = label_by_excess(answered, [torch.zeros(len(one.weights) - 1) for one in answered], 1.0, 1.0)

    def likelihood() -> float:
        rows = [CompletionTokens(row["input_ids"], 1) for row in labelled]
        return float(completion_log_likelihoods(student.eval(), rows, 4).mean())

    unlearned = likelihood()
    learn_labels(student, labelled, steps=20, batch_size=4, rate=0.03, seed=0)
    assert likelihood() > unlearned + 5

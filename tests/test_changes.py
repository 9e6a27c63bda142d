"""What an adapter changes, against cases whose answer is known."""

import math

import pytest
import tiny
import torch

from castlora.alignment.positions import align_passages, batches
from castlora.alignment.tokens import ByteTokenizer
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.distillation.objective import class_log_probabilities
from castlora.distillation.teacher import predict
from castlora.evaluation.changes import cut_pieces, measure_changes, update_divergence
from castlora.model_pair import Models
from castlora.report import ChangedPiece
from castlora.text.passages import Passage

PROMPTS = [f"Who? {sentence} Answer:" for sentence in tiny.sentences(3)]
ANSWERED = [Passage(prompt + " fox", len(prompt.encode())) for prompt in PROMPTS]


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


class TestUpdateDivergence:
    def test_without_a_change_it_is_zero(self) -> None:
        some = torch.randn(5, 7)
        assert update_divergence(some, some, torch.arange(7), 7).tolist() == [0.0] * 5

    def test_a_known_change(self) -> None:
        found = update_divergence(logits([0.5, 0.5]), logits([0.25, 0.75]), torch.arange(2), 2)
        assert found.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)

    def test_a_change_within_a_class_is_none(self) -> None:
        with_update, without = logits([0.5, 0.1, 0.4]), logits([0.2, 0.4, 0.4])
        assert update_divergence(with_update, without, torch.tensor([1, 1, 0]), 2).item() == pytest.approx(0, abs=1e-6)
        assert update_divergence(with_update, without, torch.arange(3), 3).item() > 0.3


@pytest.fixture
def models(base_model, adapter):
    """Two families as models with a LoRA in each, and the student around the target."""

    def make(source: str, target: str) -> tuple[Models, torch.nn.Module]:
        teacher, student = (tiny.load_adapted(base_model(name), adapter(name)) for name in (source, target))
        tokenizers = [tiny.tokenizer_of(base_model(name)) for name in (source, target)]
        spelled = [ByteTokenizer.from_tokenizer(tokenizer) for tokenizer in tokenizers]
        sizes = teacher.config.vocab_size, student.config.vocab_size
        shared = SharedVocabulary.of(*spelled, *sizes)
        loaded = Models(
            source=teacher.get_base_model(), teacher=teacher, target=student.get_base_model(), shared=shared,
            source_tokenizer=tokenizers[0], target_tokenizer=tokenizers[1],
            source_bytes=spelled[0], target_bytes=spelled[1],
        )  # fmt: skip
        return loaded, student

    return make


class TestMeasureChanges:
    def test_the_same_model_and_adapter_on_both_sides_changes_the_same(self, models) -> None:
        changes = measure_changes(*models("llama", "llama"), ANSWERED, 90, 4)
        assert len(changes) == 3
        for change, passage in zip(changes, ANSWERED, strict=True):
            assert all(piece.source == piece.target for piece in change.pieces)
            assert max(piece.source for piece in change.pieces) > 0.01
            assert change.source_lead == change.target_lead
            assert change.source_lead + "".join(piece.text for piece in change.pieces) == passage.text
            assert "".join(piece.text for piece in change.pieces if piece.in_answer) == " fox"
            assert change.pieces[-1].text == ""

    def test_an_adapter_that_does_nothing_changes_nothing(self, models) -> None:
        loaded, student = models("llama", "mistral")
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        (change,) = measure_changes(loaded, student, ANSWERED, 90, 1)
        assert {piece.target for piece in change.pieces} == {0.0}
        assert all(piece.source > 0 for piece in change.pieces)

    def test_places_are_those_that_both_tokenizers_have(self, models, base_model) -> None:
        loaded, student = models("llama", "gpt2")
        (change,) = measure_changes(loaded, student, ANSWERED, 90, 1)
        aligned = next(align_passages(ANSWERED, loaded.source_bytes, loaded.target_bytes, 90, 1.0))
        (batch,) = batches([aligned], 1, torch.device("cpu"))
        bare = predict(tiny.load(base_model("gpt2")), batch, "target").aligned(batch["weights"] > 0)
        with torch.no_grad():
            adapted = predict(student, batch, "target").aligned(batch["weights"] > 0)
        classes = loaded.shared.target_classes, loaded.shared.classes
        ours, theirs = (class_log_probabilities(found, *classes) for found in (adapted, bare))
        expected = (ours.exp() * (ours - theirs)).sum(-1)
        torch.testing.assert_close(torch.tensor([piece.target for piece in change.pieces]), expected)

    def test_in_a_chat_each_side_has_its_own_prompt(self, models) -> None:
        loaded, student = models("llama", "mistral")
        prompt = "<s>User: who? Reply:"
        passage = Passage(prompt + " fox", len(prompt), "<s>Tell: who?")
        (change,) = measure_changes(loaded, student, [passage], 90, 4)
        assert (change.source_lead, change.target_lead) == (prompt, "<s>Tell: who?")
        assert "".join(piece.text for piece in change.pieces) == " fox"
        assert all(piece.in_answer for piece in change.pieces)

    def test_text_that_is_cut_off_ends_with_the_last_place(self, models) -> None:
        (change,) = measure_changes(*models("llama", "llama"), ANSWERED, 12, 1)
        shown = change.source_lead + "".join(piece.text for piece in change.pieces)
        assert ANSWERED[0].text.startswith(shown) and 3 < len(shown) < 30
        assert not any(piece.in_answer for piece in change.pieces)


class TestCutPieces:
    def test_a_piece_has_the_change_of_the_place_before_it(self) -> None:
        assert cut_pieces(b"ab c", [1, 2, 4], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], 2) == [
            ChangedPiece("b", 0.1, 1.0, False),
            ChangedPiece(" c", 0.2, 2.0, True),
            ChangedPiece("", 0.3, 3.0, True),
        ]

    def test_a_character_of_several_places_is_whole_and_has_the_largest_change(self) -> None:
        text = "aжb".encode()
        assert cut_pieces(text, [1, 2, 3, 4], [0.1, 0.7, 0.3, 0.2], [2.0, 1.0, 0.0, 0.5], 0) == [
            ChangedPiece("ж", 0.7, 2.0, True),
            ChangedPiece("b", 0.3, 0.0, True),
            ChangedPiece("", 0.2, 0.5, True),
        ]

    def test_the_last_place_of_a_text_that_goes_on_is_left_out(self) -> None:
        assert cut_pieces(b"abcd", [1, 2], [0.1, 0.2], [0.3, 0.4], 0) == [ChangedPiece("b", 0.1, 0.3, True)]

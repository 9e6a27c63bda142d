import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel

from castlora import UserError, check_portable, pipeline, reading, report_runs
from castlora.adapters.factors import LowRank, read_factors, write_portable
from castlora.adapters.files import open_adapter
from castlora.models.loading import load_config
from castlora.text.passages import Passage

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "castlora.json", "report.html", "report.json"]
ANSWERED = replace(tiny.SHORT, max_length=60, answer_tokens=6)


def weights(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("source", "target", "options", "rank"),
    [
        ("llama", "mistral", {}, 8),
        ("llama", "gpt2", {"start": "ridge"}, 16),
        ("gpt2", "mistral", {"recipe": "paper"}, 8),
        ("phi3", "gpt2-deep", {"start": "ridge", "rank": 32}, 32),
        ("llama", "phi3", {"recipe": "paper", "start": "ridge"}, 16),
        (
            "gpt2-deep",
            "gpt2",
            {"tuning": replace(tiny.SHORT, format_candidates=6)},
            8,
        ),
        (
            "mistral",
            "llama",
            {"tuning": replace(tiny.SHORT, sentences=1)},
            8,
        ),
    ],
)
def test_a_transfer_between_every_two_families(base_model, quick_transfer, source, target, options, rank):
    result = quick_transfer(source, target, **options)
    assert sorted(path.name for path in result.folder.iterdir()) == FILES

    base = tiny.load(base_model(target))
    ids = torch.tensor([[5, 6, 7, 8]])
    bare = tiny.logits(base, ids)
    model = PeftModel.from_pretrained(base, result.folder)
    assert model.peft_config["default"].r == model.peft_config["default"].lora_alpha == rank
    assert (tiny.logits(model, ids) - bare).abs().max() > 1e-3

    manifest = json.loads((result.folder / "castlora.json").read_text())
    assert manifest == result.manifest
    assert manifest["rank"] == rank
    assert manifest["logit_difference"] <= 1e-4
    assert manifest["passages"] == {"training": 24, "held_out": 17, "variants": 0}
    assert (manifest["source"]["name"], manifest["target"]["name"]) == (source, target)
    assert len(manifest["pairing"]) == len(result.pairing.pairs)
    assert result.log[-1]["step"] == 3


def test_training_brings_the_student_nearer_to_the_teacher(quick_transfer):
    tuning = replace(tiny.SHORT, learning_rate_scale=2.0)
    losses = quick_transfer("llama", "mistral", steps=40, tuning=tuning).manifest["losses"]
    assert losses["kl_after"] < 0.9 * losses["kl_before"]
    assert losses["held_out_after"] < losses["held_out_before"]


def test_what_the_models_write_is_shown_side_by_side(quick_transfer):
    result = quick_transfer("llama", "mistral")
    answers = result.manifest["answers"]
    assert 0 < answers["prompts"] <= 64
    assert 0 <= answers["ci95"][0] <= answers["same_after"] <= answers["ci95"][1] <= 1
    page = (result.folder / "report.html").read_text()
    assert "of answers are the teacher" in page and "Words that differ from what source + LoRA writes" in page
    assert "What the adapters change, and where" in page


def test_the_report_can_be_shown_anew_and_beside_another(quick_transfer, tmp_path):
    runs = [quick_transfer("llama", "mistral"), quick_transfer("llama", "mistral", out="other", start="fresh", steps=2)]
    report_runs([str(runs[0].folder)], str(tmp_path / "again.html"))
    assert (tmp_path / "again.html").read_bytes() == (runs[0].folder / "report.html").read_bytes()
    found = report_runs([str(run.folder) for run in runs], str(tmp_path / "both.html"))
    assert found["comparable"] and found["differences"] == {
        "start": ["closed-form maps (ridge)", "plain LoRA (fresh)"],
        "steps": ["3", "2"],
    }
    elsewhere = quick_transfer("llama", "mistral", out="seed", seed=1)
    found = report_runs([str(runs[0].folder), str(elsewhere.folder)], str(tmp_path / "seeds.html"))
    assert [reason.split(" differ")[0] for reason in found["reasons"]] == ["The seeds", "The held-out texts"]


def test_running_text_has_no_answers_to_show(quick_transfer):
    result = quick_transfer("llama", "mistral", recipe="paper", start="ridge")
    assert result.manifest["answers"] is None
    assert "of answers are the teacher" not in (result.folder / "report.html").read_text()


def test_an_adapter_on_q_and_v_changes_q_and_v_alone(base_model, quick_transfer):
    result = quick_transfer("llama", "mistral", modules=("q_proj", "v_proj"), start="ridge")
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    factors = read_factors(open_adapter(str(result.folder)), load_config(str(base_model("mistral"))))
    assert len(factors) == 3 * 4
    assert all((factor.b.abs().max() > 0) != ("k_proj" in name) for name, factor in factors.items())
    assert {finding.rule for finding in check_portable(result.folder)} == {"base by name"}


@pytest.mark.parametrize("trained", ["maps", "factors"])
def test_an_adapter_whose_modules_have_unlike_ranks_and_scales(base_model, tmp_path, quick_transfer, trained):
    options = {"rank_pattern": {"q_proj": 2, "down_proj": 9}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    tiny.save_adapter(tmp_path / "uneven", base_model("llama"), tiny.LINEAR_MODULES["llama"], **options)
    tuning = replace(tiny.SHORT, trained=trained)
    result = quick_transfer("llama", "mistral", adapter=str(tmp_path / "uneven"), start="ridge", tuning=tuning)
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (16, 16, {}, False)
    assert result.manifest["logit_difference"] <= 1e-4


@pytest.mark.parametrize(("of_source", "written"), [(1, 8), (256, 128)])
@pytest.mark.parametrize("start", ["fresh", "ridge"])
def test_adapters_of_the_smallest_and_of_a_large_rank(base_model, tmp_path, quick_transfer, start, of_source, written):
    tiny.save_adapter(tmp_path / "ranked", base_model("llama"), ("q_proj", "down_proj"), r=of_source)
    result = quick_transfer("llama", "mistral", adapter=str(tmp_path / "ranked"), start=start)
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert (config["r"], result.manifest["adapter"]["rank"]) == (written, of_source)
    assert result.manifest["logit_difference"] <= 1e-4
    assert result.manifest["losses"]["kl_after"] < result.manifest["losses"]["kl_before"]


@pytest.mark.parametrize("start", ["fresh", "ridge", "paper"])
def test_an_adapter_that_is_no_plain_lora(base_model, tmp_path, quick_transfer, start, caplog):
    tiny.save_adapter(tmp_path / "dora", base_model("llama"), ("q_proj", "v_proj"), use_dora=True)
    with caplog.at_level("INFO", logger="castlora"):
        result = quick_transfer("llama", "mistral", adapter=str(tmp_path / "dora"), start=start)
    assert result.manifest["adapter"] == {"name": "dora", "kind": "DoRA", "rank": 32, "beyond_maps": []}
    assert ("The maps start from the DoRA adapter cut to low rank" in caplog.text) == (start != "fresh")
    assert (result.manifest["start_loss"]["low_rank"] > 0) == (start != "fresh")
    assert result.manifest["losses"]["kl_after"] < result.manifest["losses"]["kl_before"]


@pytest.mark.parametrize("start", ["fresh", "ridge"])
def test_what_the_adapter_trains_beyond_maps_is_named(base_model, tmp_path, quick_transfer, start, caplog):
    tiny.save_adapter(tmp_path / "extra", base_model("llama"), ("q_proj", "v_proj"), modules_to_save=["lm_head"])
    with caplog.at_level("INFO", logger="castlora"):
        result = quick_transfer("llama", "mistral", adapter=str(tmp_path / "extra"), start=start)
    assert "The adapter also trains lm_head. No map carries that" in caplog.text
    assert result.manifest["adapter"]["beyond_maps"] == ["lm_head"]
    assert "| also trained in the source | `lm_head`: taught by" in (result.folder / "README.md").read_text()
    assert result.manifest["losses"]["kl_after"] < result.manifest["losses"]["kl_before"]


def test_maps_leave_the_parts_of_a_fused_target_without_a_source_unchanged(base_model, quick_transfer):
    tuning = replace(tiny.SHORT, trained="maps")
    result = quick_transfer("llama", "gpt2", modules=("q_proj", "v_proj"), start="ridge", tuning=tuning)
    assert result.manifest["rank"] == 8
    for factor in read_factors(open_adapter(str(result.folder)), load_config(str(base_model("gpt2")))).values():
        delta = factor.b @ factor.a
        assert delta[32:64].abs().max() == 0
        assert delta[:32].abs().max() > 0 and delta[64:].abs().max() > 0


def test_what_is_dropped_is_said(quick_transfer, caplog):
    with caplog.at_level("INFO", logger="castlora"):
        result = quick_transfer("gpt2-deep", "llama", modules=("c_attn",))
    assert result.pairing.layer_map == (0, 2, 4)
    assert result.pairing.dropped == ("transformer.h.1.attn.c_attn", "transformer.h.3.attn.c_attn")
    assert "dropped (no partner in the target): transformer.h.1,3.attn.c_attn" in caplog.text
    assert "o_proj <- nothing" in caplog.text
    unchanged = {entry["target"].rsplit(".", 1)[-1] for entry in result.manifest["pairing"] if not entry["sources"]}
    assert unchanged == {"o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_same_seed_gives_the_same_bytes(quick_transfer):
    first = quick_transfer("llama", "gpt2", "first", seed=5)
    again = quick_transfer("llama", "gpt2", "again", seed=5)
    other = quick_transfer("llama", "gpt2", "other", seed=6)
    assert weights(first.folder) == weights(again.folder) != weights(other.folder)


@pytest.fixture
def taught(monkeypatch) -> list[Passage]:
    """The passages that a transfer learns from, answers included."""
    seen: list[Passage] = []
    align_text = reading.align_text

    def spy(models, passages, recipe):
        seen.extend(passages)
        return align_text(models, passages, recipe)

    monkeypatch.setattr(reading, "align_text", spy)
    return seen


def test_a_prompt_format_is_filled_and_answered(quick_transfer, taught):
    instruction = "Question: {text}\nAnswer:"
    result = quick_transfer("llama", "mistral", prompt_format=instruction, tuning=ANSWERED)
    assert result.manifest["text"] == {
        "regime": "prompt format", "text": "general.txt", "prompt_format": instruction, "prompts": None,
        "chat": False, "taught": None, "formats": [instruction],
    }  # fmt: skip
    for passage in taught:
        assert passage.text.startswith("Question: The ")
        assert passage.text.encode()[: passage.answer_start].endswith(b".\nAnswer:")
    assert any(passage.answer_start < len(passage.text.encode()) for passage in taught)


def test_prompts_are_answered(quick_transfer, taught, prompts_file):
    result = quick_transfer("llama", "mistral", prompts=str(prompts_file), tuning=ANSWERED)
    assert result.manifest["text"]["regime"] == "unlabelled prompts" and result.manifest["text"]["text"] is None
    assert result.manifest["licences"].keys() == {"source adapter", "source base model", "target base model"}
    prompts = {passage.text.encode()[: passage.answer_start].decode() for passage in taught}
    assert prompts == set(prompts_file.read_text().splitlines())


def test_prompts_need_no_answers(quick_transfer, taught, prompts_file):
    tuning = replace(tiny.SHORT, max_length=60, write_answers=False, context_weight=0.0)
    quick_transfer("llama", "gpt2", prompts=str(prompts_file), tuning=tuning)
    assert {len(passage.text.encode()) - passage.answer_start for passage in taught} == {0}


def test_no_record_names_a_folder_of_this_machine(quick_transfer, prompts_file):
    folder = quick_transfer("llama", "gpt2", prompts=str(prompts_file), tuning=ANSWERED).folder
    for name in ("README.md", "castlora.json", "report.html"):
        assert str(folder.parent) not in (folder / name).read_text()
        assert str(prompts_file.parent) not in (folder / name).read_text()


@pytest.mark.parametrize("prompts", ["short", "long"])
def test_text_that_comes_to_nothing_leaves_nothing(quick_transfer, tmp_path, prompts):
    path = tmp_path / "prompts.txt"
    path.write_text("Who?\n" if prompts == "short" else "\n".join("who " * 60 + str(number) for number in range(5)))
    with pytest.raises(UserError, match=r"yields 1 passages|All 5 prompts have more than 88 tokens"):
        quick_transfer("gpt2", "llama", prompts=str(path))
    assert not (tmp_path / "out").exists()


def test_little_text_is_read_again_and_again(quick_transfer, tmp_path):
    (tmp_path / "text.txt").write_text("The fox finds the hen.\n\nThe miller hides the ring.")
    result = quick_transfer("gpt2", "llama", text=str(tmp_path / "text.txt"))
    assert result.manifest["passages"] == {"training": 1, "held_out": 1, "variants": 0}


def test_an_adapter_that_computes_something_else_is_not_published(base_model, quick_transfer, tmp_path, monkeypatch):
    def write_half(folder, factors, *arguments):
        halved = {name: LowRank(factor.a, factor.b / 2) for name, factor in factors.items()}
        write_portable(folder, halved, *arguments)

    monkeypatch.setattr(pipeline, "write_portable", write_half)
    with pytest.raises(RuntimeError, match=r"adapter's logits differ from the trained model's by .*, above 1e-04"):
        quick_transfer("llama", "gpt2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".castlora"]

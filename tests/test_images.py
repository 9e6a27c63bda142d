"""Base models for images and text, of which text passes a part, as tiny models with random weights."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_images import FAMILIES, save_image_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from castlora import check_portable, convert, evaluate, inspect, transfer
from castlora.adapters.base import as_trained
from castlora.adapters.factors import read_update
from castlora.adapters.files import open_adapter
from castlora.errors import UserError
from castlora.models.loading import auto_class, load_config, load_model, skeleton, vocabulary_size
from castlora.models.modules import linear_slots

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
OPTIONS: dict[str, Any] = {
    "steps": 5, "batch_size": 4, "prompt_format": "{text}",
    "tuning": replace(tiny.SHORT, candidates=1, sentences=1, max_length=64, answer_tokens=6),
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Family → folder of its tiny model, made on first use."""
    folder = tmp_path_factory.mktemp("images")

    @functools.cache
    def make(name: str) -> Path:
        return save_image_model(folder / name, name)

    return make


def save_adapter(folder: Path, model: torch.nn.Module, target_modules: Any) -> torch.Tensor:
    """A LoRA with random factors as PEFT saves it; returns logits of the model with it."""
    torch.manual_seed(1)
    options = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(target_modules=target_modules, **options)).eval()
    adapted.save_pretrained(folder)
    return tiny.logits(adapted, IDS)


def whole(folder: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder)


def rename(adapter: Path, old: str, new: str) -> None:
    """Changes the beginnings of the names of an adapter's tensors."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {key.replace(f"base_model.model.{old}", f"base_model.model.{new}"): one for key, one in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_modules_that_text_passes_are_found_and_no_others(base, name):
    config = load_config(str(base(name)))
    model, _ = load_model(str(base(name)))
    slots = linear_slots(model, config)
    assert slots == linear_slots(skeleton(config), config)
    assert {slot.layer for slot in slots.values()} == {0, 1, 2}
    read: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=path: read.add(name)) for path, module in model.named_modules()
    ]
    tiny.logits(model, IDS)
    for handle in handles:
        handle.remove()
    assert set(slots) <= read
    assert all(path.startswith(slots[next(iter(slots))].text_part) for path in slots)
    assert vocabulary_size(config) == tiny.logits(model, IDS).shape[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_transfer_there_and_back(base, base_model, tmp_path, text_file, checked_in_process, name):
    tiny.save_adapter(tmp_path / "adapter", base_model("llama"), tiny.LINEAR_MODULES["llama"])
    there = transfer(
        str(tmp_path / "adapter"), str(base(name)), str(tmp_path / "there"), text=str(text_file), **OPTIONS
    )
    assert there.manifest["logit_difference"] <= 1e-4
    # Qwen 3.5 has not every module in every layer.
    allowed = {"base by name"} | ({"every layer"} if name == "qwen3_5" else set())
    assert {finding.rule for finding in check_portable(there.folder)} <= allowed
    bare = whole(base(name)).eval()
    before = tiny.logits(bare, IDS)
    adapted = PeftModel.from_pretrained(bare, there.folder).eval()
    assert (tiny.logits(adapted, IDS) - before).abs().max() > 1e-3
    written = load_file(there.folder / "adapter_model.safetensors")
    lora = {key.replace(".default.", ".") for key in adapted.state_dict() if ".lora_" in key}
    assert lora == set(written), "PEFT must not put factors beside modules that read images"
    assert "AutoModelForImageTextToText" in (there.folder / "README.md").read_text()

    if name not in ("gemma3", "qwen3_5", "llama4"):
        return  # Their layouts are those of one of these.
    back = transfer(str(there.folder), str(base_model("llama")), str(tmp_path / "back"), text=str(text_file), **OPTIONS)
    assert back.manifest["logit_difference"] <= 1e-4
    assert back.manifest["adapter"]["beyond_maps"] == []
    assert "AutoModelForImageTextToText" not in (back.folder / "README.md").read_text()


@pytest.mark.parametrize(("name", "part"), [("gemma3", "model.vision_tower"), ("qwen3_vl", "model.visual")])
def test_what_an_adapter_trains_in_the_part_for_images_is_named(base, tmp_path, name, part):
    save_adapter(tmp_path / "adapter", whole(base(name)), "all-linear")
    update = read_update(open_adapter(str(tmp_path / "adapter")), load_config(str(base(name))))
    assert len(update.factors) == 21
    assert update.beyond == (part,)


@pytest.mark.parametrize("name", ["gemma3", "llava", "mistral3"])
def test_names_of_older_versions_are_known(base, tmp_path, name):
    adapter = tmp_path / "adapter"
    save_adapter(adapter, whole(base(name)), r".*language_model.*\.(q_proj|v_proj)")
    new = read_update(open_adapter(str(adapter)), load_config(str(base(name))))
    rename(adapter, "model.language_model.", "language_model.model.")
    old = read_update(open_adapter(str(adapter)), load_config(str(base(name))))
    assert old.factors.keys() == new.factors.keys() and len(old.factors) == 6
    for module, lora in new.factors.items():
        assert torch.equal(old.factors[module].a, lora.a) and torch.equal(old.factors[module].b, lora.b)


class TestForTextAlone:
    """Qwen 3.5 is published for images and text, and `AutoModelForCausalLM` loads the part for text."""

    @pytest.fixture
    def adapter(self, base, tmp_path):
        folder = tmp_path / "adapter"
        model = AutoModelForCausalLM.from_pretrained(base("qwen3_5"))
        logits = save_adapter(folder, model, [*ATTENTION, "gate_proj", "up_proj", "down_proj"])
        return folder, logits

    def test_the_class_is_the_one_that_the_adapter_was_trained_on(self, base, tmp_path, adapter):
        config = load_config(str(base("qwen3_5")))
        assert auto_class(config) is AutoModelForImageTextToText
        assert auto_class(as_trained(adapter[0], config)) is AutoModelForCausalLM
        save_adapter(tmp_path / "other", whole(base("qwen3_5")), ATTENTION)
        assert as_trained(tmp_path / "other", config) is config

    def test_it_is_the_teacher_of_a_transfer(self, base, base_model, tmp_path, adapter, text_file, checked_in_process):
        moved = transfer(
            str(adapter[0]), str(base_model("llama")), str(tmp_path / "out"), text=str(text_file), **OPTIONS
        )
        sources = [source["module"] for pair in moved.manifest["pairing"] for source in pair["sources"]]
        assert sources and all(module.startswith("model.layers.") for module in sources)
        assert moved.manifest["logit_difference"] <= 1e-4

    def test_it_is_scored_and_merged_as_it_was_trained(self, base, tmp_path, adapter):
        folder, logits = adapter
        item = {"prompt": "The fox", "completion": " finds the hen"}
        (tmp_path / "task.jsonl").write_text(json.dumps(item) + "\n")
        scores = [
            evaluate(str(base("qwen3_5")), str(tmp_path / "task.jsonl"), one)["nll"] for one in (None, str(folder))
        ]
        assert abs(scores[0] - scores[1]) > 1e-3
        convert(str(folder), "merged", str(tmp_path / "merged"), base=str(base("qwen3_5")))
        merged, _ = load_model(str(tmp_path / "merged"))
        torch.testing.assert_close(tiny.logits(merged, IDS), logits, rtol=1e-4, atol=1e-4)


def test_to_mlx_and_back_computes_the_same(base, tmp_path):
    """Of Qwen 3.5, where not every layer has every module."""
    folder = base("qwen3_5")
    expected = save_adapter(tmp_path / "adapter", whole(folder), r".*language_model.*\.(q_proj|out_proj|up_proj)")
    convert(str(tmp_path / "adapter"), "mlx", str(tmp_path / "mlx"), base=str(folder))
    keys = load_file(tmp_path / "mlx" / "adapters.safetensors")
    queries = {key.split(".")[3] for key in keys if "q_proj" in key}
    assert queries == {"1"} and all(key.startswith("language_model.model.layers.") for key in keys)
    convert(str(tmp_path / "mlx"), "peft", str(tmp_path / "peft"))
    found = tiny.logits(PeftModel.from_pretrained(whole(folder), tmp_path / "peft").eval(), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_merged_model_still_knows_how_images_are_prepared(base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base("gemma3"), folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    expected = save_adapter(tmp_path / "adapter", whole(folder), r".*language_model.*\.(q_proj|up_proj)")
    convert(str(tmp_path / "adapter"), "merged", str(tmp_path / "merged"), base=str(folder))
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == (
        folder / "preprocessor_config.json"
    ).read_text()
    merged, _ = load_model(str(tmp_path / "merged"))
    assert type(merged).__name__ == "Gemma3ForConditionalGeneration"
    torch.testing.assert_close(tiny.logits(merged, IDS), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_whose_names_fit_no_module_is_not_scored_as_the_bare_model(base, tmp_path):
    save_adapter(tmp_path / "adapter", whole(base("gemma3")), r".*language_model.*\.(q_proj|v_proj)")
    rename(tmp_path / "adapter", "model.language_model.", "model.text_model.")
    (tmp_path / "task.jsonl").write_text(json.dumps({"prompt": "The fox", "completion": " finds"}) + "\n")
    with pytest.raises(UserError, match=r"cannot be loaded as an adapter of .*missing adapter keys"):
        evaluate(str(base("gemma3")), str(tmp_path / "task.jsonl"), str(tmp_path / "adapter"))


def test_inspect_counts_the_part_for_text(base, base_model, tmp_path):
    tiny.save_adapter(tmp_path / "adapter", base_model("llama"), ["q_proj", "v_proj"])
    target = inspect(str(tmp_path / "adapter"), str(base("gemma3"))).record["target"]
    assert (target["family"], target["layers"], target["width"]) == ("gemma3", 3, 32)

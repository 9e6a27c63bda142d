import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from castlora import check_portable
from castlora.adapters.factors import LowRank, write_portable
from castlora.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from castlora.adapters.portable import RULES, Finding, describe
from castlora.cli import main
from castlora.errors import UserError
from castlora.models.loading import load_config, skeleton
from castlora.models.modules import linear_slots

Tensors = dict[str, torch.Tensor]
Q_A, Q_B = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight" for side in "AB")


@pytest.fixture(scope="module")
def portable(base_model, tmp_path_factory) -> Path:
    """An adapter on all modules of the tiny Llama, as castlora writes it."""
    config = load_config(str(base_model("llama")))
    slots = linear_slots(skeleton(config), config)
    factors = {name: LowRank(torch.randn(3, slot.d_in), torch.randn(slot.d_out, 3)) for name, slot in slots.items()}
    folder = tmp_path_factory.mktemp("portable")
    write_portable(folder, factors, slots, 8, "owner/base", "abc123")
    return folder


def field(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(edit: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS_FILE)
        edit(found)
        save_file(found, folder / WEIGHTS_FILE)

    return change


def without(*ends: str) -> Callable[[Path], None]:
    def drop(found: Tensors) -> None:
        for key in [key for key in found if any(end in key for end in ends)]:
            del found[key]

    return tensors(drop)


def cut_rank(found: Tensors) -> None:
    found[Q_A], found[Q_B] = found[Q_A][:4].contiguous(), found[Q_B][:, :4].contiguous()


def wide(folder: Path) -> None:
    grown = tensors(lambda found: found.update({key: value.repeat(8, 1) if "lora_A" in key else value.repeat(1, 8)
                                                for key, value in found.items()}))  # fmt: skip
    grown(folder)
    field(r=64, lora_alpha=64)(folder)


BREACHES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a norm": (tensors(lambda f: f.update({"base_model.model.model.norm.weight": torch.ones(32)})),
               "only factors", "1 tensors are no lora_A.weight"),
    "no tensor": (tensors(dict.clear), "only factors", "holds no tensor"),
    "doubles": (tensors(lambda f: f.update({Q_A: f[Q_A].double()})), "plain tensors", "stored as F64"),
    "three sides": (tensors(lambda f: f.update({Q_A: f[Q_A][None]})), "plain tensors", "has shape (1, 8, 32)"),
    "one factor": (tensors(lambda f: f.pop(Q_B)), "both factors", "layers.1.self_attn.q_proj' has lora_A alone"),
    "ranks that differ": (tensors(cut_rank), "one rank", "r is 8, but 'model.layers.1.self_attn.q_proj' has rank 4"),
    "rank pattern": (field(rank_pattern={"q_proj": 8}), "one rank", "rank_pattern is {'q_proj': 8}"),
    "rank 7": (field(r=7), "accepted rank", "r is 7, none of 8, 16, 32, 64, 128"),
    "rank above the module": (wide, "rank within module", "has rank 64 and only 32 inputs"),
    "another alpha": (field(lora_alpha=16), "plain scale", "lora_alpha is 16 and r 8"),
    "fractional alpha": (field(lora_alpha=8.0), "plain scale", "lora_alpha is 8.0; Ollama reads a whole number"),
    "rsLoRA": (field(use_rslora=True), "plain scale", "use_rslora is true"),
    "rank 0": (field(r=0), "finite scale", "lora_alpha / r is 8 / 0, which is no number"),
    "DoRA": (field(use_dora=True), "no extras", "use_dora is True"),
    "saved head": (field(modules_to_save=["lm_head"]), "no extras", "modules_to_save is ['lm_head']"),
    "bias": (field(bias="all"), "no extras", "bias is 'all'"),
    "another kind": (field(peft_type="LOHA"), "no extras", "peft_type is 'LOHA'"),
    "pattern": (field(target_modules=".*_proj"), "plain targets", "target_modules is '.*_proj'; write a list"),
    "unsorted": (field(target_modules=["v_proj", "q_proj"]), "plain targets", "target_modules is not sorted"),
    "whole path": (field(target_modules=["model.layers.1.self_attn.q_proj"]), "plain targets", "write the end of"),
    "absent target": (field(target_modules=["c_attn"]), "plain targets", "'c_attn', of which there is no tensor"),
    "a layer missing": (without("layers.1.mlp.up"), "every layer", "'mlp.up_proj' is missing in layer 1 (1 of 3)"),
    "no keys": (without("k_proj"), "attention together", "q_proj and v_proj without k_proj"),
    "no base": (field(base_model_name_or_path=None), "base by name", "base_model_name_or_path is empty"),
    "base folder": (field(base_model_name_or_path="/models/a"), "base by name", "is a folder of one machine"),
    "tokenizer": (lambda folder: (folder / "added_tokens.json").touch(), "no tokenizer", "added_tokens.json lies"),
}  # fmt: skip


def test_what_castlora_writes_is_portable(portable):
    assert check_portable(portable) == []


@pytest.mark.parametrize(("breach", "rule", "problem"), BREACHES.values(), ids=BREACHES)
def test_each_breach_is_found_and_named(portable, tmp_path, breach, rule, problem):
    folder = Path(shutil.copytree(portable, tmp_path / "adapter"))
    breach(folder)
    findings = check_portable(folder)
    assert any(finding.rule == rule and problem in finding.problem for finding in findings), findings


def test_every_rule_can_be_broken():
    assert {rule for _, rule, _ in BREACHES.values()} == set(RULES)


def test_a_breach_breaks_its_rule_alone(portable, tmp_path):
    folder = Path(shutil.copytree(portable, tmp_path / "adapter"))
    without("layers.1.mlp.up")(folder)
    assert [finding.rule for finding in check_portable(folder)] == ["every layer"]


def test_the_description_names_rule_problem_and_engines():
    text = describe([Finding("base by name", "It is empty."), Finding("base by name", "Twice.")])
    assert text.startswith(f"Not portable: breaks 1 of {len(RULES)} rules.")
    assert "- base by name: It is empty.\n  asked for by llama.cpp, hub (convert_lora_to_gguf.py --base)" in text
    assert "keeps all" in describe([])


def test_the_way_out_is_named_where_there_is_one():
    assert "castlora convert --to peft" in describe([Finding("plain scale", "lora_alpha is 16 and r 8.")])
    assert "castlora convert" not in describe([Finding("base by name", "It is empty.")])


def test_the_command_tells_by_its_exit_code(portable, tmp_path, capsys):
    main(["check", str(portable)])
    assert "Portable: keeps all" in capsys.readouterr().out
    folder = Path(shutil.copytree(portable, tmp_path / "adapter"))
    field(use_dora=True)(folder)
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(folder)])
    assert stopped.value.code == 1
    assert "no extras: use_dora is True" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["{", "[]", None])
def test_what_cannot_be_read_is_refused(portable, tmp_path, damage):
    folder = Path(shutil.copytree(portable, tmp_path / "adapter"))
    if damage is None:
        (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:100])
    else:
        (folder / CONFIG_FILE).write_text(damage)
    with pytest.raises(UserError, match=r"copy (it|them) again"):
        check_portable(folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_config\.json; name the folder of a PEFT adapter"):
        check_portable(tmp_path)

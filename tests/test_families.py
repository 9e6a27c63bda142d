"""Every family of base models that castlora names, as tiny models with random weights, as source and as target."""

import functools
from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig

from castlora import check_portable, transfer
from castlora.maps.last_layer import find_last_layer
from castlora.models.capture import capture
from castlora.models.loading import load_config
from castlora.models.modules import MODULE_ROLES, LinearSlot, linear_slots, role_rows, row_numbers

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": tiny.CONTEXT,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
HEAD = {"head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-3": {"model_type": "llama", **GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "mistral": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 2},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, **HEAD},
    "gemma2": {**GROUPED, **HEAD, "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", **GROUPED, **HEAD, "query_pre_attn_scalar": 8},
    "phi3": GROUPED,
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {},
    "falcon-grouped": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-heads": {"model_type": "falcon", "multi_query": False},
    "stablelm": GROUPED,
    "olmo": {},
    "granite": GROUPED,
    "smollm": {"model_type": "llama", **GROUPED, "tie_word_embeddings": True},
    "smollm3": GROUPED,
    "phi": {},
    "starcoder2": GROUPED,
    "gpt_neo": {"num_layers": 3, "attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "gptj": {"rotary_dim": 4},
    "bloom": {},
    "mpt": {"max_seq_len": 96},
    "cohere2": {**GROUPED, **HEAD},
    "ernie4_5": GROUPED,
    "exaone4": {**GROUPED, "sliding_window_pattern": 3},
    "glm4": {**GROUPED, **HEAD},
    "olmo2": GROUPED,
    "olmo3": GROUPED,
    "seed_oss": {**GROUPED, **HEAD},
    "apertus": GROUPED,
    "arcee": GROUPED,
    "nemotron": GROUPED,
    "gpt_oss": {**GROUPED, **HEAD, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {**GROUPED, **HEAD, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "granite-4": {
        "model_type": "granitemoehybrid",
        **GROUPED,
        "shared_intermediate_size": 48,
        "num_local_experts": 0,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "position_embedding_type": "rope",
    },
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        **GROUPED,
        **HEAD,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}
EXPERTS = ("mixtral", "gpt_oss", "qwen3_moe")
"""Their MLPs are experts, which are left as they are."""
HYBRIDS = ("lfm2", "granite-4", "qwen3_5")
"""One layer of three has attention; the others have something that ends as attention does."""
NAMES = tuple(FAMILIES)
ORDINARY = (
    "llama", "llama-3", "mistral", "qwen2", "qwen3", "stablelm", "olmo", "granite", "smollm", "smollm3", "cohere2",
    "ernie4_5", "exaone4", "olmo2", "olmo3", "seed_oss", "apertus", "arcee", "nemotron", "qwen3_moe",
)  # fmt: skip
"""They have no layout of their own: one module per part."""


def by_tokenizer(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those with the one type of tokenizer, and those with the other."""
    of_type: tuple[list[str], list[str]] = [], []
    for name in names:
        of_type[NAMES.index(name) % 2].append(name)
    return of_type


SENTENCEPIECE, BYTE_LEVEL = by_tokenizer(name for name in NAMES if name not in ORDINARY)
# A family with a layout of its own is a source and a target, any other is one of both; tokenizers differ in type.
PAIRS = [
    *zip(SENTENCEPIECE, cycle(BYTE_LEVEL)), *zip(BYTE_LEVEL, cycle(SENTENCEPIECE)),
    *zip(*by_tokenizer(ORDINARY), strict=True),
]  # fmt: skip
every_family = pytest.mark.parametrize("name", NAMES)


def config_of(name: str) -> PreTrainedConfig:
    given = {"model_type": name, **SHAPE, **FAMILIES[name]}
    tokenizer = tokenizer_of(name)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    pad = {"pad_token_id": tokenizer.eos_token_id}
    vocabulary = {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    return AutoConfig.for_model(given.pop("model_type"), **given, **special, **pad, **vocabulary)


def tokenizer_of(name: str):
    """Half of the families have the one type of tokenizer, half the other, in several sizes."""
    size = NAMES.index(name) // 2 % 3
    return tiny.byte_level(290 + 10 * size) if NAMES.index(name) % 2 else tiny.sentencepiece_type(50 + 10 * size)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Family → folder of its tiny model, made on first use."""
    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def make(name: str) -> Path:
        return tiny.save_model(folder / name, config_of(name), tokenizer_of(name), seed=NAMES.index(name))

    return make


@every_family
def test_all_parts_of_every_layer_are_known(base, name):
    config = load_config(str(base(name)))
    slots = linear_slots(tiny.load(base(name)), config)
    for layer in range(3):
        found = [role for slot in slots.values() if slot.layer == layer for role in slot.roles]
        gated = ["down", "up"] if name in ("apertus", "arcee", "nemotron") else ["down", "gate", "up"]
        mlp = [] if name in EXPERTS else ["down", "fc"] if "fc" in found else gated
        attention = "o" if name in HYBRIDS and layer != 1 else "qkvo"
        assert sorted(found) == sorted([*attention, *mlp])
    for slot in slots.values():
        numbers = sorted(row for rows in slot.rows.values() for row in row_numbers(rows))
        assert numbers == list(range(slot.d_out))


@pytest.mark.parametrize(
    "name", ["gpt_neox", "bloom", "mpt", "falcon", "falcon-grouped", "falcon-heads", "phi3", "gpt2"]
)
def test_the_rows_of_the_values_are_the_ones_that_the_model_reads_as_values(base, name):
    model = tiny.load(base(name))
    slots = linear_slots(model, load_config(str(base(name))))
    fused = next(slot for slot in slots.values() if "v" in slot.roles and slot.layer == 0)
    reader = next(slot.name for slot in slots.values() if slot.roles == ("o",) and slot.layer == 0)
    silenced = {}
    for role in "qkv":
        module = model.get_submodule(fused.name)
        handle = module.register_forward_hook(lambda _m, _i, out, rows=fused.rows[role]: out.index_fill(
            -1, torch.tensor(list(row_numbers(rows))), 0))  # fmt: skip
        with capture(model, [reader]) as activations:
            tiny.logits(model, torch.tensor([[5, 6, 7]]))
        handle.remove()
        silenced[role] = activations[reader].inputs
    assert silenced["v"].abs().max() == 0
    # Without queries or without keys every token attends evenly to what came before.
    torch.testing.assert_close(silenced["q"], silenced["k"])
    assert silenced["q"].abs().max() > 0


def test_queries_and_keys_of_interleaved_heads_are_told_apart():
    config = AutoConfig.for_model("gpt_neox", **SHAPE)
    rows = role_rows(("q", "k", "v"), 96, config)
    assert [rows[role][:9] for role in "qkv"] == [
        [0, 1, 2, 3, 4, 5, 6, 7, 24], [8, 9, 10, 11, 12, 13, 14, 15, 32], [16, 17, 18, 19, 20, 21, 22, 23, 40],
    ]  # fmt: skip
    grouped = AutoConfig.for_model("falcon", **SHAPE, new_decoder_architecture=True, num_kv_heads=2)
    rows = role_rows(("q", "k", "v"), 64, grouped)
    assert rows["q"] == [*range(16), *range(32, 48)] and rows["k"] == [*range(16, 24), *range(48, 56)]


def slots_of(folder: Path) -> list[LinearSlot]:
    config = load_config(str(folder))
    return list(linear_slots(tiny.load(folder), config).values())


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_transfer_of_five_steps(base, tmp_path, text_file, checked_in_process, source, target):
    config = load_config(str(base(source)))
    modules = sorted({name.split(".")[-1] for name in linear_slots(tiny.load(base(source)), config)})
    tiny.save_adapter(tmp_path / "adapter", base(source), modules)
    result = transfer(
        str(tmp_path / "adapter"), str(base(target)), str(tmp_path / "out"), text=str(text_file), steps=5, batch_size=4,
        prompt_format="{text}", tuning=replace(tiny.SHORT, candidates=1, sentences=1, max_length=64, answer_tokens=6),
    )  # fmt: skip
    assert result.manifest["logit_difference"] <= 1e-4
    allowed = {"base by name", "rank within module", *(["every layer"] if target in HYBRIDS else [])}
    assert {finding.rule for finding in check_portable(result.folder)} <= allowed
    if source in HYBRIDS and target not in HYBRIDS:
        with_queries = {pair["target"] for pair in result.manifest["pairing"] if pair["sources"]}
        assert all(slot.name in with_queries for slot in slots_of(base(target)) if "q" in slot.roles)
    model, ids = tiny.load(base(target)), torch.tensor([[5, 6, 7, 8]])
    bare = tiny.logits(model, ids)
    assert (tiny.logits(PeftModel.from_pretrained(model, result.folder), ids) - bare).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_family
def test_the_last_layer_is_solved_for_where_norm_and_head_follow_at_once(base, name, dtype):
    """Some norm the output of the MLP again, Phi and GPT-J add biases to the logits, Cohere scales them."""
    model = tiny.load(base(name)).to(dtype)
    slots = linear_slots(model, load_config(str(base(name))))
    found = find_last_layer(model, slots)
    norms_again = ("gemma2", "gemma3", "exaone4", "glm4", "olmo2", "olmo3")
    assert (found is None) == (name in (*norms_again, "phi", "gptj", "cohere2", *EXPERTS))
    if found:
        with_layer_norm = name.startswith(
            ("gpt", "opt", "falcon", "stablelm", "olmo", "starcoder2", "bloom", "mpt", "nemotron")
        )
        assert found.tail.is_centred == with_layer_norm
        assert found.tail.logits(torch.randn(2, 32)).dtype == torch.float32
        assert (slots[found.module].layer, slots[found.module].roles) == (2, ("down",))


def test_a_family_with_other_names_needs_lines_in_the_table_alone(monkeypatch):
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.ffn = torch.nn.Module(), torch.nn.Module()
            for name in ("wq", "wk", "wv", "wo"):
                self.attention.add_module(name, torch.nn.Linear(8, 8))
            for name in ("w1", "w2", "w3"):
                self.ffn.add_module(name, torch.nn.Linear(8, 8))

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Layer(), Layer()])})
    config = AutoConfig.for_model("llama", **SHAPE)
    assert linear_slots(model, config) == {}
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    monkeypatch.setattr("castlora.models.modules.MODULE_ROLES", dict(MODULE_ROLES))
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    found = {name: slot.roles for name, slot in linear_slots(model, config).items() if slot.layer == 1}
    assert found["layers.1.ffn.w3"] == ("up",) and found["layers.1.attention.wo"] == ("o",)
    assert len(found) == 7

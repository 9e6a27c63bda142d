import itertools

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from castlora.errors import UserError
from castlora.models.loading import load_config, skeleton
from castlora.models.modules import LinearSlot, linear_slots
from castlora.models.pairing import branch_ranks, describe, pair_modules, relative_depth

layers = st.integers(1, 100)


@pytest.fixture(scope="module")
def slots(base_model):
    def of(name: str) -> dict[str, LinearSlot]:
        config = load_config(str(base_model(name)))
        return linear_slots(skeleton(config), config)

    return of


def names(slots: dict[str, LinearSlot], *ends: str) -> list[str]:
    return [name for name in slots if name.endswith(ends)]


@given(layers, layers)
def test_relative_depth_keeps_the_order_and_the_ends(source, target):
    mapped = relative_depth(source, target)
    assert len(mapped) == target
    assert mapped[-1] == source - 1
    assert target == 1 or mapped[0] == 0
    assert all(after - before >= 0 for before, after in itertools.pairwise(mapped))
    assert target < source or set(mapped) == set(range(source))


@given(layers)
def test_equal_depths_are_paired_one_to_one(depth):
    assert relative_depth(depth, depth) == tuple(range(depth))


def test_a_source_layer_without_attention_is_stood_for_by_the_nearest_with_it(slots):
    target = slots("mistral")
    with_attention = (0, 3)
    source = {
        f"layers.{layer}.{name}": LinearSlot(f"layers.{layer}.{name}", layer, {role: slice(0, 8)}, 8, 8, False)
        for layer in range(4)
        for name, role in (("q_proj", "q"), ("up_proj", "up"))
        if role == "up" or layer in with_attention
    }
    pairing = pair_modules(source, target, source)
    found = {pair.target.name: pair.branches[0].source_module for pair in pairing.mapped}
    queries = [found[name] for name in names(target, "q_proj")]
    assert queries == [f"layers.{layer}.q_proj" for layer in (0, 0, 3, 3)]
    assert [found[name] for name in names(target, "up_proj")] == [f"layers.{layer}.up_proj" for layer in range(4)]
    # What the adapter leaves as it is stays so: a layer that has the module is not stood for.
    adapted = [name for name in source if not name.startswith("layers.3.q")]
    partly = {pair.target.layer for pair in pair_modules(source, target, adapted).mapped if pair.target.roles == ("q",)}
    assert partly == {0, 1}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(tiny.FAMILIES, repeat=2)))
def test_branches_join_equal_roles_of_paired_layers(slots, source, target):
    source_slots, target_slots = slots(source), slots(target)
    pairing = pair_modules(source_slots, target_slots, source_slots)
    assert [pair.target for pair in pairing.pairs] == list(target_slots.values())
    for pair in pairing.pairs:
        for branch in pair.branches:
            partner = source_slots[branch.source_module]
            assert partner.layer == pairing.layer_map[pair.target.layer]
            rows = [pair.target.rows[role] for role in branch.roles]
            assert (rows[0].start, rows[-1].stop) == (branch.target_rows.start, branch.target_rows.stop)
            of_source = [role if role in partner.rows else {"fc": "up", "up": "fc"}[role] for role in branch.roles]
            rows = [partner.rows[role] for role in of_source]
            assert (rows[0].start, rows[-1].stop) == (branch.source_rows.start, branch.source_rows.stop)
        without_partner = {"gate"} if source.startswith("gpt2") else set()
        written = {role for branch in pair.branches for role in branch.roles}
        assert written == set(pair.target.roles) - without_partner


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_model_paired_with_itself(slots, name):
    own = slots(name)
    pairing = pair_modules(own, own, own)
    for pair in pairing.pairs:
        (branch,) = pair.branches
        assert branch.source_module == pair.target.name
        assert (branch.source_rows, branch.target_rows) == (slice(0, pair.target.d_out), slice(0, pair.target.d_out))
        assert pairing.multiplicity(branch) == 1
    assert pairing.dropped == ()


def test_separate_source_modules_flow_together_into_a_fused_target(slots):
    source, target = slots("llama"), slots("phi3")
    pairing = pair_modules(source, target, source)
    pair = next(pair for pair in pairing.pairs if pair.target.name.endswith("1.self_attn.qkv_proj"))
    assert [branch.source_module.rsplit(".", 1)[-1] for branch in pair.branches] == ["q_proj", "k_proj", "v_proj"]
    assert [branch.target_rows for branch in pair.branches] == [slice(0, 32), slice(32, 48), slice(48, 64)]
    ranks = {name: 8 if name.endswith("q_proj") else 4 for name in source}
    assert branch_ranks(pair, ranks) == 16


def test_a_fused_source_speaks_for_separate_targets_row_by_row(slots):
    source = slots("gpt2")
    pairing = pair_modules(source, slots("llama"), source)
    found = {
        pair.target.name: (branch.source_module, branch.source_rows)
        for pair in pairing.pairs
        for branch in pair.branches
        if pair.target.layer == 2 and pair.target.roles[0] in "qkv"
    }
    assert found == {
        f"model.layers.2.self_attn.{role}_proj": ("transformer.h.2.attn.c_attn", slice(32 * i, 32 * (i + 1)))
        for i, role in enumerate("qkv")
    }
    assert {pairing.multiplicity(branch) for pair in pairing.pairs for branch in pair.branches} == {1}


def test_a_part_that_speaks_for_several_layers_knows_it(slots):
    source = slots("gpt2")
    pairing = pair_modules(source, slots("gpt2-deep"), source)
    assert pairing.layer_map == (0, 0, 1, 2, 2)
    counts = {pair.target.layer: pairing.multiplicity(pair.branches[0]) for pair in pairing.pairs}
    assert counts == {0: 2, 1: 2, 2: 1, 3: 2, 4: 2}


def test_only_adapted_modules_speak(slots):
    source = slots("llama")
    pairing = pair_modules(source, slots("mistral"), names(source, "q_proj", "v_proj"))
    assert {pair.target.name.rsplit(".", 1)[-1] for pair in pairing.mapped} == {"q_proj", "v_proj"}
    assert len(pairing.mapped) == 8
    assert "k_proj <- nothing" in describe(pairing)


def test_modules_of_layers_without_a_partner_are_reported_as_dropped(slots):
    source = slots("gpt2-deep")
    pairing = pair_modules(source, slots("gpt2"), source)
    assert pairing.layer_map == (0, 2, 4)
    assert pairing.dropped == tuple(sorted(names(source, *(f"h.{layer}.{rest}" for layer in (1, 3) for rest in
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")))))  # fmt: skip
    assert describe(pairing).splitlines()[-1] == (
        "dropped (no partner in the target): transformer.h.1,3.attn.c_attn, transformer.h.1,3.attn.c_proj, "
        "transformer.h.1,3.mlp.c_fc, transformer.h.1,3.mlp.c_proj"
    )


def test_the_gate_is_dropped_towards_an_ungated_mlp(slots):
    source = slots("llama")
    pairing = pair_modules(source, slots("gpt2"), source)
    assert pairing.dropped == tuple(names(source, "gate_proj"))
    fc = next(pair for pair in pairing.pairs if pair.target.roles == ("fc",))
    assert fc.branches[0].source_module.endswith("up_proj")


def test_a_lost_part_of_a_fused_module_is_reported(slots):
    source = slots("phi3")
    pairing = pair_modules(source, slots("gpt2"), source)
    assert pairing.dropped == tuple(f"{name}(gate)" for name in names(source, "gate_up_proj"))
    assert describe(pairing).endswith(": model.layers.0-2.mlp.gate_up_proj(gate)")


def test_the_gate_stays_unchanged_from_an_ungated_mlp(slots):
    source = slots("gpt2")
    pairing = pair_modules(source, slots("llama"), source)
    assert {pair.target.roles for pair in pairing.pairs if not pair.branches} == {("gate",)}


def test_an_adapter_without_any_partner_is_refused(slots):
    source = slots("llama")
    with pytest.raises(UserError, match="No module that the adapter changes has a partner in the target"):
        pair_modules(source, slots("gpt2"), names(source, "gate_proj"))


def test_layers_that_are_paired_alike_are_described_once(slots):
    source = slots("gpt2")
    assert describe(pair_modules(source, slots("phi3"), source)).splitlines() == [
        "target layer <- source layer: 0 <- 0, 1 <- 1, 2 <- 2",
        "target module <- source module(roles):",
        "  layers 0-2: o_proj <- c_proj(o), qkv_proj <- c_attn(q+k+v), gate_up_proj <- c_fc(up), "
        "down_proj <- c_proj(down)",
    ]


def test_layers_that_are_paired_unlike_are_described_apart(slots):
    source = slots("gpt2")
    adapted = [*names(source, "h.0.attn.c_attn"), *names(source, "mlp.c_proj")]
    rows = describe(pair_modules(source, slots("gpt2"), adapted)).splitlines()[2:]
    assert [row.split(":")[0] for row in rows] == ["  layers 0", "  layers 1-2"]
    assert "c_attn <- c_attn(q+k+v)" in rows[0] and "c_attn <- nothing" in rows[1]

import weakref

import pytest
import tiny
import torch

from castlora.maps.fitting import (
    collect_moments,
    input_site,
    input_widths,
    parts_of,
    ridge_factors,
    ridge_maps,
    solve_in_parts,
    statistics_bytes,
)
from castlora.maps.starts import fold_maps
from castlora.models.pairing import Pairing


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ridge_maps_of_a_model_onto_itself_are_the_identity(paired, name):
    source, model, pairing, factors = paired(name, name)
    moments = collect_moments(source, model, pairing, tiny.aligned(name, name, 150))
    folded = fold_maps(pairing, factors, ridge_maps(moments, pairing, ridge=1e-9))
    # A module with more outputs than inputs never shows some directions of its output, which no data can tell.
    filled = [pair.target.name for pair in pairing.mapped if pair.target.d_out <= pair.target.d_in]
    assert len(filled) >= len(pairing.mapped) // 2
    for name in filled:
        original = factors[name].b @ factors[name].a
        torch.testing.assert_close(folded[name].b @ folded[name].a, original, rtol=0, atol=2e-3)


def test_ridge_maps_onto_a_deeper_copy_divide_the_update(paired):
    source, model, pairing, _ = paired("gpt2", "gpt2-deep")
    moments = collect_moments(source, model, pairing, tiny.aligned("gpt2", "gpt2-deep"))
    shared = ridge_maps(moments, pairing, 0.1)
    assert pairing.layer_map == (0, 0, 1, 2, 2)
    alone = Pairing(tuple(pair for pair in pairing.pairs if pair.target.layer in (0, 2, 3)), pairing.layer_map, ())
    undivided = ridge_maps(moments, alone, 0.1)
    for (name, index), maps in undivided.items():
        share = 1 if ".h.2." in name else 2
        torch.testing.assert_close(share * shared[name, index].from_source, maps.from_source)
        torch.testing.assert_close(shared[name, index].to_source, maps.to_source)


def test_rows_of_a_fused_source_are_not_divided_among_q_k_and_v(paired):
    source, model, pairing, _ = paired("gpt2", "llama")
    moments = collect_moments(source, model, pairing, tiny.aligned("gpt2", "llama"))
    maps = ridge_maps(moments, pairing, 1e-6)
    name = "model.layers.1.self_attn.v_proj"
    sums = moments.outputs[name, 0]
    cov_xx, cov_yx = sums.covariances()
    expected = torch.linalg.solve(cov_xx + 1e-6 * cov_xx.diagonal().mean() * torch.eye(32), cov_yx.T).T
    torch.testing.assert_close(maps[name, 0].from_source, expected.float(), rtol=1e-3, atol=1e-3)


def test_moments_are_sums_over_the_aligned_positions(paired):
    source, model, pairing, _ = paired("llama", "gpt2")
    passages = tiny.aligned("llama", "gpt2", 5)
    moments = collect_moments(source, model, pairing, passages)
    places = [
        (one.target_ids, at_target)
        for one in passages
        for at_source, at_target in zip(one.source_positions, one.target_positions, strict=True)
        if at_source > 0 and at_target > 0
    ]
    pair = next(pair for pair in pairing.mapped if pair.target.roles == ("fc",))
    sums = moments.outputs[pair.target.name, 0]
    assert sums.count == len(places)
    assert moments.inputs[input_site(pair, pair.branches[0])].count == len(places)
    target_rows = torch.zeros(pair.target.d_out)
    captured: dict[str, torch.Tensor] = {}
    handle = model.get_submodule(pair.target.name).register_forward_hook(
        lambda _module, _inputs, output: captured.update(output=output[0])
    )
    for target_ids, at_target in places:
        tiny.logits(model, torch.tensor([target_ids]))
        target_rows += captured["output"][at_target]
    handle.remove()
    torch.testing.assert_close(sums.sum_y.float(), target_rows, rtol=1e-4, atol=1e-4)


def test_moments_of_permuted_positions_keep_the_activations_and_lose_what_joins_them(paired):
    source, target, pairing, _ = paired("llama", "gpt2")
    text = tiny.aligned("llama", "gpt2", 40)
    rightly = collect_moments(source, target, pairing, text)
    mixed = collect_moments(source, target, pairing, text, torch.Generator().manual_seed(0))
    for key, moments in rightly.outputs.items():
        (covariance, cross), (_, mixed_cross) = moments.covariances(), mixed.outputs[key].covariances()
        torch.testing.assert_close(mixed.outputs[key].covariances()[0], covariance, atol=1e-5, rtol=1e-4)
        assert mixed_cross.norm() < 0.8 * cross.norm()


@pytest.mark.parametrize("target", ["mistral", "gpt2-deep"])
def test_maps_do_not_depend_on_the_memory_that_statistics_may_take(paired, target):
    source, model, pairing, factors = paired("gpt2", target)
    text = tiny.aligned("gpt2", target)
    whole = ridge_maps(collect_moments(source, model, pairing, text), pairing, 0.1)
    held: list[weakref.ref] = []

    def solve(moments):
        assert not [one for one in held if one() is not None], "statistics of two parts are in memory at once"
        held.append(weakref.ref(moments))
        maps = ridge_maps(moments, pairing, 0.1)
        assert len({tuple(name.split(".")[2:4]) for name, _ in maps}) == 1
        return maps

    found = solve_in_parts(source, model, pairing, factors, text, solve, memory_bytes=1)
    # Inputs of attention, of its output, and two of the MLP.
    assert len(held) == 4 * model.config.num_hidden_layers
    assert found.keys() == whole.keys()
    for key, maps in whole.items():
        assert torch.equal(found[key].to_source, maps.to_source)
        assert torch.equal(found[key].from_source, maps.from_source)


@pytest.mark.parametrize(("source", "target"), [("llama", "gpt2"), ("gpt2", "mistral"), ("gpt2", "gpt2-deep")])
def test_factors_without_maps_are_those_that_the_maps_fold_to(paired, source, target):
    source_model, model, pairing, factors = paired(source, target)
    text = tiny.aligned(source, target)
    folded = fold_maps(pairing, factors, ridge_maps(collect_moments(source_model, model, pairing, text), pairing, 0.1))

    def solve(moments):
        return ridge_factors(moments, pairing, factors, 0.1)

    found = solve_in_parts(source_model, model, pairing, factors, text, solve, memory_bytes=1)
    assert found.keys() == folded.keys()
    for name, lora in folded.items():
        torch.testing.assert_close(found[name].a, lora.a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].b, lora.b, rtol=1e-4, atol=1e-5)


def test_statistics_have_the_size_that_parts_are_planned_by(paired):
    source, model, pairing, factors = paired("phi3", "llama")
    moments = collect_moments(source, model, pairing, tiny.aligned("phi3", "llama", 5))
    squares = [one for of_kind in (moments.inputs, moments.outputs) for one in of_kind.values()]
    size = sum(matrix.nbytes for one in squares for matrix in (one.xx, one.yx))
    assert statistics_bytes(pairing.mapped, input_widths(factors)) == size
    of_layer = [pair for pair in pairing.mapped if pair.target.layer == 0]
    per_layer = statistics_bytes(of_layer, input_widths(factors))
    parts = list(parts_of(pairing, input_widths(factors), 2 * per_layer))
    assert [sorted({pair.target.layer for pair in part.mapped}) for part in parts] == [[0, 1], [2]]
    smallest = list(parts_of(pairing, input_widths(factors), 1))
    reading_the_same = [sorted(pair.target.name.split(".")[-1] for pair in part.mapped) for part in smallest]
    assert reading_the_same == 3 * [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for cut in (parts, smallest):
        assert sorted(pair.target.name for part in cut for pair in part.mapped) == sorted(
            pair.target.name for pair in pairing.mapped
        )
    assert len(list(parts_of(pairing, input_widths(factors), size))) == 1

import pytest
import tiny
import torch
from torch.nn.utils import parametrize

from castlora.adapters.factors import pad_rank
from castlora.adapters.live import attach_lora, lora_maps, start_from_factors, student_factors
from castlora.maps.cast_layer import balance
from castlora.maps.fitting import collect_moments, ridge_maps
from castlora.maps.starts import BranchMaps, Maps, cast_layer, fold_maps, paper_maps, parametrize_by_maps
from castlora.models.pairing import Pairing

IDS = torch.tensor([[5, 6, 7, 8]])
PAIRS = [("llama", "mistral"), ("llama", "gpt2"), ("gpt2", "mistral"), ("phi3", "llama"), ("gpt2", "gpt2-deep")]
each_pair = pytest.mark.parametrize(("source", "target"), PAIRS)


def random_maps(pairing: Pairing, factors) -> Maps:
    maps = {}
    for pair in pairing.mapped:
        for index, branch in enumerate(pair.branches):
            d_in = factors[branch.source_module].a.shape[1]
            rows = [part.stop - part.start for part in (branch.target_rows, branch.source_rows)]
            maps[pair.target.name, index] = BranchMaps(torch.randn(d_in, pair.target.d_in) / 8, torch.randn(*rows) / 8)
    return maps


@each_pair
def test_the_parametrised_student_is_the_folded_one(paired, source, target):
    _, model, pairing, factors = paired(source, target)
    maps = random_maps(pairing, factors)
    folded = fold_maps(pairing, factors, maps)
    rank = max(factor.rank for factor in folded.values()) + 2
    student = attach_lora(model, folded, rank)
    parametrize_by_maps(student, pairing, factors, maps)
    found = student_factors(student, folded)
    for name, factor in folded.items():
        expected = pad_rank(factor, rank)
        torch.testing.assert_close(found[name].a, expected.a)
        torch.testing.assert_close(found[name].b, expected.b)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(maps)
    assert all("parametrizations" in name for name in trained)


@each_pair
def test_the_student_computes_base_plus_live_cast_layers(paired, source, target):
    _, model, pairing, factors = paired(source, target)
    maps = random_maps(pairing, factors)

    def add_live_update(pair):
        layers = [cast_layer(branch, factors, maps[pair.target.name, i]) for i, branch in enumerate(pair.branches)]

        def hook(_module, inputs, output):
            for branch, layer in zip(pair.branches, layers, strict=True):
                output[..., branch.target_rows] += layer(inputs[0])
            return output

        return model.get_submodule(pair.target.name).register_forward_hook(hook)

    bare = tiny.logits(model, IDS)
    handles = [add_live_update(pair) for pair in pairing.mapped]
    live = tiny.logits(model, IDS)
    for handle in handles:
        handle.remove()

    rank = sum(factors[branch.source_module].rank for branch in pairing.mapped[0].branches) + 8
    student = attach_lora(model, [pair.target.name for pair in pairing.mapped], rank)
    parametrize_by_maps(student, pairing, factors, maps)
    assert (live - bare).abs().max() > 1e-3
    torch.testing.assert_close(tiny.logits(student, IDS), live, rtol=1e-4, atol=1e-4)


@each_pair
def test_a_student_that_starts_from_balanced_factors_computes_what_the_maps_do(paired, source, target):
    _, target_model, pairing, factors = paired(source, target)
    torch.manual_seed(0)
    folded = fold_maps(pairing, factors, random_maps(pairing, factors))
    rank = 4 + max(lora.rank for lora in folded.values())
    student = attach_lora(target_model, folded, rank)
    start_from_factors(student, {name: balance(lora) for name, lora in folded.items()})
    for name, started in student_factors(student, folded).items():
        torch.testing.assert_close(started.b @ started.a, folded[name].b @ folded[name].a, rtol=1e-3, atol=1e-4)
        lora_a, lora_b = lora_maps(student, name)
        assert lora_a.weight.requires_grad and lora_b.weight.requires_grad
        # What the update does not need can still learn.
        assert started.a[folded[name].rank :].abs().min() > 0


def test_modules_do_not_share_the_maps_they_train(paired):
    source, model, pairing, factors = paired("llama", "mistral")
    maps = ridge_maps(collect_moments(source, model, pairing, tiny.aligned("llama", "mistral")), pairing, 0.1)
    q, k = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert torch.equal(maps[q, 0].to_source, maps[k, 0].to_source)
    student = attach_lora(model, [pair.target.name for pair in pairing.mapped], 8)
    parametrize_by_maps(student, pairing, factors, maps)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert len({parameter.data_ptr() for parameter in trained}) == len(trained)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_identity_maps_give_back_the_adapter_to_the_bit(paired, name):
    _, model, pairing, factors = paired(name, name)
    maps = {
        (pair.target.name, 0): BranchMaps(torch.eye(pair.target.d_in), torch.eye(pair.target.d_out))
        for pair in pairing.mapped
    }
    folded = fold_maps(pairing, factors, maps)
    student = attach_lora(model, folded, 4)
    parametrize_by_maps(student, pairing, factors, maps)
    for found in (folded, student_factors(student, folded)):
        assert found.keys() == factors.keys()
        for module, original in factors.items():
            assert torch.equal(found[module].a, original.a) and torch.equal(found[module].b, original.b)


def test_the_paper_starts_at_the_unchanged_target(paired):
    _, model, pairing, factors = paired("llama", "mistral")
    maps = paper_maps(pairing, factors, seed=3)
    bare = tiny.logits(model, IDS)
    student = attach_lora(model, [pair.target.name for pair in pairing.mapped], 8)
    parametrize_by_maps(student, pairing, factors, maps)
    assert torch.equal(tiny.logits(student, IDS), bare)
    again, other = paper_maps(pairing, factors, seed=3), paper_maps(pairing, factors, seed=4)
    for key, one in maps.items():
        assert torch.equal(one.to_source, again[key].to_source)
        assert not torch.equal(one.to_source, other[key].to_source)


def test_a_fresh_lora_leaves_the_target_unchanged_and_has_scale_one(base_model):
    model = tiny.load(base_model("gpt2"))
    bare = tiny.logits(model, IDS)
    student = attach_lora(model, ["transformer.h.1.attn.c_attn"], 8)
    assert torch.equal(tiny.logits(student, IDS), bare)
    assert student.get_submodule("base_model.model.transformer.h.1.attn.c_attn").scaling == {"default": 1.0}
    lora_a, lora_b = lora_maps(student, "transformer.h.1.attn.c_attn")
    assert (lora_a.weight.shape, lora_b.weight.shape) == ((8, 32), (96, 8))
    assert not parametrize.is_parametrized(lora_a)

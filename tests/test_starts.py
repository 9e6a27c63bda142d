import pytest
import tiny
import torch
from torch.nn.utils import parametrize

from castlora.adapter_files import open_adapter
from castlora.adapters import pad_rank, read_factors
from castlora.maps import balance
from castlora.models import linear_slots, load_config
from castlora.pairing import Pairing, pair_modules
from castlora.positions import align_passages
from castlora.starts import (
    BranchMaps,
    Maps,
    attach_lora,
    cast_layer,
    collect_moments,
    fold_maps,
    input_site,
    lora_maps,
    paper_maps,
    parametrize_by_maps,
    ridge_maps,
    start_from_factors,
    student_factors,
)
from castlora.text import Passage
from castlora.tokens import ByteTokenizer

IDS = torch.tensor([[5, 6, 7, 8]])
PAIRS = [("llama", "mistral"), ("llama", "gpt2"), ("gpt2", "mistral"), ("phi3", "llama"), ("gpt2", "gpt2-deep")]
each_pair = pytest.mark.parametrize(("source", "target"), PAIRS)


@pytest.fixture
def paired(base_model, adapter):
    """Both live models, the pairing and the factors of an adapter on all linear modules of the source."""

    def load(source: str, target: str):
        models = [tiny.load(base_model(name)) for name in (source, target)]
        slots = [linear_slots(model, model.config) for model in models]
        factors = read_factors(open_adapter(str(adapter(source))), load_config(str(base_model(source))))
        return *models, pair_modules(*slots, factors), factors

    return load


def aligned(source: str, target: str, count: int = 60):
    tokenizers = [ByteTokenizer.from_tokenizer(tiny.family(name)[1]) for name in (source, target)]
    return list(align_passages(map(Passage, tiny.sentences(count)), *tokenizers, 48, 0.1))


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
    maps = ridge_maps(collect_moments(source, model, pairing, aligned("llama", "mistral")), pairing, 0.1)
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


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ridge_maps_of_a_model_onto_itself_are_the_identity(paired, name):
    source, model, pairing, factors = paired(name, name)
    moments = collect_moments(source, model, pairing, aligned(name, name, 150))
    folded = fold_maps(pairing, factors, ridge_maps(moments, pairing, ridge=1e-9))
    # A module with more outputs than inputs never shows some directions of its output, which no data can tell.
    filled = [pair.target.name for pair in pairing.mapped if pair.target.d_out <= pair.target.d_in]
    assert len(filled) >= len(pairing.mapped) // 2
    for name in filled:
        original = factors[name].b @ factors[name].a
        torch.testing.assert_close(folded[name].b @ folded[name].a, original, rtol=0, atol=2e-3)


def test_ridge_maps_onto_a_deeper_copy_divide_the_update(paired):
    source, model, pairing, _ = paired("gpt2", "gpt2-deep")
    moments = collect_moments(source, model, pairing, aligned("gpt2", "gpt2-deep"))
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
    moments = collect_moments(source, model, pairing, aligned("gpt2", "llama"))
    maps = ridge_maps(moments, pairing, 1e-6)
    name = "model.layers.1.self_attn.v_proj"
    sums = moments.outputs[name, 0]
    cov_xx, cov_yx = sums.covariances()
    expected = torch.linalg.solve(cov_xx + 1e-6 * cov_xx.diagonal().mean() * torch.eye(32), cov_yx.T).T
    torch.testing.assert_close(maps[name, 0].from_source, expected.float(), rtol=1e-3, atol=1e-3)


def test_moments_are_sums_over_the_aligned_positions(paired):
    source, model, pairing, _ = paired("llama", "gpt2")
    passages = aligned("llama", "gpt2", 5)
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
    text = aligned("llama", "gpt2", 40)
    rightly = collect_moments(source, target, pairing, text)
    mixed = collect_moments(source, target, pairing, text, torch.Generator().manual_seed(0))
    for key, moments in rightly.outputs.items():
        (covariance, cross), (_, mixed_cross) = moments.covariances(), mixed.outputs[key].covariances()
        torch.testing.assert_close(mixed.outputs[key].covariances()[0], covariance, atol=1e-5, rtol=1e-4)
        assert mixed_cross.norm() < 0.8 * cross.norm()


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

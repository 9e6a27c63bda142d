import pytest
import tiny
import torch

from castlora.adapters.factors import LowRank
from castlora.adapters.live import attach_lora, start_from_factors, student_factors
from castlora.alignment.positions import align_passages
from castlora.alignment.tokens import ByteTokenizer
from castlora.baselines.carry import BranchWeights, carry_weights, linear_weight
from castlora.baselines.cross_lora import cross_lora, singular_subspaces
from castlora.baselines.direct_copy import direct_copy
from castlora.baselines.logit_delta import evaluate_logit_delta
from castlora.baselines.lora_x import attach_constrained, lora_x, subspace_similarity
from castlora.baselines.theseus import procrustes, theseus
from castlora.errors import UserError
from castlora.evaluation.accuracy import evaluate_model
from castlora.evaluation.tasks import TaskItem
from castlora.maps.fitting import collect_moments
from castlora.maps.statistics import Moments
from castlora.models.modules import linear_slots
from castlora.plan import plan_transfer
from castlora.text.passages import Passage


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def rotation(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q


def branch(d_out: int, d_in: int, generator: torch.Generator, target: torch.Tensor | None = None) -> BranchWeights:
    source = torch.randn(d_out, d_in, generator=generator)
    update = LowRank(torch.randn(3, d_in, generator=generator), torch.randn(d_out, 3, generator=generator))
    return BranchWeights(update, source, source if target is None else target)


def delta(lora: LowRank | None) -> torch.Tensor:
    assert lora is not None
    return lora.b @ lora.a


def test_a_copy_needs_equal_shapes(generator):
    assert direct_copy(branch(6, 5, generator)) is not None
    assert direct_copy(branch(6, 5, generator, torch.randn(6, 7))) is None


@pytest.mark.parametrize("form", ["projected", "aligned"])
def test_cross_lora_between_identical_square_weights_is_the_update_itself(generator, form):
    site = branch(12, 12, generator)
    torch.testing.assert_close(delta(cross_lora(site, form)), delta(site.update), atol=1e-4, rtol=1e-4)


def test_algorithm_1_of_cross_lora_is_its_equation_7(generator):
    site = branch(12, 9, generator, torch.randn(12, 9, generator=generator))
    u, v = singular_subspaces(site.target, 5)
    equation_7 = u @ (u.T @ delta(site.update) @ v) @ v.T
    torch.testing.assert_close(delta(cross_lora(site, "projected", 5)), equation_7, atol=1e-4, rtol=1e-4)


def test_the_projected_form_needs_equal_shapes(generator):
    assert cross_lora(branch(8, 8, generator, torch.randn(10, 8)), "projected") is None


def test_the_aligned_form_follows_a_rotation_up_to_the_signs_of_singular_vectors(generator):
    left, right = rotation(10, generator), rotation(10, generator)
    site = branch(10, 10, generator)
    rotated = BranchWeights(site.update, site.source, left @ site.source @ right.T)
    u, v = singular_subspaces(site.source, 10)
    u_target, v_target = singular_subspaces(rotated.target, 10)
    # One sign per pair of singular vectors is free; given those, recovery is exact.
    signs = (u_target.T @ left @ u).diagonal().round()
    assert set(signs.abs().tolist()) == {1.0}
    coefficients = signs[:, None] * (u_target.T @ left @ delta(site.update) @ right.T @ v_target) * signs
    torch.testing.assert_close(coefficients, u.T @ delta(site.update) @ v, atol=1e-4, rtol=1e-4)
    carried = u_target.T @ delta(cross_lora(rotated, "aligned")) @ v_target
    torch.testing.assert_close(carried, coefficients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(14, 9), (7, 16)])
def test_the_aligned_form_fits_any_shape_and_keeps_the_rank(generator, shape):
    carried = cross_lora(branch(10, 10, generator, torch.randn(*shape, generator=generator)), "aligned")
    assert carried is not None and carried.rank == 3
    assert delta(carried).shape == shape


def test_lora_x_between_identical_weights_carries_what_lies_in_the_subspace(generator):
    site = branch(12, 12, generator)
    u, v = singular_subspaces(site.source, 5)
    torch.testing.assert_close(delta(lora_x(site, 12)), delta(site.update), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(delta(lora_x(site, 5)), u @ u.T @ delta(site.update) @ v @ v.T, atol=1e-4, rtol=1e-4)


def test_the_gate_of_lora_x_shuts_between_unlike_subspaces(generator):
    site = branch(40, 40, generator, torch.randn(40, 40, generator=generator))
    assert lora_x(site, subspace_rank=4) is None
    assert lora_x(site, subspace_rank=4, threshold=0.0) is not None


def test_subspace_similarity_runs_from_orthogonal_to_equal():
    basis = torch.eye(6)
    assert subspace_similarity(basis[:, :3], basis[:, :3]) == 1.0
    assert subspace_similarity(basis[:, :3], basis[:, 3:]) == 0.0
    assert subspace_similarity(basis[:, :2], basis[:, 1:3]) == 0.5


def test_the_constrained_adapter_stays_in_the_subspace_and_is_carried_whole_to_the_same_model(base_model):
    source, target = tiny.load(base_model("llama")), tiny.load(base_model("llama"))
    slots = linear_slots(source, source.config)
    slots = {name: slot for name, slot in slots.items() if name.endswith(("q_proj", "down_proj"))}
    ids = torch.tensor([[5, 6, 7, 8]])
    model = attach_constrained(source, slots, subspace_rank=6)
    torch.testing.assert_close(tiny.logits(model, ids), tiny.logits(target, ids))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {tuple(parameter.shape) for parameter in trained} == {(6, 6)} and len(trained) == len(slots)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()
    factors = student_factors(model, slots)
    for name, slot in slots.items():
        weight = linear_weight(target, slot)
        u, v = singular_subspaces(weight, 6)
        update = delta(factors[name])
        assert update.abs().max() > 1e-4
        torch.testing.assert_close(u @ u.T @ update @ v @ v.T, update, atol=1e-5, rtol=1e-3)
        carried = lora_x(BranchWeights(factors[name], weight, weight), subspace_rank=6)
        torch.testing.assert_close(delta(carried), update, atol=1e-5, rtol=1e-3)


def test_procrustes_finds_a_rotation(generator):
    turn = rotation(8, generator)
    x = torch.randn(500, 8, generator=generator) * torch.linspace(0.3, 2, 8)
    covariance = Moments.zeros(8, 8)
    covariance.update(x, x @ turn.T)
    torch.testing.assert_close(procrustes(covariance.covariances()[1]).float(), turn, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_procrustes_between_unlike_widths_is_semi_orthogonal(generator, shape):
    turned = procrustes(torch.randn(shape, generator=generator, dtype=torch.float64))
    gram = turned @ turned.T if shape[0] < shape[1] else turned.T @ turned
    torch.testing.assert_close(gram, torch.eye(5, dtype=torch.float64))


@pytest.fixture
def same_model_twice(base_model, adapter):
    """A plan from a model to itself, both live models, and an adapter on square modules."""
    folder = str(base_model("llama"))
    plan = plan_transfer(str(adapter("llama", ("q_proj", "o_proj"))), folder, folder)
    return plan, tiny.load(base_model("llama")), tiny.load(base_model("llama"))


def adapted_logits(model, plan, factors, ids):
    student = attach_lora(model, plan.target_modules, 4)
    start_from_factors(student, factors)
    return tiny.logits(student.eval(), ids)


def test_a_copy_to_the_same_model_is_the_adapted_model(same_model_twice, base_model, adapter):
    plan, source, target = same_model_twice
    carried = carry_weights(plan.pairing, plan.factors, plan.source_slots, source, target, direct_copy)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = tiny.logits(tiny.load_adapted(base_model("llama"), adapter("llama", ("q_proj", "o_proj"))), ids)
    torch.testing.assert_close(adapted_logits(target, plan, carried, ids), expected, atol=1e-4, rtol=1e-4)


def test_theseus_to_the_same_model_is_the_adapted_model(same_model_twice):
    plan, source, target = same_model_twice
    tokenizer = ByteTokenizer.from_tokenizer(tiny.family("llama")[1])
    passages = [Passage(sentence) for sentence in tiny.sentences(60)]
    text = list(align_passages(passages, tokenizer, tokenizer, 48, 1.0))
    carried = theseus(plan.pairing, plan.factors, collect_moments(source, target, plan.pairing, text))
    for name, update in carried.items():
        torch.testing.assert_close(delta(update), delta(plan.factors[name]), atol=1e-4, rtol=1e-3)


def test_a_method_that_carries_nothing_leaves_modules_out(same_model_twice):
    plan, source, target = same_model_twice
    assert carry_weights(plan.pairing, plan.factors, plan.source_slots, source, target, lambda _: None) == {}


@pytest.mark.parametrize(("source", "target"), [("gpt2", "llama"), ("llama", "gpt2"), ("phi3", "mistral")])
def test_fused_and_transposed_modules_are_carried_by_their_rows(base_model, adapter, source, target):
    plan = plan_transfer(str(adapter(source)), str(base_model(target)), str(base_model(source)))
    models = [tiny.load(base_model(name)) for name in (source, target)]
    seen = []
    carried = carry_weights(
        plan.pairing, plan.factors, plan.source_slots, *models,
        lambda site: seen.append(site) or cross_lora(site, "aligned"),
    )  # fmt: skip
    assert carried.keys() == set(plan.target_modules)
    for name, update in carried.items():
        slot = plan.target_slots[name]
        assert (update.a.shape[1], update.b.shape[0]) == (slot.d_in, slot.d_out)
    for site, (pair, _, branch) in zip(seen, plan.pairing.branches(), strict=True):
        stored = linear_weight(models[1], pair.target)
        torch.testing.assert_close(site.target, stored[branch.target_rows])
        assert site.source.shape == (site.update.b.shape[0], site.update.a.shape[1])


ITEMS = [
    TaskItem(f"Who? {sentence} Answer:", choice, (" fox", " hen", " river"))
    for sentence, choice in zip(tiny.sentences(6), [" fox", " hen", " river"] * 2, strict=True)
]


def test_the_oracle_on_one_model_is_the_adapted_model(base_model, adapter):
    bare, adapted = tiny.load(base_model("llama")), tiny.load_adapted(base_model("llama"), adapter("llama"))
    tokenizer = tiny.tokenizer_of(base_model("llama"))
    oracle = evaluate_logit_delta(bare, tokenizer, adapted, tokenizer, ITEMS)
    alone = evaluate_model(adapted, tokenizer, ITEMS)
    assert oracle.predictions == alone.predictions
    assert (oracle.nlls <= alone.nlls + 1e-3).all()
    without = evaluate_logit_delta(bare, tokenizer, adapted, tokenizer, ITEMS, strength=0.0)
    assert without.predictions == evaluate_model(bare, tokenizer, ITEMS).predictions


def test_the_oracle_needs_choices(base_model, adapter):
    bare, adapted = tiny.load(base_model("llama")), tiny.load_adapted(base_model("llama"), adapter("llama"))
    tokenizer = tiny.tokenizer_of(base_model("llama"))
    with pytest.raises(UserError, match="choices"):
        evaluate_logit_delta(bare, tokenizer, adapted, tokenizer, [TaskItem("Who?", " fox", None)])

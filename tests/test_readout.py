"""The last layer, solved for what a teacher predicts."""

import copy

import pytest
import tiny
import torch

from castlora.adapters.factors import LowRank
from castlora.adapters.live import attach_lora, start_from_factors
from castlora.alignment.tokens import ByteTokenizer
from castlora.alignment.vocabulary import SharedVocabulary
from castlora.distillation.objective import kl_divergence
from castlora.distillation.teacher import LiveTeacher
from castlora.maps import last_layer, readout
from castlora.maps.last_layer import collect_places, find_last_layer
from castlora.maps.readout import Places, Tail, solve_readout, taught_log_probabilities
from castlora.models.modules import linear_slots

REST, FOX, RUN, HEN = range(4)


def test_a_model_whose_last_map_is_scaled_on_its_way_is_left_alone(base_model):
    model = tiny.load(base_model("llama"))
    slots = linear_slots(model, model.config)
    last = model.get_submodule(f"model.layers.{model.config.num_hidden_layers - 1}.mlp")
    last.register_forward_hook(lambda _module, _inputs, output: output / 2)
    assert find_last_layer(model, slots) is None


def test_a_model_whose_logits_are_squashed_is_left_alone(base_model):
    model = tiny.load(base_model("llama"))
    model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, output: 2 * (output / 2).tanh())
    assert find_last_layer(model, linear_slots(model, model.config)) is None


@pytest.fixture
def tail() -> Tail:
    random = torch.Generator().manual_seed(0)
    norm = torch.nn.RMSNorm(12)
    norm.weight.data = 1 + 0.3 * torch.randn(12, generator=random)
    return Tail(norm, torch.randn(30, 12, generator=random), is_centred=False)


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm(12), torch.nn.LayerNorm(12)], ids=["rms", "layer"])
def test_the_gain_of_a_norm_shows_in_what_it_does(norm):
    random = torch.Generator().manual_seed(0)
    norm.weight.data = 1 + 0.3 * torch.randn(12, generator=random)
    seen = Tail(norm, torch.eye(12), isinstance(norm, torch.nn.LayerNorm)).gain(torch.randn(50, 12, generator=random))
    torch.testing.assert_close(seen, norm.weight, rtol=1e-4, atol=1e-4)


@pytest.fixture
def taught_places(tail) -> Places:
    """What a teacher says whose last layer has an update of rank 2."""
    random = torch.Generator().manual_seed(1)
    features, hidden = torch.randn(600, 20, generator=random), torch.randn(600, 12, generator=random)
    update = 0.3 * torch.randn(12, 2, generator=random) @ torch.randn(2, 20, generator=random)
    taught = (tail.norm(hidden + features @ update.T) @ tail.head.T).log_softmax(-1)
    none, everywhere = torch.full((600,), -1), torch.ones(600, dtype=torch.bool)
    return Places(features, hidden, taught, none, torch.zeros(600), everywhere, torch.ones(600))


@torch.no_grad()
def test_an_update_of_the_last_layer_is_found_again(tail, taught_places):
    places, features, hidden, taught = taught_places, *list(vars(taught_places).values())[:3]
    bare = (tail.norm(hidden) @ tail.head.T).log_softmax(-1)
    left = []
    for solved in solve_readout(places, tail, torch.arange(30), rank=2):
        assert solved.a.shape == (2, 20) and solved.b.shape == (12, 2)
        learned = (tail.norm(hidden + features @ solved.a.T @ solved.b.T) @ tail.head.T).log_softmax(-1)
        left.append(kl_divergence(taught, learned).mean() / kl_divergence(taught, bare).mean())
    assert left[0] > left[-1] and left[-1] < 0.01


@torch.no_grad()
def test_the_solution_does_not_depend_on_how_much_is_computed_at_once(tail, taught_places, monkeypatch):
    def solve() -> list[LowRank]:
        return list(solve_readout(taught_places, tail, torch.arange(30), rank=2))[:3]

    at_once = solve()
    monkeypatch.setattr(readout, "_PLACES_AT_ONCE", 7)
    monkeypatch.setattr(readout, "_TOKENS_AT_ONCE", 4)
    for whole, parts in zip(at_once, solve(), strict=True):
        torch.testing.assert_close(parts.b @ parts.a, whole.b @ whole.a, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_place_that_weighs_twice_as_much_counts_as_two(tail, taught_places):
    some, others = taught_places.at(slice(200)), taught_places.at(slice(200, 600))
    weighed = Places.together([some.weighing(2 * 200), others.weighing(400)])
    twice = Places.together([some, some, others])
    for one, other in zip(
        *(solve_readout(places, tail, torch.arange(30), 2) for places in (weighed, twice)), strict=True
    ):
        torch.testing.assert_close(one.b @ one.a, other.b @ other.a, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_last_update_lies_where_the_divergence_hardly_changes(tail, taught_places):
    """Derivatives of the divergence, which castlora writes down and autograd finds here, become small."""
    classes = torch.arange(30) // 2
    sums = torch.zeros(600, 15).index_add(1, classes, taught_places.taught.exp()).log()
    follows = torch.where(torch.arange(600) % 3 > 0, torch.arange(600) % 30, -1)
    said = (sums.gather(1, classes[follows.clamp_min(0)].unsqueeze(1)).squeeze(1) - 0.3) * (follows >= 0)
    is_aligned = torch.arange(600) % 5 > 0
    places = Places(
        taught_places.features, taught_places.hidden, sums, follows, said, is_aligned, torch.ones(600)
    ).that_teach()

    def steepness(update: LowRank) -> float:
        a, b = update.a.clone().requires_grad_(), update.b.clone().requires_grad_()
        with torch.enable_grad():
            hidden = places.hidden + places.features @ a.T @ b.T
            learned = (tail.norm(hidden) @ tail.head.T).log_softmax(-1)
            taught = taught_log_probabilities(learned.detach(), places, classes)
            kl_divergence(taught, learned).mean().backward()
        return float(a.grad.norm() + b.grad.norm())

    first, *_, last = map(steepness, solve_readout(places, tail, classes, rank=2))
    assert last < 0.05 * first


@torch.no_grad()
def test_a_head_of_16_bits_serves_as_well(tail, taught_places):
    in_16_bits = Tail(tail.norm, tail.head.bfloat16(), tail.is_centred)
    *_, expected = solve_readout(taught_places, tail, torch.arange(30), rank=2)
    *_, found = solve_readout(taught_places, in_16_bits, torch.arange(30), rank=2)
    difference = found.b @ found.a - expected.b @ expected.a
    assert difference.norm() < 0.05 * (expected.b @ expected.a).norm()


def test_each_class_gets_what_the_teacher_gives_it_and_the_answer_says_the_rest():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.5]]).expand(4, -1).contiguous()
    classes = torch.tensor([REST, FOX, FOX, HEN, RUN])
    taught = torch.tensor([0.1, 0.6, 0.1, 0.2]).log().expand(4, -1)
    next_tokens, next_taught = torch.tensor([-1, 2, 2, 4]), torch.tensor([1.0, 1.0, 0.45, 1.0]).log()
    is_aligned = torch.tensor([True, True, True, False])
    places = Places(torch.zeros(4, 1), torch.zeros(4, 1), taught, next_tokens, next_taught, is_aligned, torch.ones(4))
    free, spelled, likely, between = taught_log_probabilities(logits.log_softmax(-1), places, classes).exp()
    share = torch.tensor([1.0, 2.0]).softmax(-1)
    torch.testing.assert_close(free, torch.tensor([0.1, 0.6 * share[0], 0.6 * share[1], 0.2, 0.1]))
    torch.testing.assert_close(spelled, torch.tensor([0.1, 0.0, 0.6, 0.2, 0.1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(likely, torch.tensor([0.1, 0.15, 0.45, 0.2, 0.1]))
    assert between[4] == pytest.approx(0.99, abs=1e-3) and between.sum() == pytest.approx(1)


@torch.no_grad()
def test_a_student_predicts_like_a_teacher_that_differs_in_its_last_layer(base_model, monkeypatch):
    bare = tiny.load(base_model("mistral"))
    site = find_last_layer(bare, linear_slots(bare, bare.config))
    random = torch.Generator().manual_seed(2)
    module = bare.get_submodule(site.module)
    planted = LowRank(
        torch.randn(2, module.in_features, generator=random), torch.randn(module.out_features, 2, generator=random)
    )
    teacher = attach_lora(copy.deepcopy(bare), [site.module], 2)
    start_from_factors(teacher, {site.module: planted})
    student = attach_lora(bare, [site.module], 2)
    spelled = ByteTokenizer.from_tokenizer(tiny.tokenizer_of(base_model("mistral")))
    shared = SharedVocabulary.of(spelled, spelled, bare.config.vocab_size, bare.config.vocab_size)
    passages = tiny.aligned("mistral", "mistral", 60)
    live = LiveTeacher(teacher, with_hidden=False)
    read = passages[:50], shared.source_classes, shared.classes
    places = collect_places(student, live, site, *read)
    monkeypatch.setattr(last_layer, "_MOST_BYTES", 1)
    assert len(collect_places(student, live, site, *read).hidden) < len(places.hidden) / 2
    *_, solved = solve_readout(places, site.tail, shared.target_classes, rank=2)
    ids = torch.tensor(passages[-1].target_ids[:20]).unsqueeze(0)
    expected, before = tiny.logits(teacher, ids).log_softmax(-1), tiny.logits(student, ids).log_softmax(-1)
    start_from_factors(student, {site.module: solved})
    after = tiny.logits(student, ids).log_softmax(-1)
    assert kl_divergence(expected, after).mean() < 0.05 * kl_divergence(expected, before).mean()

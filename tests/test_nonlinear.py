import pytest
import tiny
import torch

from castlora.adapters.live import attach_lora, start_from_factors
from castlora.baselines.nonlinear import NonlinearA, ResidualMap, attach_networks
from castlora.config import DEFAULT
from castlora.distillation.distill import Student
from castlora.distillation.training import _parameter_groups, peak_learning_rate
from castlora.maps.starts import fold_maps, paper_maps
from castlora.plan import plan_transfer

PAIRS = [("llama", "mistral"), ("gpt2", "llama"), ("llama", "gpt2"), ("phi3", "gpt2-deep")]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def with_networks(base_model, adapter):
    """A target with nonlinear maps around the source's LoRA, and the same with the fold of the linear maps alone."""

    def make(source: str, target: str):
        plan = plan_transfer(str(adapter(source)), str(base_model(target)), str(base_model(source)))
        maps = paper_maps(plan.pairing, plan.factors, seed=0)
        maps = {key: type(one)(one.to_source, torch.randn_like(one.from_source)) for key, one in maps.items()}
        torch.manual_seed(0)
        student = attach_lora(tiny.load(base_model(target)), plan.target_modules, 4)
        attach_networks(student, plan.pairing, plan.factors, maps, width=6)
        folded = attach_lora(tiny.load(base_model(target)), plan.target_modules, plan.exact_rank)
        start_from_factors(folded, fold_maps(plan.pairing, plan.factors, maps))
        return student.eval(), folded.eval()

    return make


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_silent_networks_compute_what_the_fold_of_the_linear_maps_does(with_networks, source, target):
    student, folded = with_networks(source, target)
    expected = tiny.logits(folded, IDS)
    torch.testing.assert_close(tiny.logits(student, IDS), expected, atol=1e-4, rtol=1e-4)
    with student.disable_adapter():
        assert (tiny.logits(student, IDS) - expected).abs().max() > 1e-3


def test_training_reaches_the_maps_and_their_networks_but_not_the_source_factors(with_networks):
    student, _ = with_networks("llama", "gpt2")
    before = {name: value.clone() for name, value in student.state_dict(keep_vars=True).items()}
    trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
    assert all(".maps." in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # a silent network passes a gradient to its inner layer from the second step on
        student(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(before[name], value) for name, value in trained.items())


def test_maps_of_both_kinds_learn_at_the_rate_of_maps(with_networks):
    student, _ = with_networks("llama", "mistral")
    groups = _parameter_groups(Student(student, 48, 32, with_head=False), DEFAULT)
    assert [group["lr"] for group in groups] == [peak_learning_rate(DEFAULT, 48) * DEFAULT.map_learning_rate_ratio]


def test_a_network_bends_what_a_linear_map_keeps_straight():
    torch.manual_seed(1)
    one_map = ResidualMap(torch.randn(3, 5), width=8)
    x, y = torch.randn(2, 5)
    torch.testing.assert_close(one_map(x + y), one_map(x) + one_map(y))
    torch.nn.init.normal_(one_map.narrow.weight)
    assert (one_map(x + y) - one_map(x) - one_map(y)).abs().max() > 1e-2


def test_branches_of_unlike_rank_lie_side_by_side():
    lora_as, maps = [torch.randn(2, 4), torch.randn(3, 5)], [torch.randn(4, 7), torch.randn(5, 7)]
    x = torch.randn(6, 7)
    expected = torch.cat([x @ one_map.T @ a.T for a, one_map in zip(lora_as, maps, strict=True)], dim=1)
    torch.testing.assert_close(NonlinearA(lora_as, maps, width=4)(x), expected)

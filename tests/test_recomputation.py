import copy

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from castlora.adapters.live import attach_lora
from castlora.execution.recomputation import recompute_activations
from castlora.maps.fitting import collect_moments, ridge_maps
from castlora.maps.starts import parametrize_by_maps
from castlora.models.completions import generate
from castlora.models.loading import skeleton
from castlora.models.modules import layer_path, linear_slots
from castlora.plan import plan_transfer

IDS = torch.arange(5, 45).reshape(2, 20)
FAMILIES = ("llama", "phi3", "gpt2")


def recompute(model) -> None:
    """Of a model that is bare or has LoRA layers."""
    slots = linear_slots(skeleton(model.config), model.config)
    recompute_activations(model, [layer_path(slots, layer) for layer in range(model.config.num_hidden_layers)])


def gradients(model) -> tuple[dict[str, Tensor], int]:
    """Gradients of what is trained, and the numbers that are kept for the way back."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), parametrize.cached():
        loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found, sum(kept.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_stay_and_most_activations_do_not(base_model, name):
    torch.manual_seed(0)
    base = tiny.load(base_model(name)).eval()
    again = copy.deepcopy(base)
    students = []
    for model in (base, again):
        torch.manual_seed(0)
        modules = {slot.name for slot in linear_slots(model, model.config).values()}
        students.append(attach_lora(model, modules, 4).eval())
    recompute(again)
    (expected, all_kept), (found, kept) = map(gradients, students)
    assert found.keys() == expected.keys() and len(found) > 10
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert kept < 0.5 * all_kept


def test_weights_that_are_folded_from_maps_are_folded_again(base_model, adapter):
    plan = plan_transfer(str(adapter("llama")), str(base_model("gpt2")), str(base_model("llama")))
    source, text = tiny.load(base_model("llama")), tiny.aligned("llama", "gpt2")
    found = []
    for is_wrapped in (False, True):
        torch.manual_seed(0)
        target = tiny.load(base_model("gpt2")).eval()
        maps = ridge_maps(collect_moments(source, target, plan.pairing, text), plan.pairing, 0.1)
        student = attach_lora(target, plan.target_modules, plan.exact_rank).eval()
        parametrize_by_maps(student, plan.pairing, plan.factors, maps)
        if is_wrapped:
            recompute(target)
        found.append(gradients(student)[0])
    assert any("parametrizations" in name for name in found[0])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_text_is_written_as_before(base_model):
    model, tokenizer = tiny.load(base_model("gpt2")), tiny.tokenizer_of(base_model("gpt2"))
    prompts = list(tiny.sentences(3))
    before = generate(model, tokenizer, prompts, 6, 3)
    recompute(model)
    assert generate(model, tokenizer, prompts, 6, 3) == before

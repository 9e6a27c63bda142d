"""What differs on a CUDA device: models in 16 bits, weights that move, and memory to keep within.

CASTLORA_TEST_ACCELERATOR=0 pytest -m accelerator
"""

import pytest
import tiny
import torch

from castlora.bench.trained import Nonlinear, Reading
from castlora.config import PAPER
from castlora.execution.offloading import Offloading
from castlora.maps import fitting
from castlora.maps.fitting import ridge_maps, solve_in_parts
from castlora.model_pair import load_models
from castlora.plan import plan_transfer
from castlora.publishing.manifest import peak_accelerator_bytes

pytestmark = pytest.mark.accelerator
WAYS = {
    "both models": {},
    "one at a time": {"low_memory": True},
    "4 bits": {"source_bits": 4, "target_bits": 4},
    "one at a time in 4 bits": {"low_memory": True, "source_bits": 4, "target_bits": 4},
}


@pytest.mark.parametrize(
    "options", [{}, {"recipe": "paper"}, {"start": "readout"}], ids=["default", "paper", "readout"]
)
@pytest.mark.parametrize("way", WAYS)
def test_a_transfer_comes_to_its_end(quick_transfer, prompts_file, way, options):
    if "source_bits" in WAYS[way]:
        pytest.importorskip("bitsandbytes")
    result = quick_transfer("llama", "gpt2", prompts=str(prompts_file), steps=30, **options, **WAYS[way])
    losses = result.manifest["losses"]
    assert losses["kl_after"] < losses["kl_before"]
    assert result.manifest["logit_difference"] < 0.2
    assert result.manifest["peak_accelerator_bytes"] > 0


def test_one_at_a_time_changes_nothing_but_roundings(quick_transfer, prompts_file):
    options = {"prompts": str(prompts_file), "steps": 30}
    together, in_turns = (
        quick_transfer("llama", "mistral", f"out {one}", low_memory=one, **options).manifest["losses"]
        for one in (False, True)
    )
    assert in_turns == pytest.approx(together, rel=0.05, abs=0.02)


def test_the_model_on_the_accelerator_reads_first(paired):
    source, target, pairing, factors = paired("llama", "gpt2")
    text = tiny.aligned("llama", "gpt2")
    expected = solve_in_parts(source, target, pairing, factors, text, lambda some: ridge_maps(some, pairing, 0.1))
    models, offloading, used = {"source": source, "target": target}, Offloading(), []

    def use(side: str) -> None:
        for name in sorted(models, key=lambda name: name == side):
            offloading.move(models[name], torch.device("cuda" if name == side else "cpu"))
        used.append(side)

    options = {"memory_bytes": 1, "use": use}
    found = solve_in_parts(
        source, target, pairing, factors, text, lambda some: ridge_maps(some, pairing, 0.1), **options
    )
    parts = len(list(fitting.parts_of(pairing, fitting.input_widths(factors), 1)))
    assert sum(side != before for before, side in zip(["", *used], used, strict=False)) == parts + 1
    for key, maps in expected.items():
        torch.testing.assert_close(found[key].to_source, maps.to_source, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[key].from_source, maps.from_source, rtol=1e-3, atol=1e-4)


def test_nonlinear_maps_are_where_the_models_are(base_model, adapter):
    plan = plan_transfer(str(adapter("llama")), str(base_model("gpt2")), str(base_model("llama")))
    student = Nonlinear("paper", "paper").start_student(Reading(plan, load_models(plan), [], [], []), PAPER, seed=0)
    assert {parameter.device.type for parameter in student.parameters()} == {"cuda"}


def test_frozen_weights_come_back_from_the_machines_memory_and_others_from_the_accelerator(base_model):
    model, expected = (tiny.load(base_model("llama")).to("cpu") for _ in range(2))
    trained = model.get_submodule("model.layers.0.mlp.down_proj").weight
    model.requires_grad_(False)
    trained.requires_grad_(True)
    places = {name: weight.data_ptr() for name, weight in model.named_parameters() if weight is not trained}
    offloading, accelerator, processor = Offloading(), torch.device("cuda", 0), torch.device("cpu")
    for value in (7.0, 8.0):
        offloading.move(model, accelerator)
        assert {weight.device for weight in model.parameters()} == {accelerator}
        trained.data.fill_(value)
        offloading.move(model, processor)
        for (name, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            if weight is trained:
                assert torch.equal(weight, torch.full_like(other, value))
            else:
                assert torch.equal(weight, other), name
                assert weight.data_ptr() == places[name], name


def test_peak_memory_is_known():
    on_accelerator = torch.zeros(1 << 20, device="cuda")
    assert on_accelerator.nbytes <= peak_accelerator_bytes() <= torch.cuda.get_device_properties(0).total_memory

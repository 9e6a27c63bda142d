"""What `python -m benchmarks.levers` changes in the default, and what it renders."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from benchmarks import lever_starts, levers
from castlora.adapters.factors import LowRank
from castlora.adapters.live import student_factors
from castlora.alignment.positions import batches, counted_places
from castlora.bench.reading import Reading
from castlora.bench.results import PooledCell
from castlora.bench.spec import BenchmarkModel, BenchmarkSpec
from castlora.config import DEFAULT
from castlora.distillation.teacher import predict
from castlora.errors import UserError
from castlora.lift import lift_with_interval
from castlora.model_pair import load_models
from castlora.models.capture import change_output
from castlora.plan import plan_transfer

EXACT = replace(DEFAULT, ridge=1e-9)


@pytest.fixture
def reading(base_model, tmp_path):
    """What a transfer between two tiny models reads.

    Outputs of the adapted modules vary in as many directions as an update can have, so that nothing of it is lost.
    """

    def read(source: str, target: str) -> Reading:
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
        tiny.save_adapter(tmp_path / "adapter", base_model(source), modules, lora_alpha=1)
        plan = plan_transfer(str(tmp_path / "adapter"), str(base_model(target)), str(base_model(source)))
        passages = tiny.aligned(source, target, 72)
        return Reading(plan, load_models(plan), passages[8:], passages[:8], [])

    return read


def updates(student, modules) -> dict[str, torch.Tensor]:
    return {name: lora.b @ lora.a for name, lora in student_factors(student.model, modules).items()}


@pytest.mark.parametrize(
    "begin",
    [
        lever_starts.unbalanced,
        pytest.param(lever_starts.whitened(), id="whitened"),
        pytest.param(lever_starts.whitened(directions=8), id="whitened along 8 directions"),
        lever_starts.b_apart,
        lever_starts.earlier_modules_adapted,
        lever_starts.outputs_by_gradients,
        lever_starts.layers_most_alike,
        pytest.param(lever_starts.of_rank(8), id="rank 8"),
    ],
)
def test_between_identical_models_a_start_is_the_adapter_itself(reading, begin):
    read = reading("llama", "llama")
    found = updates(begin(read, EXACT, 0), read.plan.target_modules)
    assert found.keys() == read.plan.factors.keys()
    for name, lora in read.plan.factors.items():
        expected = lora.b @ lora.a
        # Where each module is solved behind the one before, errors of single precision add up.
        assert (found[name] - expected).norm() < 0.1 * expected.norm(), name


def test_a_start_of_one_side_leaves_the_target_as_it_is(reading):
    read = reading("llama", "mistral")
    solved = lever_starts.balanced(lever_starts.closed_form(read, DEFAULT))
    for side, other in (("a", "b"), ("b", "a")):
        student = lever_starts.one_side(side)(read, DEFAULT, 0)
        for name, lora in student_factors(student.model, read.plan.target_modules).items():
            rank = solved[name].rank
            found = LowRank(lora.a[:rank], lora.b[:, :rank])
            assert torch.equal(getattr(found, side), getattr(solved[name], side)), name
            assert not getattr(found, other).any() and not (lora.b @ lora.a).any(), name
        student.model.unload()


def test_whitened_inputs_vary_alike_and_leave_a_as_it_is():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=random, dtype=torch.float64) @ torch.randn(6, 6, generator=random).double()
    whitening = lever_starts.Whitening(x.T @ x / len(x), ridge=0.0)
    white = x.float() @ whitening.get_buffer("inverse_root").T
    moments = white.T @ white / len(x)
    torch.testing.assert_close(moments, moments.diagonal().mean() * torch.eye(6), atol=1e-4, rtol=1e-4)
    c = (x.T @ x / len(x)).float()
    c /= c.diagonal().mean()
    of_two = lever_starts.Whitening(c.double(), ridge=0.0, directions=2).get_buffer("inverse_root")
    vectors = torch.linalg.eigh(c).eigenvectors
    along = (vectors.T @ of_two @ c @ of_two @ vectors).diagonal()
    torch.testing.assert_close(along[-2:], torch.ones(2), atol=1e-3, rtol=1e-3)
    assert along[:-2].mean() == pytest.approx(1.0, rel=1e-3) and along[:-2].max() > 1.1 * along[:-2].min()
    a = torch.randn(3, 6, generator=random)
    torch.testing.assert_close(whitening(whitening.right_inverse(a)), a, atol=1e-4, rtol=1e-4)


def test_gradients_say_what_a_change_of_a_module_does_to_the_text(reading):
    read = reading("llama", "gpt2")
    model, name = read.models.target, "transformer.h.1.mlp.c_proj"
    (batch,) = batches(read.training[:8], 8, torch.device("cpu"))
    counts = batch["weights"] > 0
    (rows,) = lever_starts.output_gradients(model, [name], batch, "target").values()
    here, length = counted_places(batch["target_positions"], counts), batch["target_ids"].shape[1]
    direction = torch.randn(len(batch["target_ids"]), length, rows.shape[1], generator=torch.Generator().manual_seed(0))
    # Where nothing counts nothing is changed.
    kept = torch.zeros(direction.shape[:2], dtype=torch.bool)
    kept[here] = True
    direction *= kept.unsqueeze(-1)

    @torch.no_grad()
    def log_probability(size: float) -> float:
        with change_output(model, name, lambda output: output + size * direction):
            learned = predict(model, batch, "target")
        places = counted_places(learned.positions, counts)
        following = learned.ids.roll(-1, dims=1)[places]
        return float(learned.logits[places].double().log_softmax(-1).gather(1, following[:, None]).sum())

    slope = (log_probability(1e-2) - log_probability(-1e-2)) / 2e-2
    assert slope == pytest.approx(float((rows * direction[here]).sum()), rel=1e-2)


def test_layers_in_reverse_take_what_the_last_ones_say(reading):
    read = reading("llama", "mistral")
    layer_map = read.plan.pairing.layer_map
    changed = [lever_starts._from_layer(pair, layer_map[::-1][pair.target.layer]) for pair in read.plan.pairing.mapped]
    found = {(pair.target.layer, branch.source_module.split(".")[2]) for pair in changed for branch in pair.branches}
    assert found == {(layer, str(layer_map[-1 - layer])) for layer in range(len(layer_map))}
    forwards = updates(lever_starts.unbalanced(read, DEFAULT, 0), read.plan.target_modules)
    backwards = updates(lever_starts.layers_reversed(reading("llama", "mistral"), DEFAULT, 0), read.plan.target_modules)
    of_first = [name for name in forwards if ".layers.0." in name]
    assert of_first
    assert all((forwards[name] - backwards[name]).norm() > 0.1 * forwards[name].norm() for name in of_first)


def test_logits_are_shifted_by_what_the_adapter_changes(reading):
    read = reading("llama", "llama")
    student = lever_starts.unbalanced(read, DEFAULT, 0)
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        shifted = levers.ShiftedLogits(read.models.teacher, student.model)(input_ids=ids).logits
        # Source and target are one model here.
        expected = read.models.teacher(input_ids=ids).logits
        moved = student.model(input_ids=ids).logits
    torch.testing.assert_close(shifted, expected, atol=1e-4, rtol=1e-4)
    assert (moved - expected).abs().max() > 1e-2


def test_a_place_weighs_what_the_adapter_changes_there(reading):
    read = reading("llama", "mistral")
    weighed = levers.weighed_by_effect(read.models, read.training)
    weights = [weight for passage in weighed for weight in passage.weights]
    assert len(weights) == sum(len(passage.weights) for passage in read.training) and min(weights) > 0
    assert sum(weights) / len(weights) == pytest.approx(1.0, abs=1e-4)
    ids = torch.tensor([read.training[0].source_ids])
    moved = tiny.logits(read.models.teacher, ids)[0].log_softmax(-1)
    with read.models.teacher.disable_adapter():
        bare = tiny.logits(read.models.teacher, ids)[0].log_softmax(-1)
    effects = (moved.exp() * (moved - bare)).sum(-1)[read.training[0].source_positions]
    # Classes of tokens are coarser than tokens where the vocabularies differ; these hardly do.
    correlation = torch.corrcoef(torch.stack([effects, torch.tensor(weighed[0].weights)]))[0, 1]
    assert correlation > 0.99


@pytest.fixture
def spec() -> BenchmarkSpec:
    """All pairs of the grid, with one skill."""
    models = {name: BenchmarkModel(name, "{skill}") for pair in levers.GRID_PAIRS for name in pair.split(":")}
    return BenchmarkSpec(models, list(levers.GRID_PAIRS), ["one"], "tasks", "text")


def test_every_lever_runs_where_the_page_shows_it(spec):
    names = levers.GRID_PAIRS
    planned = {(settings.steps, cell.pair, name) for settings, cell, name, _ in levers.planned_runs(spec)}
    compared = {pair for steps, pair, name in planned if (steps, name) == (levers.LONG, levers.DEFAULT)}
    assert compared == {*levers.PAIRS, *levers.SHARED_TOKENIZER}
    assert {(levers.SHORT, pair, name) for pair in names for name in (levers.DEFAULT, "rate-2")} <= planned
    assert {(levers.SHORT, pair, "gradients") for pair in levers.PAIRS} <= planned
    assert {pair for _, pair, name in planned if name == "shifted"} == set(levers.SHARED_TOKENIZER)
    assert {pair for steps, pair, name in planned if (steps, name) == (levers.LONG, "rate-2")} == set(levers.PAIRS)
    assert len(planned) == len(list(levers.planned_runs(spec)))


def test_a_lever_alone_runs_on_its_pairs_beside_their_references(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(levers, "run_lever", lambda *run: {})
    monkeypatch.setattr(levers, "reference_scores", lambda *cell: {})
    levers.run_missing(spec, tmp_path, ["rank-4"])
    folders = [f"{levers.LONG}/{pair.replace(':', '--')}/one" for pair in levers.PAIRS]
    expected = {f"{folder}/{name}.json" for folder in folders for name in ("references", "rank-4.prompts.seed0")}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")} == expected


def test_the_page_compares_with_the_default_on_the_same_pairs():
    def cell(pair: str, method: str, right: int) -> PooledCell:
        scores = [np.array([[float(item < count) for item in range(10)]]) for count in (0, right, 10)]
        lift = lift_with_interval(*scores)
        return PooledCell(pair, "one", "prompts", method, 1, right / 10, None, lift, {0: lift.lift}, None)

    def found(*cells: PooledCell) -> levers.Found:
        by_method: dict[str, list[PooledCell]] = {}
        for one in cells:
            by_method.setdefault(one.method, []).append(one)
        drift = {name: {(one.pair, "one"): one.score for one in of_one} for name, of_one in by_method.items()}
        return levers.Found(by_method, drift, [{"seed": 0, "environment": environment}])

    environment = {"commit": "0123456789abcdef", "machine": "two cores", "versions": {"torch": "2"}}
    first, second = levers.PAIRS
    default, fresh = levers.DEFAULT, "fresh, rehearsed"
    compared = [cell(first, default, 6), cell(second, default, 8), cell(first, fresh, 7), cell(second, fresh, 5)]
    long = found(*compared, cell("llama-m:llama-s", default, 1), cell("llama-m:llama-s", "shifted", 3))
    page = levers.render({levers.SHORT: found(cell(first, fresh, 2)), levers.LONG: long})
    assert "| the default | – | – | – | 0.70 | – | 0.70 |" in page
    assert "| a fresh LoRA | 0.20 | – | 0.20 | 0.60 | -0.10 [-0.30, +0.10], 1 and 1 | 0.60 |" in page
    assert "| 0.30 | +0.20 [+0.20, +0.20], 1 and 0 | 0.30 |" in page
    assert page.endswith("## Environment\n\nCommits 0123456789; seeds 0; two cores; torch 2.\n")
    assert "rank 4" not in page and "What is minimised" not in page


def test_an_unknown_lever_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="Lever 'magic' is unknown; choose from default; fresh, rehearsed; inputs;"):
        levers.main(tmp_path, tmp_path, tmp_path / "out", tmp_path / "page.md", levers=["magic"])
    assert not list(tmp_path.iterdir())

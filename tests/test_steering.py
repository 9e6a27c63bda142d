import json

import pytest
import tiny
import torch

from castlora.alignment.positions import align_passages
from castlora.cli import main
from castlora.errors import UserError
from castlora.evaluation.accuracy import evaluate_model
from castlora.evaluation.tasks import TaskItem
from castlora.maps.statistics import Moments
from castlora.model_pair import load_models
from castlora.plan import plan_transfer
from castlora.steering import (
    CONTROL,
    STEERED,
    Bridge,
    Layers,
    collect_residuals,
    evaluate_steered,
    explained_variance,
    steer,
)
from castlora.text.passages import Passage

CHOICES = (" fox", " hen", " river")
ITEMS = [
    TaskItem(f"Who? {sentence} Answer:", CHOICES[number % 3], CHOICES)
    for number, sentence in enumerate(tiny.sentences(9))
]


@pytest.fixture
def loaded(base_model, adapter):
    def load(source: str, target: str):
        plan = plan_transfer(str(adapter(source)), str(base_model(target)), str(base_model(source)))
        models = load_models(plan)
        passages = [Passage(sentence) for sentence in tiny.sentences(60)]
        text = list(align_passages(passages, models.source_bytes, models.target_bytes, 96, 1.0))
        return plan, models, text

    return load


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "task.jsonl"
    rows = [{"prompt": item.prompt, "completion": item.completion, "choices": item.choices} for item in ITEMS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_bridge_recovers_an_affine_map():
    generator = torch.Generator().manual_seed(0)
    weight, offset = torch.randn(5, 7, generator=generator), torch.randn(5, generator=generator)
    x = torch.randn(400, 7, generator=generator) + 3
    moments = Moments.zeros(7, 5)
    moments.update(x, x @ weight.T + offset)
    torch.testing.assert_close(Bridge.fit(moments, 1e-9)(x[:3]), x[:3] @ weight.T + offset, atol=1e-3, rtol=1e-3)


def test_from_a_model_to_itself_steering_brings_the_adapters_answers(loaded, base_model):
    """At the last layer the replaced states are those of source + LoRA, and the head is the same."""
    plan, models, text = loaded("llama", "llama")
    layers = Layers.at(plan, 2)
    assert (layers.source, layers.target) == ("model.layers.2", "model.layers.2")
    width = models.target.config.hidden_size
    identity = Bridge(torch.eye(width), torch.zeros(width), torch.zeros(width))
    steered = evaluate_steered(models, layers, ITEMS, identity, 1.0)
    taught = evaluate_model(models.teacher, models.source_tokenizer, ITEMS)
    torch.testing.assert_close(torch.tensor(steered.nlls), torch.tensor(taught.nlls), atol=1e-4, rtol=1e-4)
    assert explained_variance(models, layers, text, identity) < 1


def test_without_strength_the_target_is_as_it_was(loaded):
    plan, models, text = loaded("llama", "gpt2")
    layers = Layers.at(plan, None)
    bridge = Bridge.fit(collect_residuals(models, layers, text), 0.1)
    unmoved = evaluate_steered(models, layers, ITEMS, bridge, 0.0)
    bare = evaluate_steered(models, layers, ITEMS, None, 0.0)
    steered = evaluate_steered(models, layers, ITEMS, bridge, 1.0)
    alone = evaluate_model(models.target, models.target_tokenizer, ITEMS)
    torch.testing.assert_close(torch.tensor(unmoved.nlls), torch.tensor(bare.nlls))
    torch.testing.assert_close(torch.tensor(bare.nlls), torch.tensor(alone.nlls), atol=1e-4, rtol=1e-4)
    assert (steered.nlls != bare.nlls).all()


def test_permuted_pairs_explain_less(loaded):
    plan, models, text = loaded("llama", "llama")
    layers = Layers.at(plan, 1)
    fitted = Bridge.fit(collect_residuals(models, layers, text[:48]), 0.1)
    permuted = Bridge.fit(collect_residuals(models, layers, text[:48], torch.Generator().manual_seed(0)), 0.1)
    assert explained_variance(models, layers, text[48:], fitted) > 0.3
    assert explained_variance(models, layers, text[48:], permuted) < 0.1


def test_the_layer_must_be_one_of_the_targets(loaded):
    plan, _, _ = loaded("llama", "gpt2")
    with pytest.raises(UserError, match="layers 0 to 2"):
        Layers.at(plan, 3)


def test_steer_reports_and_writes_what_it_measured(base_model, adapter, text_file, task_file, tmp_path, capsys):
    out = tmp_path / "results" / "steer.json"
    command = [
        "steer", "--adapter", str(adapter("llama")), "--source", str(base_model("llama")),
        "--target", str(base_model("gpt2")), "--task", str(task_file), "--text", str(text_file), "--out", str(out),
    ]  # fmt: skip
    main(command)
    record = json.loads(out.read_text())
    assert record["n"] == 9 and record["text"] == "general text"
    for name in (STEERED, CONTROL):
        assert 0 <= record[name]["score"] <= 1 and -2 < record[name]["r_squared"] < 1
    assert record[STEERED]["r_squared"] > record[CONTROL]["r_squared"]
    table = capsys.readouterr().out
    assert "permuted pairs" in table and f"{record[STEERED]['score']:.3f}" in table
    with pytest.raises(SystemExit):
        main(command)
    assert "steer.json' exists; give a new file, nothing is ever overwritten." in capsys.readouterr().err
    main([*command[:-1], str(tmp_path / "again.json"), "--json", "true"])
    assert json.loads(capsys.readouterr().out) == record


def test_steering_needs_choices(base_model, adapter, tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"prompt": "Who?", "completion": " fox"}))
    with pytest.raises(UserError, match="choices"):
        steer(str(adapter("llama")), str(base_model("gpt2")), str(path), source=str(base_model("llama")))


def test_a_strength_beyond_the_bridge_is_refused(base_model, adapter, task_file):
    with pytest.raises(UserError, match=r"--strength is 2\.0"):
        steer(str(adapter("llama")), str(base_model("gpt2")), str(task_file), strength=2.0)


def test_an_item_whose_answer_would_be_cut_off_is_refused(loaded):
    plan, models, _ = loaded("llama", "gpt2")
    item = TaskItem("Who? " + " ".join(tiny.sentences(9)) + " Answer:", " fox", CHOICES)
    with pytest.raises(UserError, match="longer than the 96 tokens"):
        evaluate_steered(models, Layers.at(plan, None), [item], None, 0.0)


def test_a_bridge_out_of_bounds_is_named(loaded):
    plan, models, _ = loaded("llama", "llama")
    width = models.target.config.hidden_size
    bridge = Bridge(torch.full((width, width), torch.inf), torch.zeros(width), torch.zeros(width))
    with pytest.raises(UserError, match="--strength"):
        evaluate_steered(models, Layers.at(plan, 1), ITEMS, bridge, 1.0)


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(UserError, match="seed is -1; give a whole number from 0"):
        steer("adapter", "target", "task.jsonl", seed=-1)

"""The comparison of `gpu_engines`, with PEFT itself in the place of an engine; the engines need a GPU."""

import pytest
import torch
from gpu_engines import ENGINES, TOP, from_peft, largest_difference, main

from castlora.adapters.factors import read_factors, write_portable
from castlora.adapters.files import open_adapter
from castlora.demonstration.bundle import TARGET, demo_adapters_path, demo_models_path, demo_skill
from castlora.models.loading import load_config, skeleton
from castlora.models.modules import linear_slots

BASE = str(demo_models_path() / TARGET)


@pytest.fixture(scope="module")
def portable(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("portable") / "adapter"
    config = load_config(BASE)
    factors = read_factors(open_adapter(str(demo_adapters_path() / TARGET / demo_skill().name)), config)
    write_portable(folder, factors, linear_slots(skeleton(config), config), 16, "org/base", None)
    return str(folder)


def engine_with(adapter_acts: bool):
    def predict(base, adapter, rank, prompts, precision):
        assert rank == 16
        rows = from_peft(base, adapter, prompts, precision)[0 if adapter_acts else 1]
        return [
            dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            for best in (row.topk(TOP) for row in rows)
        ]

    return predict


def test_an_engine_that_computes_the_same_passes(portable, monkeypatch, capsys):
    monkeypatch.setitem(ENGINES, "vllm", engine_with(adapter_acts=True))
    main("vllm", BASE, portable, "float32")
    assert "differ by 0.0000 nats at most" in capsys.readouterr().out


def test_an_engine_that_drops_the_adapter_does_not(portable, monkeypatch):
    monkeypatch.setitem(ENGINES, "sglang", engine_with(adapter_acts=False))
    with pytest.raises(SystemExit, match="does not compute what PEFT computes"):
        main("sglang", BASE, portable, "float32")


def test_an_adapter_that_engines_refuse_is_named(base_model, adapter):
    unlike = str(adapter("llama", layers_to_transform=(2,), use_rslora=True))
    with pytest.raises(SystemExit, match="Not portable"):
        main("vllm", str(base_model("llama")), unlike)


def test_an_engine_without_log_probabilities_is_noticed():
    with pytest.raises(ValueError, match="reports no log-probabilities"):
        largest_difference([{}], torch.zeros(1, 4))

"""What castlora writes, loaded by real engines: each computes what PEFT computes.

`tests/engines.sh` installs the engines beside castlora and runs these tests; llama.cpp is built from its sources there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_images import save_image_model
from transformers import AutoModelForCausalLM

from castlora import convert
from castlora.adapters.factors import LowRank, write_portable
from castlora.demonstration.bundle import demo_models_path
from castlora.models.loading import auto_class, load_config, skeleton
from castlora.models.modules import linear_slots

pytestmark = pytest.mark.engine
IDS = [5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    """An adapter in the form that `transfer` writes, on all linear modules of a base model."""

    def make(base: Path) -> Path:
        folder = tmp_path_factory.mktemp("portable") / base.name
        config = load_config(str(base))
        slots = linear_slots(skeleton(config), config)
        torch.manual_seed(0)
        factors = {
            name: LowRank(torch.randn(5, slot.d_in) / slot.d_in, torch.randn(slot.d_out, 5))
            for name, slot in slots.items()
        }
        write_portable(folder, factors, slots, 8, str(base), None)
        return folder

    return make


def log_probabilities(base: Path, adapter: Path | None) -> np.ndarray:
    """PEFT's prediction at every position."""
    model = auto_class(load_config(str(base)))
    model = model.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return tiny.logits(model, torch.tensor([IDS]))[0].log_softmax(-1).numpy()


def assert_same(found: np.ndarray, base: Path, adapter: Path, tolerance: float = 1e-3) -> None:
    expected, bare = log_probabilities(base, adapter), log_probabilities(base, None)
    assert np.abs(expected - bare).max() > 100 * tolerance
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "phi3"])
def test_transformers_loads_the_adapter_itself(base_model, portable, name):
    adapter = portable(base_model(name))
    model = AutoModelForCausalLM.from_pretrained(base_model(name)).eval()
    model.load_adapter(str(adapter))
    found = tiny.logits(model, torch.tensor([IDS]))[0].log_softmax(-1).numpy()
    assert_same(found, base_model(name), adapter)


def as_published(base: Path, folder: Path) -> Path:
    """GPT-2 with the names and the field of the checkpoints on the hub, which MLX-LM relies on; others as they are."""
    config = json.loads((base / "config.json").read_text())
    if config["model_type"] != "gpt2":
        return base
    copy = folder / "published"
    shutil.copytree(base, copy)
    (copy / "config.json").write_text(json.dumps(config | {"n_ctx": config["n_positions"]}))
    tensors = load_file(base / "model.safetensors")
    published = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(published, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "phi3"])
def test_mlx_lm(base_model, portable, tmp_path, name):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed; tests/engines.sh installs it")
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed; tests/engines.sh installs it")
    adapter = portable(base_model(name))
    convert(str(adapter), "mlx", str(tmp_path / "mlx"))
    model, _ = mlx_lm.load(str(as_published(base_model(name), tmp_path)), adapter_path=str(tmp_path / "mlx"))
    logits = model(mx.array([IDS])).astype(mx.float32)
    found = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]
    assert_same(found, base_model(name), adapter)


@pytest.mark.parametrize("name", ["mistral3", "qwen3_vl", "qwen3_5"])
def test_mlx_lm_with_models_for_images(portable, tmp_path, name):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed; tests/engines.sh installs it")
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed; tests/engines.sh installs it")
    base = save_image_model(tmp_path / "base", name)
    config = json.loads((base / "config.json").read_text())
    # MLX-LM reads these fields of published models, and transformers does without them.
    has_head = {"mistral3": True, "qwen3_vl": False, "qwen3_5": False}[name]
    config["text_config"] |= {"tie_word_embeddings": has_head, "rope_theta": 10000.0, "full_attention_interval": 2}
    (base / "config.json").write_text(json.dumps(config))
    adapter = portable(base)
    convert(str(adapter), "mlx", str(tmp_path / "mlx"))
    model, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "mlx"))
    logits = model(mx.array([IDS])).astype(mx.float32)
    found = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]
    assert_same(found, base, adapter)


@pytest.fixture(scope="module")
def llama_cpp_sources() -> Path:
    if "CASTLORA_LLAMA_CPP" not in os.environ:
        pytest.skip("CASTLORA_LLAMA_CPP does not name llama.cpp's sources; tests/engines.sh fetches them")
    return Path(os.environ["CASTLORA_LLAMA_CPP"])


@pytest.mark.parametrize("name", ["llama-s", "mistral-s"])
def test_llama_cpp(portable, tmp_path, llama_cpp_sources, name):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; tests/engines.sh does it")
    base, base_file = demo_models_path() / name, tmp_path / "base.gguf"
    adapter = portable(base)
    to_gguf = llama_cpp_sources / "convert_hf_to_gguf.py"
    command = [sys.executable, to_gguf, base, "--outfile", base_file, "--outtype", "f32"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    convert(str(adapter), "gguf", str(tmp_path / "adapter.gguf"), llama_cpp=str(llama_cpp_sources))
    engine = llama_cpp.Llama(
        str(base_file),
        lora_path=str(tmp_path / "adapter.gguf"),
        logits_all=True,
        n_ctx=len(IDS) + 1,
        n_threads=1,
        verbose=False,
        # The cache of keys and values is in half precision otherwise.
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    engine.eval(IDS)
    found = torch.tensor(np.array(engine.scores[: len(IDS)])).log_softmax(-1).numpy()
    assert_same(found, base, adapter)

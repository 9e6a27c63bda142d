"""The model card: complete, valid for the Hub, and silent about the machine it was made on."""

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from castlora.lift import Lift
from castlora.models.loading import _quantization
from castlora.publishing.card import make_card, write_card
from castlora.publishing.names import is_hub_id, public_command, public_name
from castlora.report import BARE_TARGET, RETRAINED, TRANSFERRED, Score, Skill
from castlora.report.formatting import percent

DOCUMENTED = {
    "language", "license", "license_name", "license_link", "library_name", "tags", "datasets", "metrics", "base_model",
    "base_model_relation", "new_version", "pipeline_tag", "thumbnail", "model-index",
}  # fmt: skip
"""Fields of a model card's metadata in the documentation of the hub."""

HOSTILE = "evil`](javascript:x)\n---\nlicense: mit\n---\n# Heading\n<script>alert(1)</script>|``` ![x](y) \x1b\u202e"

SKILL = Skill(
    "trec",
    {
        BARE_TARGET: Score(0.132, (0.1, 0.16), 3.2),
        TRANSFERRED: Score(0.688, (0.65, 0.72), 0.93),
        RETRAINED: Score(0.779),
    },
    Lift(0.859, (0.79, 0.93), 0.883, countable=True),
)


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "source": {"name": "org/llama-s", "revision": "3f2a91c", "tokenizer_sha256": "ab"},
        "target": {"name": "org/mistral-s", "revision": "88b01de", "tokenizer_sha256": "cd"},
        "adapter": {"name": "org/trec-lora", "kind": "LoRA", "rank": 4, "beyond_maps": []},
        "rank": 8,
        "source_bits": None,
        "target_bits": 4,
        "text": {
            "regime": "prompt format",
            "text": "allenai/c4",
            "prompt_format": "Q: {text}",
            "prompts": None,
            "taught": None,
        },
        "pairing": [
            {"target": "layers.0.q_proj", "sources": [{"module": "layers.0.q_proj", "roles": ["q"]}]},
            {"target": "layers.0.gate_proj", "sources": []},
        ],
        "recipe": {
            "name": "default", "start": "fresh", "steps": 500, "batch_size": 32, "kl_weight": 1.0, "mse_weight": 0.5,
            "chunk_weight": 0.0, "rehearsal_weight": 0.0, "departures": {"steps": 500},
        },
        "start_loss": {"low_rank": 0.0, "cut": 0.0},
        "shared_vocabulary": {"source_ends": 1, "target_ends": [2]},
        "seed": 17,
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "passages": {"training": 24, "held_out": 6, "variants": 0},
        "scale": {"scale": 0.75, "tried": [0.0, 0.75, 1.0], "losses": [3.0, 0.552, 0.6]},
        "losses": {
            "held_out_bare": 2.91, "held_out_after": 0.552, "agreement_bare": 0.31, "agreement_after": 0.84,
            "kl_before": 2.5, "kl_after": 0.21, "drift_after": 0.125,
        },
        "licences": {"source adapter": "mit", "source base model": "mit", "target base model": "mit", "text": "mit"},
        "answers": {"prompts": 64, "same_before": 0.02, "same_after": 0.81, "ci95": [0.7, 0.9]},
        "command": "castlora transfer --adapter org/trec-lora --target org/mistral-s --out out",
        "seconds": 252.34,
        "peak_memory_bytes": 2 << 30,
        **changes,
    }  # fmt: skip


def measured(card: ModelCard) -> dict[tuple[str, str], float]:
    """Values of a card's model index by data set and kind of metric."""
    (index,) = card.data.to_dict()["model-index"]
    return {
        (result["dataset"]["type"], metric["type"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    return [text for one in value for text in strings(one)] if isinstance(value, list) else [str(value)]


def without_code(text: str) -> str:
    """What is left of Markdown outside fenced blocks and code spans: all that can act."""
    text = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def test_a_target_that_cannot_tell_its_end_is_to_be_stopped_at_all_of_its_ends():
    assert "stop_token_ids" not in make_card(manifest()).text
    use = make_card(manifest(shared_vocabulary={"source_ends": 1, "target_ends": [2, 7, 9]})).text
    assert "`org/mistral-s` predicts 2 tokens as it predicts the one that ends its texts" in use
    assert "`stop_token_ids` of a request to vLLM or SGLang" in use


def test_what_the_start_lacks_is_said() -> None:
    assert "it lacks" not in make_card(manifest()).text
    adapter = {**manifest()["adapter"], "kind": "DoRA"}
    card = make_card(manifest(adapter=adapter, start_loss={"low_rank": 0.034, "cut": 0.12}))
    assert f"it lacks {percent(0.034)} of the norm of the `DoRA` adapter, cut to low rank" in card.text
    assert f"it lacks {percent(0.12)} of the start's norm, cut to rank 8" in card.text


def test_memory_of_an_accelerator_is_said_where_one_was_used() -> None:
    assert "of the accelerator" not in make_card(manifest(peak_accelerator_bytes=None)).text
    assert "| peak memory of the accelerator | 20.0 GiB |" in make_card(manifest(peak_accelerator_bytes=20 << 30)).text


def test_metadata() -> None:
    data = make_card(manifest()).data.to_dict()
    assert data.pop("model-index")[0]["name"] == "trec-lora"
    assert data == {
        "base_model": "org/mistral-s",
        "base_model_relation": "adapter",
        "datasets": ["allenai/c4"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["castlora", "lora", "base_model:adapter:org/mistral-s"],
    }


@pytest.mark.parametrize(
    "fact",
    [
        "`org/trec-lora`, rank 4", "`org/llama-s` at `3f2a91c` |", "`88b01de`, quantized to 4 bits |",
        "`prompt format`, `allenai/c4`", "`default` with `steps=500`", "| `fresh` |", "1.00 × KL + 0.500 × hidden MSE",
        "500 × 32", "| seed | 17 |", "0.750, by held-out loss", "2.91 bare → 0.552", "31\xa0% bare → 84\xa0%",
        "0.125 nats per position", "| time | 252 s |",
        "2.00 GiB",
        "1 of 2 target modules have a partner in the source; no update for `layers.0.gate_proj`",
        "belongs to one.\n\n```python",
        'AutoModelForCausalLM.from_pretrained("org/mistral-s", revision="88b01de", quantization_config=BitsAndBytes',
        "vllm serve org/mistral-s --revision 88b01de --quantization bitsandbytes --enable-lora --max-lora-rank 8",
        "--lora-modules trec-lora=",
        "castlora transfer --adapter org/trec-lora --target org/mistral-s --out out", "`torch 2.13.0`", "2510.17902",
    ],
)  # fmt: skip
def test_body_tells(fact: str) -> None:
    assert fact in make_card(manifest()).text


def test_evaluation() -> None:
    assert "how much of the skill arrived is not known" in make_card(manifest()).text
    text = make_card(manifest(), [SKILL]).text
    assert "how much of the skill arrived is not known" not in text
    assert "| `trec (accuracy)` | `transferred` | 0.688 | [0.650, 0.720] | 0.930 | 86\xa0% [79, 93] |" in text
    assert "| `trec (accuracy)` | `retrained` | 0.779 |  | – |  |" in text


def test_the_hub_can_read_what_was_measured(tmp_path: Path) -> None:
    held_out = {
        ("allenai/c4", "agreement"): 0.84, ("allenai/c4", "kl_divergence"): 0.21, ("allenai/c4", "exact_match"): 0.81,
    }  # fmt: skip
    written = ModelCard.load(write_card(tmp_path, manifest(), [SKILL]))
    assert measured(written) == {**held_out, ("trec", "accuracy"): 0.688, ("trec", "lift"): 0.859}
    assert measured(make_card(manifest())) == held_out


def test_the_metadata_are_what_the_hub_documents(tmp_path: Path) -> None:
    """As the hub's own check of a card, which needs a network, would have them: nothing unknown, nothing lost."""
    path = write_card(tmp_path, manifest(), [replace(SKILL, sha256="ab" * 32)])
    metadata = metadata_load(path)
    assert set(metadata) <= DOCUMENTED
    assert metadata["base_model_relation"] in ("adapter", "merge", "quantized", "finetune")
    assert metadata["pipeline_tag"] == "text-generation"
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert eval_results_to_model_index(name, results) == metadata["model-index"]
    assert len({(result.unique_identifier, result.metric_type) for result in results}) == len(results) == 5
    assert all(isinstance(result.metric_value, float) and math.isfinite(result.metric_value) for result in results)
    assert ModelCardData(**metadata, ignore_metadata_errors=False).to_dict() == metadata
    assert ModelCard.load(path, ignore_metadata_errors=False).data.to_dict() == metadata


def test_what_was_not_measured_is_in_no_index() -> None:
    private = {**manifest()["text"], "text": None, "prompts": "p.txt"}
    losses = {**manifest()["losses"], "kl_after": float("nan")}
    small_gain = Skill(SKILL.name, {BARE_TARGET: Score(0.7)}, Lift(3.0, (1.0, 9.0), 1.0, countable=False))
    card = make_card(manifest(text=private, losses=losses, answers=None), [small_gain])
    assert measured(card) == {("held-out", "agreement"): 0.84}
    assert card.data.datasets is None


def test_licences_are_named() -> None:
    same = make_card(manifest()).text
    assert "Licences: source adapter `mit`, source base model `mit`, target base model `mit`, text `mit`." in same
    licences = {"source adapter": "mit", "source base model": "llama2", "target base model": None, "text": None}
    unlike = make_card(manifest(licences=licences)).text
    expected = "Licences differ: source adapter `mit`, source base model `llama2`; not known: that of the target base"
    assert f"{expected} model, that of the text." in unlike
    assert make_card(manifest(licences=licences)).data.license is None


def test_the_time_of_a_resumed_run_is_told_as_that() -> None:
    assert "| time | 252 s, since it was resumed |" in make_card(manifest(resumed=True)).text


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_python_snippet_is_python_and_loads_the_target_as_it_was(bits: int | None, monkeypatch) -> None:
    loaded = []

    def load(*_name: str, **options: Any) -> None:
        loaded.append(options.get("quantization_config"))

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_name, **_options: None)
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", lambda *_places: None)
    for name in ("org/mistral-s", HOSTILE, "a\"b\\c'd"):
        card = make_card(manifest(target={"name": name, "revision": "1"}, target_bits=bits)).text
        (code,) = re.findall(r"^(`{3,})python\n(.*?)^\1$", card, re.M | re.S)
        exec(code[1], {})
    expected = _quantization(bits, torch.bfloat16).to_dict() if bits else None
    assert [found and found.to_dict() for found in loaded] == [expected] * 3
    assert ("--quantization bitsandbytes" in card) == (bits == 4)
    assert ("quantized to" in card) == bool(bits)


def test_written_card_loads(tmp_path: Path) -> None:
    path = write_card(tmp_path, manifest(), [SKILL])
    assert path == tmp_path / "README.md"
    assert ModelCard.load(path).data.base_model == "org/mistral-s"


class TestHostileNames:
    @pytest.fixture
    def content(self) -> str:
        skill = Skill(HOSTILE, {HOSTILE: Score(0.5)}, metric=HOSTILE)
        record = {"name": HOSTILE, "revision": HOSTILE}
        changes = manifest(
            source=record,
            target=record,
            adapter={"name": HOSTILE, "kind": HOSTILE, "rank": 4, "beyond_maps": [HOSTILE]},
            text={"regime": HOSTILE, "text": HOSTILE, "prompt_format": HOSTILE, "prompts": HOSTILE, "taught": HOSTILE},
            pairing=[{"target": HOSTILE, "sources": []}],
            start_loss={"low_rank": 0.1, "cut": 0.1},
            versions={HOSTILE: HOSTILE},
            command=shlex.join(["castlora", HOSTILE]),
        )
        changes["recipe"] |= {"name": HOSTILE, "start": HOSTILE, "departures": {HOSTILE: HOSTILE}}
        return str(make_card(changes, [skill]))

    def test_metadata_is_ours(self, content: str) -> None:
        front = content.split("\n---\n")[0].removeprefix("---\n")
        metadata = yaml.safe_load(front)
        (index,) = metadata.pop("model-index")
        assert all(re.fullmatch(r"[\w .+,()/−-]+", text) for text in strings(index)), strings(index)
        assert metadata == {
            "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["castlora", "lora"],
        }  # fmt: skip

    def test_nothing_acts_outside_code(self, content: str) -> None:
        body = content.split("\n---\n", 1)[1]
        active = without_code(body)
        assert "evil" in body
        assert not re.search(r"evil|<script|javascript|license|!\[|\]\(", active)
        assert re.findall(r"^#+ .*", active, re.M)[1:] == [
            "## Origin", "## Evaluation", "## Use", "## Reproduce", "## Limits", "## Citation",
        ]  # fmt: skip

    def test_controls_are_visible(self, content: str) -> None:
        assert "\x1b" not in content
        assert "\u202e" not in content
        assert "⟨U+202E⟩" in content

    def test_table_rows_keep_their_columns(self, content: str) -> None:
        rows = [line for line in without_code(content).splitlines() if line.startswith("|")]
        assert {line.count("|") for line in rows} == {3, 7}


class TestPrivacy:
    def test_card_has_no_local_paths_or_tokens(self, tmp_path: Path) -> None:
        folder = tmp_path / "my models" / "mistral"
        folder.mkdir(parents=True)
        local = {"name": str(folder), "revision": None}
        command = [
            "castlora",
            "transfer",
            "--target",
            str(folder),
            f"--out={tmp_path}/out",
            "--token",
            "hf_" + "a" * 34,
        ]
        text = {"regime": "general text", "text": f"json:{tmp_path}/t.jsonl", "prompt_format": None}
        text |= {"prompts": None, "taught": None}
        card = make_card(
            manifest(
                target=local,
                adapter={"name": "/home/ann/lora", "kind": "LoRA", "rank": 4, "beyond_maps": []},
                text=text,
                command=shlex.join(command),
            )
        )
        content = str(card)
        assert not re.search(rf"{re.escape(str(tmp_path))}|/home|ann|my models|hf_a", content)
        assert "castlora transfer --target mistral --out=out --token 'hf_…'" in content
        assert "`t.jsonl`" in content
        assert card.data.base_model is None

    @pytest.mark.parametrize(
        ("name", "public"),
        [
            ("org/model", "org/model"), ("gpt2", "gpt2"), ("/data/models/llama", "llama"), ("~/llama/", "llama"),
            ("../llama", "llama"), (r"C:\Users\ann\llama", "llama"), ("C:/Users/ann/llama", "llama"),
            ("https://user:secret@host/org/model", "model"), ("a/b/c", "c"), ("prompt format", "prompt format"),
        ],
    )  # fmt: skip
    def test_public_name(self, name: str, public: str) -> None:
        assert public_name(name) == public

    def test_folder_in_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "runs" / "lora").mkdir(parents=True)
        assert is_hub_id("runs/lora")
        monkeypatch.chdir(tmp_path)
        assert not is_hub_id("runs/lora")
        assert public_name("runs/lora") == "lora"

    def test_command_keeps_free_text(self) -> None:
        arguments = ["castlora", "--prompt-format", "Yes/No? {text}\nA:", "--seed=1", "x" * 5000]
        assert shlex.split(public_command(arguments)) == arguments

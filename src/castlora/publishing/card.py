"""The model card of a transferred adapter."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from castlora.publishing.licences import CARD_FILE, describe_licences
from castlora.publishing.markdown import code, fenced, python_string, table
from castlora.publishing.names import is_hub_id, public_command, public_name, quoted_name, slug
from castlora.report import TRANSFERRED, Skill
from castlora.report.formatting import (
    is_number,
    number,
    percent,
    percent_interval,
    score,
    score_interval,
)

_NAMED_MODULES = 4

_QUANTIZED = {
    4: 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"',
    8: "load_in_8bit=True",
}
"""Arguments of transformers' BitsAndBytesConfig."""

_SCORES_BEGIN = "<!-- castlora evaluate --record true writes the lines from here -->"
_SCORES_END = "<!-- to here -->"

_LIMITS = """\
- The adapter imitates the source model with its adapter, mistakes and biases included. No labels were used.
- It belongs to the revision of the base model named above; on another one it may do harm.
- The licences and terms of the source adapter, of both base models and of the text apply.
"""

_CITATION = """\
@misc{kari2025activation,
  title = {Activation Manifold Projection: Liberating Task-Specific Behaviors from {LLM} Architectures},
  author = {Al Kari},
  year = {2025},
  eprint = {2510.17902},
  archivePrefix = {arXiv}
}
"""


def write_card(folder: Path, manifest: Mapping[str, Any], skills: Sequence[Skill] = ()) -> Path:
    """Writes README.md, the model card of the adapter in `folder`.

    Names are taken as hostile, and of local files and folders only the last component is told.

    Args:
        folder: The adapter's folder.
        manifest: What was done, as `castlora.transfer` writes it next to the adapter.
        skills: Scores by task; empty for a transfer without a task.

    Returns:
        The card's path.
    """
    path = folder / CARD_FILE
    make_card(manifest, skills).save(path)
    return path


def add_scores(card: ModelCard, skills: Sequence[Skill], scored: Skill, name: str) -> None:
    """Brings the scores of a task into a card that its owner may have changed; what is not about this task stays.

    Args:
        card: The card.
        skills: All tasks that were scored, for the table. A card from which its owner has taken the place of the table
            gets none.
        scored: The one whose results the metadata get, instead of those that they had for it.
        name: What the adapter is called where the metadata do not say it.
    """
    card.data["model_name"] = card.data.get("model_name") or slug(name)
    others = [result for result in card.data.get("eval_results", ()) if result.dataset_revision != scored.sha256]
    card.data["eval_results"] = others + _skill_results(scored)
    before, begin, rest = card.text.partition(_SCORES_BEGIN)
    _, end, after = rest.partition(_SCORES_END)
    if begin and end:
        card.text = f"{before}{begin}\n{_evaluation(skills)}\n{end}{after}"


def make_card(manifest: Mapping[str, Any], skills: Sequence[Skill] = ()) -> ModelCard:
    """Returns the model card that `write_card` writes."""
    adapter, source = quoted_name(manifest["adapter"]["name"]), quoted_name(manifest["source"]["name"])
    target = quoted_name(manifest["target"]["name"])
    sections = [
        f"# {adapter} for {target}",
        f"A LoRA adapter for {target} that carries the skill of {adapter}, an adapter for {source}."
        " castlora moved it without task labels.",
        "## Origin",
        table(("", ""), _facts(manifest)),
        "## Evaluation",
        f"{_SCORES_BEGIN}\n{_evaluation(skills)}\n{_SCORES_END}",
        "## Use",
        *_needed_precision(manifest["target_bits"]),
        *_needed_stops(manifest),
        fenced("python", _peft_snippet(manifest)),
        fenced("shell", _vllm_snippet(manifest)),
        "## Reproduce",
        fenced("shell", public_command(shlex.split(manifest["command"]))),
        "Versions: " + ", ".join(code(f"{name} {version}") for name, version in manifest["versions"].items()),
        "## Limits",
        f"{_LIMITS}- {describe_licences(manifest['licences'], code)}",
        "## Citation",
        fenced("bibtex", _CITATION),
    ]
    return ModelCard(f"---\n{_metadata(manifest, skills).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _metadata(manifest: Mapping[str, Any], skills: Sequence[Skill]) -> ModelCardData:
    target, text = manifest["target"]["name"], manifest["text"]["text"]
    base_model = target if is_hub_id(target) else None
    return ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        datasets=[text] if text and is_hub_id(text) else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["castlora", "lora", *([f"base_model:adapter:{base_model}"] if base_model else [])],
        model_name=slug(manifest["adapter"]["name"]),
        eval_results=[*_fidelity(manifest), *(result for skill in skills for result in _skill_results(skill))],
    )


def _fidelity(manifest: Mapping[str, Any]) -> list[EvalResult]:
    """How close the target came to its teacher on held-out text, in the form that the hub reads."""
    text, losses, answers = manifest["text"]["text"], manifest["losses"], manifest["answers"]
    measured = [
        ("agreement", "share of positions with the next token of source + LoRA", losses["agreement_after"]),
        ("kl_divergence", "KL divergence to source + LoRA per position, in nats", losses["kl_after"]),
    ]
    if answers is not None:
        measured.append(("exact_match", "share of prompts with the answer of source + LoRA", answers["same_after"]))
    return _results(text if text and is_hub_id(text) else "held-out", "held-out text of the run", measured)


def _skill_results(skill: Skill) -> list[EvalResult]:
    lift = skill.countable_lift
    measured = [
        (slug(skill.metric), "score of the transferred adapter", skill.value(TRANSFERRED)),
        ("lift", "(transferred - bare target) / (retrained - bare target)", lift.lift if lift else None),
    ]
    return _results(slug(skill.name), slug(skill.name), measured, skill.sha256)


def _results(
    data_type: str, data: str, measured: Sequence[tuple[str, str, float | None]], revision: str | None = None
) -> list[EvalResult]:
    return [
        EvalResult(
            "text-generation",
            data_type,
            data,
            dataset_revision=revision,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in measured
        if is_number(value)
    ]


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe, losses, beyond = manifest["recipe"], manifest["losses"], manifest["adapter"]["beyond_maps"]
    departures = ", ".join(code(f"{field}={value}") for field, value in recipe["departures"].items())
    return [
        ("source adapter", f"{quoted_name(manifest['adapter']['name'])}, rank {manifest['adapter']['rank']}"),
        *([("also trained in the source", _beyond(beyond))] if beyond else []),
        ("source base model", _model(manifest["source"]) + _precision(manifest["source_bits"])),
        ("target base model", _model(manifest["target"]) + _precision(manifest["target_bits"])),
        ("text", _text(manifest["text"]) + _variants(manifest["passages"])),
        ("recipe", code(recipe["name"]) + (f" with {departures}" if departures else "")),
        ("start", code(recipe["start"]) + _start_choice(manifest.get("start_choice")) + _start_loss(manifest)),
        ("objective", _objective(recipe)),
        ("steps × batch", f"{recipe['steps']} × {recipe['batch_size']}"),
        ("seed", str(manifest["seed"])),
        ("rank", str(manifest["rank"])),
        ("pairing", _pairing_summary(manifest["pairing"])),
        ("scale of the update", f"{number(manifest['scale']['scale'])}, by held-out loss"),
        ("held-out loss", f"{number(losses['held_out_bare'])} bare → {number(losses['held_out_after'])}"),
        (
            "next token as the teacher's",
            f"{percent(losses['agreement_bare'])} bare → {percent(losses['agreement_after'])} of held-out positions",
        ),
        *_answers(manifest["answers"]),
        (
            "drift",
            f"{number(losses['drift_after'])} nats per position from the bare target, on its own text",
        ),
        ("time", f"{number(manifest['seconds'])} s" + (", since it was resumed" if manifest.get("resumed") else "")),
        ("peak memory", f"{number(manifest['peak_memory_bytes'] / 2**30)} GiB"),
        *_accelerator_memory(manifest),
    ]


def _accelerator_memory(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    peak = manifest.get("peak_accelerator_bytes")
    return [("peak memory of the accelerator", f"{number(peak / 2**30)} GiB")] if peak is not None else []


def _precision(bits: int | None) -> str:
    return f", quantized to {bits} bits" if bits else ""


def _start_choice(choice: Mapping[str, Any] | None) -> str:
    return "; the adapter as it is, which was nearer than its maps" if choice and choice["is_copied"] else ""


def _start_loss(manifest: Mapping[str, Any]) -> str:
    lost = manifest["start_loss"]
    parts = [
        (lost["low_rank"], f"of the norm of the {code(manifest['adapter']['kind'])} adapter, cut to low rank"),
        (lost["cut"], f"of the start's norm, cut to rank {manifest['rank']}"),
    ]
    return "".join(f"; it lacks {percent(share)} {what}" for share, what in parts if share > 0)


def _answers(record: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if record is None:
        return []
    shares = f"{percent(record['same_before'])} bare → {percent(record['same_after'])}"
    return [("answer as the teacher's", f"{shares} of {record['prompts']} held-out prompts")]


def _beyond(kinds: Sequence[str]) -> str:
    return ", ".join(map(code, kinds)) + ": taught by what the source adapter predicts"


def _model(record: Mapping[str, Any]) -> str:
    return quoted_name(record["name"]) + (f" at {code(record['revision'])}" if record["revision"] else "")


def _text(record: Mapping[str, Any]) -> str:
    names = [quoted_name(record[kind]) for kind in ("text", "prompts", "taught") if record[kind]]
    return ", ".join([code(record["regime"]), *names])


def _variants(passages: Mapping[str, int]) -> str:
    if not passages["variants"]:
        return ""
    return f"; {passages['variants']} of {passages['training']} passages are variants of prompts"


def _objective(recipe: Mapping[str, Any]) -> str:
    weights = {"KL": "kl_weight", "hidden MSE": "mse_weight", "chunk": "chunk_weight", "rehearsal": "rehearsal_weight"}
    return " + ".join(f"{number(recipe[field])} × {name}" for name, field in weights.items() if recipe[field])


def _pairing_summary(pairs: Sequence[Mapping[str, Any]]) -> str:
    alone = [pair["target"] for pair in pairs if not pair["sources"]]
    summary = f"{len(pairs) - len(alone)} of {len(pairs)} target modules have a partner in the source"
    if not alone:
        return summary
    more = f" and {len(alone) - _NAMED_MODULES} more" if len(alone) > _NAMED_MODULES else ""
    return f"{summary}; no update for {', '.join(map(code, alone[:_NAMED_MODULES]))}{more}"


def _evaluation(skills: Sequence[Skill]) -> str:
    if not skills:
        return "No task was evaluated: how much of the skill arrived is not known."
    rows = [row for skill in skills for row in _skill_rows(skill)]
    return (
        table(("task", "model", "score", "95 %", "NLL", "lift"), rows)
        + "\n\nLift is (transferred − bare target) / (retrained on the target − bare target), with a bootstrap 95 %"
        " interval. NLL is the mean negative log-likelihood of the right answer, in nats."
    )


def _skill_rows(skill: Skill) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for model, result in skill.scores.items():
        lift = skill.countable_lift if model == TRANSFERRED else None
        arrived = f"{percent(lift.lift)} {percent_interval(lift.ci95)}".strip() if lift else ""
        values = score(result.value), score_interval(result.interval), score(result.nll)
        rows.append((code(f"{skill.name} ({skill.metric})"), code(model), *values, arrived))
    return rows


def _needed_precision(bits: int | None) -> list[str]:
    if not bits:
        return []
    sentence = f"The adapter was trained beside a base model quantized to {bits} bits, and belongs to one."
    return [sentence + (" vLLM quantizes so only to 4." if bits == 8 else "")]


def _needed_stops(manifest: Mapping[str, Any]) -> list[str]:
    others = len(manifest["shared_vocabulary"].get("target_ends", ())) - 1
    if others < 1:
        return []
    return [
        f"{quoted_name(manifest['target']['name'])} predicts {others} tokens as it predicts the one that ends its"
        " texts, and a LoRA on its layers cannot part them: any of them ends an answer. Stop at all of them, which"
        " `shared_vocabulary.target_ends` in `castlora.json` lists: `stop_token_ids` of a request to vLLM or SGLang,"
        " `eos_token_id` of `generate`."
    ]


def _peft_snippet(manifest: Mapping[str, Any]) -> str:
    revision, bits = manifest["target"]["revision"], manifest["target_bits"]
    base = python_string(public_name(manifest["target"]["name"]))
    pinned = f"{base}, revision={python_string(revision)}" if revision else base
    kind = "AutoModelForImageTextToText" if manifest["target"].get("reads_images") else "AutoModelForCausalLM"
    classes = [kind, "AutoTokenizer", *(["BitsAndBytesConfig"] if bits else [])]
    quantized = f", quantization_config=BitsAndBytesConfig({_QUANTIZED[bits]})" if bits else ""
    return f"""\
from peft import PeftModel
from transformers import {", ".join(classes)}

tokenizer = AutoTokenizer.from_pretrained({pinned})
base = {kind}.from_pretrained({pinned}{quantized})
model = PeftModel.from_pretrained(base, "path/to/this/adapter")
"""


def _vllm_snippet(manifest: Mapping[str, Any]) -> str:
    revision = manifest["target"]["revision"]
    name = slug(manifest["adapter"]["name"])
    parts = ["vllm", "serve", public_name(manifest["target"]["name"])]
    parts += ["--revision", revision] if revision else []
    parts += ["--quantization", "bitsandbytes"] if manifest["target_bits"] == 4 else []
    parts += ["--enable-lora", "--max-lora-rank", str(manifest["rank"])]
    parts += ["--lora-modules", f"{name}=path/to/this/adapter"]
    return shlex.join(parts)

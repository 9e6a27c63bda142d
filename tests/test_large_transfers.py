"""The benchmark of large transfers, at the size of the demo."""

import json

from transformers import AutoTokenizer

from benchmarks.large_transfers import WAYS, long_prompts, main
from castlora.demonstration.bundle import SOURCE, TARGET, demo_models_path


def test_prompts_fill_a_passage_and_never_overflow_it():
    tokenizers = [AutoTokenizer.from_pretrained(demo_models_path() / name) for name in (SOURCE, TARGET)]
    prompts = long_prompts(tokenizers, 200, 9)
    lengths = [max(len(tokenizer(prompt).input_ids) for tokenizer in tokenizers) for prompt in prompts]
    assert len(set(prompts)) == 9
    assert all(150 < length <= 200 for length in lengths), lengths


def test_what_is_recorded_is_not_run_again_and_a_failure_is_recorded(tmp_path):
    record = tmp_path / "record.json"
    first, second, *_ = WAYS
    main(tmp_path / "work", record, "zoo", [first], steps=2, batch_size=2, length=64, passages=8)
    (entry,) = json.loads(record.read_text())["runs"].values()
    assert entry["exit_code"] == 0, (tmp_path / "work" / f"{first.replace(' ', '-')}.log").read_text()
    assert entry["seconds"] > 0
    main(tmp_path / "work", record, "zoo", [first, second], steps=2, batch_size=2, length=64, passages=8, limit=0)
    runs = json.loads(record.read_text())["runs"]
    assert runs[first] == entry
    assert runs[second]["exit_code"] == -1
    assert "seconds" not in runs[second]

"""What a run measures beside its result: the bare target, answers to other prompts, and how alike the models are."""

import json
from dataclasses import replace

import pytest
import tiny

from castlora import transfer
from castlora.publishing.runs import read_run


@pytest.fixture
def moved(base_model, adapter, prompts_file, tmp_path, checked_in_process):
    """Moves the adapter of a tiny Llama to a tiny Mistral in three steps."""

    def run(out: str = "out", **options):
        return transfer(
            str(adapter("llama")), str(base_model("mistral")), str(tmp_path / out), str(base_model("llama")),
            prompts=str(prompts_file), steps=3, batch_size=4,
            tuning=replace(tiny.SHORT, max_length=60, answer_tokens=6), **options,
        )  # fmt: skip

    return run


def test_the_bare_target_and_answers_to_other_prompts_are_the_controls(moved):
    result = moved()
    losses, scale = result.manifest["losses"], result.manifest["scale"]
    assert scale["tried"][0] == 0
    assert losses["held_out_bare"] == pytest.approx(scale["losses"][0], rel=1e-5)
    assert losses["held_out_bare"] != pytest.approx(losses["held_out_before"], rel=1e-5)
    assert 0 <= losses["agreement_bare"] <= 1
    assert 0 <= result.manifest["answers"]["same_by_chance"] <= 1
    fresh = moved("fresh", start="fresh").manifest["losses"]
    assert fresh["held_out_bare"] == pytest.approx(fresh["held_out_before"], rel=1e-5)


def test_the_report_shows_how_alike_paired_modules_are(moved):
    result = moved()
    measured = json.loads((result.folder / "report.json").read_text())["similarity"]
    assert measured["modules"].keys() == {pair["target"] for pair in result.manifest["pairing"]}
    assert (len(measured["layers"]), len(measured["layers"][0])) == (4, 3)
    page = (result.folder / "report.html").read_text()
    assert "Cells: CKA of hidden states, before the transfer" in page and "CKA of outputs" in page
    read = read_run(str(result.folder)).report.pairing
    assert [site.score for site in read.sites] == list(measured["modules"].values())
    assert read.matrix == measured["layers"]

"""Licences are read from cards and named, never guessed."""

import logging
import shutil
from pathlib import Path

import pytest

from castlora import inspect
from castlora.publishing import licences
from castlora.publishing.licences import describe_licences, licence_of, licences_differ


def card(folder: Path, front: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: qwen-research", "qwen-research"),
        ("license: other", "other"),
        ("license: [mit, gpl]", None),
        ("license: 'mit\u202e](javascript:x)'", None),
        ("license: mit\n license: [", None),
        ("- license", None),
        ("tags: [lora]", None),
        ("license: " + "[" * 50_000, None),
    ],
)
def test_a_folders_card_names_its_licence(front, licence, tmp_path):
    assert licence_of(card(tmp_path / "model", front)) == licence


def test_what_has_no_card_has_no_known_licence(tmp_path):
    (tmp_path / "text.txt").write_text("license: mit")
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    places = (str(tmp_path / "text.txt"), str(tmp_path), "nobody/has-this", "a/b/c", "x" * 5000)
    assert [licence_of(name) for name in places] == [None] * len(places)


def test_cards_of_the_hub_come_from_its_cache(tmp_path, monkeypatch):
    asked = []

    def download(name, file, revision, repo_type):
        asked.append((name, file, revision, repo_type))
        return str(Path(card(tmp_path / "cached", "license: odc-by")) / file)

    monkeypatch.setattr(licences, "hf_hub_download", download)
    assert licence_of("allenai/c4", repo_type="dataset") == "odc-by"
    assert asked == [("allenai/c4", "README.md", None, "dataset")]


def test_only_known_licences_differ():
    assert not licences_differ({"a": "mit", "b": "mit", "c": None})
    assert licences_differ({"a": "mit", "b": "gemma"})
    assert describe_licences({"a": None, "b": None}) == "Licences are not known: that of the a, that of the b."
    assert describe_licences({"a": "mit", "b": "mit"}) == "Licences: a mit, b mit."


@pytest.fixture
def models(base_model, adapter, tmp_path):
    names = {"source": base_model("llama"), "target": base_model("mistral"), "adapter": adapter("llama")}
    return {name: str(shutil.copytree(path, tmp_path / name)) for name, path in names.items()}


def test_unlike_licences_are_said_before_a_transfer(models, caplog):
    for name, licence in (("source", "llama2"), ("target", "apache-2.0")):
        card(Path(models[name]), f"license: {licence}")
    (Path(models["adapter"]) / "README.md").unlink(missing_ok=True)
    with caplog.at_level(logging.WARNING, "castlora"):
        found = inspect(**models)
    said = "Licences differ: source base model llama2, target base model apache-2.0; not known: that of the source"
    assert said in caplog.text and said in str(found)
    assert found.record["licences"] == {
        "source adapter": None, "source base model": "llama2", "target base model": "apache-2.0",
    }  # fmt: skip


def test_like_licences_need_no_warning(models, caplog):
    for name in models:
        card(Path(models[name]), "license: mit")
    found = inspect(**models)
    assert "Licences: source adapter mit, source base model mit, target base model mit." in str(found)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

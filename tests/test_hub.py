import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from castlora import UserError, pipeline, push
from castlora.adapters import files
from castlora.adapters.factors import LowRank, write_portable
from castlora.adapters.vocabulary import tokenizer_of
from castlora.cli import main
from castlora.models.loading import load_config, load_tokenizer, skeleton
from castlora.models.modules import linear_slots
from castlora.publishing import hub


@pytest.fixture
def moved(base_model, tmp_path):
    """What a transfer to a model of the hub leaves behind, and a file of the user's own."""
    config = load_config(str(base_model("llama")))
    slots = linear_slots(skeleton(config), config)
    factors = {name: LowRank(torch.ones(3, slot.d_in), torch.ones(slot.d_out, 3)) for name, slot in slots.items()}
    folder = tmp_path / "moved"
    write_portable(folder, factors, slots, 8, "owner/base", None)
    for name in ("README.md", "castlora.json", "report.html", "report.json", "notes.txt"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def uploads(monkeypatch):
    """What the hub was asked for."""
    asked = []

    class Api:
        def repo_exists(self, repo):
            asked.append(("look", repo, {}))

        def whoami(self):
            asked.append(("whoami", "", {}))

        def create_repo(self, repo, **options):
            asked.append(("create", repo, options))

        def upload_folder(self, **options):
            asked.append(("upload", options["repo_id"], options))
            return SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}/commit/1")

    monkeypatch.setattr(hub, "HfApi", Api)
    return asked


@pytest.mark.parametrize("report", [False, True])
def test_only_what_belongs_to_the_adapter_is_uploaded(moved, uploads, report):
    assert push(str(moved), "owner/name", private=True, report=report) == "https://hub/owner/name/commit/1"
    (_, created, how), (_, uploaded, what) = uploads
    assert created == uploaded == "owner/name" and how == {"private": True, "exist_ok": True}
    expected = ["adapter_config.json", "adapter_model.safetensors", "README.md", "castlora.json"]
    assert what["allow_patterns"] == expected + ["report.html"] * report
    assert what["folder_path"] == moved


def test_a_chat_template_beside_the_adapter_goes_along(moved, uploads, capsys):
    (moved / "chat_template.jinja").write_text("template")
    main(["push", "--adapter", str(moved), "--repo", "owner/name"])
    assert "chat_template.jinja" in uploads[1][2]["allow_patterns"]
    assert capsys.readouterr().out == "https://hub/owner/name/commit/1\n"


def test_an_adapter_that_names_its_base_by_a_folder_is_not_published(moved, uploads):
    path = moved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/home/ann/base"}))
    with pytest.raises(UserError, match=r"cannot be loaded everywhere: .* castlora check says all"):
        push(str(moved), "owner/name")
    (moved / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter_config"):
        push(str(moved), "owner/name")
    assert uploads == []


def test_an_adapter_without_a_card_is_not_published(moved, uploads):
    (moved / "README.md").unlink()
    with pytest.raises(UserError, match=r"has no README\.md; give a folder that castlora transfer wrote"):
        push(str(moved), "owner/name")
    assert uploads == []


@pytest.mark.parametrize("error", [HFValidationError("hf_secret"), HTTPError("Bearer hf_secret")])
def test_what_the_hub_answers_is_not_repeated(moved, monkeypatch, error):
    class Api:
        def create_repo(self, *_arguments, **_options):
            raise error

    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(
        UserError, match=rf"--repo 'a/b': the hub does not take it \({type(error).__name__}\)"
    ) as raised:
        push(str(moved), "a/b")
    assert "hf_secret" not in str(raised.value)


def test_without_a_network_the_command_ends_in_one_sentence(moved, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["push", "--adapter", str(moved), "--repo", "owner/name"])
    assert stopped.value.code == 2
    assert "the hub does not take it (OfflineModeIsEnabled)" in capsys.readouterr().err


class TestTransferAndPush:
    """`castlora transfer --push-to-hub`."""

    @pytest.fixture
    def run(self, moved, monkeypatch):
        """The command with a transfer that is done at once; the folders that it was to write."""
        written = []

        def transfer(_adapter, _target, out, **_settings):
            written.append(out)
            return SimpleNamespace(manifest={})

        monkeypatch.setattr(pipeline, "transfer", transfer)

        def command(*words, target="owner/base"):
            main(["transfer", "--adapter", "a", "--target", str(target), "--out", str(moved), *words])
            return written

        command.written = written
        return command

    def test_the_adapter_is_uploaded_when_it_is_written(self, run, moved, uploads):
        assert run("--push-to-hub", "owner/name", "--private", "true") == [str(moved)]
        assert [(what, repo) for what, repo, _ in uploads] == [
            ("look", "owner/name"), ("whoami", ""), ("create", "owner/name"), ("upload", "owner/name"),
        ]  # fmt: skip
        assert uploads[2][2]["private"] is True

    def test_nothing_is_uploaded_unless_asked_for(self, run, uploads):
        run()
        assert uploads == []

    def test_whoever_is_not_logged_in_hears_of_it_first(self, run, monkeypatch, capsys):
        class Api:
            def repo_exists(self, _repo):
                return False

            def whoami(self):
                raise LocalTokenNotFoundError("no token")

        monkeypatch.setattr(hub, "HfApi", Api)
        with pytest.raises(SystemExit) as stopped:
            run("--push-to-hub", "owner/name")
        assert stopped.value.code == 2 and run.written == []
        assert (
            "--push-to-hub 'owner/name': the hub does not take it (LocalTokenNotFoundError)" in capsys.readouterr().err
        )

    def test_a_name_that_is_none_and_a_target_in_a_folder_are_refused_first(self, run, tmp_path, capsys):
        for words, target, complaint in (
            (["--push-to-hub", "a/b/c"], "owner/base", "(HFValidationError)"),
            (["--push-to-hub", "owner/name"], tmp_path, "give --target by its hub id"),
        ):
            with pytest.raises(SystemExit) as stopped:
                run(*words, target=target)
            assert stopped.value.code == 2 and run.written == []
            assert complaint in capsys.readouterr().err


@pytest.fixture
def on_hub(monkeypatch, tmp_path):
    """A repository of the hub with what the folder `repository` holds."""

    def download(name, revision, allow_patterns):
        assert name == "owner/name" and revision is None
        repository, copy = tmp_path / "repository", tmp_path / "downloaded"
        names = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
        for one in filter_repo_objects(names, allow_patterns=allow_patterns):
            (copy / one).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / one, copy / one)
        return str(copy)

    monkeypatch.setattr(files, "snapshot_download", download)
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


def test_a_repository_with_pickled_weights_is_told_from_one_with_adapters_in_folders(on_hub, moved):
    shutil.copy(moved / "adapter_config.json", on_hub)
    (on_hub / "adapter_model.bin").touch()
    with pytest.raises(UserError, match=r"if it has adapter_model\.bin, download it and make a safe copy: castlora"):
        files.open_adapter("owner/name")
    assert not list(on_hub.parent.glob("downloaded/*.bin"))
    (on_hub / "adapter_config.json").rename(on_hub.parent / "adapter_config.json")
    shutil.rmtree(on_hub.parent / "downloaded")
    shutil.copytree(moved, on_hub / "first")
    with pytest.raises(UserError, match=r"adapters in folders \('first'\); download it and name the folder of one"):
        files.open_adapter("owner/name")


def test_the_chat_template_of_an_adapter_on_the_hub_is_read(on_hub, moved, base_model):
    shutil.copytree(moved, on_hub, dirs_exist_ok=True)
    (on_hub / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer, config = load_tokenizer(str(base_model("llama"))), load_config(str(base_model("llama")))
    assert (
        tokenizer_of(files.find_adapter("owner/name"), tokenizer, config).chat_template == "{{ messages[0].content }}"
    )


def test_the_tokenizer_of_an_adapter_on_the_hub_is_read(on_hub, moved, base_model):
    shutil.copytree(moved, on_hub, dirs_exist_ok=True)
    tokenizer, config = load_tokenizer(str(base_model("llama"))), load_config(str(base_model("llama")))
    own = load_tokenizer(str(base_model("llama")))
    own.add_special_tokens({"eos_token": "<|end|>"})
    own.save_pretrained(on_hub)
    assert (
        tokenizer_of(files.find_adapter("owner/name"), tokenizer, config).eos_token == "<|end|>" != tokenizer.eos_token
    )

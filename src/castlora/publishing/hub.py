"""Publishing: an adapter goes to the hub with its card and manifest, and nothing that was not asked for."""

import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

# The one that the hub's client raises where there is no network; the package does not list it as its own.
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

from castlora.adapters.files import CONFIG_FILE, TRANSLATION_FILE, WEIGHTS_FILE
from castlora.adapters.portable import check_portable
from castlora.errors import UserError
from castlora.publishing.licences import CARD_FILE
from castlora.publishing.manifest import MANIFEST_FILE
from castlora.publishing.record import REPORT_FILE
from castlora.text.chat import TEMPLATE_FILE

logger = logging.getLogger("castlora")

PUBLISHED = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, MANIFEST_FILE, TRANSLATION_FILE, TEMPLATE_FILE)
# What the hub's client raises where a name, a login or the network is not as it must be.
_REFUSALS = (HTTPError, HFValidationError, OSError)


def check_push(repo: str, targets: Sequence[str]) -> None:
    """Finds what would keep `push` from uploading an adapter, before a transfer has made it.

    Args:
        repo: OWNER/NAME
        targets: folder or hub id of each base model that there will be an adapter for

    Raises:
        UserError: nobody is logged in, the hub does not answer, there would be several adapters, or others could not
            load it.
    """
    if len(targets) != 1:
        raise UserError("--push-to-hub names one repository for several adapters; give each to castlora push.")
    [target] = targets
    if Path(target).exists():
        raise UserError(
            f"--push-to-hub: others could not load an adapter for the folder {target!r}; give --target by its hub id."
        )
    try:
        api = HfApi()
        api.repo_exists(repo)  # refuses what is no name of a repository
        api.whoami()
    except _REFUSALS as error:
        raise _refused("--push-to-hub", repo, error) from error


def push(adapter: str, repo: str, private: bool = False, report: bool = False) -> str:
    """Uploads an adapter to the hub, as whoever `hf auth login` has logged in.

    Args:
        adapter: folder that `castlora transfer` or `castlora translate` wrote
        repo: OWNER/NAME; made if there is none, and added to if there is
        private: whether a new repository is private
        report: whether the report goes along, which shows some of the prompts

    Returns:
        the address of the commit

    Raises:
        UserError: others could not load the adapter, or the hub does not take it; no file has been uploaded then.
    """
    folder = Path(adapter)
    findings = check_portable(folder)
    if findings:
        raise UserError(f"{adapter!r} cannot be loaded everywhere: {findings[0].problem} castlora check says all.")
    if not (folder / CARD_FILE).is_file():
        raise UserError(f"{adapter!r} has no {CARD_FILE}; give a folder that castlora transfer wrote.")
    files = [name for name in (*PUBLISHED, *([REPORT_FILE] if report else [])) if (folder / name).is_file()]
    return upload(folder, repo, private, files, "Upload adapter moved by castlora")


def upload(folder: Path, repo: str, private: bool, files: Sequence[str], message: str) -> str:
    """Uploads files of a folder to the hub, as whoever `hf auth login` has logged in.

    Args:
        folder: where they are
        repo: OWNER/NAME; made if there is none, and added to if there is
        private: whether a new repository is private
        files: their names or patterns
        message: of the commit

    Returns:
        the address of the commit

    Raises:
        UserError: the hub does not take it; no file has been uploaded then.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(files), commit_message=message)
    except _REFUSALS as error:
        raise _refused("--repo", repo, error) from error
    logger.info("Uploaded %s to %s", ", ".join(files), repo)
    return str(commit.commit_url)


def _refused(option: str, repo: str, error: Exception) -> UserError:
    # What the hub answers may quote the request; its type says enough.
    return UserError(
        f"{option} {repo!r}: the hub does not take it ({type(error).__name__}); log in with hf auth login, and give "
        "OWNER/NAME of a repository that you may write to."
    )

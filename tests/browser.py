"""Pages in a real browser, headless: what it shows, complains about and asks the network for."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium binary")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--dump-dom",
)  # fmt: skip


@dataclass(frozen=True)
class OpenedPage:
    """What became of a page."""

    dom: str
    log: str
    requests: list[str]
    """Addresses that the page, and not the browser of its own accord, asked the network for."""


def open_page(page: Path, scratch: Path) -> OpenedPage:
    """Opens a file as a user would, in a profile of its own."""
    assert CHROMIUM is not None
    network = scratch / "network.json"
    flags = [*_FLAGS, f"--user-data-dir={scratch / 'profile'}", f"--log-net-log={network}"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    record = json.loads(network.read_text(encoding="utf-8"))
    started = record["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [event.get("params", {}) for event in record["events"] if event["type"] == started]
    requests = [one["url"] for one in asked if one.get("network_isolation_key", "").startswith("file:")]
    return OpenedPage(done.stdout, done.stderr, requests)

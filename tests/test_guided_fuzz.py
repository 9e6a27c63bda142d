"""The harness of the guided search; the search itself is its command."""

import pytest

pytest.importorskip("atheris", reason="atheris is not installed")

from benchmarks import guided_fuzz
from benchmarks.fuzz import Target
from benchmarks.guided_fuzz import PLACES, read, try_bytes, write_seeds
from castlora.errors import UserError


def test_every_reader_starts_from_intact_files(tmp_path):
    write_seeds(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(PLACES)
    for path in tmp_path.iterdir():
        try_bytes(path.read_bytes())


def test_anything_but_a_refusal_in_one_line_is_a_failure(tmp_path, monkeypatch):
    def refuse(folder):
        content = (folder / "file").read_bytes()
        if content == b"crash":
            raise KeyError
        raise UserError(content.decode())

    target = Target(lambda folder: (folder / "file").touch(), refuse, ("file",))
    read(target, "file", b"refused")
    with pytest.raises(AssertionError, match="no line of text"):
        read(target, "file", b"two\nlines")
    monkeypatch.setattr(guided_fuzz, "PLACES", [(target, "file")])
    with pytest.raises(KeyError):
        try_bytes(b"\x00crash")

import pytest

from castlora.errors import UserError, first_line


@pytest.mark.parametrize(
    ("message", "quoted"),
    [
        ("Shapes differ. See the manual.", "Shapes differ"),
        ("\n  first line:\nsecond line", "first line"),
        ("", "ValueError"),
        ("type `\ud800` \x1b[31mred", "type `\\ud800` \\x1b[31mred"),
        ("x" * 1000, "x" * 200),
    ],
)
def test_what_a_library_says_becomes_one_printable_line(message, quoted):
    assert str(UserError(first_line(ValueError(message)))) == quoted


def test_a_sentence_of_ours_is_printable_whatever_it_names():
    assert str(UserError("Model 'a\x7fb\ud800' is none.")) == r"Model 'a\x7fb\ud800' is none."

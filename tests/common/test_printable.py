"""Text of files on a terminal: no character moves the cursor or changes the direction of text."""

import json
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from electra_ds.common.printable import (
    counted,
    json_text,
    printable,
    printable_lines,
    shortened,
    word_shown,
)


@given(st.text())
def test_printable_has_no_control_characters_and_can_be_encoded(text):
    result = printable(text)
    result.encode()
    kinds = {unicodedata.category(c) for c in result if c not in "\u200c\u200d"}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_letters_of_all_scripts_stay():
    text = "café 東京 हिन्दी العربية שלום 한국어 \U0001f600 نمی‌خواهم"
    assert printable(text) == text


def test_terminal_sequences_are_shown():
    assert printable("a\x1b[31mb\r\n\u202ec") == "a\\x1b[31mb\\r\\n\\u202ec"
    assert printable_lines("a\x1b\n\tb") == "a\\x1b\n\tb"


def test_shortened_is_bounded():
    assert shortened("x" * 10**6) == "'" + "x" * 76 + "..."
    assert shortened(10**300).endswith("...") and len(shortened(10**300)) == 80
    assert shortened({"a": [0] * 10**6}) == "a dict of 1"


def test_a_long_word_is_cut_and_printable():
    assert word_shown("漢" * 20) == "漢" * 20 and word_shown("漢" * 21) == "漢" * 20 + "..."
    assert word_shown("a\x1b") == "a\\x1b"


@given(st.recursive(st.text(), lambda part: st.lists(part) | st.dictionaries(st.text(), part)))
def test_json_holds_nothing_that_a_terminal_interprets(value):
    for indent in (None, 2):
        text = json_text(value, indent)
        assert json.loads(text) == value
        assert printable(text.replace("\n", "")) == text.replace("\n", "")
        text.encode()


def test_json_keeps_letters_of_all_scripts():
    letters = "café 東京 हिन्दी العربية \U0001f600 نمی\u200cخواهم"
    assert json_text([letters]) == f'["{letters}"]'
    escaped = "\x1b\x9b\x7f\u202e\u2066\ud800\u2028\U000e0041"
    expected = r"\u001b\u009b\u007f\u202e\u2066\ud800\u2028\udb40\udc41"
    assert json_text(escaped) == f'"{expected}"'


def test_one_of_a_kind_is_singular():
    found = [counted(number, "document") for number in (0, 1, 1234)]
    assert found == ["0 documents", "1 document", "1,234 documents"]

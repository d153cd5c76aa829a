"""Text of files on a terminal: no character moves the cursor or changes the direction of text."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from electra_ds.common.printable import counted, printable, printable_lines, shortened


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


def test_one_of_a_kind_is_singular():
    found = [counted(number, "document") for number in (0, 1, 1234)]
    assert found == ["0 documents", "1 document", "1,234 documents"]

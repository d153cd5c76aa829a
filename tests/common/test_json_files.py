"""Strict JSON: limits, undefined content, and records, each refused in one line."""

import json
import os
import time

import pytest

from electra_ds.common.errors import UserError
from electra_ds.common.json_files import (
    MAX_DEPTH,
    Record,
    _parts,
    parse_strictly,
    read_json,
    read_record,
    write_json,
)


class Sizes(Record):
    rows: int
    name: str = "a"
    parts: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "out of the range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5,000 digits"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
        (b"[" * 10 + b"]" * 10, "found a JSON list"),
        (b'{"a":' * (MAX_DEPTH + 2) + b"1" + b"}" * (MAX_DEPTH + 2), "nested more than"),
        (b'{"a":' * 100_000, "nested more than"),
        (b"[" * 200_000, "nested more than"),
    ],
)
def test_undefined_or_oversized_json_is_refused_in_one_line(tmp_path, content, expected):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path, "a record of sizes")
    message = str(error.value)
    assert expected in message and str(path) in message and "\n" not in message


def test_a_late_duplicate_key_is_found_in_linear_time():
    keys = "".join(f'"{number}": 0, ' for number in range(200_000))
    start = time.monotonic()
    with pytest.raises(ValueError, match="the key 'last' occurs twice"):
        parse_strictly("{" + keys + '"last": 0, "last": 1}')
    assert time.monotonic() - start < 30  # counting each key in the list took many minutes


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": "\\ud83d\\ude00"}')
    assert read_json(path, "text") == {"a": "\U0001f600"}


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    places = {"fifo": "not a regular file", ".": "is a folder", "none": "not found", "a\0b": "null"}
    for name, expected in {**places, "x" * 300: "too long"}.items():
        with pytest.raises(UserError, match=expected):
            read_json(f"{tmp_path}/{name}", "a record")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"rows": "1"}, "rows = '1'"),
        ({"rows": True}, "rows = True"),
        ({"rows": 1.5}, "rows = 1.5"),
        ({}, "rows: missing"),
        ({"rows": 1, "row": 2}, "row: unknown key"),
        ({"rows": 1, "parts": [1, None]}, "parts.1 = None"),
        ({"rows": 1, "name": {"deep": []}}, "name = a dict of 1"),
        ({"rows": None, "na\x1b[31mme": 1}, "na\\x1b[31mme: unknown key"),
    ],
)
def test_a_record_names_key_and_value(tmp_path, value, expected):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError) as error:
        read_record(path, Sizes, "a record of sizes")
    assert expected in str(error.value) and str(path) in str(error.value)


def test_a_record_is_read_as_it_was_written(tmp_path):
    sizes = Sizes(rows=3, parts=(1, 2))
    write_json(tmp_path / "x.json", sizes.model_dump())
    assert read_record(tmp_path / "x.json", Sizes, "a record of sizes") == sizes


def test_the_number_of_values_is_limited_before_parsing(monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    for text in ("[" + "{}," * 300 + "0]", '{"a":' * 300, "[" * 600, '["a",' * 300):
        with pytest.raises(ValueError, match="more than 256 values"):
            parse_strictly(text, max_values=256)
    monkeypatch.undo()
    assert len(parse_strictly("[" + "0," * 254 + "0]", max_values=256)) == 255
    marks = "[{,:" * 300 + '\\"[{,:\\\\' * 300  # marks in a string are no values
    assert parse_strictly(f'{{"{marks}": 1}}', max_values=256)


def test_the_parts_of_a_value_have_their_depths():
    value = {"a": [1, {"b": []}], "c": None}
    found = [(part, depth) for part, depth in _parts(value) if not isinstance(part, (dict, list))]
    assert found == [("a", 1), (1, 2), ("b", 3), ("c", 1), (None, 1)]


def test_letters_are_written_as_they_are_and_every_value_is_read_again(tmp_path):
    values = {"\u0e44\u0e17\u0e22": "\u0430 \u202e \u2028 \U0001f600"}
    write_json(tmp_path / "x.json", values)
    assert "\u0e44\u0e17\u0e22" in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "x.json", "values") == values
    write_json(tmp_path / "x.json", {"name": "\udcff"})  # of a file name that is not UTF-8
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"name": "\udcff"}

"""Readers of text lines, detection of formats, the plan, cleaning, and builtin:docs."""

import bz2
import gzip
import json
import lzma
import os
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.formats import jsonl as jsonl_format
from data_tools.formats import source as source_module
from data_tools.formats import text as text_formats
from data_tools.formats.documents import documents
from data_tools.formats.source import Source, Tally
from data_tools.inputs import docstring_corpus
from data_tools.inputs.plan import make_plan
from data_tools.pipeline.clean import clean_lines, text_hash
from electra_ds.common.errors import UserError

PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(
    source: Source, start: int = 0, end: int | None = None, tally: Tally | None = None
) -> list[str]:
    """The documents of a byte range, without white space at their ends."""
    texts = documents(
        source,
        start,
        source.size if end is None else end,
        text_field="text",
        tally=tally or Tally(),
        on_progress=lambda amount: None,
    )
    return [text.strip() for text in texts]


def source_of(path, content: bytes, format: str = "auto") -> Source:
    """The planned source of a file with this content."""
    path.write_bytes(content)
    return make_plan([str(path)], format=format).sources[0]


def wiki(texts: list[str]) -> bytes:
    return "".join(
        f'<doc id="{i}" title="t">\n{text}\n\n</doc>\n' for i, text in enumerate(texts)
    ).encode()


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def plain(texts: list[str]) -> bytes:
    return b"\n" + "\n \n\n".join(texts).encode()


TEXT = st.text(st.sampled_from("ab \u00e9\u65e5"), min_size=1, max_size=40).map(lambda t: f"x{t}y")


@pytest.mark.parametrize(("format", "write"), [("text", plain), ("wiki", wiki), ("jsonl", jsonl)])
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(TEXT | st.tuples(TEXT, TEXT).map("\n".join), min_size=1), step=st.integers(1, 60)
)
def test_any_byte_ranges_of_a_file_give_each_document_once(
    tmp_path_factory, format, write, texts, step
):
    source = source_of(tmp_path_factory.mktemp("cut") / "file", write(texts), format)
    ranges = [(at, min(at + step, source.size)) for at in range(0, source.size, step)]
    assert [text for start, end in ranges for text in read(source, start, end)] == texts


@pytest.mark.parametrize(
    ("format", "write"),
    [("text", plain), ("wiki", wiki), ("wikitext", plain), ("text_file", plain)],
)
@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.lists(TEXT, min_size=1).map("\n".join), min_size=1), step=st.integers(1, 60)
)
@example(texts=["x" + "a" * 38 + "y\nxy"], step=1)  # a part ends where its line does
def test_a_long_text_becomes_bounded_documents_for_any_byte_ranges(
    tmp_path_factory, format, write, texts, step
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_formats, "LONGEST", 40)
        source = source_of(tmp_path_factory.mktemp("cut") / "file", write(texts), format)
        tally = Tally()
        step = source.size if format == "text_file" else step
        found = [
            text
            for start in range(0, source.size, step)
            for text in documents(
                source,
                start,
                min(start + step, source.size),
                text_field="",
                tally=tally,
                on_progress=lambda amount: None,
            )
        ]
    assert not tally.bad  # no character was cut
    assert "".join("".join(found).split()) == "".join("".join(texts).split())
    # a document that is not yet long, and one more part
    assert all(len(text.encode()) < 2 * (40 + 3) for text in found)


def test_long_texts_are_cut_and_long_lines_of_json_are_counted_as_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "LONGEST", 10)
    monkeypatch.setattr(jsonl_format, "LONGEST_LINE", 1 << 20)
    tally, long = Tally(), jsonl(["x" * (2 << 20)])
    assert read(
        source_of(tmp_path / "a.jsonl", jsonl(["x" * 25, ""]) + long + jsonl(["y"])), tally=tally
    ) == ["x" * 10, "x" * 10, "x" * 5, "", "y"]
    assert tally.bad == {"longer than 1 MiB": 1}  # its other two parts are no lines


def test_a_line_of_many_values_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl_format, "MOST_VALUES", 50)
    marks = "[{,:" * 40  # inside of a string
    lines = [
        jsonl([marks]),
        b'{"text": "many", "x": [' + b"{}," * 40 + b"{}]}\n",
        b'{"text": "broken", "x": [' + b"[" * 60 + b"\n",
        jsonl(["y"]),
    ]
    tally = Tally()
    assert read(source_of(tmp_path / "a.jsonl", b"".join(lines)), tally=tally) == [marks, "y"]
    assert tally.bad == {"more than 50 values": 2} and tally.lines == 4


def test_formats_are_detected_from_name_and_content(tmp_path):
    found = {
        name: source_of(tmp_path / name, content).format
        for name, content in {
            "a.txt": b"some text",
            "b.txt": wiki(["x"]),
            "c.jsonl": b"broken",
            "d.json": jsonl(["x"]),
            "e.gz": gzip.compress(wiki(["x"])),
            "f.jsonl.xz": lzma.compress(jsonl(["x"])),
            "g": b"\n\n{not json\n",
        }.items()
    }
    assert found == {
        "a.txt": "text",
        "b.txt": "wiki",
        "c.jsonl": "jsonl",
        "d.json": "jsonl",
        "e.gz": "wiki",
        "f.jsonl.xz": "jsonl",
        "g": "text",
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'"text"\n'),
        ("b.tar.gz", gzip.compress(b"x.txt\0\0\0")),
        ("c", b"\x7fELF\0\0"),
        ("d.arrow", b"ARROW1"),
    ],
)
def test_files_that_are_not_text_are_refused(tmp_path, name, content):
    with pytest.raises(UserError, match=rf"{name}: not text"):
        source_of(tmp_path / name, content)


def test_a_file_can_be_one_document(tmp_path):
    assert read(source_of(tmp_path / "a.txt", b"one\n\ntwo\n", "text_file")) == ["one\n\ntwo"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_give_the_documents_of_plain_ones(tmp_path, suffix):
    texts = [f"document {i} \u00e9" * 50 for i in range(100)]
    packed = PACKERS[suffix](wiki(texts[:60])) + PACKERS[suffix](
        wiki(texts[60:])
    )  # two streams in one file
    assert read(source_of(tmp_path / f"file{suffix}", packed)) == texts


@pytest.mark.parametrize("suffix", PACKERS)
def test_the_error_for_a_truncated_file_names_it(tmp_path, suffix):
    packed = PACKERS[suffix](wiki([f"document {i * i}" for i in range(5000)]))
    with pytest.raises(UserError, match=rf"file{suffix}: broken after byte \d+"):
        read(source_of(tmp_path / f"file{suffix}", packed[: len(packed) - 9]))


@pytest.mark.parametrize("suffix", PACKERS)
def test_the_error_for_a_damaged_file_names_it(tmp_path, suffix):
    packed = bytearray(PACKERS[suffix](wiki([f"document {i * i}" for i in range(5000)])))
    packed[16:80] = b"\xff" * 64
    with pytest.raises(UserError, match=rf"file{suffix}: broken after byte \d+"):
        read(source_of(tmp_path / f"file{suffix}", packed))


def test_the_error_for_zst_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match=r"^reading \.zst needs the zstandard package"):
        source_of(tmp_path / "file.zst", zstandard.compress(b"text"))


def test_bad_lines_are_counted_by_class_with_their_locations(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b'{"other": 1}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[]",
        b'{"text": "x", "number": ' + b"1" * 5000 + b"}",
    ]
    tally = Tally()
    assert read(source_of(tmp_path / "a.jsonl", b"\n".join(lines)), tally=tally) == ["good"]
    assert tally.bad == {
        "not JSON": 2,
        "no field 'text'": 1,
        "not a JSON object": 1,
        "not UTF-8": 1,
        "half a surrogate pair": 1,
    }
    assert tally.locations[0] == "a.jsonl: byte 17: not JSON" and tally.lines == 7
    tally = Tally()
    assert read(source_of(tmp_path / "b.txt", b"one\n\xfftwo\nthree\n"), tally=tally) == [
        "one\nthree"
    ]
    assert tally.bad == {"not UTF-8": 1} and tally.locations == ["b.txt: byte 4: not UTF-8"]
    tally = Tally()
    assert read(source_of(tmp_path / "c.txt", b"<doc>\none\n<doc>\ntwo\n"), tally=tally) == [
        "one",
        "two",
    ]
    assert tally.bad == {"<doc> without </doc>": 2}


def test_the_plan_does_not_depend_on_folder_or_order(tmp_path):
    for root in ("one", "two"):
        (tmp_path / root / "sub").mkdir(parents=True)
        for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden"):
            (tmp_path / root / name).write_text(f"text of {name}")
    whole = make_plan([str(tmp_path / "one")])
    parts = make_plan(
        [
            str(tmp_path / "two" / "sub"),
            str(tmp_path / "two" / "*.txt"),
            str(tmp_path / "two" / "a.txt"),
        ]
    )
    assert whole.identity() == parts.identity()
    assert [s.name for s in whole.sources] == ["a.txt", "b.txt", "sub/c.txt"]
    assert len(whole.units) == 1  # small files share a unit


def test_large_files_are_divided_and_compressed_ones_are_not(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    (tmp_path / "b.txt").write_bytes(b"x" * 5)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"x" * 100))
    size = (tmp_path / "c.txt.gz").stat().st_size
    assert make_plan([str(tmp_path)], unit_bytes=40).units == (
        ((0, 0, 40),),
        ((0, 40, 80),),
        ((0, 80, 100),),
        ((1, 0, 5),),
        ((2, 0, size),),
    )


def test_links_are_followed_once_and_folders_that_a_glob_matches_are_read(tmp_path, monkeypatch):
    for name in ("in/a.txt", "in/sub.txt/b.txt", "other/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "in" / "again.txt").symlink_to("a.txt")
    (tmp_path / "in" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "linked").symlink_to("../other")
    monkeypatch.chdir(tmp_path / "other")
    names = ["in/a.txt", "in/sub.txt/b.txt", "other/c.txt"]
    for inputs in (
        ["../in"],
        ["../in/*"],
        ["../in/**"],
        ["../in/*.txt", "c.txt", "../in/up/up/linked/c.txt"],
    ):
        plan = make_plan(
            [*inputs, str(tmp_path / "in" / "a.txt"), f"file://{tmp_path}/in/again.txt"]
        )
        assert [source.name for source in plan.sources] == names, inputs
    (tmp_path / "in" / "gone.txt").symlink_to("nothing")
    for name in ("../in", "../in/*", "../in/gone.txt"):
        with pytest.raises(
            UserError, match=r"in/gone.txt: neither a file nor a folder, or a link to nothing"
        ):
            make_plan([name])


@pytest.mark.parametrize("closed", ["in/a.txt", "in"])
def test_the_error_for_a_file_without_read_permission_names_it(closed):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        (Path(folder) / "in" / "a.txt").write_text("text")
        os.chmod(folder, 0o755)
        os.chmod(Path(folder) / closed, 0)
        if root := os.geteuid() == 0:
            os.seteuid(65534)  # a user without rights
        try:
            with pytest.raises(
                UserError, match=rf"cannot be read \(.*Permission denied: '{folder}/{closed}'"
            ):
                make_plan([f"{folder}/in"])
        finally:
            if root:
                os.seteuid(0)
            os.chmod(Path(folder) / closed, 0o755)


@pytest.mark.parametrize(
    ("change", "start"),
    [
        (lambda text: text[:-1], 0),
        (lambda text: text[:-1], 50),
        (lambda text: text + b"x", 0),
        (lambda text: b"x" + text[1:], 0),
    ],
)
def test_the_error_for_a_file_that_changed_after_the_plan_names_it(tmp_path, change, start):
    text = b"0123456789" * 10
    source = source_of(tmp_path / "a.txt", text)
    (tmp_path / "a.txt").write_bytes(change(text))
    with pytest.raises(
        UserError, match=rf"^a.txt: changed since the start: {len(change(text))} bytes, 100 then"
    ):
        read(source, start)


@pytest.mark.parametrize("suffix", PACKERS)
def test_empty_files_hold_no_document(tmp_path, suffix):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, content in ((f"a{suffix}", b""), (f"a.jsonl{suffix}", b"\n")):
        (tmp_path / name).write_bytes(PACKERS[suffix](content))
    plan = make_plan([str(tmp_path)])
    assert (
        len(plan.sources) == 4 and [text for source in plan.sources for text in read(source)] == []
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [(["none/*.txt"], "no such file"), ([], "no input"), (["empty.txt"], "are empty")],
)
def test_missing_and_empty_inputs_are_refused(tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=message):
        make_plan(inputs)


def test_cleaning_keeps_text_and_removes_control_characters():
    lines, removed = clean_lines(
        "caf\x01e\u200b\u0301 \x00one\x07\r\n\n \ttwo\u200b\x85three\u2028four\ufeff\ufffd"
    )
    assert removed == 7 and lines == ["caf\u00e9 one", "two", "three", "four"]
    assert all(unicodedata.is_normalized("NFC", line) for line in lines)


def test_texts_that_differ_in_case_and_space_have_one_hash():
    assert (
        text_hash(["One  two", "three"])
        == text_hash(["one TWO three"])
        != text_hash(["one two four"])
    )


PROSE = "This sentence explains in plain English words what the function is good for."


def test_builtin_docs_hold_each_paragraph_of_prose_once_and_no_code(tmp_path):
    module = f'''"""{PROSE}

    >>> print("this line is code, so it and its paragraph stay out of the text")

    x : int
        The number of rows that the reader takes from the file at a time.

    -----------------------------------------------------------------------------

    The class :class:`~pkg.Reader` and ``read`` are what most people ever need to know.
    """
raise SystemExit("nothing is imported")
class A:
    def f(self):
        """{PROSE}"""
'''
    (tmp_path / "m.py").write_text(module)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "n.py").write_text(module.replace("plain", "simple"))
    (tmp_path / "broken.py").write_text('"""' + PROSE + '"""\nthis is no python')
    found = [
        text
        for _, _, text in docstring_corpus.documents(docstring_corpus.source_files([tmp_path]))
        if text
    ]
    assert found == [
        f"{PROSE}\nThe number of rows that the reader takes from the file at a time.\n"
        "The class pkg.Reader and read are what most people ever need to know."
    ]


def test_the_standard_library_holds_enough_prose():
    files = [
        (name, path)
        for name, path in docstring_corpus.source_files()
        if name in ("argparse.py", docstring_corpus.TOPICS)
    ]
    texts = [text for _, _, text in docstring_corpus.documents(files) if text]
    assert len(texts) > 50 and sum(map(len, texts)) > 100_000
    assert not any(">>>" in text for text in texts)

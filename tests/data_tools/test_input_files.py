"""The files of an input that are read, and the messages for those that are not text."""

import glob
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from running import run_cli

from data_tools.formats.detect import detect_format
from data_tools.formats.documents import documents
from data_tools.formats.source import Tally, check_bad_lines
from data_tools.inputs.matching import local_matches
from data_tools.inputs.plan import make_plan
from data_tools.inspect_rows import describe_rows
from data_tools.prepare import prepare
from data_tools.train_tokenizer import train_tokenizer
from data_tools.verify import verify
from electra_ds.common.encodings import wide_encoding
from electra_ds.common.errors import UserError
from electra_ds.data.shard_format import read_manifest

TEXT = "the river is old .\n\nthe house of stone .\n\nlight on the water .\n" * 20


def names(*inputs: object, **options) -> list[str]:
    return [source.name for source in make_plan([*map(str, inputs)], **options).sources]


def read(path: Path, field: str = "text", format: str = "auto") -> list[str]:
    return [
        text.strip()
        for source in make_plan([str(path)], format=format).sources
        for text in documents(
            source, 0, source.size, text_field=field, tally=Tally(), on_progress=lambda amount: None
        )
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a text and its vocabulary."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(TEXT)
    train_tokenizer([str(tmp_path / "in")], tmp_path / "in/T", vocab_size=64)
    return tmp_path / "in"


def test_outputs_inside_of_the_input_are_no_inputs(folder: Path) -> None:
    options = dict(sequence_length=16, valid_fraction=0, units=folder / "U")
    for _ in range(2):  # the second time it is complete
        manifest = prepare([str(folder)], folder / "T", folder / "D", **options)
    assert manifest.source.files == ("a.txt",)
    shutil.rmtree(folder / "D")
    for given in (folder, f"{folder}/*", f"{folder}/**", f"{folder}/../in"):
        assert names(given, outputs=[folder / "U"]) == ["a.txt"]
    made = prepare([str(folder)], folder / "T", folder / "D", **options)  # as after a kill
    assert made.dataset_id == manifest.dataset_id
    train_tokenizer([str(folder)], folder / "T", vocab_size=64)  # again


def test_an_input_inside_of_the_output_is_refused(folder: Path) -> None:
    for given in (folder / "D/x.txt", folder / "D/y/z.txt"):
        given.parent.mkdir(exist_ok=True, parents=True)
        if not given.exists():
            given.write_text("x")
        with pytest.raises(UserError, match="this input lies in the folder of the output"):
            prepare([str(given)], folder / "T", folder / "D", sequence_length=16)
    with pytest.raises(UserError, match="this input lies in the folder of the output"):
        prepare([str(folder)], folder / "T", folder, sequence_length=16)


def test_the_vocabulary_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    for tokenizer in (tmp_path, tmp_path / "vocab.txt"):
        out = tmp_path / f"D-{tokenizer.name}"
        options = dict(sequence_length=16, valid_fraction=0)
        assert prepare([str(tmp_path)], tokenizer, out, **options).source.files == ("a.txt",)
    assert names(tmp_path / "vocab.txt", vocabulary=tmp_path) == ["vocab.txt"]  # named by the user


def test_links_that_double_in_every_folder_are_searched_once(tmp_path: Path) -> None:
    for level in range(40):
        (tmp_path / f"d{level}").mkdir()
        for name in "ab":
            (tmp_path / f"d{level}/{name}").symlink_to(f"../d{level + 1}")
    (tmp_path / "d40").mkdir()
    (tmp_path / "d40/x.txt").write_text("x")
    assert names(tmp_path / "d0") == ["x.txt"]


@pytest.mark.parametrize("pattern", ["**/*.txt", "**", "**/", "**/**/x.txt", "*/**/x.*"])
def test_links_to_a_folder_around_them_do_not_multiply_the_matches(tmp_path: Path, pattern) -> None:
    (tmp_path / "F" / "sub").mkdir(parents=True)
    for folder in (tmp_path / "F", tmp_path / "F" / "sub"):
        (folder / "x.txt").write_text("x")
        for name in "ab":
            (folder / name).symlink_to(tmp_path / "F")
    assert names(tmp_path / "F" / pattern) == ["sub/x.txt", "x.txt"]


@pytest.mark.parametrize(
    "pattern",
    ["**", "**/*.txt", "**/", "a/**", "**/b/*", "**/**/*.txt", "a*/**/[x]*", "*/**", "[[]c]/**/x*"],
)
def test_patterns_match_what_glob_matches(tmp_path: Path, monkeypatch, pattern) -> None:
    for name in ("x.txt", "a/x.txt", "a/b/x.md", "a/b/.hidden/x.txt", "a2/b/y.txt", "[c]/d/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    for given in (pattern, f"{tmp_path}/{pattern}"):
        expected = {os.path.normpath(match) for match in glob.glob(given, recursive=True)}
        assert {os.path.normpath(match) for match in local_matches(given)} == expected


def test_another_vocabulary_in_the_folder_is_refused_before_the_training(folder: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        raise AssertionError("training has begun")

    for name, kind in (
        ("vocab.txt", "unigram"),
        ("spm.model", "wordpiece"),
        ("tokenizer.json", "bpe"),
    ):
        out = folder / f"with-{name}"
        out.mkdir()
        (out / name).write_text("x")
        with pytest.raises(UserError, match=f"holds {name}, which would be read beside the new"):
            train_tokenizer([str(folder)], out, kind=kind, vocab_size=64, progress=progress)
        assert os.listdir(out) == [name]
    for out in (folder / "a.txt", folder / "a.txt/T", Path("/proc/T"), folder / ("x" * 300)):
        with pytest.raises(UserError, match=r"--out .*: "):
            train_tokenizer([str(folder)], out, vocab_size=64, progress=progress)


# ---------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "first",
    [
        "{{Short description|A river}}",
        "{{Infobox",
        r"{\bf The river} is {old}",
        "{the river, the house}",
        "{",
        "{}}",
    ],
)
def test_a_text_that_begins_with_a_brace_is_text(tmp_path: Path, first: str) -> None:
    (tmp_path / "a.txt").write_text(f"{first}\nThe river is old .\n\nThe house .\n")
    assert read(tmp_path / "a.txt") == [f"{first}\nThe river is old .", "The house ."]


def test_a_broken_object_in_the_first_line_is_not_guessed(tmp_path: Path) -> None:
    for content in ('{"text": "one"}\n', '{"text": "one", }\n', '{"text": NaN"}\n'):
        (tmp_path / "a").write_text(content * 3)
        if content == '{"text": "one"}\n':
            assert read(tmp_path / "a") == ["one"] * 3
        else:
            with pytest.raises(UserError, match=r"--format jsonl if .* or --format text"):
                read(tmp_path / "a")
            assert len(read(tmp_path / "a", format="text")[0]) > 20
    assert detect_format("a", b'{"text": "' + b"x" * 70_000) == "jsonl"  # cut by the head


def test_a_nul_in_the_first_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\0two\nthree\n")
    with pytest.raises(UserError, match=r"byte 3 of its first line is NUL.* set --format"):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", format="text") == ["one\0two\nthree"]


@pytest.mark.parametrize("name", ["a.txt", "a.parquet", "a.jsonl.gz", "a.tar", "a.arrow"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    for format in ("auto", "text", "jsonl"):
        with pytest.raises(UserError, match=f"^{name}: a Git LFS pointer.*git lfs pull"):
            make_plan([str(tmp_path)], format=format)


def test_the_type_of_a_column_that_is_no_text_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    from pyarrow import parquet

    columns = {
        "number": [1, 2],
        "list": [["a"], ["b"]],
        "nested": [{"text": "a"}, {"text": "b"}],
        "date": pyarrow.array([1, 2], pyarrow.date32()),
        "text": ["one", None],
        "bytes": [b"one", b"two"],
        "dictionary": pyarrow.array(["one", "one"]).dictionary_encode(),
        "large": pyarrow.array(["one", "two"], pyarrow.large_string()),
        "view": pyarrow.array(["one", "two"], pyarrow.string_view()),
    }
    table = pyarrow.table(columns)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        for column in ("number", "list", "nested", "date"):
            with pytest.raises(
                UserError,
                match=rf"the column '{column}' holds values of type .*, no text; expected",
            ):
                read(tmp_path / name, column)
        for column in ("text", "bytes", "dictionary", "large", "view"):
            assert read(tmp_path / name, column)[0] == "one"
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", twice.schema) as writer:
        writer.write_table(twice)
    with pytest.raises(UserError, match="2 columns 'text' of text"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("value", ["null", "1", "[]", "{}", "true"])
def test_a_field_without_text_is_named_as_it_is(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"sentence": {value}, "id": 3}}\n')
    tally = Tally()
    (source,) = make_plan([str(tmp_path)]).sources
    for field in ("sentence", "text"):
        list(documents(source, 0, 1000, text_field=field, tally=tally, on_progress=print))
    (found, missing) = tally.bad
    kind = {"null": "null", "1": "int", "[]": "list", "{}": "dict", "true": "bool"}[value]
    assert found == f"no text in field 'sentence' ({kind})"
    assert missing == "no field 'text'"


# ------------------------------------------------------------------------------------- file names


def test_names_that_are_not_utf8_or_move_the_cursor_are_printable(folder: Path) -> None:
    shutil.move(folder / "a.txt", os.fsencode(folder) + b"/caf\xe9\x1b[2J.txt")
    out = folder.parent / "D"
    done = run_cli(
        *("prepare", "--input", folder, "--tokenizer", folder / "T", "--out", out),
        *("--sequence-length", 16, "--valid-fraction", 0),
    )
    assert read_manifest(out).source.files == ("caf\\xe9\\x1b[2J.txt",)
    assert verify(out) == []
    list(describe_rows(out, "train", [0], inputs=[str(folder)]))
    shown = run_cli("inspect", out, 0, "--source", PYTHONIOENCODING="utf-8")
    assert "caf\\xe9\\x1b[2J.txt" in shown.stdout and "\x1b" not in shown.stdout + done.stdout
    record = json.loads((out / "prepare.json").read_text())
    assert record["files"][0][0] == "caf\\xe9\\x1b[2J.txt"


# --------------------------------------------------------------------------- files that are not text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "the river\n".encode("utf-16"), "in UTF-16; convert it: iconv -f UTF-16"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "in UTF-16; convert it: iconv"),
        ("a.txt", "the river\n".encode("utf-32"), "in UTF-32; convert it: iconv -f UTF-32"),
        ("a.txt", "the river\n".encode("utf-16").replace(b"\xff\xfe", b"\xfe\xff", 1), "in UTF-16"),
        ("a.pdf", b"%PDF-1.4\n1 0 obj\n", "a PDF; extract its text"),
        ("a.docx", b"PK\x03\x04 word\n", "a zip archive, as .docx"),
        ("a.txt", gzip.compress(b"the river\n"), "compressed by gzip; add .gz to its name"),
    ],
)
def test_a_file_that_is_not_text_is_named_with_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{name}: not text .*{message}"):
        make_plan([str(tmp_path / name)])


def test_a_folder_without_inputs_and_an_unreadable_one_are_not_said_to_be_missing(
    tmp_path, monkeypatch
):
    (tmp_path / "README.md").write_text("a card")
    with pytest.raises(UserError, match=r"no input file in this folder; .*README\.md"):
        make_plan([str(tmp_path)])

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("data_tools.inputs.plan.os.lstat", denied)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read .*Permission denied"):
        make_plan([str(tmp_path / "a.txt")])


def test_the_rest_of_a_line_that_is_too_long_is_no_line(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.formats.jsonl.LONGEST_LINE", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "' + "x" * 350 + '"}\n{"text": "two"}\n')
    (source,), tally = make_plan([str(path)]).sources, Tally()
    texts = documents(
        source, 0, source.size, text_field="text", tally=tally, on_progress=lambda amount: None
    )
    assert list(texts) == ["one", "two"] and tally.lines == 3 and tally.bad.total() == 1


# ------------------------------------------------------------- tables, JSON values, other encodings


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz"])
def test_a_table_is_refused_unless_the_user_says_that_it_is_text(tmp_path: Path, name: str) -> None:
    content = "id,text\n1,one two\n"
    packed = gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(UserError, match=rf"^{name}: a table.*JSONL.*--text-field.*--format text"):
        make_plan([str(tmp_path)])
    assert read(tmp_path / name, format="text") == [content.strip()]


def test_a_text_field_without_an_input_that_has_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(UserError, match="--text-field 'body': the inputs are read as text"):
        make_plan([str(tmp_path)], text_field="body")
    assert len(make_plan([str(tmp_path)]).sources) == 1
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n')
    assert len(make_plan([str(tmp_path)], text_field="body").sources) == 2


def test_the_text_field_of_each_command_is_checked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\n" * 50)
    given = ["--input", tmp_path / "a.txt", "--out", tmp_path / "t"]
    run = run_cli("train-tokenizer", *given, "--text-field", "body", check=False)
    assert run.returncode == 2 and "--text-field 'body'" in run.stderr
    assert run_cli("train-tokenizer", *given, "--vocab-size", 80).returncode == 0
    given = ["--input", tmp_path / "a.txt", "--tokenizer", tmp_path / "t", "--out", tmp_path / "d"]
    run = run_cli("prepare", *given, "--text-field", "body", check=False)
    assert run.returncode == 2 and "--text-field 'body'" in run.stderr
    assert run.stdout.strip() == ""  # no bar, and no empty line for it


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("a.json", '[{"text": "one"}, {"text": "two"}]', r"an array.*jq -c '\.\[\]'"),
        ("a.jsonl", '\n[\n  {\n    "text": "one"\n  }\n]\n', r"an array.*jq -c '\.\[\]'"),
        ("a.json", '{\n  "text": "one"\n}\n', r"an object.*jq -c '\.'"),
    ],
)
def test_one_json_value_over_the_lines_is_named(
    tmp_path: Path, name: str, content: str, advice: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"^{name}: the file is one JSON value, {advice}"):
        make_plan([str(tmp_path)])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text",
    [
        "za\u017c\u00f3\u0142\u0107 1\n",
        "\u4e0a\u6d77 \u5317\u4eac\n",
        "\u0432\u0447\u0435\u0440\u0430\n",
        "\u0e04\u0e23\u0e39\u0e2d\u0e48\u0e32\u0e19\n",
    ],
)
def test_utf16_and_utf32_without_a_mark_are_named(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes((text * 20).encode(encoding))
    wanted = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    for format in ("auto", "text"):
        with pytest.raises(UserError, match=f"in {wanted}; convert it: iconv -f {wanted}"):
            make_plan([str(tmp_path)], format=format)


def test_bytes_that_are_no_utf16_are_not_named_so() -> None:
    for content in (b"hello\0 world, hello\n", b"one\0two\n", bytes(range(256)), b"\0" * 40):
        assert wide_encoding(content) is None


def test_the_fields_of_lines_without_the_text_field_are_named_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "\u092a\u093e\u0920": "x"}\n' * 30)
    tally = Tally()
    (source,) = make_plan([str(tmp_path)]).sources
    given = {"text_field": "text", "tally": tally, "on_progress": lambda amount: None}
    assert list(documents(source, 0, source.size, **given)) == []
    with pytest.raises(UserError) as caught:
        check_bad_lines(tally, 0.001)
    message = str(caught.value)
    assert message.startswith("30 of 30 lines") and message.count("byte ") == 3
    assert message.count("(found 'id', '\u092a\u093e\u0920')") == 1
    assert "give the field of the text as --text-field" in message

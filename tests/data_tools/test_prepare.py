"""prepare: all tokens are kept, their source is known, any workers write the same bytes, resume."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import FILES, WITH_SUPPORT
from small_corpus import ENTRIES, WORDS, contents, endless, text_of
from small_corpus import prepare_corpus as run

from data_tools.inspect_rows import describe_rows, source_reader
from data_tools.pipeline import units as units_module
from data_tools.pipeline.dedup import HASHES_AT_ONCE
from data_tools.pipeline.markers import claim_folder
from data_tools.pipeline.pack import best_fit, concat
from data_tools.prepare import prepare
from data_tools.verify import verify
from data_tools.workers import pool
from electra_ds.common.errors import LockedOut, RunFailure, UserError
from electra_ds.common.json_files import read_json, write_json
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import load_tokenizer

VERSION_0_1 = FILES / "version-0.1"
PACKINGS = ("best_fit", "concat", "google")


def documents_of(data) -> dict[str, dict[tuple[int, int], list[int]]]:
    """Return the ids of each document, joined from its fragments: split -> (unit, document) -> ids.

    Fails if a token of a document is missing or occurs twice.
    """
    documents = {}
    for split in ("train", "valid"):
        reader, parts = ShardReader(data, split), {}
        for block in range(len(reader.blocks)):
            rows = reader.block(block)
            for row, start, length, unit, document, token in reader.fragments(block).tolist():
                ids = rows[row, start : start + length].tolist()
                parts.setdefault((unit, document), []).append((token, ids))
        documents[split] = {}
        for key, fragments in parts.items():
            fragments.sort()
            ends = np.cumsum([len(ids) for _, ids in fragments])
            assert [token for token, _ in fragments] == [0, *ends[:-1]]
            documents[split][key] = [i for _, ids in fragments for i in ids]
    return documents


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_token_of_every_document_is_in_one_row_with_its_source(corpus, tmp_path, packing):
    manifest = run(corpus, tmp_path / "data", packing=packing)
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    prepared = documents_of(tmp_path / "data")
    read_unit = source_reader(tmp_path / "data", [str(corpus / "in")])
    texts = {
        (unit, number): document.text
        for unit in range(len(manifest.source.units))
        for number, document in enumerate(read_unit(unit))
    }
    source = dict(zip(texts, tokenizer.encode_batch(list(texts.values())), strict=True))
    first = {tuple(ids): key for key, ids in reversed(source.items())}  # of equal documents
    assert (len(source), len(first)) == (330, 300)
    assert prepared["train"] | prepared["valid"] == {key: list(ids) for ids, key in first.items()}
    assert not prepared["train"].keys() & prepared["valid"].keys()
    assert manifest.removed == {
        "control_characters": 0,
        "repeated_lines": 0,
        "too_short": 0,
        "filtered": 0,
        "duplicates": 30,
        "near_duplicates": 0,
    }
    assert len(manifest.splits["train"].shards) > 2 and len(manifest.source.units) > 5
    assert verify(tmp_path / "data") == []
    for split, info in manifest.splits.items():
        assert info.tokens == sum(map(len, prepared[split].values()))
        assert info.documents == len(prepared[split])


def test_inspect_with_the_inputs_names_file_byte_range_and_title(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "data")
    inputs = [str(corpus / "in")]
    head, *lines = describe_rows(tmp_path / "data", "train", [0], inputs=inputs)
    assert f" padding, {len(lines) // 3} document fragment" in head
    for fragment, origin, title in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        pattern = (
            r"    from ([ab]\.\w+), bytes (\d+)-(\d+): document \d+, token (\d+) \(unit (\d+)\)"
        )
        file, start, end, token, unit = re.fullmatch(pattern, origin).groups()
        segment = (manifest.source.files.index(file), int(start), int(end))
        assert segment in manifest.source.units[int(unit)]
        first_word = title.removeprefix("    title: ").lower().split()[0]
        assert (fragment.split()[1] == first_word) == (token == "0")
    with pytest.raises(UserError, match=r"b\.txt: not among the files of --input"):
        source_reader(tmp_path / "data", [str(corpus / "in" / "*.wiki")])


def test_inspect_numbers_documents_of_small_files_by_unit_and_with_the_inputs_by_file(
    corpus, tmp_path
):
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.txt").write_text(f"n{2 * i} alpha\n\nn{2 * i + 1} beta")
    inputs = [str(tmp_path / "in")]
    prepare(inputs, corpus / "tok", tmp_path / "data", sequence_length=64, valid_fraction=0)
    by_unit = list(describe_rows(tmp_path / "data", "train", [0], source=True))
    files = "; ".join(f"{i}.txt, bytes 0-17" for i in range(3))
    for fragment, origin in zip(by_unit[1::2], by_unit[2::2], strict=True):
        number = int(fragment.split()[1].removeprefix("n"))
        end = f"document {number} of these files, token 0 (unit 0)"
        assert origin == f"    from {files}; 2 more files: {end}"
    by_file = list(describe_rows(tmp_path / "data", "train", [0], inputs=inputs))
    assert len(by_file) == 1 + 3 * 10
    for fragment, origin, title in zip(by_file[1::3], by_file[2::3], by_file[3::3], strict=True):
        number = int(fragment.split()[1].removeprefix("n"))
        place = f"{number // 2}.txt, bytes 0-17: document {number % 2}"
        assert origin == f"    from {place}, token 0 (unit 0)"
        assert title == f"    title: n{number} {('alpha', 'beta')[number % 2]}"


def test_rows_have_the_form_of_their_packing(corpus, tmp_path):
    rows = {}
    for packing in PACKINGS:
        run(corpus, tmp_path / packing, packing=packing)
        reader = ShardReader(tmp_path / packing, "train")
        rows[packing] = reader.read(np.arange(reader.rows))
        assert (rows[packing][:, 0] == 2).all()
        assert (np.diff(rows[packing] == 0, axis=1) >= 0).all()  # padding at the end only
    fit = rows["best_fit"]
    assert ((fit == 2).sum(axis=1) == (fit == 3).sum(axis=1)).all() and (fit == 2).sum() > len(fit)
    assert (fit == 0).mean() < 0.02
    assert ((rows["concat"] == 2).sum(axis=1) == 1).all()
    padding = [(row == 0).sum() for row in rows["concat"]]
    assert np.count_nonzero(padding) <= 9  # the last row of each shard
    separators = (rows["google"] == 3).sum(axis=1)
    assert set(separators) == {1, 2} and ((rows["google"] == 2).sum(axis=1) == 1).all()


def test_the_bytes_are_the_same_for_any_workers_and_any_input_folder(corpus, tmp_path):
    run(corpus, tmp_path / "one")
    shutil.copytree(corpus / "in", tmp_path / "moved")
    prepare(
        [str(tmp_path / "moved" / "b.txt"), str(tmp_path / "moved" / "*.wiki")],
        corpus / "tok",
        tmp_path / "two",
        sequence_length=16,
        valid_fraction=0.1,
        unit_bytes=9000,
        shard_bytes=4000,
        block_rows=64,
        workers=2,
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_prepare_json_has_the_keys_and_order_of_older_data_folders(corpus, tmp_path):
    run(corpus, tmp_path / "data")
    stored = json.loads((tmp_path / "data" / "prepare.json").read_text())
    older = json.loads((VERSION_0_1 / "data" / "prepare.json").read_text())
    assert list(stored) == list(older)
    assert stored["unit_format"] == older["unit_format"]


class Stopped(Exception):
    """Raised in place of a kill."""


@pytest.mark.parametrize("at", range(2, 26, 4))
def test_a_stopped_run_resumes_to_the_same_bytes(corpus, tmp_path, at):
    calls = []

    def stop(stage, done, total):
        calls.append(stage)
        if len(calls) == at:
            raise Stopped

    run(corpus, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(corpus, tmp_path / "data", progress=stop)
    assert not (tmp_path / "data" / "manifest.json").exists()
    for number, path in enumerate(sorted((tmp_path / "data" / "work").rglob("unit-*.ids"))):
        if number % 3 == 0:
            path.write_bytes(path.read_bytes()[:-2])  # cut short
        elif number % 3 == 1:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    if (tmp_path / "data" / "shards").exists():  # missing if the run stopped in its first stage
        (tmp_path / "data" / "shards" / ".stale.0123456789ab.tmp").write_text("left by a kill")
    run(corpus, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_killed_job_resumes_to_the_same_bytes_with_another_number_of_workers(corpus, tmp_path):
    run(corpus, tmp_path / "whole")
    code = f"""
from small_corpus import prepare_corpus as run
from pathlib import Path
if __name__ == "__main__":
    run(Path({str(corpus)!r}), Path({str(tmp_path / "data")!r}), workers=2)
"""
    (tmp_path / "job.py").write_text(code)
    job = subprocess.Popen(
        [sys.executable, tmp_path / "job.py"],
        start_new_session=True,
        env=os.environ | WITH_SUPPORT,
    )
    while not list((tmp_path / "data").rglob("unit-*.json")) and job.poll() is None:
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    run(corpus, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def fails_or_never_ends(fails, on_progress):
    if fails:
        raise UserError("this task fails")
    endless(None, on_progress)


def killed(_, on_progress):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "job.py").write_text("""
import multiprocessing
from small_corpus import endless
from data_tools.workers import pool
if __name__ == "__main__":
    with pool(3) as run:
        pids = [process.pid for process in multiprocessing.active_children()]
        run(endless, [1, 2], lambda done: print(*pids, flush=True))
""")
    job = subprocess.Popen(
        [sys.executable, tmp_path / "job.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | WITH_SUPPORT,
    )
    pids = [int(pid) for pid in job.stdout.readline().split()]
    assert len(pids) == 3  # two run tasks, one is idle
    job.kill()
    job.wait()
    for _ in range(1000):
        if not any(
            Path(f"/proc/{pid}/cmdline").is_file() and Path(f"/proc/{pid}/cmdline").read_bytes()
            for pid in pids
        ):
            return
        time.sleep(0.02)
    pytest.fail("a worker runs after its parent was killed")


def test_a_failed_task_ends_the_others_and_a_killed_worker_is_reported():
    with pytest.raises(UserError, match="this task fails"), pool(2) as run:
        run(fails_or_never_ends, [False, True], lambda done: None)
    with pytest.raises(UserError, match="a worker process was killed"), pool(2) as run:
        run(killed, [0], lambda done: None)


def test_kept_units_are_used_for_other_lengths_and_packings(corpus, tmp_path, monkeypatch):
    run(corpus, tmp_path / "a", units=tmp_path / "units")
    monkeypatch.setattr(units_module, "documents", None)  # the input is not read again
    run(corpus, tmp_path / "b", units=tmp_path / "units", sequence_length=32, packing="concat")
    monkeypatch.undo()
    run(corpus, tmp_path / "c", sequence_length=32, packing="concat")
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    with pytest.raises(UserError, match="seed: found 0, expected 1"):
        run(corpus, tmp_path / "d", units=tmp_path / "units", seed=1)


def test_units_of_an_older_version_are_refused_and_older_markers_are_replaced(corpus, tmp_path):
    run(corpus, tmp_path / "a", units=tmp_path / "units")
    for marker in (tmp_path / "units").glob("unit-*.json"):
        marker.write_text(
            json.dumps({"plan_sha256": json.loads(marker.read_text())["plan_sha256"]})
        )
    run(corpus, tmp_path / "b", units=tmp_path / "units")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    plan = json.loads((tmp_path / "units" / "plan.json").read_text())
    del plan["unit_format"]
    (tmp_path / "units" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="unit_format: found null, expected 2"):
        run(corpus, tmp_path / "c", units=tmp_path / "units")


def test_a_second_prepare_in_the_same_folder_is_refused_with_the_owner_named(corpus, tmp_path):
    (tmp_path / "job.py").write_text(f"""
import sys, time
from pathlib import Path
from electra_ds.common import folder_lock
from small_corpus import prepare_corpus as run
folder_lock.BEAT_SECONDS = 0.1
def stay(stage, done, total):
    if stage == "tokenize":
        print("running", flush=True)
        time.sleep(600)
run(Path({str(corpus)!r}), Path(sys.argv[1]), units=Path(sys.argv[2]), progress=stay)
""")
    job = subprocess.Popen(
        [sys.executable, tmp_path / "job.py", tmp_path / "data", tmp_path / "units"],
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | WITH_SUPPORT,
    )
    assert job.stdout.readline() == "running\n"
    for out, units in ((tmp_path / "data", None), (tmp_path / "other", tmp_path / "units")):
        with pytest.raises(
            LockedOut, match=f"lock names process {job.pid} on .*, which is running there"
        ):
            run(corpus, out, units=units)
    job.kill()
    job.wait()
    run(corpus, tmp_path / "data", units=tmp_path / "units")
    run(corpus, tmp_path / "whole")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert not (tmp_path / "units" / "lock").exists()


def test_a_finished_folder_is_returned_and_another_data_set_is_refused(
    corpus, tmp_path, monkeypatch
):
    manifest = run(corpus, tmp_path / "data")
    before = contents(tmp_path / "data")
    assert run(corpus, tmp_path / "data") == manifest and contents(tmp_path / "data") == before
    with pytest.raises(UserError, match="sequence_length: found 16, expected 32"):
        run(corpus, tmp_path / "data", sequence_length=32)
    shutil.copytree(corpus, tmp_path / "other")
    last = max(path for path in (tmp_path / "other" / "in").rglob("*") if path.is_file())
    last.unlink()
    with pytest.raises(
        UserError, match=rf'files: found \["{last.name}", .*\], expected null; units: found \[\['
    ):
        run(tmp_path / "other", tmp_path / "data")


def test_settings_of_the_packing_may_change_until_packing_begins(corpus, tmp_path):
    with pytest.raises(UserError, match="and 0 held-out"):
        run(corpus, tmp_path / "a", valid_fraction=1e-9)
    with pytest.raises(UserError, match="seed: found 0, expected 1"):
        run(corpus, tmp_path / "a", seed=1)
    run(corpus, tmp_path / "a")
    run(corpus, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("has_units_folder", [False, True])
def test_settings_of_an_attempt_without_documents_do_not_count(corpus, tmp_path, has_units_folder):
    """A function that fails, a wrong field and a damaged input; then the corrected command."""
    source, data = tmp_path / "in.jsonl", tmp_path / "data"
    source.write_text("".join(f"{json.dumps({'body': text_of(i)})}\n" for i in range(20)))
    options = {"units": tmp_path / "units"} if has_units_folder else {}

    def attempt(out, **settings):
        plan = {"sequence_length": 16, "valid_fraction": 0, **options, **settings}
        return prepare([str(source)], corpus / "tok", out, **plan)

    with pytest.raises(UserError, match="keep = 'math:sqrt' raised TypeError"):
        attempt(data, text_field="body", keep="math:sqrt")
    with pytest.raises(UserError, match="no field 'text'"):
        attempt(data)
    with pytest.raises(UserError, match="no text in 1 input"):
        attempt(data, max_bad_fraction=1)
    whole = source.read_bytes()
    source.write_bytes(whole.replace(b"body", b"bodo"))
    with pytest.raises(UserError, match="no field 'body'"):
        attempt(data, text_field="body")
    source.write_bytes(whole)
    attempt(data, text_field="body")
    with pytest.raises(UserError, match=r"holds other data .*seed: found 0, expected 1"):
        attempt(data, text_field="body", seed=1)
    shutil.rmtree(tmp_path / "units", ignore_errors=True)
    attempt(tmp_path / "once", text_field="body")
    assert contents(data) == contents(tmp_path / "once")


def test_settings_do_not_change_while_another_attempt_has_the_lock(corpus, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="raised TypeError"):
        run(corpus, tmp_path, keep="math:sqrt")
    before = (tmp_path / "prepare.json").read_bytes()

    def held(self):
        raise LockedOut("held by another process")

    monkeypatch.setattr("data_tools.prepare.Lock.acquire", held)
    with pytest.raises(LockedOut):
        run(corpus, tmp_path)
    assert (tmp_path / "prepare.json").read_bytes() == before


@pytest.mark.parametrize("name", ["work", "shards", "letter.txt"])
def test_a_folder_with_other_files_is_refused_and_not_changed(corpus, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=rf"found {name} but no prepare\.json"):
        run(corpus, tmp_path)
    assert (tmp_path / name / "thesis.txt").read_text() == "years"


def test_files_left_by_a_kill_after_the_manifest_are_removed(corpus, tmp_path):
    run(corpus, tmp_path / "data")
    before = contents(tmp_path / "data")
    (tmp_path / "data" / "work" / "units").mkdir(parents=True)
    (tmp_path / "data" / "work" / "units" / "unit-000000.ids").write_bytes(b"left by a kill")
    run(corpus, tmp_path / "data")
    assert contents(tmp_path / "data") == before and not (tmp_path / "data" / "work").exists()


@pytest.mark.parametrize("module", ["units", "assemble"])
def test_a_full_disk_is_a_run_failure_and_leaves_no_temporary_files(
    corpus, tmp_path, monkeypatch, module
):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(f"data_tools.pipeline.{module}.write_bytes", full)
    with pytest.raises(RunFailure, match=r"No space left on device.*the same command resumes"):
        run(corpus, tmp_path / "data")
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    run(corpus, tmp_path / "data")


def test_the_text_field_selects_the_text(corpus, tmp_path):
    lines = [json.dumps({"text": text_of(i), "body": text_of(i + 100)}) for i in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    manifest = prepare(
        [str(tmp_path / "in.jsonl")],
        corpus / "tok",
        tmp_path / "out",
        text_field="body",
        sequence_length=16,
        valid_fraction=0,
    )
    counts = np.load(tmp_path / "out" / "unigrams.npy")
    assert manifest.splits["train"].documents == 20
    firsts = [ENTRIES[i] for i in np.flatnonzero(counts) if ENTRIES[i] not in WORDS]
    assert firsts == [f"n{i}" for i in range(100, 120)]


def test_inputs_without_text_are_refused(corpus, tmp_path):
    (tmp_path / "in.txt").write_text("plain text")
    with pytest.raises(UserError, match=r"no text in 1 input file\(s\) read as wiki"):
        prepare([str(tmp_path / "in.txt")], corpus / "tok", tmp_path / "out", format="wiki")


def test_the_sizes_of_runs_and_hash_ranges_do_not_change_the_output(corpus, tmp_path, monkeypatch):
    run(corpus, tmp_path / "one")
    monkeypatch.setattr("data_tools.pipeline.dedup.HASHES_AT_ONCE", 7)
    monkeypatch.setattr("data_tools.pipeline.units.RUN_TOKENS", 200)
    monkeypatch.setattr("data_tools.pipeline.units.BATCH_CHARS", 300)
    run(corpus, tmp_path / "two")
    assert HASHES_AT_ONCE > 7 and contents(tmp_path / "one") == contents(tmp_path / "two")


def test_documents_are_shuffled_over_all_shards_by_the_seed(corpus, tmp_path):
    orders = []
    for seed in (0, 1):
        run(corpus, tmp_path / str(seed), seed=seed)
        reader = ShardReader(tmp_path / str(seed), "train")
        blocks = range(len(reader.blocks))
        fragments = np.concatenate([reader.fragments(block) for block in blocks])
        orders.append([tuple(fragment) for fragment in fragments[:, 3:5]])
        units_of_first_block = reader.fragments(0)[:, 3]
        assert len(set(units_of_first_block)) > 4
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1])


def test_duplicates_can_be_kept_and_short_documents_removed(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "a", deduplicate=False)
    assert sum(split.documents for split in manifest.splits.values()) == 330
    documents = documents_of(tmp_path / "a")
    first_ids = [{ids[0] for ids in documents[split].values()} for split in ("train", "valid")]
    assert not first_ids[0] & first_ids[1]  # copies of a text are in one split
    manifest = run(corpus, tmp_path / "b", min_chars=200)
    short = sum(sum(map(len, text_of(i).split("\n"))) < 200 for i in range(300))
    assert manifest.removed["too_short"] >= short > 0


def test_unigrams_count_the_training_rows(corpus, tmp_path):
    run(corpus, tmp_path / "data")
    reader = ShardReader(tmp_path / "data", "train")
    counts = np.bincount(reader.read(np.arange(reader.rows)).ravel(), minlength=len(ENTRIES))
    counts[:5] = 0
    assert np.array_equal(np.load(tmp_path / "data" / "unigrams.npy"), counts)


def test_too_many_bad_lines_fail_with_their_locations_and_few_are_counted(corpus, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        "".join(f'{{"text": "{text_of(i)!r}"}}\n' for i in range(50)) + "{broken\n"
    )
    options = dict(sequence_length=16, valid_fraction=0)
    with pytest.raises(
        UserError, match=r"1 of 51 lines cannot be read \(not JSON: 1\).*in\.jsonl: byte \d+"
    ):
        prepare([str(tmp_path / "in.jsonl")], corpus / "tok", tmp_path / "a", **options)
    manifest = prepare(
        [str(tmp_path / "in.jsonl")],
        corpus / "tok",
        tmp_path / "b",
        max_bad_fraction=0.1,
        **options,
    )
    assert manifest.bad_lines == {"not JSON": 1} and list(manifest.splits) == ["train"]


def test_an_error_in_a_worker_reaches_the_user(corpus, tmp_path):
    (tmp_path / "x.gz").write_bytes(b"\x1f\x8b\x08\x00 broken, though it begins like a gzip file")
    with pytest.raises(UserError, match=r"x\.gz: broken after byte"):
        prepare(
            [str(tmp_path / "x.gz")], corpus / "tok", tmp_path / "out", workers=2, format="text"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(packing="tight"), "expected one of best_fit"),
        (dict(sequence_length=4), "expected 8 to"),
        (dict(valid_fraction=1.5), "less than 1"),
        (dict(valid_fraction=1e-9), r"of \d+ documents gives .* and 0 held-out"),
        (dict(format="pdf"), "expected one of auto"),
        (dict(workers=0), "expected at least 1"),
    ],
)
def test_unusable_settings_are_refused(corpus, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(corpus, tmp_path / "data", **options)


@pytest.mark.parametrize("width", [32, 128, 512])
def test_best_fit_has_little_padding_and_concat_none(width):
    lengths = np.random.default_rng(0).geometric(1 / 300, 20_000)
    layout = best_fit(lengths, width)
    used = layout.fragments[:, 2].sum() + len(layout.cls) + len(layout.sep)
    assert (
        layout.fragments[:, 2].sum() == lengths.sum() and 1 - used / (layout.rows * width) < 0.005
    )
    stream = concat(lengths, width)
    assert stream.rows == -(-(lengths.sum() + len(lengths)) // (width - 1))
    assert stream.fragments[:, 2].sum() == lengths.sum()


def test_more_blocks_than_a_reader_accepts_are_refused_before_the_packing(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("electra_ds.data.shard_format.MAX_BLOCKS", 4)
    with pytest.raises(UserError, match=r"block_rows = 1: about .* blocks in train"):
        run(corpus, tmp_path / "data", block_rows=1)
    monkeypatch.undo()
    run(corpus, tmp_path / "data", block_rows=8)


def test_units_and_output_inside_each_other_are_refused_before_anything_is_written(
    corpus, tmp_path
):
    for out, units in (("p", "p/units"), ("u/p", "u"), ("p", "p")):
        with pytest.raises(UserError, match="one is inside the other"):
            run(corpus, tmp_path / out, units=tmp_path / units)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["shards", "work", "tokenizer"])
def test_a_link_out_of_the_output_is_refused_and_not_followed(corpus, tmp_path, name):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".x.0123456789ab.tmp").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"a symbolic link leads to .*remove the link"):
        run(corpus, tmp_path / "data")
    assert [path.name for path in (tmp_path / "other").iterdir()] == [".x.0123456789ab.tmp"]


def test_a_marker_that_another_command_just_wrote_is_compared(tmp_path, monkeypatch):
    marker = tmp_path / "data" / "prepare.json"
    glob = Path.glob

    def late(folder, pattern):
        if folder == marker.parent and not marker.exists():
            write_json(marker, {"a": 1})
        return glob(folder, pattern)

    marker.parent.mkdir()
    monkeypatch.setattr(Path, "glob", late)
    claim_folder(marker, {"a": 1}, {"a": 1}, tmp_path / "units")
    assert read_json(marker, "a marker") == {"a": 1}

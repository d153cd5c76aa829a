"""Text to shards: every token kept and found again, the same bytes for any workers, resumable."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import WITH_SUPPORT
from small_corpus import ENTRIES, WORDS, contents, endless, text_of
from small_corpus import prepare_corpus as run

from data_tools.inspect_rows import describe_rows, reread
from data_tools.pipeline import units as units_module
from data_tools.pipeline.assemble import HASHES_AT_ONCE
from data_tools.pipeline.pack import best_fit, concat
from data_tools.prepare import prepare
from data_tools.verify import verify
from data_tools.workers import pool
from electra_ds.common.errors import LockedOut, RunFailure, UserError
from electra_ds.data.shard_reader import ShardReader
from electra_ds.data.tokenizer import load_tokenizer

PACKINGS = ("best_fit", "concat", "google")


def documents_of(data) -> dict[str, dict[tuple[int, int], list[int]]]:
    """The ids of each document, put together from rows and pieces: split -> (unit, document) -> ids."""
    found = {}
    for split in ("train", "valid"):
        reader, parts = ShardReader(data, split), {}
        for block in range(len(reader.blocks)):
            rows = reader.block(block)
            for row, start, length, unit, document, token in reader.fragments(block).tolist():
                parts.setdefault((unit, document), []).append(
                    (token, rows[row, start : start + length].tolist())
                )
        found[split] = {}
        for key, pieces in parts.items():
            pieces.sort()
            ends = np.cumsum([len(ids) for _, ids in pieces])
            assert [token for token, _ in pieces] == [
                0,
                *ends[:-1],
            ]  # each token once, in its place
            found[split][key] = [i for _, ids in pieces for i in ids]
    return found


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_token_of_every_document_is_in_one_row_and_its_place_in_the_source_is_known(
    corpus, tmp_path, packing
):
    manifest = run(corpus, tmp_path / "data", packing=packing)
    tokenizer, found = (
        load_tokenizer(tmp_path / "data" / "tokenizer"),
        documents_of(tmp_path / "data"),
    )
    texts_of = reread(tmp_path / "data", [str(corpus / "in")])
    texts = {
        (unit, number): text
        for unit in range(len(manifest.source.units))
        for number, text in enumerate(texts_of(unit))
    }
    source = dict(zip(texts, tokenizer.encode_batch(list(texts.values())), strict=True))
    first = {tuple(ids): key for key, ids in reversed(source.items())}  # of equal documents
    assert (len(source), len(first)) == (330, 300)
    assert found["train"] | found["valid"] == {key: list(ids) for ids, key in first.items()}
    assert not found["train"].keys() & found["valid"].keys()
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
        assert info.tokens == sum(map(len, found[split].values())) and info.documents == len(
            found[split]
        )
    _, *lines = describe_rows(tmp_path / "data", "train", [0], inputs=[str(corpus / "in")])
    for piece, origin, document in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        begins = document.removeprefix("    which begins: ").lower().split()
        assert not origin.endswith(" token 0") or begins[0] == piece.split()[1]
    with pytest.raises(UserError, match=r"b\.txt: not among the files of --input"):
        reread(tmp_path / "data", [str(corpus / "in" / "*.wiki")])


def test_rows_look_as_their_packing_says(corpus, tmp_path):
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
    last = [(row == 0).sum() for row in rows["concat"]]
    assert ((rows["concat"] == 2).sum(axis=1) == 1).all() and np.count_nonzero(
        last
    ) <= 9  # the last row of each shard
    separators = (rows["google"] == 3).sum(axis=1)
    assert set(separators) == {1, 2} and ((rows["google"] == 2).sum(axis=1) == 1).all()


def test_the_bytes_are_the_same_for_any_workers_and_place(corpus, tmp_path):
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


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("at", range(2, 26, 4))
def test_a_stopped_run_goes_on_to_the_same_bytes(corpus, tmp_path, at):
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
    if (tmp_path / "data" / "shards").exists():  # not yet when it stopped at once
        (tmp_path / "data" / "shards" / ".stale.1.tmp").write_text("left by a kill")
    run(corpus, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_killed_job_goes_on_to_the_same_bytes_with_other_workers(corpus, tmp_path):
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


def fails_or_runs_for_ever(fails, on_progress):
    if fails:
        raise UserError("this one fails")
    endless(None, on_progress)


def killed(_, on_progress):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_leave_when_their_parent_is_killed(tmp_path):
    (tmp_path / "job.py").write_text("""
import multiprocessing
from small_corpus import endless
from data_tools.workers import pool
if __name__ == "__main__":
    with pool(3) as run:
        run(endless, [1, 2], lambda done: print(*[p.pid for p in multiprocessing.active_children()], flush=True))
""")
    job = subprocess.Popen(
        [sys.executable, tmp_path / "job.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | WITH_SUPPORT,
    )
    pids = [int(pid) for pid in job.stdout.readline().split()]
    assert len(pids) == 3  # two at work, one waiting
    job.kill()
    job.wait()
    for _ in range(1000):
        if not any(
            Path(f"/proc/{pid}/cmdline").is_file() and Path(f"/proc/{pid}/cmdline").read_bytes()
            for pid in pids
        ):
            return
        time.sleep(0.02)
    pytest.fail("a worker outlives its parent")


def test_a_task_that_fails_ends_the_others_and_a_killed_worker_is_named():
    with pytest.raises(UserError, match="this one fails"), pool(2) as run:
        run(fails_or_runs_for_ever, [False, True], lambda done: None)
    with pytest.raises(UserError, match="a worker process was killed"), pool(2) as run:
        run(killed, [0], lambda done: None)


def test_kept_units_serve_other_lengths_and_packings(corpus, tmp_path, monkeypatch):
    run(corpus, tmp_path / "a", units=tmp_path / "units")
    monkeypatch.setattr(units_module, "documents", None)  # nothing is read again
    run(corpus, tmp_path / "b", units=tmp_path / "units", sequence_length=32, packing="concat")
    monkeypatch.undo()
    run(corpus, tmp_path / "c", sequence_length=32, packing="concat")
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    with pytest.raises(UserError, match="seed: 0 there, 1 asked for"):
        run(corpus, tmp_path / "d", units=tmp_path / "units", seed=1)


def test_units_of_an_older_version_are_refused_and_its_markers_are_made_again(corpus, tmp_path):
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
    with pytest.raises(UserError, match="unit_format: null there, 2 asked for"):
        run(corpus, tmp_path / "c", units=tmp_path / "units")


def test_a_second_prepare_in_the_same_out_or_units_is_refused_with_the_owner_named(
    corpus, tmp_path
):
    (tmp_path / "job.py").write_text(f"""
import sys, time
from pathlib import Path
from electra_ds.common import folder_lock as lock
from small_corpus import prepare_corpus as run
lock.BEAT_SECONDS = 0.1
def stay(stage, done, total):
    if stage == "tokenize":
        print("at work", flush=True)
        time.sleep(600)
run(Path({str(corpus)!r}), Path(sys.argv[1]), units=Path(sys.argv[2]), progress=stay)
""")
    job = subprocess.Popen(
        [sys.executable, tmp_path / "job.py", tmp_path / "data", tmp_path / "units"],
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | WITH_SUPPORT,
    )
    assert job.stdout.readline() == "at work\n"
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
    with pytest.raises(UserError, match="sequence_length: 16 there, 32 asked for"):
        run(corpus, tmp_path / "data", sequence_length=32)
    shutil.copytree(corpus, tmp_path / "other")
    last = max(path for path in (tmp_path / "other" / "in").rglob("*") if path.is_file())
    last.unlink()
    with pytest.raises(
        UserError, match=rf'files: \["{last.name}", .*\] there, null asked for; units: \[\['
    ):
        run(tmp_path / "other", tmp_path / "data")


def test_settings_of_the_packing_may_change_until_it_begins(corpus, tmp_path):
    with pytest.raises(UserError, match="and 0 held out"):
        run(corpus, tmp_path / "a", valid_fraction=1e-9)
    with pytest.raises(UserError, match="seed: 0 there, 1 asked for"):
        run(corpus, tmp_path / "a", seed=1)
    run(corpus, tmp_path / "a")
    run(corpus, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("name", ["work", "shards", "letter.txt"])
def test_a_folder_of_other_things_is_left_alone(corpus, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=rf"holds {name} but no prepare\.json"):
        run(corpus, tmp_path)
    assert (tmp_path / name / "thesis.txt").read_text() == "years"


def test_a_run_killed_after_its_manifest_is_tidied_by_the_next(corpus, tmp_path):
    run(corpus, tmp_path / "data")
    before = contents(tmp_path / "data")
    (tmp_path / "data" / "work" / "units").mkdir(parents=True)
    (tmp_path / "data" / "work" / "units" / "unit-000000.ids").write_bytes(b"left by a kill")
    run(corpus, tmp_path / "data")
    assert contents(tmp_path / "data") == before and not (tmp_path / "data" / "work").exists()


@pytest.mark.parametrize("module", ["units", "assemble"])
def test_a_full_disk_is_no_traceback_and_leaves_no_remains(corpus, tmp_path, monkeypatch, module):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(f"data_tools.pipeline.{module}.write_bytes", full)
    with pytest.raises(RunFailure, match=r"No space left on device.*the same command goes on"):
        run(corpus, tmp_path / "data")
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    run(corpus, tmp_path / "data")


def test_the_text_field_says_where_the_text_is(corpus, tmp_path):
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


def test_inputs_without_text_are_named_as_such(corpus, tmp_path):
    (tmp_path / "in.txt").write_text("plain text")
    with pytest.raises(UserError, match=r"no text in 1 input file\(s\) read as wiki"):
        prepare([str(tmp_path / "in.txt")], corpus / "tok", tmp_path / "out", format="wiki")


def test_runs_and_hash_ranges_change_memory_and_not_the_documents(corpus, tmp_path, monkeypatch):
    run(corpus, tmp_path / "one")
    monkeypatch.setattr("data_tools.pipeline.assemble.HASHES_AT_ONCE", 7)
    monkeypatch.setattr("data_tools.pipeline.units.RUN_TOKENS", 200)
    monkeypatch.setattr("data_tools.pipeline.units.BATCH_CHARS", 300)
    run(corpus, tmp_path / "two")
    assert HASHES_AT_ONCE > 7 and contents(tmp_path / "one") == contents(tmp_path / "two")


def test_documents_are_shuffled_over_all_shards_and_the_seed_says_how(corpus, tmp_path):
    orders = []
    for seed in (0, 1):
        run(corpus, tmp_path / str(seed), seed=seed)
        reader = ShardReader(tmp_path / str(seed), "train")
        pieces = np.concatenate([reader.fragments(block) for block in range(len(reader.blocks))])
        orders.append([tuple(piece) for piece in pieces[:, 3:5]])
        first = reader.fragments(0)[:, 3]
        assert len(set(first)) > 4  # the first block holds documents of many units
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1])


def test_duplicates_stay_when_asked_and_short_documents_go(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "a", deduplicate=False)
    assert sum(split.documents for split in manifest.splits.values()) == 330
    found = documents_of(tmp_path / "a")  # copies of one text stand on one side
    assert not {ids[0] for ids in found["train"].values()} & {
        ids[0] for ids in found["valid"].values()
    }
    manifest = run(corpus, tmp_path / "b", min_chars=200)
    short = sum(sum(map(len, text_of(i).split("\n"))) < 200 for i in range(300))
    assert manifest.removed["too_short"] >= short > 0


def test_unigrams_count_the_training_rows(corpus, tmp_path):
    run(corpus, tmp_path / "data")
    reader = ShardReader(tmp_path / "data", "train")
    counts = np.bincount(reader.read(np.arange(reader.rows)).ravel(), minlength=len(ENTRIES))
    counts[:5] = 0
    assert np.array_equal(np.load(tmp_path / "data" / "unigrams.npy"), counts)


def test_too_many_bad_lines_fail_with_their_places_and_few_are_counted(corpus, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        "".join(f'{{"text": "{text_of(i)!r}"}}\n' for i in range(50)) + "{broken\n"
    )
    options = dict(sequence_length=16, valid_fraction=0)
    with pytest.raises(
        UserError, match=r"1 of 51 lines are bad \(not JSON: 1\).*in\.jsonl: byte \d+"
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
    ("options", "found"),
    [
        (dict(packing="tight"), "expected one of best_fit"),
        (dict(sequence_length=4), "expected 8 to"),
        (dict(valid_fraction=1.5), "less than 1"),
        (dict(valid_fraction=1e-9), "and 0 held out"),
        (dict(format="pdf"), "expected one of auto"),
        (dict(workers=0), "expected at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(corpus, tmp_path, options, found):
    with pytest.raises(UserError, match=found):
        run(corpus, tmp_path / "data", **options)


@pytest.mark.parametrize("width", [32, 128, 512])
def test_best_fit_pads_little(width):
    lengths = np.random.default_rng(0).geometric(1 / 300, 20_000)
    layout = best_fit(lengths, width)
    used = layout.pieces[:, 2].sum() + len(layout.cls) + len(layout.sep)
    assert layout.pieces[:, 2].sum() == lengths.sum() and 1 - used / (layout.rows * width) < 0.005
    stream = concat(lengths, width)
    assert stream.rows == -(-(lengths.sum() + len(lengths)) // (width - 1))
    assert stream.pieces[:, 2].sum() == lengths.sum()

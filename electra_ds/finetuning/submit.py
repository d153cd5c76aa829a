"""Zip file for a submission to the GLUE site: eleven files of two columns."""

import io
import math
import zipfile
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.files import write_output
from electra_ds.common.json_files import read_small
from electra_ds.common.outputs import check_output_file
from electra_ds.common.printable import printable, shortened
from electra_ds.finetuning.report import Results, best_seed, read_results
from electra_ds.finetuning.tasks import GLUE

# File in the zip -> task, split, number of rows of the official test set.
FILES = {
    "CoLA": ("cola", "test", 1063),
    "SST-2": ("sst2", "test", 1821),
    "MRPC": ("mrpc", "test", 1725),
    "STS-B": ("stsb", "test", 1379),
    "QQP": ("qqp", "test", 390965),
    "MNLI-m": ("mnli", "test_matched", 9796),
    "MNLI-mm": ("mnli", "test_mismatched", 9847),
    "QNLI": ("qnli", "test", 5463),
    "RTE": ("rte", "test", 3000),
    "WNLI": ("wnli", "test", 146),
    "AX": ("mnli", "test_ax", 1104),
}


def write_submission(folder: Path, out: Path) -> list[str]:
    """Write the zip file of the test predictions in `folder`, of the best seed on dev of each task.

    folder: DIR of finetune. out: the zip file.
    Returns a line for each file with its seed, and a warning that names the files without
    predictions, which are filled with a constant. Raises UserError without writing when there are
    no predictions, and for predictions of other data than the official test set.
    """
    read = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".zip")
    check_output_file(out, "--out", tuple(read))
    results = read_results(folder)
    notes = []
    filled = []
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in FILES:
            answers, origin = _answers(folder, results, name)
            rows = "".join(f"{number}\t{text}\n" for number, text in enumerate(answers))
            # ZipInfo has a fixed date: the same predictions give the same bytes.
            entry = zipfile.ZipInfo(f"{name}.tsv")
            archive.writestr(entry, f"index\tprediction\n{rows}", zipfile.ZIP_DEFLATED)
            if origin is None:
                filled.append(name)
            else:
                notes.append(f"{name}.tsv: {origin}")
    if not notes:
        raise UserError(
            f"{folder}: no GLUE task has a finished seed with predictions of its test split "
            f"(predictions-test.tsv); found {', '.join(map(printable, results))}; nothing is written"
        )
    if filled:
        notes.append(
            f"WARNING: no test predictions of {', '.join(filled)}: filled with a constant; their "
            "scores are meaningless"
        )
    write_output(out, data.getvalue())
    return notes


def _answers(folder: Path, results: Results, name: str) -> tuple[list[str], str | None]:
    """Return (second column of one file, description of its seed; None for a constant)."""
    task, split, rows = FILES[name]
    labels = GLUE[task].get("labels", ["0", "1"])  # None in regression
    best = best_seed(results.get(task, {}))
    path = folder / task / f"seed-{best.seed if best else ''}" / f"predictions-{split}.tsv"
    if best is None or not path.exists():
        return [labels[0] if labels else "0.000"] * rows, None
    lines = read_small(path, "predictions").decode("utf-8", "replace").split("\n")[1:]
    cells = [line.split("\t")[:2] for line in lines if line]
    if [cell[0] for cell in cells] != [str(number) for number in range(rows)]:
        raise UserError(
            f"{path}: {len(cells)} rows, the first {cells[:1]}; expected {rows} with index 0 to "
            f"{rows - 1}, the official test set of {name}: predict its test file again"
        )
    texts = [cell[1] if len(cell) > 1 else "" for cell in cells]
    if labels and (odd := [text for text in texts if text not in labels]):
        raise UserError(
            f"{path}: the prediction {shortened(odd[0])} is not a label of {task}; "
            "predict its test file again"
        )
    answers = texts if labels else [_value(text, path) for text in texts]
    return answers, f"seed {best.seed}, {best.metric} {100 * best.value:.1f} on {best.split}"


def _value(text: str, path: Path) -> str:
    """Return a prediction of STS-B as the site expects it: from 0 to 5, three decimal places."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"{path}: the prediction {shortened(text)} is not a number; predict its test file again"
        )
    return f"{min(5.0, max(0.0, value)):.3f}"

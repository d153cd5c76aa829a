"""How are predictions handed in? The zip that the GLUE site takes: eleven files of two columns."""

import io
import zipfile
from pathlib import Path

from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes
from electra_ds.finetuning.report import Results, best_seed, read_results
from electra_ds.finetuning.tasks import GLUE

# File of the zip -> task, split, rows of the official test set.
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
    """Write the zip of what finetune left in `folder`, each task by its seed with the best dev score.

    Returns a line per file with the seed it is of, and one that names the files filled with a constant. UserError,
    and no zip, where there is no prediction at all, or for predictions that are not of the official test set.
    """
    results, notes, filled, data = read_results(folder), [], [], io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in FILES:
            predictions, seed = _predictions(folder, results, name)
            rows = "".join(f"{number}\t{text}\n" for number, text in enumerate(predictions))
            entry = zipfile.ZipInfo(
                f"{name}.tsv"
            )  # dated 1980: the same predictions give the same zip
            archive.writestr(entry, f"index\tprediction\n{rows}", zipfile.ZIP_DEFLATED)
            notes += [f"{name}.tsv: {seed}"] if seed else []
            filled += [] if seed else [name]
    if not notes:
        raise UserError(
            f"{folder}: no GLUE task has a finished seed with predictions of its test split "
            f"(predictions-test.tsv); found {', '.join(results)}; nothing is written"
        )
    if filled:
        notes.append(
            f"WARNING: no test predictions of {', '.join(filled)}: filled with a constant, their scores mean "
            "nothing"
        )
    write_bytes(out, data.getvalue())
    return notes


def _predictions(folder: Path, results: Results, name: str) -> tuple[list[str], str | None]:
    """The second column of one file, and the seed it is of, or None where it is a constant."""
    task, split, rows = FILES[name]
    best = best_seed(results.get(task, {}))
    path = folder / task / f"seed-{best[0] if best else ''}" / f"predictions-{split}.tsv"
    labels = GLUE[task].get("labels", ["0", "1"])  # null: a value
    if not path.exists():
        return [labels[0] if labels else "0.000"] * rows, None
    cells = [
        line.split("\t")[:2] for line in path.read_text(encoding="utf-8").split("\n")[1:] if line
    ]
    if [cell[0] for cell in cells] != [str(number) for number in range(rows)]:
        raise UserError(
            f"{path}: {len(cells)} rows, the first {cells[:1]}; expected {rows} with index 0 to {rows - 1}, the "
            f"official test set of {name}: predict its test file again"
        )
    answers = [text if labels else f"{min(5.0, max(0.0, float(text))):.3f}" for _, text in cells]
    if labels and (odd := [text for text in answers if text not in labels]):
        raise UserError(
            f"{path}: the prediction {odd[0]!r} is no answer of {task}; predict its test file again"
        )
    seed, valid, metric, value = best
    return answers, f"seed {seed}, {metric} {100 * value:.1f} on {valid}"

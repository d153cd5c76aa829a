"""What does a fine-tuned model say? Encoded examples in, logits and predictions out; the verb predict.

Letters: S tokens, C outputs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes
from electra_ds.config.schema import ModelConfig
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.finetuning.batches import Encoded, TaskBatch, collate, encode, prediction_batches
from electra_ds.finetuning.examples import Example, read_examples, read_file
from electra_ds.finetuning.metrics import score
from electra_ds.finetuning.model import Classifier
from electra_ds.finetuning.tasks import GLUE, Task, load_task
from electra_ds.interop.load_model import read_checkpoint
from electra_ds.model.weights import load_true_state
from electra_ds.training.checkpoint import tokenizer_of

BATCH = 64
ALONE = Ranks(0, 1, 0, 1, "none")


def classifier(model: ModelConfig, task: Task) -> Classifier:
    """The fine-tuned module of a task, its weights not set yet."""
    return Classifier(
        model,
        len(task.labels or [0]),
        task.kind == "token_classification",
        task.kind == "regression",
    )


def logits_of(
    module: nn.Module,
    kind: str,
    examples: list[Encoded],
    pad_id: int,
    ranks: Ranks = ALONE,
    all_gather_object: Callable[[Any], list] = lambda mine: [mine],
) -> list[np.ndarray]:
    """Logits of each example, [C] or [S, C] fp32, on every rank; module: a Classifier in eval mode. Collective."""
    mine, device = {}, next(module.parameters()).device
    for numbers in prediction_batches(examples, BATCH, ranks.rank, ranks.world_size):
        batch = TaskBatch(
            *(tensor.to(device) for tensor in collate([examples[i] for i in numbers], pad_id, kind))
        )
        found = module(batch, predict=True).cpu().numpy()
        found = (
            found.reshape(*batch.document_ids.shape, -1)
            if kind == "token_classification"
            else found
        )
        for i, row in zip(numbers, found, strict=False):  # an empty batch holds a row of padding
            mine[i] = row[: len(examples[i].ids)] if row.ndim == 2 else row
    whole = {i: row for part in all_gather_object(mine) for i, row in part.items()}
    return [whole[i] for i in range(len(examples))]


def predictions_of(
    task: Task, examples: list[Example], encoded: list[Encoded], logits: list[np.ndarray]
) -> list:
    """Class numbers, values in the label's own unit, or per example a class number for each word.

    Words behind max_length are not seen: they get O, or the first label where there is no O.
    """
    if task.kind == "regression":
        low, high = task.label_range or (0.0, 1.0)
        return [low + float(row[0]) * (high - low) for row in logits]
    if task.kind == "classification":
        return [int(row.argmax()) for row in logits]
    unseen, found = task.labels.index("O") if "O" in task.labels else 0, []
    for example, tokens, rows in zip(examples, encoded, logits, strict=True):
        seen = [
            int(row.argmax()) for row, label in zip(rows, tokens.label, strict=True) if label >= 0
        ]
        found.append(seen + [unseen] * (len(example.text_a) - len(seen)))
    return found


def write_predictions(
    path: Path, task: Task, examples: list[Example], predictions: list, logits: list
) -> None:
    """A TSV: index, prediction (label, value, or a label per word), and in classification each label's probability."""
    shares = [f"p({label})" for label in task.labels] if task.kind == "classification" else []
    lines = ["\t".join(["index", "prediction", *shares])]
    for example, prediction, row in zip(examples, predictions, logits, strict=True):
        if task.kind == "regression":
            said = [f"{prediction:.6g}"]
        elif task.kind == "classification":
            said = [task.labels[prediction], *(f"{p:.5f}" for p in softmax(row))]
        else:
            said = [" ".join(task.labels[label] for label in prediction)]
        lines.append("\t".join([example.index, *said]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def predict(
    model: Path,
    out: Path,
    file: Path | None = None,
    split: str | None = None,
    data: Path | None = None,
) -> dict[str, float]:
    """The verb: predictions of a fine-tuned model for a file like its task's, or for a split of the task's own data.

    model: DIR/TASK (its kept seed), DIR/TASK/seed-N, or that seed's model. Returns the scores where labels are there.
    """
    if (file is None) == (split is None):
        raise UserError("give --input FILE, or --split NAME with --data")
    found, meta, _, weights = read_checkpoint(model)
    if "task" not in meta.config:
        raise UserError(
            f"{found}: a pretrained encoder, not a fine-tuned model; finetune writes DIR/TASK/seed-N/model"
        )
    task = Task.model_validate(meta.config["task"])
    if data is not None:
        folder = load_task(task.name, data).folder if task.name in GLUE else str(data)
        task = task.model_copy(update={"folder": folder})
    examples = read_file(task, file) if file else read_examples(task, split)
    words = load_tokenizer(tokenizer_of(found))
    encoded = encode(examples, task, words, meta.config["train"]["max_length"])
    module = classifier(ModelConfig.model_validate(meta.config["model"]), task)
    load_true_state(module, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device).eval()
    with torch.no_grad():
        logits = logits_of(module, task.kind, encoded, words.special_ids.pad)
    predictions = predictions_of(task, examples, encoded, logits)
    write_predictions(out, task, examples, predictions, logits)
    labelled = bool(examples) and all(example.label is not None for example in examples)
    return score(task, predictions, examples) if labelled else {}

"""Predictions of a fine-tuned model, and the verb `predict`.

Dimensions: S tokens of an example, C outputs.
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import UserError
from electra_ds.common.files import write_output
from electra_ds.common.outputs import check_output_file, check_outside
from electra_ds.common.printable import printable
from electra_ds.config.architectures import ModelConfig
from electra_ds.config.loading import parse_config
from electra_ds.finetuning.answer_metrics import BEST_F1_THRESHOLD, score_answers
from electra_ds.finetuning.answers import answers_table, decode_answers, predictions_json
from electra_ds.finetuning.batches import Encoded, TaskBatch, collate, encode, prediction_batches
from electra_ds.finetuning.conll_tasks import is_preset
from electra_ds.finetuning.examples import Example, read_examples, read_file
from electra_ds.finetuning.metrics import score
from electra_ds.finetuning.model import Classifier
from electra_ds.finetuning.notes import split_notes
from electra_ds.finetuning.span_classifier import SpanClassifier
from electra_ds.finetuning.squad import SQUAD
from electra_ds.finetuning.squad_files import Answers
from electra_ds.finetuning.superglue_answers import PICKS_ONE, best_candidates, candidates_table
from electra_ds.finetuning.superglue_tasks import is_superglue
from electra_ds.finetuning.tasks import Task, TaskKind, load_task
from electra_ds.interop.checkpoints import read_checkpoint, resolve_checkpoint
from electra_ds.model.weights import load_true_state

BATCH_SIZE = 64
Progress = Callable[[int, int], None]  # (number of finished examples, number of all)
SINGLE_RANK = Ranks(0, 1, 0, 1, "none")


def no_progress(done: int, total: int) -> None:
    """Ignore the progress."""


class Predictions(NamedTuple):
    """The predictions of a model for the examples of a split, in the order of the examples.

    values: see `decode`; in question_answering an Answer for each example. logits: for each row
    fp32 [C], or [S, C] if they are computed for each token. scores: metric -> value; empty when an
    example has no label.
    """

    values: list[Any]
    logits: list[np.ndarray]
    scores: dict[str, float]

    @property
    def is_finite(self) -> bool:
        """Whether every logit is finite. The logits of a diverged model may not be."""
        return all(np.isfinite(row).all() for row in self.logits)


def classifier(model: ModelConfig, task: Task) -> Classifier:
    """Return the module of a task without loaded weights. model: sizes of the encoder."""
    if task.kind == "question_answering":
        return SpanClassifier(model)
    outputs = 1 if task.kind == "multiple_choice" else len(task.labels or [0])
    is_per_token = task.kind == "token_classification"
    return Classifier(model, outputs, is_per_token, task.kind == "regression")


def predict_split(
    module: nn.Module,
    task: Task,
    examples: list[Example],
    encoded: list[Encoded],
    pad_id: int,
    ranks: Ranks = SINGLE_RANK,
    all_gather_object: Callable[[Any], list[Any]] = lambda value: [value],
    progress: Progress = no_progress,
    threshold: float | None = None,
) -> Predictions:
    """Return the predictions and scores of a Classifier on one split, on every rank. Collective.

    module: in eval mode. encoded: the result of `encode` for the examples. all_gather_object:
    returns the JSON values of all ranks, in rank order. progress: called with the number of
    finished examples (on several ranks an estimate) and of all examples. threshold: the null
    threshold of questions without an answer; None: the one that is best for these examples, 0 if
    they have no labels. Fine-tuning and the verb `predict` both use this function.
    """
    with torch.no_grad():
        logits = logits_of(module, task.kind, encoded, pad_id, ranks, all_gather_object, progress)
    has_labels = bool(examples) and all(example.label is not None for example in examples)
    if task.kind == "question_answering":
        return _answers(task, examples, encoded, logits, has_labels, threshold)
    values = decode(task, examples, encoded, logits)
    scores = score(task, values, examples) if has_labels else {}
    return Predictions(values, logits, scores)


def _answers(
    task: Task,
    examples: list[Example],
    encoded: list[Encoded],
    logits: list[np.ndarray],
    has_labels: bool,
    threshold: float | None,
) -> Predictions:
    """Return answers and scores. Arguments as in `predict_split`."""
    answers = decode_answers(task, examples, encoded, logits)
    no_answer = task.questions.no_answer
    scores: dict[str, float] = {}
    if has_labels:
        golds = [example.label for example in examples if isinstance(example.label, Answers)]
        scores = score_answers(task.metrics, no_answer, answers, golds, threshold)
    if no_answer:
        if threshold is None:
            threshold = scores.get(BEST_F1_THRESHOLD, 0.0)
        answers = [answer.at(threshold) for answer in answers]
    return Predictions(answers, logits, scores)


def logits_of(
    module: nn.Module,
    kind: TaskKind,
    examples: list[Encoded],
    pad_id: int,
    ranks: Ranks = SINGLE_RANK,
    all_gather_object: Callable[[Any], list[Any]] = lambda value: [value],
    progress: Progress = no_progress,
) -> list[np.ndarray]:
    """Return the logits of each row, fp32 [C], or [S, C] if they are of tokens. Collective.

    Each rank computes its share and receives all logits. module: a Classifier in eval mode. kind:
    that of the task. Other arguments as in `predict_split`.
    """
    device = next(module.parameters()).device
    own: dict[int, np.ndarray] = {}  # example number -> logits of this rank's share
    for numbers in prediction_batches(examples, BATCH_SIZE, ranks.rank, ranks.world_size):
        batch = collate([examples[i] for i in numbers], pad_id, kind)
        batch = TaskBatch._make(x if x is None else x.to(device) for x in batch)
        logits = module(batch, predict=True).cpu().numpy()
        if kind in ("token_classification", "question_answering"):
            logits = logits.reshape(*batch.document_ids.shape, -1)
        for i, row in zip(numbers, logits, strict=False):  # a batch without examples has one row
            count = len(examples[i].choices) if kind == "multiple_choice" else None
            own[int(i)] = row[: len(examples[i].ids)] if row.ndim == 2 else row[:count]
        progress(len(own) * ranks.world_size, len(examples))
    gathered: dict[int, np.ndarray] = {}
    for share in all_gather_object([_to_text(i, row) for i, row in own.items()]):
        gathered.update(_from_text(*item) for item in share)
    return [gathered[i] for i in range(len(examples))]


def _to_text(number: int, row: np.ndarray) -> list[Any]:
    """Return the logits of one example as JSON values: number, shape, fp32 bytes in base64."""
    content = np.ascontiguousarray(row, dtype="<f4").tobytes()
    return [number, list(row.shape), base64.b64encode(content).decode("ascii")]


def _from_text(number: int, shape: list[int], text: str) -> tuple[int, np.ndarray]:
    """Return (number, logits in fp32) from the result of `_to_text`."""
    values = np.frombuffer(base64.b64decode(text), dtype="<f4")
    return number, values.reshape(shape)


def decode(
    task: Task, examples: list[Example], encoded: list[Encoded], logits: list[np.ndarray]
) -> list[Any]:
    """Return the prediction of each example from its logits.

    A prediction is a class number; in regression a float in the unit of the labels; in token
    classification a list with one class number for each word. Words beyond max_length have no
    logits: they get the label O, or the first label if the task has no O.
    """
    if task.kind == "regression":
        low, high = task.label_range or (0.0, 1.0)
        return [low + float(row[0]) * (high - low) for row in logits]
    if task.format in PICKS_ONE:
        return best_candidates(examples, logits)
    if task.kind in ("classification", "multiple_choice"):
        return [int(row.argmax()) for row in logits]
    labels = task.labels or []
    cut_off = labels.index("O") if "O" in labels else 0
    predictions = []
    for example, tokens, rows in zip(examples, encoded, logits, strict=True):
        assert isinstance(tokens.label, list)
        tags = [
            int(row.argmax()) for row, label in zip(rows, tokens.label, strict=True) if label >= 0
        ]
        predictions.append(tags + [cut_off] * (len(example.text_a) - len(tags)))
    return predictions


def predictions_table(
    task: Task, examples: list[Example], predictions: list[Any], logits: list[Any]
) -> bytes:
    """Return a TSV with one line for each example: index, prediction, probabilities.

    The prediction is a label, a value, one label for each word, or the number of a choice (its
    label, if the choices have labels). In classification, a column for each label contains its
    probability; in multiple choice, one column contains the probabilities of all choices. A format
    of candidates has one line for each question instead, with the text of the best one. Control
    characters in labels and keys are escaped, so that each example is one line.
    """
    if task.kind == "question_answering":
        return answers_table(task, examples, predictions)
    if task.format in PICKS_ONE:
        return candidates_table(examples, predictions)
    labels = [printable(label) for label in task.labels or []]
    columns = [f"p({label})" for label in labels] if task.kind == "classification" else []
    columns += ["probabilities"] if task.kind == "multiple_choice" else []
    lines = ["\t".join(["index", "prediction", *columns])]
    for example, prediction, row in zip(examples, predictions, logits, strict=True):
        if task.kind == "regression":
            cells = [f"{prediction:.6g}"]
        elif task.kind == "classification":
            cells = [labels[prediction], *(f"{p:.5f}" for p in softmax(row))]
        elif task.kind == "multiple_choice":
            choice = labels[prediction] if labels else str(prediction)
            cells = [choice, " ".join(f"{p:.5f}" for p in softmax(row))]
        else:
            cells = [" ".join(labels[label] for label in prediction)]
        lines.append("\t".join([printable(example.key), *cells]))
    return ("\n".join(lines) + "\n").encode()


class Written(NamedTuple):
    """The result of `predict`. scores: metric -> value, empty without labels. notes: warnings."""

    scores: dict[str, float]
    notes: list[str]


def predict(
    model: Path,
    out: Path,
    file: Path | None = None,
    split: str | None = None,
    data: Path | None = None,
    progress: Progress = no_progress,
) -> Written:
    """Write the predictions of a fine-tuned model to a TSV file; return scores and notes.

    model: DIR/TASK (if it contains one model), DIR/TASK/seed-N, or DIR/TASK/seed-N/model.
    out: the TSV file. Answers are written in the official shape of SQuAD if its suffix is .json.
    file: a file with the columns of the task. split: a split of the task's own data, instead of
    file. data: with split, the GLUE root or the folder of the task.
    progress: called with the number of finished examples and of all examples.
    Raises UserError unless exactly one of file and split is given, for a model that is not
    fine-tuned, for a file that does not fit the task, and for an `out` that cannot be written.
    """
    if (file is None) == (split is None):
        raise UserError("expected exactly one of --input FILE and --split NAME (with --data)")
    if file is not None and data is not None:
        raise UserError("--data is the folder of --split; leave it out with --input")
    check_output_file(out, "--out", (file,))
    check_outside(out, "--out", {"FINETUNED": resolve_checkpoint(model)})
    source = read_checkpoint(model)
    if source.fine_tuned is None:
        raise UserError(
            f"{source.folder}: found a pretrained model; expected a fine-tuned one, such as "
            "DIR/TASK/seed-N/model, which finetune writes"
        )
    task = parse_config(source.meta.config["task"], f"{source.folder}/meta.json: task", Task)
    if data is not None:
        is_known = (
            task.is_glue
            or is_superglue(task.name)
            or task.name in SQUAD
            or is_preset(task.name, task.tag_scheme)
        )
        folder = load_task(task.name, data).folder if is_known else str(data)
        task = task.model_copy(update={"folder": folder})
    if file is not None:
        examples = read_file(task, file)
    else:
        assert split is not None
        examples = read_examples(task, split)
    tokenizer = source.tokenizer()
    encoded = encode(examples, task, tokenizer, source.max_length)
    notes = split_notes(task, str(file or split), examples, encoded, tokenizer)
    module = classifier(source.model, task)
    load_true_state(module, source.weights)
    module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    pad_id = tokenizer.special_ids.pad
    scores = source.fine_tuned.scores.get(next(iter(task.valid_splits), ""), {})
    predictions = predict_split(
        module,
        task,
        examples,
        encoded,
        pad_id,
        progress=progress,
        threshold=scores.get(BEST_F1_THRESHOLD),
    )
    if task.kind == "question_answering" and out.suffix == ".json":
        content = predictions_json(examples, predictions.values)
    else:
        content = predictions_table(task, examples, predictions.values, predictions.logits)
    write_output(out, content)
    return Written(predictions.scores, notes)

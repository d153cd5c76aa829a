"""Export of a run, a checkpoint or a fine-tuned model as folders that transformers can load."""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict
from safetensors.torch import save
from torch import Tensor

from electra_ds.common.files import write_bytes
from electra_ds.common.json_files import Record, read_record, write_json
from electra_ds.common.outputs import check_outside, new_folder
from electra_ds.config.schema import ObjectiveConfig, RunConfig
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.average import average_of
from electra_ds.interop.checkpoints import (
    Checkpoint,
    FineTunedConfig,
    FineTunedTask,
    read_checkpoint,
)
from electra_ds.interop.hf import format_of
from electra_ds.interop.hf_format import HfFormat, Role, part_names
from electra_ds.interop.hf_tokenizer import write_tokenizer
from electra_ds.interop.installed import check_class
from electra_ds.interop.model_card import Card, render_card
from electra_ds.training.checkpoint import folder_of_model
from electra_ds.training.metrics_file import metric_lines

PURPOSES = {
    "detection": "A text encoder that electra_ds pretrained by replaced token detection (ELECTRA).",
    "prediction": "A text encoder that electra_ds pretrained by predicting tokens.",
    "generator": "The generator that electra_ds trained beside a text encoder; it predicts tokens.",
    "frozen": "The generator with which electra_ds pretrained a text encoder; it predicts tokens. It "
    "was frozen in the run: its weights come from another model.",
}
TUNED = "A text encoder that electra_ds fine-tuned on the task {name}."


def export(path: Path, out: Path, tokenizer: Path | None = None) -> list[str]:
    """Write a pretrained model as out/discriminator and out/generator, a fine-tuned one as `out`.

    path: a run folder, a checkpoint or a fine-tuned model. tokenizer: the vocabulary, when it is
    not beside the model. Each folder holds fp32 weights for `from_pretrained` of the class in its
    config.json, the files of AutoTokenizer and a model card. Returns a line for each folder.
    Raises UserError when `out` is not empty or lies in the model's folder, when there is no model
    or no tokenizer, when their vocabulary sizes differ, and for a run of the user's own modules.
    """
    check_outside(out, "--out", {"MODEL": folder_of_model(path), "--tokenizer": tokenizer})
    with new_folder(out, "--out") as folder:
        source = read_checkpoint(path)
        words = source.tokenizer(tokenizer)
        if source.fine_tuned is not None:
            lines = [_export_fine_tuned(source, source.fine_tuned, folder, out.name, words)]
        else:
            assert source.run is not None
            lines = _export_run(source, source.run, folder, words)
    return [line.replace(str(folder), str(out), 1) for line in lines]


def _export_run(source: Checkpoint, config: RunConfig, out: Path, words: Tokenizer) -> list[str]:
    weights, detects = source.weights, config.objective.detects
    has_generator = any(name.startswith("generator_head.") for name in weights)
    parts = ["discriminator", "generator"] if has_generator else ["discriminator"]
    facts = _run_facts(source)
    exported = {name for part in parts for name in part_names(weights, part)}
    if rest := sorted(weights.keys() - exported):
        facts["left out (not in the stock classes)"] = ", ".join(rest)
    form = format_of(source.model)
    lines = []
    for part in parts:
        tensors = form.to_hf(weights, part)
        tensors.pop(form.output_matrix, None)  # tied to the word table
        is_generator = part == "generator"
        role: Role = "detection" if detects and not is_generator else "prediction"
        sizes = config.generator if is_generator else None
        values = form.config(source.model, sizes, words.special_ids, role)
        of_generator = "frozen" if config.objective.is_frozen else "generator"
        card = Card(PURPOSES[of_generator if is_generator else role], facts, role)
        written = Written(part, form, values, tensors, card)
        lines.append(_write_folder(out / part, written, words, source.max_length))
    return lines


class ImportSource(Record):
    """What a card takes from import.json, the report of an import."""

    model_config = ConfigDict(extra="ignore")

    source: str = "unknown"


class Origin(Record):
    """What a card takes from result.json of a fine-tuned seed."""

    model_config = ConfigDict(extra="ignore")

    origin: str = "unknown"


def _run_facts(source: Checkpoint) -> dict[str, str]:
    """Facts of a pretraining run for its cards: base model, data, length, held-out metrics."""
    config, state = source.run, source.meta.state
    assert config is not None
    run_folder = source.folder.resolve().parent.parent
    facts = {}
    if (run_folder / "import.json").is_file():
        report = read_record(run_folder / "import.json", ImportSource, "an import's report")
        facts["base model"] = report.source
    facts |= {"objective": config.objective.kind, **_sampling_facts(config.objective)}
    if averaged := average_of(source.folder) if state.step == 0 else None:
        facts["average of"] = "; ".join(averaged.lines())
    else:
        facts |= {
            "steps": f"{state.step:,}",
            "tokens read": f"{state.tokens:,}",
            "data": str(state.data.get("dataset_id", "unknown")),
        }
    facts["rows"] = f"{config.data.sequence_length} tokens"
    metrics = run_folder / "metrics.jsonl"
    last: dict[str, Any] = {}  # evaluation up to the step of the checkpoint
    for _, record in metric_lines(metrics) if metrics.is_file() else ():
        if record["split"] == "valid" and record["step"] <= state.step:
            last = record
    for key, value in last.items():
        if isinstance(value, float):
            text = f"{value:.4f}" if value < 1000 else f"{value:,.0f}"
            facts[f"held out at step {last['step']:,}, {key}"] = text
    return facts


def _sampling_facts(objective: ObjectiveConfig) -> dict[str, str]:
    """Facts of the samples that differ from the default: a frozen generator, a temperature."""
    facts = {"objective.generator": "frozen"} if objective.is_frozen else {}
    temperature, decay = objective.temperature, objective.temperature_decay
    if objective.has_generator and (temperature != 1 or objective.is_frozen):
        changes = decay is not None and temperature != 1
        change = (
            f" at first, tends to 1 (objective.temperature_decay = {decay:g})" if changes else ""
        )
        facts["temperature"] = f"{temperature:g}{change}"
    return facts


def _export_fine_tuned(
    source: Checkpoint, config: FineTunedConfig, out: Path, name: str, words: Tokenizer
) -> str:
    task = config.task
    kind, labels = task.kind, task.labels or [task.name]
    form = format_of(source.model)
    role, tensors = form.classifier(source.weights, kind, task.label_range)
    if role == "multiple_choice":
        check_class(form.classes[role])
    values = form.config(source.model, None, words.special_ids, role)
    values |= {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if role == "sequence_classification":
        problem = "regression" if kind == "regression" else "single_label_classification"
        values["problem_type"] = problem
    reads_cls = kind == "classification" and role == "token_classification"
    facts = _task_facts(source, task)
    if reads_cls:
        facts["class of the text"] = (
            "the logits of the first token, because the stock sentence head is too small"
        )
    for split, scores in config.scores.items():
        facts |= {
            f"{split}, {metric}": f"{value:.4f}"
            for metric, value in scores.items()
            if value is not None
        }
    takes_pairs = task.text_b is not None or task.choices is not None
    card = Card(TUNED.format(name=task.name), facts, role, takes_pairs, reads_cls)
    written = Written(name, form, values, tensors, card)
    return _write_folder(out, written, words, source.max_length)


def _task_facts(source: Checkpoint, task: FineTunedTask) -> dict[str, str]:
    """Facts of a fine-tuned model for its card: base model, task, data, labels as words."""
    facts = {}
    result = source.folder.parent / "result.json"
    if result.is_file():
        facts["base model"] = read_record(result, Origin, "the result of a seed").origin
    facts["task"] = f"{task.name} ({task.kind})"
    if data := task.dataset or task.splits.get("train"):
        facts["data"] = data
    if task.labels:
        facts["labels"] = ", ".join(task.labels)
    elif task.label_range:
        low, high = task.label_range
        facts["labels"] = f"a number from {low:g} to {high:g}"
    return facts


class Written(NamedTuple):
    """The content of a folder. name: its later name. config: config.json."""

    name: str
    format: HfFormat
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    card: Card


def _write_folder(folder: Path, content: Written, words: Tokenizer, max_length: int) -> str:
    """Write weights, tokenizer and card, then config.json, which marks a complete folder.

    max_length: most tokens of a text, for the tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = content.config
    write_tokenizer(words, folder, max_length, content.format.has_token_types)
    tensors = {name: value.contiguous() for name, value in content.tensors.items()}
    write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    parameters = sum(value.numel() for value in tensors.values())
    card = content.card
    card = card._replace(
        facts={**card.facts, "tokenizer": words.describe_options()},
        has_spaces=words.kind == "byte_bpe",
    )
    text = render_card(content.name, content.format, config, parameters, card)
    write_bytes(folder / "README.md", text.encode())
    write_json(folder / "config.json", config)
    return (
        f"{folder}: {config['architectures'][0]}, {parameters:,} parameters, "
        f"{words.kind} of {words.vocab_size:,} entries, texts of up to {max_length} tokens"
    )

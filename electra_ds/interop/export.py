"""How do others use what was trained here? Stock Hugging Face folders: no code of ours is needed to load them."""

from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.files import write_bytes, write_json
from electra_ds.config.loading import parse_run
from electra_ds.config.schema import ModelConfig
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.hf import classifier_to_hf, hf_config, part_names, to_hf
from electra_ds.interop.hf_tokenizer import write_tokenizer
from electra_ds.interop.load_model import checked_tokenizer, read_trained
from electra_ds.training.checkpoint import tokenizer_of
from electra_ds.training.metrics_file import read_metrics


def export(path: Path, out: Path, tokenizer: Path | None = None) -> list[str]:
    """Write a run or checkpoint as out/discriminator and out/generator, a fine-tuned model as out itself.

    Each folder is what `from_pretrained` of the class named in its config.json reads, fp32, with AutoTokenizer's files
    and a card. Returns a line per folder. UserError when `out` is not empty, or for a run of the user's own modules.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; choose a new folder")
    found, meta, weights = read_trained(path)
    model = ModelConfig.model_validate(meta.config["model"])
    words = checked_tokenizer(tokenizer or tokenizer_of(found), model.vocab_size)
    if "task" in meta.config:
        return [_fine_tuned(out, meta.config, model, weights, words)]
    config = parse_run(meta.config, f"{found}/meta.json")
    facts = {
        "objective": config.objective.kind,
        "steps": f"{meta.state.step:,}",
        "tokens read": f"{meta.state.tokens:,}",
        "data": meta.state.data.get("dataset_id", "unknown"),
        "rows": f"{config.data.sequence_length} tokens",
    }
    metrics = found.resolve().parent.parent / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    held_out = [r for r in records if r["split"] == "valid" and r["step"] <= meta.state.step]
    for key, value in held_out[-1].items() if held_out else ():
        if isinstance(value, float):
            title = f"held out at step {held_out[-1]['step']:,}, {key}"
            facts[title] = f"{value:.4f}" if value < 1000 else f"{value:,.0f}"
    has_generator = any(name.startswith("generator_head.") for name in weights)
    parts = ["discriminator", "generator"] if has_generator else ["discriminator"]
    exported = {name for part in parts for name in part_names(weights, part)}
    if rest := sorted(weights.keys() - exported):
        facts["left out, the stock classes have no place for it"] = ", ".join(rest)
    lines = []
    for part in parts:
        tensors = to_hf(weights, part)
        tensors.pop("generator_lm_head.weight", None)  # tied: the library takes the word table
        is_mlm = "generator_lm_head.bias" in tensors
        values = hf_config(model, config.generator, part, words.special_ids.pad)
        values["architectures"] = ["ElectraForMaskedLM" if is_mlm else "ElectraForPreTraining"]
        lines.append(_write(out / part, values, tensors, words, facts))
    return lines


def _fine_tuned(
    out: Path, config: dict, model: ModelConfig, weights: dict[str, Tensor], words: Tokenizer
) -> str:
    task = config["task"]
    kind, labels = task["kind"], task["labels"] or [task["name"]]
    architecture, tensors = classifier_to_hf(weights, kind, task.get("label_range"))
    values = hf_config(model, None, "discriminator", words.special_ids.pad) | {
        "architectures": [architecture],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if architecture == "ElectraForSequenceClassification":
        values["problem_type"] = (
            "regression" if kind == "regression" else "single_label_classification"
        )
    facts = {"task": f"{task['name']} ({kind})"}
    if kind == "classification" and architecture == "ElectraForTokenClassification":
        facts["class of the text"] = (
            "the logits at the first token: the stock sentence head has no room for all labels"
        )
    for split, scores in config["scores"].items():
        facts |= {f"{split}, {metric}": f"{value:.4f}" for metric, value in scores.items()}
    return _write(out, values, tensors, words, facts)


def _write(
    folder: Path, config: dict, tensors: dict[str, Tensor], words: Tokenizer, facts: dict[str, str]
) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(words, folder, config["max_position_embeddings"])
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    architecture, count = (
        config["architectures"][0],
        sum(value.numel() for value in tensors.values()),
    )
    sizes = "{num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} heads, feed-forward "
    sizes += "{intermediate_size}, embedding {embedding_size}, vocabulary {vocab_size:,}"
    rows = {
        "class": architecture,
        "sizes": sizes.format(**config),
        "parameters": f"{count:,}",
        **facts,
    }
    card = [
        "---",
        "library_name: transformers",
        "tags: [electra]",
        "---",
        f"# {folder.name}",
        "A text encoder trained by electra_ds.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        "",
        "```python",
        f"from transformers import AutoTokenizer, {architecture}",
        f'model = {architecture}.from_pretrained("{folder.name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder.name}")',
        "```",
        "",
    ]
    write_bytes(folder / "README.md", "\n".join(card).encode())
    write_json(folder / "config.json", config)
    return f"{folder}: {architecture}, {count:,} parameters, {words.kind} of {words.vocab_size:,} entries"

"""Small run folders without training; all weights are random, LayerNorms and biases included."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from electra_ds.config.loading import load_run, parse_run
from electra_ds.config.schema import RunConfig
from electra_ds.interop.parts import encoder_with_task_head
from electra_ds.model.objective import ElectraObjective
from electra_ds.model.weights import true_state
from electra_ds.training import checkpointer
from electra_ds.training.optimizer import MOMENTS
from electra_ds.training.state import TrainingState

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY += [
    f"{mark}{chr(97 + i // 26)}{chr(97 + i % 26)}" for mark in ("", "##") for i in range(300)
]
VOCABULARY = VOCABULARY[:600]
SIZES = {
    "model": dict(
        hidden_size=48, num_layers=2, num_heads=2, ffn_size=80, embedding_size=32, max_positions=40
    ),
    "generator": dict(hidden_size=32, num_layers=2, num_heads=1, ffn_size=64),
}
# Of the architecture modernbert: a local window smaller than a row, and unusual bases.
MODERN_SIZES = {
    "model": dict(
        hidden_size=48,
        num_layers=3,
        num_heads=2,
        ffn_size=40,
        max_positions=40,
        local_attention=8,
        global_theta=500.0,
        local_theta=100.0,
    ),
    "generator": dict(hidden_size=48, num_layers=2, num_heads=2, ffn_size=40),
}
# Of the architecture deberta_v2: fewer buckets than distances in a row.
DEBERTA_SIZES = {
    "model": dict(
        hidden_size=48,
        num_layers=3,
        num_heads=2,
        ffn_size=80,
        max_positions=40,
        position_buckets=8,
    ),
    "generator": dict(hidden_size=48, num_layers=2, num_heads=2, ffn_size=80),
}
OF_ARCHITECTURE = {  # preset, sizes
    "electra": ("tiny", SIZES),
    "modernbert": ("modern-tiny", MODERN_SIZES),
    "deberta_v2": ("deberta-tiny", DEBERTA_SIZES),
}
IDS = dict(pad=0, unk=1, cls=2, sep=3, mask=4)


class SingleProcessWeights:
    """The part of `engine.Engine` that saving weights needs: one process with whole tensors."""

    ranks = SimpleNamespace(rank=0, world_size=1)

    def __init__(self, state: dict[str, torch.Tensor]):
        self.parameters = state
        self.frozen: dict[str, torch.Tensor] = {}
        self.optimizer_kind = "adam"
        self.moments = dict.fromkeys(state, MOMENTS)

    def full_tensor(self, name: str, kind: str) -> torch.Tensor:
        return self.parameters[name]

    def shape(self, name: str) -> torch.Size:
        return self.parameters[name].shape

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def scaler_state(self) -> dict[str, float]:
        return {}


def config(
    sharing: str = "shared", kind: str = "electra", architecture: str = "electra"
) -> RunConfig:
    preset, sections = OF_ARCHITECTURE[architecture]
    values = load_run(preset).model_dump(mode="json")
    for section, sizes in sections.items():
        values[section] |= sizes
    values["model"] |= {"sharing": sharing, "vocab_size": 600}
    if architecture != "electra" and sharing == "untied":
        values["generator"] |= {"hidden_size": 24, "num_heads": 1}
    if sharing == "all":
        equal = values["generator"].keys() - {"embedding_size"}
        values["generator"] |= {key: values["model"][key] for key in equal}
    values["data"] |= {"sequence_length": 32, "special_ids": IDS}
    values["objective"]["kind"] = kind
    return parse_run(values, "test")


def frozen_config(architecture: str = "electra", **generator: Any) -> RunConfig:
    """A run with a frozen generator. generator: changes of the section."""
    values = config(architecture=architecture).model_dump(mode="json")
    values["objective"]["generator"] = "frozen"
    values["model"]["sharing"] = "untied"
    if architecture == "electra":
        values["generator"]["embedding_size"] = 32
    values["generator"] |= generator
    return parse_run(values, "test")


@torch.no_grad()
def drawn(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with noise added to every parameter, in place; returned in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module.eval()


def objective(run: RunConfig, seed: int = 0) -> ElectraObjective:
    parts = (run.model, run.generator, run.objective, run.data.special_ids)
    return drawn(ElectraObjective(*parts, seed=0), seed)


def vocabulary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY))
    return folder


def save(folder: Path, name: str, state: dict[str, torch.Tensor], values: dict) -> Path:
    """Write a checkpoint with only weights as folder/name, with a config."""
    return checkpointer.save(
        SingleProcessWeights(state),
        folder,
        name,
        TrainingState(step=7),
        values,
        {},
        weights_only=True,
    )


def pretrained(
    out: Path, sharing: str = "shared", kind: str = "electra", architecture: str = "electra"
) -> ElectraObjective:
    """Write a run folder with its vocabulary, as finetune and export read it; its module."""
    return saved(out, config(sharing, kind, architecture))


def saved(out: Path, run: RunConfig) -> ElectraObjective:
    """Write a run folder of any config with its vocabulary; its module."""
    module = objective(run)
    save(out / "ckpt", "final", true_state(module), run.model_dump(mode="json"))
    (out / "ckpt" / "latest").write_text("final\n")
    vocabulary(out / "tokenizer")
    return module


def rows_with_padding(vocab_size: int = 600) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, token_type_ids) [3, 20]: two segments, the second row shorter."""
    ids, mask = torch.randint(5, vocab_size, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    ids[1, 12:], mask[1, 12:] = IDS["pad"], 0
    return ids, mask, (torch.arange(20) > 8).long().expand(3, -1)


TASKS = {
    "classification": dict(labels=["no", "maybe", "yes"], label_range=None, outputs=3),
    "regression": dict(labels=None, label_range=[1.0, 5.0], outputs=1),
    "token_classification": dict(labels=["O", "NAME"], label_range=None, outputs=2),
    "many classes": dict(
        labels=[f"c{i}" for i in range(25)], label_range=None, outputs=25
    ),  # 2 x 25 > 48
}


CHOICES = dict(labels=None, label_range=None, outputs=1, choices="options")


def fine_tuned(folder: Path, name: str, architecture: str = "electra") -> torch.nn.ModuleDict:
    """Write a fine-tuned model of a task in TASKS, or of multiple choice, as folder/model; its
    encoder and head."""
    model = config(architecture=architecture).model
    task = CHOICES if name == "multiple_choice" else TASKS[name]
    parts = drawn(encoder_with_task_head(model, task["outputs"]))
    kind = "classification" if name == "many classes" else name
    described = {
        "name": "own",
        "kind": kind,
        "labels": task["labels"],
        "label_range": task["label_range"],
        "choices": task.get("choices"),
    }
    values = {
        "model": model.model_dump(mode="json"),
        "task": described,
        "scores": {"valid": {"accuracy": 0.5}},
    }
    vocabulary(folder / "tokenizer")
    save(folder, "model", true_state(parts), values)
    (folder / "result.json").write_text('{"origin": "run O, step 7"}')
    return parts

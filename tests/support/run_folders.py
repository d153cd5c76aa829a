"""Small run folders without training: every weight drawn at random, LayerNorms and biases too."""

from pathlib import Path

import torch

from electra_ds.config.loading import load_run, parse_run
from electra_ds.config.schema import RunConfig
from electra_ds.interop.import_weights import WholeWeights
from electra_ds.model.objective import ElectraObjective
from electra_ds.model.weights import true_state
from electra_ds.training import checkpointer
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
IDS = dict(pad=0, unk=1, cls=2, sep=3, mask=4)


def config(sharing: str = "shared", kind: str = "electra") -> RunConfig:
    values = load_run("tiny").model_dump(mode="json")
    for section, sizes in SIZES.items():
        values[section] |= sizes
    values["model"] |= {"sharing": sharing, "vocab_size": 600}
    if sharing == "all":
        values["generator"] |= {key: values["model"][key] for key in values["generator"]}
    values["data"] |= {"special_ids": IDS}
    values["objective"]["kind"] = kind
    return parse_run(values, "test")


@torch.no_grad()
def drawn(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with every parameter shaken; rows that pad the word table stay what they are."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module.eval()


def objective(made_of: RunConfig, seed: int = 0) -> ElectraObjective:
    parts = (made_of.model, made_of.generator, made_of.objective, made_of.data.special_ids)
    return drawn(ElectraObjective(*parts, seed=0), seed)


def vocabulary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY))
    return folder


def save(folder: Path, name: str, state: dict[str, torch.Tensor], values: dict) -> Path:
    """Write a checkpoint of plain weights as folder/name with the given config."""
    progress = TrainingState(step=7)
    return checkpointer.save(
        WholeWeights(state), folder, name, progress, values, {}, weights_only=True
    )


def pretrained(out: Path, sharing: str = "shared", kind: str = "electra") -> ElectraObjective:
    """Write a run folder that finetune and export take, with its vocabulary; the module whose weights it holds."""
    made_of = config(sharing, kind)
    module = objective(made_of)
    save(out / "ckpt", "final", true_state(module), made_of.model_dump(mode="json"))
    (out / "ckpt" / "latest").write_text("final\n")
    vocabulary(out / "tokenizer")
    return module


def rows_with_padding(vocab_size: int = 600) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, token_type_ids) [3, 20]: two segments, the second row shorter."""
    ids, mask = torch.randint(5, vocab_size, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    ids[1, 12:], mask[1, 12:] = IDS["pad"], 0
    return ids, mask, (torch.arange(20) > 8).long().expand(3, -1)

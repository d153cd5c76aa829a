"""Import of a run of electra_ds into a config of equal or larger sizes, by tiling.

The patterns are those of `model.tiling`. The tokenizer, the architecture and the sharing of the
embeddings stay; the moments are not used.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.printable import printable
from electra_ds.config.architectures import EncoderConfig, ModelConfig
from electra_ds.config.loading import (
    apply_settings,
    differences,
    load_values,
    parse_run,
    phase_runs,
)
from electra_ds.config.schema import FactoryConfig, RunConfig
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.checkpoints import check_run
from electra_ds.interop.import_report import ImportReport, write_imported
from electra_ds.interop.vocabularies import tokenizer_of_model
from electra_ds.model.build import build_objective
from electra_ds.model.tiling import (
    GrownEncoder,
    layer_kinds,
    layer_sources,
    source_names,
    tiled,
)
from electra_ds.model.weights import Shapes, check_state, shapes_of
from electra_ds.training import checkpoint
from electra_ds.training.checkpoint_config import config_of_weights

GROWING = ("hidden_size", "num_layers", "ffn_size")  # fields that may be larger than in the source
# Fields of `model` that are numbers of rows. A row has a meaning of its own: an entry, a position.
ROWS = ("max_positions", "type_vocab_size", "position_buckets")
# Fields of `model` on which the function of the weights depends, at equal shapes.
MEANING = (
    "layer_norm_eps",
    "attention_pattern",
    "local_attention",
    "global_theta",
    "local_theta",
    "max_positions",
)
GENERATOR = ("generator.", "generator_embeddings.", "generator_head.")
HEADS = ("discriminator_head.", "mlm_head.", "copy_gate.", "generator_head.")


class SourceRun(NamedTuple):
    """A checkpoint of a pretraining run.

    config: of the run. trained: of its weights; of a run with phases that of the last phase.
    weights: canonical name -> fp32 tensor, with deltas.
    """

    folder: Path
    config: RunConfig
    trained: RunConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer


def is_run(path: Path) -> bool:
    """Return whether `path` is a run folder or a checkpoint of electra_ds."""
    return found_at(path).kind in ("run", "checkpoint")


def import_run(
    source: Path, out: Path, run: str | None, sets: Sequence[str], tokenizer: Path | None
) -> ImportReport:
    """Write a run or checkpoint of electra_ds into the new folder `out`, with other sizes.

    run, sets: the config of the result; None: that of the source, so that `sets` alone enlarge it.
    tokenizer: as of the source; None: the one beside it.
    With equal sizes every tensor is equal to that of the source. Raises UserError for a source that
    is no checkpoint of a built-in encoder, for another architecture, sharing or tokenizer, and with
    all sizes that do not fit.
    """
    found = _source(source, tokenizer)
    config = _target(found, run, sets)
    _check_sizes(found.config, config, source)
    shapes = shapes_of(lambda: build_objective(config), f"{source} with {run or 'its config'}")
    encoders = _encoders(found.config, config)
    report = ImportReport([], [], {}, [], {})
    assert report.layers is not None
    report.layers.update({part.rstrip("."): grown.layers for part, grown in encoders.items()})
    state = _grown(found, shapes, encoders, report)
    check_state(state, {name: shapes[name] for name in state}, str(source))
    report.warnings.extend(_notes(found.trained, phase_runs(config)[0], report))
    write_imported(out, source, config, state, found.tokenizer, report)
    return report


def _source(source: Path, tokenizer: Path | None) -> SourceRun:
    folder = checkpoint.find_checkpoint(source)
    meta = checkpoint.read_meta(folder)
    if "task" in meta.config:
        raise UserError(f"{printable(folder)}{found_at(folder).clause}; expected a pretraining run")
    config = parse_run(meta.config, f"{folder}/meta.json")
    if isinstance(config.model, FactoryConfig):
        raise UserError(
            f"{printable(folder)}: has a model.factory; expected a run of the built-in encoders"
        )
    weights = checkpoint.weights(folder)
    check_run(config, weights, folder)
    model, special_ids = config.model, config.data.special_ids
    words = tokenizer_of_model(folder, tokenizer, model.vocab_size, special_ids)
    return SourceRun(folder, config, config_of_weights(meta, f"{folder}/meta.json"), weights, words)


def _target(found: SourceRun, run: str | None, sets: Sequence[str]) -> RunConfig:
    """The config of the result. UserError for another architecture, sharing or vocabulary."""
    if run is None:
        values: dict[str, Any] = found.config.model_dump(mode="json")
        apply_settings(values, sets)
        where = f"the config of {printable(found.folder)}"
    else:
        values, where = load_values(run, "pretrain", sets), f"--run {printable(run)}"
    config = parse_run(values, where)
    if isinstance(config.model, FactoryConfig):
        raise UserError(
            f"{where}: has a model.factory; weights are imported into the built-in model"
        )
    for key in ("architecture", "sharing"):
        theirs, own = getattr(found.config.model, key), getattr(config.model, key)
        if theirs != own:
            raise UserError(
                f"{where}: model.{key} = {own}, but {theirs} in {printable(found.folder)}; expected "
                f"a config of {theirs}{_way(key, theirs)}"
            )
    model, data = found.config.model, found.config.data
    assert data.special_ids is not None and model.vocab_size is not None
    for name, value, own in (
        ("model.vocab_size", config.model.vocab_size, model.vocab_size),
        ("data.special_ids", config.data.special_ids, data.special_ids),
    ):
        if value not in (None, own):
            raise UserError(
                f"{where}: {name} = {value}, but {own} in {printable(found.folder)}; its tokenizer "
                "stays: leave the key out"
            )
    return config.with_data(model.vocab_size, data.special_ids, config.data.sequence_length)


def _way(key: str, theirs: str) -> str:
    if key == "architecture":
        return ""
    return (
        f", such as --set model.sharing={theirs}; another sharing needs an export of the run and an "
        "import of the exported folder first"
    )


def _check_sizes(old: RunConfig, new: RunConfig, source: Path) -> None:
    """Raise UserError with every size that is smaller than in the source, or does not fit it."""
    problems = _problems("model", old.model, new.model)
    for name in ROWS:
        before, after = getattr(old.model, name, None), getattr(new.model, name, None)
        is_limit = name == "max_positions" and new.model.architecture != "electra"
        if before != after and not is_limit:
            problems.append(f"model.{name} = {after}, but {before} there: expected the same rows")
    problems += _width_problems("model", _widths(old.model), _widths(new.model))
    if old.objective.has_generator and new.objective.has_generator and new.model.sharing != "all":
        problems += _problems("generator", old.generator, new.generator)
        widths = [_widths(run.model, run.generator) for run in (old, new)]
        problems += _width_problems("generator", *widths)
    if problems:
        raise UserError(
            f"{printable(source)}: its weights do not fit a config with "
            f"{'; '.join(dict.fromkeys(problems))}; expected a deeper or wider config (--run, --set)"
        )


def _problems(section: str, old: EncoderConfig, new: EncoderConfig) -> list[str]:
    """What is smaller than in the source, and a head of another size."""
    found = [
        f"{section}.{name} = {getattr(new, name)}, but {getattr(old, name)} there"
        for name in GROWING
        if getattr(new, name) < getattr(old, name)
    ]
    if new.head_size != old.head_size:
        fitting = new.hidden_size // old.head_size
        way = (
            f": set {section}.num_heads = {fitting}"
            if fitting * old.head_size == new.hidden_size
            else ""
        )
        found.append(
            f"{section}.num_heads = {new.num_heads}, heads of {new.head_size}, but of "
            f"{old.head_size} there{way}"
        )
    return found


def _widths(model: ModelConfig, generator: EncoderConfig | None = None) -> tuple[int, int]:
    """(width of the word table, hidden size) of one encoder."""
    if generator is None:
        return model.word_width, model.hidden_size
    return model.generator_width(generator), generator.hidden_size


def _width_problems(section: str, old: tuple[int, int], new: tuple[int, int]) -> list[str]:
    """A narrower word table, or a projection to the hidden size in one of two encoders alone."""
    found = []
    if new[0] < old[0]:
        found.append(f"{section}.embedding_size = {new[0]}, but {old[0]} there")
    if (old[0] == old[1]) != (new[0] == new[1]):
        words = [
            "no projection" if width == hidden else "a projection" for width, hidden in (new, old)
        ]
        found.append(
            f"tables of {new[0]} and {section}.hidden_size = {new[1]}, {words[0]} after the "
            f"embeddings, but {words[1]} there (tables of {old[0]})"
        )
    return found


def _encoders(old: RunConfig, new: RunConfig) -> dict[str, GrownEncoder]:
    """The encoders that both configs have, by their prefix."""
    sharing = new.model.sharing
    pairs: dict[str, tuple[EncoderConfig, EncoderConfig, str]] = {
        "discriminator.": (
            old.model,
            new.model,
            "embedding_deltas." if sharing == "gdes" else "embeddings.",
        )
    }
    if old.objective.has_generator and new.objective.has_generator and sharing != "all":
        has_own = sharing in ("untied", "gdes")
        tables = "generator_embeddings." if has_own else "embeddings."
        pairs["generator."] = (old.generator, new.generator, tables)
    encoders = {}
    for part, (small, large, tables) in pairs.items():
        kinds = [
            layer_kinds(run.model, sizes.num_layers) for run, sizes in ((old, small), (new, large))
        ]
        encoders[part] = GrownEncoder(small, large, layer_sources(*kinds), tables)
    return encoders


def _grown(
    found: SourceRun, shapes: Shapes, encoders: Mapping[str, GrownEncoder], report: ImportReport
) -> dict[str, Tensor]:
    """The tensors of the result that come from the source; fills the report."""
    state: dict[str, Tensor] = {}
    used = set()
    for name, shape in shapes.items():
        names = source_names(name, dict(encoders))
        own = next((own for own in names if own in found.weights), None)
        if own is None:
            report.initialized.append(name)
            continue
        used.add(own)
        state[name] = tiled(found.weights[own], name, shape, dict(encoders))
        report.loaded.append((own, name))
    for name in sorted(found.weights.keys() - used):
        report.unused[name] = _reason(name)
    return state


def _reason(name: str) -> str:
    if name.startswith(HEADS) or name.startswith(GENERATOR):
        return "the new config has no such part"
    return "no layer of the new config starts from this one"


def _notes(old: RunConfig, new: RunConfig, report: ImportReport) -> list[str]:
    """Sentences about parts that are initialized, and about fields that change the weights' function.

    old: the config of the weights. new: of the first phase.
    """
    notes = []
    if report.initialized:
        parts = sorted({name.split(".")[0] for name in report.initialized})
        count = len(report.initialized)
        notes.append(f"{', '.join(parts)}: not in the source; {count} tensors are initialized")
    for line in differences(old, new)[0]:
        section, _, field = line.partition(":")[0].partition(".")
        if section == "model" and field in MEANING:
            notes.append(f"{line}: the weights were trained with the first value")
    return notes

"""Import of Hugging Face folders and TensorFlow checkpoints as a run folder at step 0.

A run of electra_ds is imported by `import_run`.
"Foreign" means of the imported model. Every foreign tensor is either loaded, or listed as unused
with a reason. Every parameter without a foreign tensor is initialized.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.folder_kinds import found_at
from electra_ds.common.json_files import Record, read_record
from electra_ds.common.outputs import check_outside, new_folder
from electra_ds.common.printable import printable, shortened
from electra_ds.config.architectures import EncoderConfig
from electra_ds.config.loading import config_names, load_run, load_values, parse_run
from electra_ds.config.schema import FactoryConfig, RunConfig
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.interop.hf import IMPORTED_TYPES, format_of_type
from electra_ds.interop.hf_electra import ElectraFormat
from electra_ds.interop.hf_folder import HfFolder, is_hf_folder, read_config, read_folder
from electra_ds.interop.hf_format import Head, HfFormat, joined
from electra_ds.interop.import_report import ImportReport, write_imported
from electra_ds.interop.import_run import import_run, is_run
from electra_ds.interop.tf import find_tf, read_tf, sizes_of, tf_names
from electra_ds.interop.vocabularies import checked_tokenizer
from electra_ds.model.build import build_objective
from electra_ds.model.gdes import name_of_sum, with_deltas
from electra_ds.model.weights import (
    check_layers,
    check_state,
    shapes_of,
)
from electra_ds.training.checkpoint import folder_of_model

REASONS = (  # pattern of foreign tensors that have no counterpart -> the reason in the report
    (r"adam_[mv]$|(^|[/.])global_step$|^Adam|(beta[12])_power$", "optimizer state"),
    (r"position_ids$|token_type_ids$", "a buffer, not a weight"),
    (r"pooler", "pooler: ELECTRA has none"),
    (
        r"^mask_predictions\.",
        "Microsoft's head that detects replaced tokens: it adds the state of [CLS] and a LayerNorm; "
        "a head of our form is initialized",
    ),
    (r"^deberta\.embeddings\.position_embeddings", "position table: position_biased_input = false"),
    (r"seq_relationship", "head of next-sentence prediction"),
    (r"^(classifier|qa_outputs|summary|sequence_summary)\b", "head of a task"),
)
ENCODERS = ("embeddings.", "discriminator.", "generator_embeddings.", "generator.")
# The parameters of the main encoder's head of each kind.
MAIN_HEADS: dict[Head, str] = {"discriminator": "discriminator_head.", "generator": "mlm_head."}
TABLES = "generator_embeddings."
GENERATOR = (TABLES, "generator.", "generator_head.")
MOST_LISTED = 6  # tensors that one warning names; import.json lists all
HEAD_WIDTH = 64  # hidden size of an attention head in the authors' TensorFlow models


class HeadSizes(Record):
    """The sizes in the JSON file of a TensorFlow checkpoint that its tensors do not determine."""

    model_config = ConfigDict(extra="ignore")

    hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> "HeadSizes":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        return self


class Source(NamedTuple):
    """Tensors of one foreign folder.

    tensors: by their name in a stock class, or by the name of the TensorFlow variable.
    original_names: the key of `tensors` -> the name in the folder itself.
    foreign_names: electra_ds parameter name -> the keys of `tensors` that it consists of.
    prefixes: prefixes of the electra_ds parameters that this folder supplies.
    format, heads: of a Hugging Face folder.
    starts_both: the sizes of a model that initializes both encoders; None for a part of a pair.
    """

    folder: Path
    tensors: dict[str, Tensor]
    original_names: dict[str, str]
    foreign_names: Callable[[str], tuple[str, ...]]
    prefixes: tuple[str, ...]
    format: HfFormat | None = None
    heads: tuple[Head, ...] = ()
    starts_both: EncoderConfig | None = None

    def label(self, name: str) -> str:
        """A tensor in messages: folder and original name."""
        return f"{self.folder.name}: {self.original_names[name]}"


class Foreign(NamedTuple):
    """A foreign model: its sources, the folder of its vocabulary, and config fields by section.

    free: the fields that do not determine the shapes of the weights; --set may change them.
    """

    vocabulary: Path
    sources: list[Source]
    sizes: dict[str, dict[str, Any]]
    free: frozenset[str]


def import_weights(
    source: Path,
    out: Path,
    run: str | None = None,
    sets: Sequence[str] = (),
    *,
    generator: Path | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
) -> ImportReport:
    """Write `out` as a run folder at step 0, for `pretrain out/config.json --init-from out`.

    source: a Hugging Face folder of ELECTRA, ModernBERT or DeBERTa-v2 (discriminator or generator),
        a folder that contains `discriminator` and `generator`, a BERT folder, one of
        ModernBertForMaskedLM or a DeBERTa-v2 with a head that predicts tokens (these initialize
        both encoders), a TensorFlow checkpoint of the authors' code (heads = hidden / 64, or
        from `config`, or from a config.json beside the checkpoint), or a run or checkpoint of
        electra_ds (see `import_run`).
    run, sets: the run config for everything that the weights do not determine, such as the sizes of
        a part that is missing; None: the preset `default_run` of the format of `source`, or the
        config of the run `source`.
    generator: the generator's folder, when it is not beside the discriminator.
    config: JSON file with hidden_size and num_attention_heads, for a TensorFlow checkpoint.
    tokenizer: the vocabulary, when it is not in `source`.
    Raises UserError when `out` is not empty or lies in an input folder, when there are no weights
    or no vocabulary, for an architecture or a vocabulary that is not supported, for options that do
    not fit `source`, and for a run or a tensor of an encoder that is missing or does not fit the
    source.
    """
    inputs = {"SRC": folder_of_model(source), "--generator": generator, "--tokenizer": tokenizer}
    check_outside(out, "--out", inputs)
    with new_folder(out, "--out") as folder:
        return _import(
            source,
            folder,
            run,
            sets,
            generator=generator,
            config=config,
            tokenizer=tokenizer,
        )


def _import(
    source: Path,
    out: Path,
    run: str | None,
    sets: Sequence[str],
    *,
    generator: Path | None,
    config: Path | None,
    tokenizer: Path | None,
) -> ImportReport:
    prefix = find_tf(source)
    if not prefix and is_run(source):
        if generator or config:
            raise UserError(
                f"{printable(source)}: it is a run of electra_ds, which has all its parts and sizes: "
                "leave --generator and --config out"
            )
        return import_run(source, out, run, sets, tokenizer)
    if (generator and prefix) or (config and not prefix):
        raise UserError(
            f"{source}: expected --generator with a Hugging Face folder, or "
            "--config with a TensorFlow checkpoint"
        )
    main = prefix or _main_folder(source)
    form = ElectraFormat() if prefix else _format_of_folder(main)
    run = run or form.default_run
    base = _load_base(run, sets, source, form)
    if prefix:
        foreign = _tensorflow(prefix, config)
    else:
        foreign = _hugging_face(source, main, generator, base, tokenizer)
    words = checked_tokenizer(tokenizer or foreign.vocabulary, foreign.sizes["model"]["vocab_size"])
    imported = _run_config(source, run, sets, foreign, words)
    shapes = shapes_of(lambda: build_objective(imported), f"{source} with {run}")
    sources = [_with_generator(source, imported.generator) for source in foreign.sources]
    sources = _with_tables(sources, imported.model.sharing)
    state, report = _convert(sources, shapes)
    if imported.model.sharing == "gdes":
        state = with_deltas(state)
    check_state(state, {name: shapes[name] for name in state}, str(source))
    report.warnings.extend(_run_notes(run, base, foreign.sizes))
    report.warnings.extend(_changed_notes(form, foreign, imported))
    if tokenizer is not None:
        report.warnings.extend(_vocabulary_notes(words, tokenizer, foreign.vocabulary))
    write_imported(out, source, imported, state, words, report)
    return report


def _load_base(run: str, sets: Sequence[str], source: Path, form: HfFormat) -> RunConfig:
    """The run config that an import starts from, with settings of its objective alone.

    Other settings may fit the sizes of the weights only. UserError for another architecture.
    """
    base = load_run(run, [setting for setting in sets if _is_of_objective(setting)])
    if isinstance(base.model, FactoryConfig):
        raise UserError(
            f"--run {run}: has a model.factory; weights are imported into the built-in model"
        )
    if base.model.architecture != form.architecture:
        raise UserError(
            f"--run {run}: model.architecture = {base.model.architecture}, but the weights in "
            f"{source} need {form.architecture}: use a run of it, such as --run {form.default_run}"
        )
    return base


def _is_of_objective(setting: str) -> bool:
    return setting.partition("=")[0].strip().partition(".")[0] == "objective"


def _run_config(
    source: Path, run: str, sets: Sequence[str], foreign: Foreign, words: Tokenizer
) -> RunConfig:
    """`run` with the sizes of the weights, the settings and the special ids of the vocabulary."""
    values = load_values(run, "pretrain", sets, foreign.sizes)
    _check_sets(sets, values, foreign)
    where = f"{source} with {run}"
    imported = parse_run(values, where)
    if imported.data.special_ids not in (None, words.special_ids):
        raise UserError(
            f"--run {run}: data.special_ids are not those of the vocabulary; leave them out"
        )
    values = imported.model_dump(mode="json")
    values["data"]["special_ids"] = words.special_ids.model_dump()
    return parse_run(values, where)


def _check_sets(sets: Sequence[str], values: dict[str, Any], foreign: Foreign) -> None:
    """Raise UserError for a --set that the weights decide otherwise.

    values: those of the run config with the settings, not checked yet.
    """
    for setting in sets:
        section, _, field = setting.partition("=")[0].strip().partition(".")
        decided, stated = foreign.sizes.get(section, {}), values.get(section)
        if not isinstance(stated, dict):
            continue  # the schema refuses it
        for name in [field] if field else list(decided):
            if name == "sharing" and stated.get(name) in _other_sharings(foreign.sizes):
                continue
            if name in decided and name not in foreign.free and stated.get(name) != decided[name]:
                raise UserError(
                    f"--set {setting}: the imported weights have {section}.{name} = "
                    f"{decided[name]}, which cannot be changed; leave the setting out"
                )


def _other_sharings(sizes: dict[str, dict[str, Any]]) -> set[str]:
    """The values of model.sharing that fit the tables of the weights beside their own.

    With untied tables, shared takes those of the discriminator; the generator's are listed as
    unused. Deltas (gdes) are computed from the tables of both parts.
    """
    model, generator = sizes["model"], sizes.get("generator")
    sharing = model.get("sharing")
    if sharing not in ("shared", "untied"):
        return set()
    width = model.get("embedding_size", model["hidden_size"])
    if generator is None or generator["hidden_size"] != width:
        return {"gdes"} if sharing == "shared" else set()
    return {"shared", "untied", "gdes"}


def _changed_notes(form: HfFormat, foreign: Foreign, imported: RunConfig) -> list[str]:
    """A sentence for each free field with another value, where the logits depend on it."""
    notes = []
    for name, effect in form.effects.items():
        theirs, own = foreign.sizes["model"].get(name), getattr(imported.model, name)
        if theirs not in (None, own):
            notes.append(f"model.{name} {theirs} -> {own}: {effect}")
    return notes


def _run_notes(run: str, base: RunConfig, sizes: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence about values of the user's own RUN.json that the weights replace."""
    if run in config_names("pretrain"):
        return []
    stated = base.model_dump(mode="json")
    replaced = [
        f"{section}.{name} {shortened(stated[section][name])} -> {shortened(value)}"
        for section, values in sizes.items()
        for name, value in values.items()
        if stated[section][name] not in (None, value)
    ]
    return [f"{run}: the weights decide {', '.join(replaced)}"] if replaced else []


def _vocabulary_notes(words: Tokenizer, given: Path, beside: Path) -> list[str]:
    """A sentence when the vocabulary beside the weights is another one than the given one."""
    try:
        other = load_tokenizer(beside)
    except UserError:  # there is none, or it is of another kind
        return []
    if other.names == words.names:
        return []
    return [f"--tokenizer {given}: its entries are not those of the vocabulary in {beside}"]


def _tensorflow(prefix: Path, config: Path | None) -> Foreign:
    """A TensorFlow checkpoint of the authors' code. config: JSON with the size of the heads."""
    tensors = read_tf(prefix)
    head_width = HEAD_WIDTH
    path = config or prefix.parent / "config.json"
    if path.is_file() or config:
        stated = read_record(
            path, HeadSizes, "the sizes of the model (hidden_size, num_attention_heads)"
        )
        head_width = stated.hidden_size // stated.num_attention_heads
    model, generator = sizes_of(tensors, head_width)
    encoders = ENCODERS if generator else ENCODERS[:2]
    prefixes = (*encoders, "discriminator_head.", "generator_head.")
    source = Source(prefix, tensors, {name: name for name in tensors}, tf_names, prefixes)
    sizes = {"model": model}
    if generator:
        sizes["generator"] = generator
    return Foreign(prefix.parent, [source], sizes, ElectraFormat.free)


def _main_folder(path: Path) -> Path:
    """The Hugging Face folder of the main encoder: path, or discriminator/ in it."""
    main = next((p for p in (path / "discriminator", path) if is_hf_folder(p)), None)
    if main is None:
        raise UserError(
            f"{printable(path)}: no weights here{found_at(path).clause}; expected a Hugging Face "
            "folder (config.json with model.safetensors or pytorch_model.bin), discriminator/ and "
            "generator/, a TensorFlow checkpoint or a run of electra_ds"
        )
    return main


def _format_of_folder(path: Path) -> HfFormat:
    return format_of_type(read_config(path, IMPORTED_TYPES)["model_type"])


def _hugging_face(
    path: Path, main: Path, generator: Path | None, base: RunConfig, tokenizer: Path | None
) -> Foreign:
    """A Hugging Face folder: discriminator, generator, both, or a model that starts both."""
    if generator is None and is_hf_folder(path / "generator"):
        generator = path / "generator"
    entries = load_tokenizer(tokenizer or main).vocab_size
    content = read_folder(main, entries, IMPORTED_TYPES)
    form = content.format
    predicts = "generator" in form.heads(content.config, content.tensors)
    if content.config["model_type"] != form.model_type:  # BERT
        if generator:
            raise UserError(
                f"{generator}: BERT ({main}) initializes both encoders; leave the generator out"
            )
        return _both_encoders(main, content)
    if generator is None and predicts and form.predicting_folder_starts_both:
        return _both_encoders(main, content)
    if generator is None and predicts and base.objective.has_generator:
        return _generator_alone(main, content)
    other = read_folder(generator, entries, (form.model_type,)) if generator else None
    return _pair(main, content, generator, other)


def _pair(main: Path, content: HfFolder, generator: Path | None, other: HfFolder | None) -> Foreign:
    """A folder of the main encoder, and that of the generator if there is one."""
    form = content.format
    config = other.config if other else None
    model, generator_sizes = form.parse(content.config, config, f"{main}/config.json")
    heads = form.heads(content.config, content.tensors)
    prefixes = ["embeddings.", "discriminator.", *(MAIN_HEADS[head] for head in heads)]
    sources = [_source(main, content, prefixes, model.num_layers)]
    decided = form.sizes | form.tables
    if generator is None or other is None:
        decided |= {"sharing"} if form.discriminator_alone_shares else set()
        sizes = {"model": model.model_dump(include=set(decided))}
        return Foreign(main, sources, sizes, form.free)
    sizes = {"model": model.model_dump(include={*decided, "sharing"})}
    sources.append(_source(generator, other, GENERATOR, generator_sizes.num_layers))
    sizes["generator"] = generator_sizes.model_dump()
    can_be_untied = generator_sizes.hidden_size == model.word_width
    if sharing := _sharing(sources[0], sources[1], form, can_be_untied):
        sizes["model"]["sharing"] = sharing
    return Foreign(main, sources, sizes, form.free)


def _generator_alone(path: Path, content: HfFolder) -> Foreign:
    """A generator's folder without a discriminator: it supplies the shared embeddings as well."""
    form = content.format
    model, generator = form.parse(content.config, where=f"{path}/config.json")
    sizes = {
        "model": model.model_dump(include=set(form.tables)),
        "generator": generator.model_dump(),
    }
    prefixes = (*GENERATOR, "embeddings.")
    return Foreign(path, [_source(path, content, prefixes, generator.num_layers)], sizes, form.free)


def _sharing(
    discriminator: Source, generator: Source, form: HfFormat, can_be_untied: bool
) -> str | None:
    """model.sharing as derived from the tensors of both parts; None: as derived from the sizes."""
    main, other = discriminator.tensors, generator.tensors
    if form.word_table not in main or form.word_table not in other:
        raise UserError(
            f"{discriminator.folder} or {generator.folder}: no tensor {form.word_table}; expected "
            f"{form.model_type} models"
        )
    differing = {
        name
        for name, tensor in main.items()
        if name.startswith(form.prefix) and not _equals(tensor, other.get(name))
    }
    if not differing:
        return "all"
    return "untied" if form.word_table in differing and can_be_untied else None


def _both_encoders(path: Path, content: HfFolder) -> Foreign:
    """A model that predicts tokens: it initializes the discriminator, and a generator of its width.

    The generator takes the first layers, and what is not in a layer; see `_with_generator`.
    """
    form = content.format
    model, own_sizes = form.parse(content.config, where=f"{path}/config.json")
    prefixes = ["embeddings.", "discriminator.", "mlm_head."]
    sizes = {"model": model.model_dump(include=set(form.sizes | form.tables))}
    source = _source(path, content, prefixes, model.num_layers)
    return Foreign(path, [source._replace(starts_both=own_sizes)], sizes, form.free)


def _with_generator(source: Source, generator: EncoderConfig) -> Source:
    """A source that starts both encoders, with the parameters that this generator takes from it."""
    own = source.starts_both
    compared = ("hidden_size", "num_heads", "ffn_size")
    if own is None or any(getattr(generator, f) != getattr(own, f) for f in compared):
        return source
    layers = range(min(generator.num_layers, own.num_layers))
    taken = [f"generator.layers.{i}." for i in layers]
    taken += ["generator.final_norm.", "generator.relative.", "generator.relative_norm."]
    taken += ["generator_head.", "generator_embeddings."]
    return source._replace(prefixes=(*source.prefixes, *taken))


def _with_tables(sources: list[Source], sharing: str) -> list[Source]:
    """The sources; without tables of a generator, the first one supplies its own for both parts.

    The deltas of gdes are 0 then.
    """
    table = f"{TABLES}word.weight"
    suppliers = [source for source in sources if TABLES in source.prefixes]
    has_tables = any(set(each.foreign_names(table)) <= each.tensors.keys() for each in suppliers)
    if has_tables or (sharing != "gdes" and not suppliers):
        return sources
    first, *others = sources

    def of_main(name: str) -> tuple[str, ...]:
        is_table = name.startswith(TABLES)
        return first.foreign_names(name.removeprefix("generator_") if is_table else name)

    prefixes = (*first.prefixes, TABLES)
    return [first._replace(prefixes=prefixes, foreign_names=of_main), *others]


def _source(folder: Path, content: HfFolder, prefixes: Iterable[str], num_layers: int) -> Source:
    form, tensors = content.format, content.tensors
    check_layers(tensors, form.before_layer, num_layers, str(folder))
    renamed, original = form.renamed(tensors, str(folder))
    heads = form.heads(content.config, renamed)
    return Source(folder, renamed, original, form.foreign_names, tuple(prefixes), form, heads)


def _convert(
    sources: list[Source], parameters: Iterable[str]
) -> tuple[dict[str, Tensor], ImportReport]:
    """(tensors taken from the sources, report).

    parameters: names of all parameters of the new model. Deltas (`model.gdes`) are taken as sums,
    under the names of these.
    """
    state: dict[str, Tensor] = {}
    report = ImportReport([], [], {}, [])
    used: dict[Path, set[str]] = {source.folder: set() for source in sources}
    for parameter in parameters:
        name = name_of_sum(parameter)
        source = next((source for source in sources if name.startswith(source.prefixes)), None)
        if source is None:
            report.initialized.append(parameter)
            continue
        foreign = source.foreign_names(name)
        missing = [key for key in foreign if key not in source.tensors]
        if missing and name.startswith(ENCODERS):
            raise UserError(
                f"{source.folder}: no tensor {missing[0]} for {name}; expected all encoder weights"
            )
        if missing:  # a head that this folder does not have
            report.initialized.append(parameter)
            continue
        used[source.folder].update(foreign)
        state[name] = joined([source.tensors[key] for key in foreign], name, str(source.folder))
        originals = ", ".join(source.original_names[key] for key in foreign)
        report.loaded.append((f"{source.folder.name}: {originals}", parameter))
    for source in sources:
        unexplained: dict[str, list[str]] = {}  # reason -> labels of tensors with their shapes
        for name in sorted(source.tensors.keys() - used[source.folder]):
            _report_unused(report, source, name, sources[0], unexplained)
        for reason, labels in sorted(unexplained.items()):
            listed = ", ".join(labels[:MOST_LISTED]) + (
                ", ..." if len(labels) > MOST_LISTED else ""
            )
            report.warnings.append(f"{listed}: {len(labels)} tensor(s) not used: {reason}")
    if report.initialized:
        report.warnings.append(_initialized_warning(report.initialized, sources))
    return state, report


def _report_unused(
    report: ImportReport,
    source: Source,
    name: str,
    first: Source,
    unexplained: dict[str, list[str]],
) -> None:
    """Add a foreign tensor without a counterpart to the report.

    unexplained: collects reason -> tensors that a warning must name.
    """
    label = source.label(name)
    reason = _reason(source, name, first)
    if reason is None:
        reason = "no parameter corresponds to it"
        if source is not first and name in first.tensors:
            reason = f"differs from that of {first.folder.name}, which is loaded"
        elif source.format and name == source.format.output_matrix:
            reason = "differs from the word table, which takes its place"
        shape = tuple(source.tensors[name].shape)
        unexplained.setdefault(reason, []).append(f"{label} {shape}")
    report.unused[label] = reason


def _initialized_warning(initialized: list[str], sources: list[Source]) -> str:
    parts = sorted({name.split(".")[0] for name in initialized})
    folders = ", ".join(str(source.folder) for source in sources)
    is_for_both = any(source.starts_both is not None for source in sources)
    lacks_part = "discriminator" in parts or ("generator" in parts and not is_for_both)
    shared = "; shared parameters come from the other part" if lacks_part else ""
    return (
        f"{', '.join(parts)}: not in {folders}; {len(initialized)} tensors are initialized{shared}"
    )


def _reason(source: Source, name: str, first: Source) -> str | None:
    """The reason why a tensor is not used, or None for an unknown one. first: the first source."""
    tensors, value, form = source.tensors, source.tensors[name], source.format
    if form and name == form.output_matrix and _equals(value, tensors.get(form.word_table)):
        return "tied to the word table"
    if form and name in form.copies and _equals(value, tensors.get(form.copies[name])):
        return "a copy of the output bias"
    if source is not first and _equals(value, first.tensors.get(name)):
        return f"shared: equal to that of {first.folder.name}"
    head = form.head_of(name, source.heads) if form else None
    if head == "generator" and "generator_head." not in source.prefixes:
        return "language-modelling head: this run has no such head of the same size"
    if head == "discriminator":
        return "head that detects replaced tokens: this run has none"
    if head == "task":
        return "head of a task"
    return next((reason for pattern, reason in REASONS if re.search(pattern, name)), None)


def _equals(value: Tensor, other: Tensor | None) -> bool:
    return other is not None and value.dtype == other.dtype and torch.equal(value, other)

"""How does pretraining go on from others' weights? Hugging Face folders and TensorFlow checkpoints become a run folder.

Every tensor is accounted for: read (foreign -> ours), made (ours), left (foreign, with the reason).
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from electra_ds.cluster.run_folder import write_config
from electra_ds.common.errors import UserError
from electra_ds.common.files import read_json, write_bytes, write_json
from electra_ds.config.loading import load_run, parse_run
from electra_ds.config.schema import FactoryConfig, RunConfig
from electra_ds.interop.hf import SIZES, TABLES, electra_names, from_hf_config, hf_names
from electra_ds.interop.hf_folder import is_hf_folder, read_config, read_tensors
from electra_ds.interop.load_model import checked_tokenizer
from electra_ds.interop.tf import find_tf, read_tf, sizes_of, tf_names
from electra_ds.model.build import build_objective
from electra_ds.model.weights import load_true_state, true_state
from electra_ds.training import checkpointer
from electra_ds.training.state import TrainingState

REASONS = (  # of foreign tensors that have no place here
    (r"adam_[mv]$|(^|[/.])global_step$|^Adam|(beta[12])_power$", "optimizer state"),
    (r"position_ids$|token_type_ids$", "a buffer, not a weight"),
    (r"pooler", "pooler: ELECTRA has none"),
    (r"seq_relationship", "head of next-sentence prediction"),
    (r"^(classifier|qa_outputs|summary|sequence_summary)\b", "head of a task"),
)
WORDS = "electra.embeddings.word_embeddings.weight"
ENCODERS = ("embeddings.", "discriminator.", "generator_embeddings.", "generator.")


class Source(NamedTuple):
    """Tensors of one folder under the names the table gives; `original` is what the folder itself calls them.

    serves: our parameters that come from here; missing heads are made, missing parts of an encoder are an error.
    """

    folder: Path
    tensors: dict[str, Tensor]
    original: dict[str, str]
    table: Callable[[str], tuple[str, ...]]
    serves: tuple[str, ...]


class ImportReport(NamedTuple):
    """read: [foreign, ours] pairs; made: ours; left: {foreign: reason}; warnings: for people."""

    read: list[tuple[str, str]]
    made: list[str]
    left: dict[str, str]
    warnings: list[str]


def import_weights(
    source: Path,
    out: Path,
    run: str = "small",
    sets: list[str] = (),
    *,
    generator: Path | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
) -> ImportReport:
    """Write `out` as a run folder at step 0, for `pretrain out/config.json --init-from out`.

    source: a Hugging Face ELECTRA folder (discriminator or generator), a parent of `discriminator` and `generator`, a
    BERT folder (a start for both encoders), or a TensorFlow checkpoint of the authors' code (heads = hidden / 64, or
    by the JSON file `config`). run, sets: everything that the weights do not say, the sizes of a missing part included.
    UserError for what our encoder cannot be, a vocabulary without our special tokens, a missing or misshapen tensor.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; choose a new folder")
    base = load_run(run, sets)
    if isinstance(base.model, FactoryConfig):
        raise UserError(
            f"--run {run}: has a model.factory; weights are imported into the built-in model"
        )
    prefix = find_tf(source)
    if (generator and prefix) or (config and not prefix):
        raise UserError(
            "--generator goes with a Hugging Face folder, --config with a TensorFlow checkpoint"
        )
    beside, sources, sizes = (
        _tensorflow(prefix, config) if prefix else _hugging_face(source, generator, base)
    )
    words = checked_tokenizer(tokenizer or beside, sizes["model"]["vocab_size"])
    values = base.model_dump(mode="json")
    for section, found in sizes.items():
        values[section] |= found
    values["data"]["special_ids"] = words.special_ids.model_dump()
    imported = parse_run(values, f"{source} with {run}")
    module = build_objective(imported, imported.train.seed)
    state, account = _fill(sources, true_state(module))
    load_true_state(module, state, partial=True)
    whole = true_state(module)
    out.mkdir(parents=True, exist_ok=True)
    words.save(out / "tokenizer")
    write_config(out, imported, "")
    values = imported.model_dump(mode="json")
    checkpointer.save(
        WholeWeights(whole), out / "ckpt", "0", TrainingState(), values, {}, weights_only=True
    )
    write_bytes(out / "ckpt" / "latest", b"0\n")
    write_json(out / "import.json", {"source": str(source), **account._asdict()})
    return account


class WholeWeights:
    """What checkpoint.save needs, without an engine: one process and its whole tensors."""

    ranks = SimpleNamespace(rank=0, world_size=1)

    def __init__(self, state: dict[str, Tensor]):
        self.parameters = state

    def full_tensor(self, name: str, kind: str) -> Tensor:
        return self.parameters[name]

    def shape(self, name: str) -> torch.Size:
        return self.parameters[name].shape

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def scaler_state(self) -> dict[str, float]:
        return {}


def _tensorflow(prefix: Path, config: Path | None) -> tuple[Path, list[Source], dict[str, dict]]:
    tensors, width, given = read_tf(prefix), 64, config or prefix.parent / "config.json"
    if given.is_file() or config:
        stated = read_json(given, "the sizes of the model (hidden_size, num_attention_heads)")
        if not {"hidden_size", "num_attention_heads"} <= stated.keys():
            raise UserError(
                f"{given}: expected hidden_size and num_attention_heads, found {', '.join(stated)}"
            )
        width = stated["hidden_size"] // stated["num_attention_heads"]
    model, generator = sizes_of(tensors, width)
    parts = ENCODERS if generator else ENCODERS[:2]
    serves = (*parts, "discriminator_head.", "generator_head.")
    source = Source(prefix, tensors, {name: name for name in tensors}, tf_names, serves)
    return (
        prefix.parent,
        [source],
        {"model": model} | ({"generator": generator} if generator else {}),
    )


def _hugging_face(
    path: Path, generator: Path | None, base: RunConfig
) -> tuple[Path, list[Source], dict[str, dict]]:
    main: Path | None = next((p for p in (path / "discriminator", path) if is_hf_folder(p)), None)
    generator = generator or (path / "generator" if is_hf_folder(path / "generator") else None)
    if main is None:
        raise UserError(
            f"{path}: no weights here; expected a Hugging Face folder (config.json with model.safetensors "
            "or pytorch_model.bin), discriminator/ and generator/, or a TensorFlow checkpoint"
        )
    config = read_config(main, ("electra", "bert"))
    if config["model_type"] == "bert":
        if generator:
            raise UserError(
                f"{generator}: BERT ({main}) starts both encoders; import it without a generator's folder"
            )
        return _bert(main, config, base)
    tensors = read_tensors(main)
    if (
        generator is None
        and "generator_predictions.dense.weight" in tensors
        and base.objective.has_generator
    ):
        main, generator = None, main
    sources = []
    if main:
        serves = ["embeddings.", "discriminator.", "discriminator_head.", "mlm_head."]
        sources.append(_source(main, tensors, serves))
    if generator:
        serves = [
            "generator_embeddings.",
            "generator.",
            "generator_head.",
            *([] if main else ["embeddings."]),
        ]
        sources.append(_source(generator, read_tensors(generator), serves))
    found, made = from_hf_config(config, read_config(generator) if generator else None)
    sizes = {"model": found.model_dump(include={*TABLES, *((*SIZES, "sharing") if main else ())})}
    sizes |= {"generator": made.model_dump()} if generator else {}
    if main and generator:
        mine, theirs = (source.tensors for source in sources)
        if WORDS not in mine or WORDS not in theirs:
            raise UserError(f"{main} or {generator}: no {WORDS}; is that an ELECTRA model?")
        unlike = {
            n
            for n in mine
            if n.startswith("electra.") and not (n in theirs and torch.equal(mine[n], theirs[n]))
        }
        if not unlike:
            sizes["model"]["sharing"] = "all"
        elif WORDS in unlike and made.hidden_size == found.embedding_size:
            sizes["model"]["sharing"] = "untied"
    return main or generator, sources, sizes


def _bert(path: Path, config: dict, base: RunConfig) -> tuple[Path, list[Source], dict[str, dict]]:
    found, same = from_hf_config(config | {"embedding_size": config.get("hidden_size")})
    made, serves = base.generator, ["embeddings.", "discriminator.", "mlm_head."]
    fits = made.hidden_size == same.hidden_size  # the head is as wide as the generator
    if fits and (made.num_heads, made.ffn_size) == (same.num_heads, same.ffn_size):
        serves += [
            f"generator.layers.{i}." for i in range(min(made.num_layers, same.num_layers))
        ]  # cut to its layers
        serves.append("generator_head.")
    sizes = {"model": found.model_dump(include={*SIZES, *TABLES})}
    return path, [_source(path, read_tensors(path), serves)], sizes


def _source(folder: Path, tensors: dict[str, Tensor], serves: list[str]) -> Source:
    original = {new: name for name, new in electra_names(tensors).items()}
    return Source(
        folder,
        {new: tensors[name] for new, name in original.items()},
        original,
        hf_names,
        tuple(serves),
    )


def _fill(sources: list[Source], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], ImportReport]:
    state, account = {}, ImportReport([], [], {}, [])
    used: dict[Path, set[str]] = {source.folder: set() for source in sources}
    for name in own:
        source = next((source for source in sources if name.startswith(source.serves)), None)
        foreign = source.table(name) if source else ()
        missing = [f for f in foreign if f not in source.tensors]
        if missing and name.startswith(ENCODERS):
            raise UserError(
                f"{source.folder}: no tensor {missing[0]} for {name}; is the file complete?"
            )
        if missing or not foreign:
            account.made.append(name)
            continue
        used[source.folder].update(foreign)
        state[name] = torch.cat([source.tensors[f].float() for f in foreign])
        account.read.append(
            (f"{source.folder.name}: {', '.join(source.original[f] for f in foreign)}", name)
        )
    for source in sources:
        for name in sorted(source.tensors.keys() - used[source.folder]):
            label, reason = (
                f"{source.folder.name}: {source.original[name]}",
                _reason(source, name, sources[0]),
            )
            is_second = source is not sources[0] and name in sources[0].tensors
            why_not = (
                f"differs from that of {sources[0].folder.name}, which is taken"
                if is_second
                else "fits nowhere"
            )
            account.left[label] = reason or why_not
            if reason is None:
                account.warnings.append(
                    f"{label} {tuple(source.tensors[name].shape)} is left out: {why_not}"
                )
    if account.made:
        parts = sorted({name.split(".")[0] for name in account.made})
        is_part = any(
            "discriminator_head." in source.serves for source in sources
        )  # of ELECTRA; BERT has no parts
        lacks_other = "discriminator" in parts or ("generator" in parts and is_part)
        account.warnings.append(
            f"{', '.join(parts)}: not in {', '.join(str(s.folder) for s in sources)}; {len(account.made)} tensors "
            f"are drawn anew{', what is shared comes from the other part' if lacks_other else ''}"
        )
    return state, account


def _reason(source: Source, name: str, first: Source) -> str | None:
    value, tensors = source.tensors[name], source.tensors
    if (
        name == "generator_lm_head.weight"
        and WORDS in tensors
        and torch.equal(value, tensors[WORDS])
    ):
        return "tied to the word table"
    if name == "cls.predictions.decoder.bias" and torch.equal(
        value, tensors["generator_lm_head.bias"]
    ):
        return "the output bias once more"
    if source is not first and name in first.tensors and torch.equal(value, first.tensors[name]):
        return f"shared: equal to that of {first.folder.name}"
    if (
        name.startswith(("generator_lm_head.", "generator_predictions."))
        and "generator_head." not in source.serves
    ):
        return "head of language modelling: no part here has one of its sizes"
    return next((reason for pattern, reason in REASONS if re.search(pattern, name)), None)

"""Averages of checkpoints: weights that are the weighted mean of those of several checkpoints.

A tensor of the average is the sum of share x tensor over the checkpoints, in fp64, rounded to fp32.
With model.sharing = "gdes" the deltas and the generator's tables are averaged, so the tables of the
main encoder, which are their sums, are averaged as well.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from electra_ds.cluster.run_folder import write_config
from electra_ds.common.errors import UserError
from electra_ds.common.files import sha256_file
from electra_ds.common.folder_kinds import found_at, reading
from electra_ds.common.json_files import Record, read_record, write_json
from electra_ds.common.outputs import check_outside, new_folder
from electra_ds.common.printable import printable
from electra_ds.config.architectures import ModelConfig
from electra_ds.config.loading import differences
from electra_ds.config.schema import MAX_STEPS, FactoryConfig, RunConfig
from electra_ds.data.tokenizer import Tokenizer
from electra_ds.interop.checkpoints import Checkpoint, check_run_shapes
from electra_ds.interop.vocabularies import tokenizer_of_model
from electra_ds.model.weights import Shapes, check_values
from electra_ds.training import checkpoint, checkpointer
from electra_ds.training.checkpoint_config import config_of_weights

NAME = "average.json"
PART_BYTES = 1 << 27  # of the fp32 weights that are averaged at a time and written as one file
# Fields of the sections model and generator that affect the training only.
OF_TRAINING = ("init", "init_std", "embedding_init_std")


class AveragedCheckpoint(Record):
    """One checkpoint of an average.

    path: as found. meta_sha256: of its meta.json, which has the sha256 of its weights. weight: as
    given. share: weight / sum of the weights. differences: fields of scope `science` that differ
    from the config of the first checkpoint.
    """

    path: str
    step: int = Field(ge=0, le=MAX_STEPS)
    tokens: int = Field(ge=0)
    dataset_id: str | None
    meta_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    weight: float
    share: float
    differences: list[str]


class Average(Record):
    """Content of average.json. trained_segments: see `Checkpoint.trained_segments`."""

    format: Literal["electra_ds average"] = "electra_ds average"
    version: Literal[1] = 1
    trained_segments: int | None
    checkpoints: list[AveragedCheckpoint] = Field(min_length=2)

    @property
    def is_trained(self) -> bool:
        """Whether a checkpoint of it was trained; otherwise all are imported."""
        return any(part.step > 0 for part in self.checkpoints)

    def lines(self) -> list[str]:
        """One line for each checkpoint: share, path and step."""
        return [f"{c.share:.6g} x {c.path}, step {c.step:,}" for c in self.checkpoints]


class Source(NamedTuple):
    """A checkpoint to average. folder: with meta.json. config: of its run."""

    folder: Path
    meta: checkpoint.Meta
    config: RunConfig


def average_of(folder: Path) -> Average | None:
    """Return how the checkpoint `folder` was averaged; None if it is no average.

    Raises UserError when average.json is damaged.
    """
    path = folder.resolve().parent.parent / NAME
    if not path.is_file():
        return None
    return read_record(path, Average, "the description of an average, as `average` writes it")


def average(paths: Sequence[Path], out: Path, weights: Sequence[float] | None = None) -> Average:
    """Write the average of checkpoints as the run folder `out` at step 0, with its average.json.

    paths: run folders (their latest checkpoint) or checkpoints, at least two. The config and the
        tokenizer are those of the first one.
    weights: one for each path, finite, with a sum that is not 0; None: equal weights.
    The memory is three times PART_BYTES or the largest tensor, for any number of checkpoints.
    Raises UserError when `out` is not empty or lies in an input, for other weights, for a
    checkpoint that is damaged or occurs twice, and when architecture, sizes, parameters or
    tokenizers differ.
    """
    given = [1.0] * len(paths) if weights is None else list(weights)
    shares = _shares(given, len(paths))
    for path in paths:
        check_outside(out, "--out", {"CKPT": checkpoint.folder_of_model(path)})
    sources = [_source(path) for path in paths]
    _check_all_different(sources)
    shapes = _common_shapes(sources)
    tokenizer = _common_tokenizer(sources)
    described = Average(
        trained_segments=_trained_segments(sources),
        checkpoints=[
            _described(source, sources[0], weight, share)
            for source, weight, share in zip(sources, given, shares, strict=True)
        ],
    )
    parts = _parts(shapes)
    first = sources[0].config
    with new_folder(out, "--out") as folder:
        for source in sources:
            _check_weights_content(source)
        tokenizer.save(folder / "tokenizer")
        write_config(folder, first, "")
        averaged = (_averaged(sources, shares, names, shapes) for names in parts)
        values = first.model_dump(mode="json")
        checkpointer.write_initial_parts(folder / "ckpt", averaged, len(parts), values)
        write_json(folder / NAME, described.model_dump())
    return described


def _shares(weights: list[float], count: int) -> list[float]:
    """The weights divided by their sum. UserError when that is not possible."""
    if count < 2:
        raise UserError(f"CKPT: found {count}; expected at least two checkpoints to average")
    shown = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise UserError(
            f"--weights {shown}: {len(weights)} weights for {count} checkpoints; expected one for "
            "each, in the same order"
        )
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weights {shown}: expected finite numbers")
    total = sum(weights)
    shares = [weight / total for weight in weights] if total and math.isfinite(total) else []
    if not shares or not all(map(math.isfinite, shares)):
        raise UserError(
            f"--weights {shown}: their sum is {total:g}; they are divided by it: expected weights "
            "with another sum, such as 1"
        )
    return shares


def _source(path: Path) -> Source:
    folder = checkpoint.find_checkpoint(path)
    with reading(folder, "the files of a checkpoint"):
        meta = checkpoint.read_meta(folder)
    if "task" in meta.config:
        raise UserError(
            f"{printable(folder)}{found_at(folder).clause}; expected the checkpoint of a "
            "pretraining run"
        )
    return Source(folder, meta, config_of_weights(meta, f"{folder}/meta.json"))


def _check_all_different(sources: list[Source]) -> None:
    seen: set[Path] = set()
    for source in sources:
        real = source.folder.resolve()
        if real in seen:
            raise UserError(
                f"{printable(source.folder)}: given twice; give each checkpoint once, with a "
                "larger weight (--weights)"
            )
        seen.add(real)


def _common_shapes(sources: list[Source]) -> Shapes:
    """The shapes of the weights, equal in all sources. Reads the headers of the files.

    UserError when configs or tensors differ. Without model.factory the tensors are compared with
    the config; no code of a factory is run.
    """
    first = sources[0]
    expected = checkpoint.shapes(first.folder, first.meta)
    if not isinstance(first.config.model, FactoryConfig):
        check_run_shapes(first.config, expected, first.folder)
    for other in sources[1:]:
        _check_same_model(other, first)
        _check_same_shapes(other, first, expected)
    return expected


def _check_same_model(other: Source, first: Source) -> None:
    """Compare the fields that decide what the weights mean, also at equal shapes."""
    kinds = [_kind_of_model(source.config) for source in (first, other)]
    changed = [f"model: {kinds[0]} -> {kinds[1]}"] if kinds[0] != kinds[1] else []
    if not changed:
        science, _ = differences(first.config, other.config)
        changed = [line for line in science if _decides_weights(line, first.config)]
    if changed:
        raise UserError(
            f"{printable(other.folder)}: its model is not that of {printable(first.folder)}: "
            f"{'; '.join(changed)}; expected checkpoints of one architecture with the same sizes"
        )


def _kind_of_model(config: RunConfig) -> str:
    """The architecture, or the factory."""
    if isinstance(config.model, FactoryConfig):
        return f"factory {config.model.factory}"
    return f"architecture {config.model.architecture}"


def _decides_weights(difference: str, config: RunConfig) -> bool:
    """Whether a line of `differences` is about a field that the meaning of weights depends on."""
    key = difference.partition(":")[0]
    section, _, field = key.partition(".")
    if section == "generator" and not config.objective.has_generator:
        return False
    is_of_model = section in ("model", "generator") and field not in OF_TRAINING
    return key.startswith("data.special_ids") or (is_of_model and not field.endswith("_dropout"))


def _check_same_shapes(other: Source, first: Source, expected: Shapes) -> None:
    found = checkpoint.shapes(other.folder, other.meta)
    missing, more = sorted(expected.keys() - found), sorted(found.keys() - expected.keys())
    if missing or more:
        names = [f"no {printable(name)}" for name in missing[:2]]
        names += [printable(name) for name in more[:2]]
        objectives = [
            f"{o.kind}, generator {o.generator}"
            for o in (first.config.objective, other.config.objective)
        ]
        raise UserError(
            f"{printable(other.folder)}: has {', '.join(names)} ({len(missing) + len(more)} "
            f"tensors differ from {printable(first.folder)}); objective {objectives[0]} -> "
            f"{objectives[1]}; expected checkpoints with the same parameters"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(
                f"{printable(other.folder)}: {printable(name)} has shape {found[name]}, but "
                f"{shape} in {printable(first.folder)}; expected equal shapes"
            )


def _common_tokenizer(sources: list[Source]) -> Tokenizer:
    """The tokenizer of the first source that has one, after a comparison with the others."""
    chosen: tuple[Tokenizer, Path] | None = None
    for source in sources:
        own = checkpoint.tokenizer_of(source.folder)
        if not own.is_dir():
            continue
        config = source.config
        entries, special_ids = config.model.vocab_size, config.data.special_ids
        tokenizer = tokenizer_of_model(source.folder, None, entries, special_ids)
        chosen = chosen or (tokenizer, own)
        if _vocabulary(tokenizer) != _vocabulary(chosen[0]):
            raise UserError(
                f"{printable(own)}: its vocabulary or its options are not those of "
                f"{printable(chosen[1])}; expected checkpoints that were trained with one tokenizer"
            )
    if chosen is None:
        missing = checkpoint.tokenizer_of(sources[0].folder)
        raise UserError(f"{printable(missing)}: not found; expected the tokenizer of a run")
    return chosen[0]


def _vocabulary(tokenizer: Tokenizer) -> tuple[Any, ...]:
    """What must be equal; the scores in SentencePiece files are not compared."""
    return tokenizer.kind, tokenizer.names, tokenizer.options, tokenizer.normalization


def _trained_segments(sources: list[Source]) -> int | None:
    """The largest number of token types that a source trained; None if it is not known."""
    counts: list[int] = []
    for folder, meta, config in sources:
        if not isinstance(config.model, ModelConfig):
            return None
        found = Checkpoint(folder, meta, config.model, {}, config, None).trained_segments()
        if found is None:
            return None
        counts.append(found)
    return max(counts)


def _described(source: Source, first: Source, weight: float, share: float) -> AveragedCheckpoint:
    dataset_id = source.meta.state.data.get("dataset_id")
    return AveragedCheckpoint(
        path=str(source.folder),
        step=source.meta.state.step,
        tokens=source.meta.state.tokens,
        dataset_id=dataset_id if isinstance(dataset_id, str) else None,
        meta_sha256=sha256_file(source.folder / "meta.json"),
        weight=weight,
        share=share,
        differences=differences(first.config, source.config)[0],
    )


def _parts(shapes: Shapes) -> list[list[str]]:
    """The names of all tensors in groups of at most PART_BYTES, or of one larger tensor."""
    parts: list[list[str]] = []
    free = 0
    for name, shape in sorted(shapes.items()):
        size = 4 * math.prod(shape)
        if not parts or size > free:
            parts.append([])
            free = PART_BYTES
        parts[-1].append(name)
        free -= size
    return parts


def _check_weights_content(source: Source) -> None:
    """Compare the files of the weights with their sha256; the moments are not read."""
    files = {name: facts for name, facts in source.meta.files.items() if name.startswith("model")}
    with reading(source.folder, "the files of a checkpoint"):
        checkpoint.check_content(source.folder, replace(source.meta, files=files))


def _averaged(
    sources: list[Source], shares: list[float], names: list[str], shapes: Shapes
) -> dict[str, Tensor]:
    """Name -> average in fp32 of these tensors. UserError for values that are not finite."""
    sums = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in names}
    for source, share in zip(sources, shares, strict=True):
        for name, value in _tensors(source, names):
            check_values({name: value}, printable(source.folder))
            sums[name] += share * value.double()
    averages = {}
    for name in names:
        averages[name] = sums.pop(name).float()
    check_values(averages, "the average (its weights are too large)")
    return averages


def _tensors(source: Source, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    with reading(source.folder, "the files of a checkpoint"):
        yield from checkpoint.tensors(source.folder, source.meta, only=set(names))

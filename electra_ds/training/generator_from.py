"""The weights of --generator-from, of a frozen generator, on every rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.config.schema import RunConfig
from electra_ds.data.tokenizer import Tokenizer, load_tokenizer
from electra_ds.training.collectives import fail_on_all_ranks, on_rank0
from electra_ds.training.engine import Engine

Reader = Callable[[RunConfig, Tokenizer], dict[str, Tensor]]


def read_weights(
    read: Reader | None,
    config: RunConfig,
    data_tokenizer: Path,
    all_gather_object: Callable[[Any], list[Any]],
    *,
    needs_weights: bool,
) -> dict[str, Tensor] | None:
    """Return the weights of --generator-from; None without the option. Collective.

    read: see `AttemptOptions.read_generator`. data_tokenizer: folder of the tokenizer of the data.
    needs_weights: whether a frozen generator has no weights yet: a new run without --init-from.
    Raises UserError on every rank when the option does not fit the objective, when it is missing,
    and when the weights do not fit.
    """
    options = config.objective
    if read is None:
        if options.is_frozen and needs_weights:
            raise UserError(
                "objective.generator = frozen: a new run needs the weights of the generator: give "
                "--generator-from with a run, a checkpoint or a Hugging Face folder"
            )
        return None
    if not options.is_frozen:
        raise UserError(
            f"--generator-from: objective.generator = {options.generator} uses no weights of "
            "another generator: leave the option out, or set objective.generator=frozen and "
            "model.sharing=untied"
        )
    weights: dict[str, Tensor] | None = None

    def read_here() -> None:
        nonlocal weights
        weights = read(config, load_tokenizer(data_tokenizer))

    on_rank0(read_here)  # its message stands alone: a mistake is the same on every rank
    with fail_on_all_ranks(all_gather_object, "reading the generator"):
        if weights is None:
            read_here()
    return weights


def set_weights(engine: Engine, weights: dict[str, Tensor], out: Path, is_new: bool) -> None:
    """Set the frozen generator of a new run; compare it with that of a resumed one. Collective.

    weights: emptied here, because the attempt refers to them for the whole run.
    out: the run folder, for the message.
    Raises UserError on every rank when the weights of rank 0 differ.
    """
    if is_new:
        while weights:
            engine.set_frozen(*weights.popitem())
        return
    on_rank0(lambda: _compare(engine, weights, out))  # other ranks may have no fp32 values
    weights.clear()


def _compare(engine: Engine, weights: dict[str, Tensor], out: Path) -> None:
    differing = [
        name for name, value in weights.items() if not torch.equal(value, engine.frozen[name].cpu())
    ]
    if differing:
        raise UserError(
            f"--generator-from: {len(differing)} tensors differ from those of the generator in "
            f"{printable(out)} ({differing[0]}, ...): leave the option out to resume, or choose "
            "another --out"
        )

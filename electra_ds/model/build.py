"""The module of a run config, and its parameter counts."""

from typing import NamedTuple

import torch
from torch import nn

from electra_ds.common.errors import UserError
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.schema import (
    FactoryConfig,
    RunConfig,
)
from electra_ds.model.custom import (
    FactoryObjective,
    load_factory,
)
from electra_ds.model.objective import ElectraObjective, Objective
from electra_ds.model.weights import true_state

VOCAB_SIZE = 30522  # bert-base-uncased's


def build_objective(config: RunConfig, seed: int | None = None) -> Objective:
    """The module of a resolved config (vocab_size and special_ids known), its weights drawn from the seed.

    With model.factory this runs the code it names: trust the config first.
    """
    model, options, special_ids = config.model, config.objective, config.data.special_ids
    if not isinstance(model, FactoryConfig):
        return ElectraObjective(model, config.generator, options, special_ids, seed)
    if seed is not None:
        torch.manual_seed(seed)
    pair = load_factory(model.factory)(config)
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], nn.Module)) or (
        options.has_generator and not isinstance(pair[0], nn.Module)
    ):
        raise UserError(
            f"model.factory = {model.factory!r} must return (generator, discriminator), two torch modules"
        )
    module = FactoryObjective(*pair, model, options, special_ids)
    held = {*module.state_dict()} - {
        name for name, p in module.named_parameters(remove_duplicate=False)
    }
    lost = [name for name in held if module.get_buffer(name).is_floating_point()]
    lost += [name for name, p in module.named_parameters() if not p.requires_grad]
    if lost:
        raise UserError(
            f"model.factory = {model.factory!r}: {sorted(lost)[0]} is a buffer or frozen, and checkpoints hold what is "
            "trained: train it, or register it with persistent=False and compute it anew (LayerNorm for BatchNorm)"
        )
    return module


class ParameterCount(NamedTuple):
    """True parameters, without rows that only pad the word table in memory."""

    discriminator: int
    joint: int


def meta_model(config: RunConfig) -> Objective:
    """The module of a config, of a built-in model with shapes alone (torch's device "meta"); VOCAB_SIZE is assumed
    where the data has not said it yet."""
    special_ids = config.data.special_ids or SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
    config = config.with_data(
        config.model.vocab_size or VOCAB_SIZE, special_ids, config.data.sequence_length
    )
    with torch.device("cpu" if isinstance(config.model, FactoryConfig) else "meta"):
        return build_objective(config)


def parameter_count(config: RunConfig) -> ParameterCount:
    """Parameters of the main encoder with its head, and of everything trained."""
    sizes = {name: value.numel() for name, value in true_state(meta_model(config)).items()}
    own = sum(size for name, size in sizes.items() if not name.startswith("generator"))
    return ParameterCount(own, sum(sizes.values()))

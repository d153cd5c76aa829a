"""Construction of the module of a run config, and its number of parameters."""

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

VOCAB_SIZE = 30522  # of bert-base-uncased


def build_objective(config: RunConfig, seed: int | None = None) -> Objective:
    """Return the module of a config with known vocab_size and special_ids.

    With model.factory this runs the code that the config names. Use only configs that you trust.

    seed: of the initial weights; None uses torch's default generator. With model.factory it seeds
          the default generator.
    Raises UserError when the factory cannot be imported, returns no pair of modules, or a module
    has floating-point buffers or frozen parameters.
    """
    model, special_ids = config.model, config.data.special_ids
    assert special_ids is not None
    if not isinstance(model, FactoryConfig):
        return ElectraObjective(model, config.generator, config.objective, special_ids, seed)
    if seed is not None:
        torch.manual_seed(seed)
    made = load_factory(model.factory)(config)
    is_pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], nn.Module)
    if not is_pair or (config.objective.has_generator and not isinstance(made[0], nn.Module)):
        raise UserError(
            f"model.factory = {model.factory!r} must return (generator, discriminator), two torch "
            f"modules, but returned {type(made).__name__}; the generator may be None with "
            "objective.generator = uniform"
        )
    generator, discriminator = made
    module = FactoryObjective(generator, discriminator, model, config.objective, special_ids)
    _check_all_trained(module, model.factory)
    return module


def _check_all_trained(module: nn.Module, factory: str) -> None:
    """Raise UserError for a buffer or a frozen parameter, which checkpoints do not hold."""
    parameter_names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffer_names = set(module.state_dict()) - parameter_names
    lost = [name for name in buffer_names if module.get_buffer(name).is_floating_point()]
    lost += [name for name, p in module.named_parameters() if not p.requires_grad]
    if lost:
        raise UserError(
            f"model.factory = {factory!r}: {min(lost)} is a buffer or frozen, but checkpoints hold "
            "trained parameters only: make it a parameter that is trained, or compute it in the "
            "constructor and register it with persistent=False (for BatchNorm use LayerNorm)"
        )


class ParameterCount(NamedTuple):
    """Numbers of parameters, without rows that pad the word table in memory."""

    discriminator: int  # main encoder with embeddings and head
    trained: int  # of the whole module
    frozen: int  # of a generator that does not train


def meta_model(config: RunConfig) -> Objective:
    """Return the module of a config to count or measure, not to train.

    A built-in model is on the device "meta" and has no data; a model.factory is on the CPU. An
    unknown vocabulary size is assumed to be VOCAB_SIZE.
    """
    special_ids = config.data.special_ids or SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
    config = config.with_data(
        config.model.vocab_size or VOCAB_SIZE, special_ids, config.data.sequence_length
    )
    with torch.device("cpu" if isinstance(config.model, FactoryConfig) else "meta"):
        return build_objective(config)


def parameter_count(config: RunConfig) -> ParameterCount:
    """Count the parameters of the main encoder with its head, and those of the whole module."""
    module = meta_model(config)
    sizes = {name: value.numel() for name, value in true_state(module).items()}
    discriminator = sum(size for name, size in sizes.items() if not name.startswith("generator"))
    frozen = sum(sizes[name] for name, p in module.named_parameters() if not p.requires_grad)
    return ParameterCount(discriminator, sum(sizes.values()) - frozen, frozen)

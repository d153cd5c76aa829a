"""Tables of gradient-disentangled embedding sharing (DeBERTaV3, He et al. 2021, section 3.2).

The discriminator embeds with stop_gradient(E_G) + delta, where E_G is a table of the generator. A
checkpoint holds E_G as generator_embeddings.* and the deltas as embedding_deltas.*. A main encoder
without its generator has the sums, as embeddings.*. The LayerNorms are not summed.
"""

from collections.abc import Mapping

from torch import Tensor

GENERATOR, DELTAS, SUMS = "generator_embeddings.", "embedding_deltas.", "embeddings."


def name_of_sum(name: str) -> str:
    """The name of a parameter in a main encoder without deltas."""
    return SUMS + name.removeprefix(DELTAS) if name.startswith(DELTAS) else name


def with_sums(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a checkpoint with embeddings.* in place of embedding_deltas.*.

    state: canonical name -> tensor; returned unchanged if it has no deltas.
    """
    return {
        name_of_sum(name): value + state[_of_generator(name)] if _is_table(name) else value
        for name, value in state.items()
    }


def with_deltas(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters with embedding_deltas.* in place of embeddings.*, the inverse of `with_sums`.

    A delta is rounded to the dtype of its table, so that a sum can differ by one rounding error
    from the original. It is exact where both tables are equal.
    """
    deltas = {name: name.replace(SUMS, DELTAS, 1) for name in state if name.startswith(SUMS)}
    return {
        deltas.get(name, name): value - state[_of_generator(deltas[name])]
        if name in deltas and _is_table(deltas[name])
        else value
        for name, value in state.items()
    }


def _is_table(name: str) -> bool:
    return name.startswith(DELTAS) and not name.startswith(f"{DELTAS}norm.")


def _of_generator(name: str) -> str:
    return GENERATOR + name.removeprefix(DELTAS)

"""How is an encoder of the user's own called? Its arguments, its hidden layer, its output.

Letters: B rows, S sequence, H hidden, V vocabulary.
"""

import inspect
import re
import warnings
from functools import partial
from typing import Any

from torch import Tensor, nn

from electra_ds.common.errors import UserError
from electra_ds.common.plugins import load_function
from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.schema import (
    FactoryConfig,
    ObjectiveConfig,
)
from electra_ds.data.batch import Batch
from electra_ds.model.kernels.vocab_head import HeadResult, logits_head
from electra_ds.model.objective import Objective, gather_positions

load_factory = partial(
    load_function, "model.factory"
)  # (name) -> the function that makes both encoders


def takes(module: nn.Module, name: str, by_name: bool = False) -> bool:
    """Whether the module's forward takes this keyword argument beside the ids; by_name: a **kwargs does not count."""
    _ids, *others = inspect.signature(module.forward).parameters.values()
    if name in (p.name for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)):
        return True
    return not by_name and any(p.kind is p.VAR_KEYWORD for p in others)


def call_generator(generator: nn.Module, ids: Tensor, ties: str, given: dict[str, Any]) -> Tensor:
    """generator(ids [B, S], ...) -> [B, S, V], or [B, S, H] where it has a `predict`. ties: what `tied` said of it."""
    try:
        found = generator(ids, **given)
    except RuntimeError as error:
        if not ties or not re.search(
            r"\bsizes?\b|shape", str(error)
        ):  # not the user's: a rank, the device, memory
            raise
        raise UserError(
            f"the generator fails with what it shares with the discriminator, {ties}: {error}. Tie embeddings of equal "
            "width, or put a projection behind them"
        ) from error
    if not isinstance(found, Tensor) or found.shape[:2] != ids.shape or found.ndim != 3:
        raise UserError(
            f"the generator must return logits {[*ids.shape, 'V']}, but returned {_shape(found)}"
        )
    return found


def tied(generator: nn.Module, discriminator: nn.Module) -> str:
    """The parameters that both own, with their shapes, for people."""
    own = {id(p) for p in discriminator.parameters()}
    return ", ".join(
        f"{name} {list(p.shape)}" for name, p in generator.named_parameters() if id(p) in own
    )


class Discriminator(nn.Module):
    """Any module that takes ids [B, S], as one that gives logits [B, S] fp32.

    dim > 0: the output of the layer `layer` (name, or index among its children) is [B, S, dim], and a linear head of
    our own, in our state_dict, makes the logits. Else the module returns logits [B, S] or [B, S, 1] itself; the last
    Sigmoid of an nn.Sequential is left out, since the loss takes logits.
    """

    def __init__(self, module: nn.Module, dim: int = -1, layer: str | int = -1):
        super().__init__()
        self.module, self.layer = module, layer
        device = next((p.device for p in module.parameters()), None)
        self.head = nn.Linear(dim, 1, device=device) if dim > 0 else None
        is_plain = (
            isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        )
        self.drops_sigmoid = (
            dim <= 0 and is_plain and len(module) > 0 and isinstance(module[-1], nn.Sigmoid)
        )
        if self.head is not None:
            self._watched()
        if self.drops_sigmoid:
            warnings.warn(
                "the discriminator's last Sigmoid is left out in training: losses take logits",
                stacklevel=3,
            )

    def forward(self, ids: Tensor, **given: Any) -> Tensor:
        if self.head is not None:
            logits = self.head(self._hidden(ids, given))
        else:
            module = nn.Sequential(*list(self.module)[:-1]) if self.drops_sigmoid else self.module
            logits = module(ids, **given)
            if isinstance(logits, Tensor) and _ends_in_sigmoid(logits):
                raise UserError(
                    "the discriminator ends in a sigmoid, but the loss takes logits: return its input"
                )
        if isinstance(logits, Tensor) and logits.shape == (*ids.shape, 1):
            logits = logits.squeeze(-1)
        if not isinstance(logits, Tensor) or logits.shape != ids.shape:
            raise UserError(
                f"the discriminator must return logits {list(ids.shape)} or {[*ids.shape, 1]}, but returned "
                f"{_shape(logits)}; discr_dim and discr_layer take a hidden layer instead"
            )
        return logits.float()

    def _watched(self) -> nn.Module:
        children, named = list(self.module.children()), dict(self.module.named_modules())
        if isinstance(self.layer, str) and self.layer in named:
            return named[self.layer]
        if isinstance(self.layer, int) and -len(children) <= self.layer < len(children):
            return children[self.layer]
        names = ", ".join(name for name, _ in self.module.named_children())
        raise UserError(
            f"discr_layer = {self.layer!r}: the discriminator has no such layer; it has {names}"
        )

    def _hidden(self, ids: Tensor, given: dict[str, Any]) -> Tensor:
        outputs = []
        # A hook that lives only now: one left on the layer would be pickled with the module, and this one with it.
        hook = self._watched().register_forward_hook(
            lambda _layer, _inputs, output: outputs.append(output)
        )
        try:
            self.module(ids, **given)
        finally:
            hook.remove()
        expected = (*ids.shape, self.head.in_features)
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].shape != expected:
            found = ", then ".join(map(_shape, outputs)) or "nothing"
            raise UserError(
                f"discr_layer = {self.layer!r} gave {found}; expected one tensor {list(expected)} (discr_dim)"
            )
        return outputs[0]


# What changes no number, or wraps a module (DeepSpeed's ZeRO-3), between a sigmoid and what is returned.
HARMLESS = (
    "Squeeze",
    "Unsqueeze",
    "View",
    "UnsafeView",
    "Reshape",
    "Select",
    "Slice",
    "Transpose",
    "Permute",
    "Clone",
    "Clamp",
    "ToCopy",
    "PreBackward",
    "PostBackward",
)


def _ends_in_sigmoid(found: Tensor) -> bool:
    step = found.grad_fn
    while step is not None and step.name().startswith(HARMLESS):
        step = step.next_functions[0][0]
    return step is not None and step.name().startswith("Sigmoid")


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


class FactoryObjective(Objective):
    """Encoders of the user's own (model.factory); kinds electra and electra_15.

    generator(ids [B, S]) -> logits [B, S, V], or hidden states [B, S, H] which its `predict` turns into logits at the
    masked positions [B, K, H] -> [B, K, V]; None with objective.generator = "uniform". discriminator: see
    `adapters.Discriminator`. A forward that names attention_mask, token_type_ids, position_ids or document_ids gets them;
    rows hold several pieces unless packed otherwise, and only document_ids keeps these apart.
    """

    def __init__(
        self,
        generator: nn.Module | None,
        discriminator: nn.Module,
        model: FactoryConfig,
        objective: ObjectiveConfig,
        special_ids: SpecialIds,
    ):
        super().__init__(objective, special_ids, model.vocab_size)
        self.discriminator = Discriminator(discriminator, model.discr_dim, model.discr_layer)
        if objective.has_generator:
            self.generator, self.ties = generator, tied(generator, discriminator)

    def generate(self, masked_ids: Tensor, batch: Batch, with_best: bool = False) -> HeadResult:
        options = self.objective
        found = call_generator(
            self.generator, masked_ids, self.ties, _inputs(self.generator, batch)
        )
        logits = gather_positions(found, batch.masked_positions)
        logits = (
            self.generator.predict(logits) if hasattr(self.generator, "predict") else logits
        )  # [B, K, V]
        if logits.shape[-1] != self.vocab_size:
            raise UserError(
                f"the generator has {logits.shape[-1]} tokens, the data {self.vocab_size} (model.vocab_size)"
            )
        targets = batch.input_ids.gather(1, batch.masked_positions)
        draw = batch.uniforms, options.temperature, with_best, options.disallow_correct
        return logits_head(logits, targets, batch.masked_weights, *draw)

    def discriminate(self, input_ids: Tensor, batch: Batch) -> Tensor:
        return self.discriminator(input_ids, **_inputs(self.discriminator.module, batch))


def _inputs(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What a module of the user's own is told of a batch: whatever its forward names."""
    known = {
        "attention_mask": (batch.document_ids > 0).long(),
        "token_type_ids": batch.segment_ids,
        "position_ids": batch.position_ids,
        "document_ids": batch.document_ids,
        "piece_ids": batch.document_ids,  # the name of version 0.1
    }
    return {name: value for name, value in known.items() if takes(module, name, by_name=True)}

"""Objective with user-defined encoders (model.factory), and the calls of user-defined modules.

Dimensions: B rows, S sequence, H hidden, K masked positions, V vocabulary.
"""

import inspect
import re
import warnings
from collections.abc import Callable
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

# Name prefixes of autograd nodes that may follow a sigmoid without another function of its values:
# views, copies, clamps, and the backward hooks of ZeRO-3.
VALUE_PRESERVING_NODES = (
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
KEYWORD_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_factory(name: str) -> Callable:
    """Return the function `package.module:function` that makes both encoders."""
    return load_function("model.factory", name)


def accepts_argument(module: nn.Module, name: str, by_name: bool = False) -> bool:
    """Return whether the module's forward accepts this keyword argument besides the token ids.

    by_name: True requires a parameter of that name; otherwise **kwargs is enough
    """
    _ids, *parameters = inspect.signature(module.forward).parameters.values()
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            if not by_name:
                return True
        elif parameter.name == name and parameter.kind in KEYWORD_KINDS:
            return True
    return False


def describe_shared_parameters(generator: nn.Module, discriminator: nn.Module) -> str:
    """Return names and shapes of the parameters that both modules contain, for messages."""
    owned = {id(p) for p in discriminator.parameters()}
    shared = [
        f"{name} {list(p.shape)}" for name, p in generator.named_parameters() if id(p) in owned
    ]
    return ", ".join(shared)


def call_generator(
    generator: nn.Module, ids: Tensor, shared: str, arguments: dict[str, Any]
) -> Tensor:
    """Call generator(ids [B, S], **arguments) and check its output.

    shared: text of `describe_shared_parameters`, for the message of a shape error
    Returns logits [B, S, V], or hidden states [B, S, H] if the generator has a method `predict`.
    Raises UserError for an output of another shape, and for a shape error in the generator when it
    shares parameters with the discriminator.
    """
    try:
        output = generator(ids, **arguments)
    except RuntimeError as error:
        is_about_shapes = re.search(r"\bsizes?\b|shape", str(error))
        if not shared or not is_about_shapes:  # may come from another rank, the device, memory
            raise
        raise UserError(
            "the generator fails with the parameters that it shares with the discriminator, "
            f"{shared}: {error}. Share embeddings of equal width, or add a projection behind them"
        ) from error
    if not isinstance(output, Tensor) or output.shape[:2] != ids.shape or output.ndim != 3:
        raise UserError(
            f"the generator must return logits {[*ids.shape, 'V']}, but returned {_shape(output)}"
        )
    return output


class Discriminator(nn.Module):
    """A wrapper around a module that takes ids [B, S]. It returns logits [B, S] fp32.

    With dim > 0 the layer `layer` (name, or index among the children) returns [B, S, dim], and a
    linear head of this class computes the logits. The head is in the state_dict.
    With dim <= 0 the module returns logits [B, S] or [B, S, 1]. If it is an nn.Sequential that ends
    in a Sigmoid, the Sigmoid is not applied, because the loss takes logits.
    Raises UserError when there is no layer `layer`.
    """

    def __init__(self, module: nn.Module, dim: int = -1, layer: str | int = -1) -> None:
        super().__init__()
        self.module = module
        self.layer = layer
        device = next((p.device for p in module.parameters()), None)
        self.head = nn.Linear(dim, 1, device=device) if dim > 0 else None
        self.drops_sigmoid = dim <= 0 and _is_sequential_with_sigmoid(module)
        if self.head is not None:
            self._hidden_layer()  # raises when there is no such layer
        if self.drops_sigmoid:
            warnings.warn(
                "the discriminator's last Sigmoid is left out, because the loss takes logits",
                stacklevel=3,
            )

    def forward(self, ids: Tensor, **arguments: Any) -> Tensor:
        """Return logits [B, S] fp32; arguments are passed to the module.

        Raises UserError for an output of another shape, and for one that ends in a sigmoid.
        """
        logits: Any
        if self.head is not None:
            logits = self.head(self._hidden(ids, self.head.in_features, arguments))
        else:
            module = self.module
            if self.drops_sigmoid:
                assert isinstance(module, nn.Sequential)
                module = nn.Sequential(*list(module)[:-1])
            logits = module(ids, **arguments)
            if isinstance(logits, Tensor) and _ends_in_sigmoid(logits):
                raise UserError(
                    "the discriminator ends in a sigmoid, but the loss takes logits: return the "
                    "input of the sigmoid"
                )
        if isinstance(logits, Tensor) and logits.shape == (*ids.shape, 1):
            logits = logits.squeeze(-1)
        if not isinstance(logits, Tensor) or logits.shape != ids.shape:
            raise UserError(
                f"the discriminator must return logits {list(ids.shape)} or {[*ids.shape, 1]}, but "
                f"returned {_shape(logits)}; set discr_dim and discr_layer to use a hidden layer "
                "instead"
            )
        return logits.float()

    def _hidden_layer(self) -> nn.Module:
        children = list(self.module.children())
        by_name = dict(self.module.named_modules())
        if isinstance(self.layer, str) and self.layer in by_name:
            return by_name[self.layer]
        if isinstance(self.layer, int) and -len(children) <= self.layer < len(children):
            return children[self.layer]
        names = ", ".join(name for name, _ in self.module.named_children())
        raise UserError(
            f"discr_layer = {self.layer!r}: the discriminator has no such layer; it has {names}"
        )

    def _hidden(self, ids: Tensor, dim: int, arguments: dict[str, Any]) -> Tensor:
        """Run the module and return the output of its hidden layer, [B, S, dim]."""
        outputs: list[Any] = []
        # The hook is removed after the call, because torch.save cannot pickle a lambda.
        hook = self._hidden_layer().register_forward_hook(
            lambda _layer, _inputs, output: outputs.append(output)
        )
        try:
            self.module(ids, **arguments)
        finally:
            hook.remove()
        expected = (*ids.shape, dim)
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].shape != expected:
            returned = ", then ".join(map(_shape, outputs)) or "nothing"
            raise UserError(
                f"discr_layer = {self.layer!r} returned {returned}; expected one tensor "
                f"{list(expected)} (discr_dim)"
            )
        return outputs[0]


class FactoryObjective(Objective):
    """Objective with user-defined encoders (model.factory), for the kinds electra and electra_15.

    generator:     generator(ids [B, S]) returns logits [B, S, V], or hidden states [B, S, H] that
                   its method `predict` maps to logits at the masked positions,
                   [B, K, H] -> [B, K, V]; None with objective.generator = "uniform"
    discriminator: see `Discriminator`

    If a forward has parameters named attention_mask, token_type_ids, position_ids or document_ids,
    it gets these tensors, [B, S] int64 each. piece_ids, the name in version 0.1, is accepted for
    document_ids. With packing best_fit a row has several documents, and only document_ids separates
    them. Raises UserError for outputs of other shapes.
    """

    def __init__(
        self,
        generator: nn.Module | None,
        discriminator: nn.Module,
        model: FactoryConfig,
        objective: ObjectiveConfig,
        special_ids: SpecialIds,
    ) -> None:
        assert model.vocab_size is not None
        super().__init__(objective, special_ids, model.vocab_size)
        self.discriminator = Discriminator(discriminator, model.discr_dim, model.discr_layer)
        if objective.has_generator:
            assert generator is not None
            self.generator = generator
            self.shared = describe_shared_parameters(generator, discriminator)

    def generate(
        self, masked_ids: Tensor, batch: Batch, with_predictions: bool = False
    ) -> HeadResult:
        options = self.objective
        arguments = _forward_arguments(self.generator, batch)
        output = call_generator(self.generator, masked_ids, self.shared, arguments)
        logits = gather_positions(output, batch.masked_positions)
        predict = getattr(self.generator, "predict", None)
        if predict is not None:
            logits = predict(logits)  # [B, K, H] -> [B, K, V]
        if logits.shape[-1] != self.vocab_size:
            raise UserError(
                f"the generator has {logits.shape[-1]} tokens, the data {self.vocab_size}; "
                "expected logits with model.vocab_size entries on the last axis"
            )
        return logits_head(
            logits,
            batch.input_ids.gather(1, batch.masked_positions),
            batch.masked_weights,
            batch.uniforms,
            temperature=self.temperature,
            with_predictions=with_predictions,
            disallow_target=options.disallow_correct,
        )

    def discriminate(self, input_ids: Tensor, batch: Batch) -> Tensor:
        arguments = _forward_arguments(self.discriminator.module, batch)
        return self.discriminator(input_ids, **arguments)


def _forward_arguments(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch that the forward of a user's module names."""
    available = {
        "attention_mask": (batch.document_ids > 0).long(),
        "token_type_ids": batch.segment_ids,
        "position_ids": batch.position_ids,
        "document_ids": batch.document_ids,
        "piece_ids": batch.document_ids,  # the name in version 0.1
    }
    return {
        name: value
        for name, value in available.items()
        if accepts_argument(module, name, by_name=True)
    }


def _is_sequential_with_sigmoid(module: nn.Module) -> bool:
    """Whether a module is a plain nn.Sequential that ends in a Sigmoid."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    return len(module) > 0 and isinstance(module[-1], nn.Sigmoid)


def _ends_in_sigmoid(output: Tensor) -> bool:
    """Return whether the autograd graph of output ends in a sigmoid; False without a graph."""
    node = output.grad_fn
    while node is not None and node.name().startswith(VALUE_PRESERVING_NODES):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__

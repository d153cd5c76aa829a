"""`electra_ds.Electra`: replaced token detection with two user-defined modules.

Dimensions: B rows, S sequence, K masked positions, V vocabulary.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError
from electra_ds.model.custom import (
    Discriminator,
    accepts_argument,
    call_generator,
    describe_shared_parameters,
)
from electra_ds.model.kernels.vocab_head import logits_head
from electra_ds.model.objective import (
    discriminator_nll,
    gather_positions,
    scatter_tokens,
    uniform_tokens,
)


class Result(NamedTuple):
    """Losses and accuracies of one call.

    Losses and accuracies are 0-d fp32 means: over the masked positions (mlm_loss, gen_acc) or over
    the real tokens (disc_loss, disc_acc). Only `loss` has a gradient.
    """

    loss: Tensor  # gen_weight * mlm_loss + disc_weight * disc_loss
    mlm_loss: Tensor
    disc_loss: Tensor
    gen_acc: Tensor
    disc_acc: Tensor
    disc_labels: Tensor  # [B, S] fp32: 1 where the token was replaced, else 0
    disc_predictions: Tensor  # [B, S] fp32: 1 where the logit is above 0, else 0

    def backward(self) -> None:
        """Compute the gradients of `loss`."""
        self.loss.backward()


class Electra(nn.Module):
    """ELECTRA's two losses for a generator and a discriminator that take ids [B, S].

    The interface is that of electra-pytorch. Both modules are not modified:
    torch.save(discriminator) saves the discriminator without the head. state_dict() of the wrapper
    also holds the head.

    generator:     returns logits [B, S, V]
    discriminator: returns logits [B, S] or [B, S, 1]; with discr_dim > 0 its layer discr_layer
                   (name, or index among the children) returns [B, S, discr_dim], and a linear head
                   of the wrapper computes the logits
    num_tokens:    size of the vocabulary, needed for random_token_prob
    mask_prob:     share of a row's real tokens that is masked, at distinct positions; tokens equal
                   to pad_token_id, mask_token_id or one of mask_ignore_token_ids are never masked
    random_token_prob: share of the masked positions that become random tokens
    replace_prob:  share of the other masked positions that become mask_token_id; the rest keep
                   their token
    disc_weight, gen_weight: factors of disc_loss and mlm_loss in the loss
    temperature:   temperature of the softmax from which the generator's tokens are sampled
    Tokens equal to pad_token_id count in no loss.
    Raises UserError for a share outside 0 to 1, for random_token_prob without num_tokens, and for a
    discr_layer that does not exist.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        num_tokens: int | None = None,
        discr_dim: int = -1,
        discr_layer: str | int = -1,
        mask_prob: float = 0.15,
        replace_prob: float = 0.85,
        random_token_prob: float = 0.0,
        mask_token_id: int = 2,
        pad_token_id: int = 0,
        mask_ignore_token_ids: Collection[int] = (),
        disc_weight: float = 50.0,
        gen_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        shares = {
            "mask_prob": mask_prob,
            "replace_prob": replace_prob,
            "random_token_prob": random_token_prob,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"{name} = {share}: expected a share from 0 to 1")
        if random_token_prob > 0 and num_tokens is None:
            raise UserError("random_token_prob needs num_tokens, the number of tokens to draw from")
        self.generator = generator
        self.discriminator = Discriminator(discriminator, discr_dim, discr_layer)
        self.shared = describe_shared_parameters(generator, discriminator)
        self.num_tokens = num_tokens
        self.mask_prob = mask_prob
        self.replace_prob = replace_prob
        self.random_token_prob = random_token_prob
        self.mask_id = mask_token_id
        self.pad_id = pad_token_id
        self.never_masked = sorted({mask_token_id, pad_token_id, *mask_ignore_token_ids})
        self.disc_weight = disc_weight
        self.gen_weight = gen_weight
        self.temperature = temperature

    def forward(self, input: Tensor, **kwargs: Any) -> Result:
        """Return the losses of ids [B, S] int64.

        A keyword argument is passed to each module with a forward that accepts it. Masked positions
        and tokens are drawn from torch's default generator.
        Raises UserError for an argument that no module accepts, and for outputs of other shapes.
        """
        generator_arguments, discriminator_arguments = self._split_arguments(kwargs)
        positions, weights = self._select_masked_positions(input)  # [B, K]
        originals = input.gather(1, positions)
        masked_ids = scatter_tokens(input, positions, self._mask(originals), weights)
        output = call_generator(self.generator, masked_ids, self.shared, generator_arguments)
        uniforms = torch.rand(positions.shape, device=input.device)
        drawn = logits_head(
            gather_positions(output, positions),
            originals,
            weights,
            uniforms,
            self.temperature,
            with_predictions=True,
        )
        corrupted = scatter_tokens(input, positions, drawn.sampled, weights)
        is_replaced = corrupted != input
        real = input != self.pad_id
        logits = self.discriminator(corrupted, **discriminator_arguments)  # [B, S]
        masked_count = weights.sum().clamp(min=1)
        token_count = real.sum().clamp(min=1)
        mlm_loss = drawn.nll / masked_count
        disc_loss = discriminator_nll(logits, is_replaced, real) / token_count
        predictions = logits > 0
        return Result(
            loss=self.gen_weight * mlm_loss + self.disc_weight * disc_loss,
            mlm_loss=mlm_loss.detach(),
            disc_loss=disc_loss.detach(),
            gen_acc=(weights * (drawn.predicted == originals)).sum() / masked_count,
            disc_acc=((predictions == is_replaced) & real).sum() / token_count,
            disc_labels=is_replaced.float(),
            disc_predictions=predictions.float(),
        )

    def _split_arguments(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments that generator and discriminator accept."""
        generator, discriminator = (
            {name: value for name, value in arguments.items() if accepts_argument(module, name)}
            for module in (self.generator, self.discriminator.module)
        )
        if unused := sorted(arguments.keys() - generator.keys() - discriminator.keys()):
            raise UserError(
                f"neither the generator's nor the discriminator's forward takes {', '.join(unused)}"
            )
        return generator, discriminator

    def _select_masked_positions(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return distinct positions of each row [B, K], and weights [B, K]: 0 for unused ones."""
        candidates = ~torch.isin(ids, torch.tensor(self.never_masked, device=ids.device))
        wanted = ((ids != self.pad_id).sum(1) * self.mask_prob).round().clamp(min=1)
        count = wanted.minimum(candidates.sum(1))  # [B]
        slots = max(1, round(ids.shape[1] * self.mask_prob))
        priorities = torch.rand(ids.shape, device=ids.device).masked_fill(~candidates, -1.0)
        used = torch.arange(slots, device=ids.device) < count[:, None]
        return priorities.topk(slots).indices, used.float()

    def _mask(self, originals: Tensor) -> Tensor:
        """Return the generator's input at the masked positions, [B, K]."""
        to_mask, to_random, uniforms = torch.rand(3, *originals.shape, device=originals.device)
        masked = originals.masked_fill(to_mask < self.replace_prob, self.mask_id)
        if self.random_token_prob == 0:
            return masked
        assert self.num_tokens is not None
        random_tokens = uniform_tokens(uniforms, self.num_tokens, self.never_masked)
        return torch.where(to_random < self.random_token_prob, random_tokens, masked)

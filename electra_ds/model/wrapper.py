"""`electra_ds.Electra`: replaced token detection around any two modules of the user's own, in a loop of their own.

Letters: B rows, S sequence, K masked positions, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError
from electra_ds.model.custom import Discriminator, call_generator, takes, tied
from electra_ds.model.kernels.vocab_head import logits_head
from electra_ds.model.objective import discriminator_nll, gather_positions, put, uniform_tokens


class Result(NamedTuple):
    """What one call gives: 0-d fp32 losses and accuracies over the masked positions (mlm, gen) or real tokens (disc)."""

    loss: Tensor  # gen_weight * mlm_loss + disc_weight * disc_loss
    mlm_loss: Tensor
    disc_loss: Tensor
    gen_acc: Tensor
    disc_acc: Tensor
    disc_labels: Tensor  # [B, S] 1. where the token was replaced, else 0.
    disc_predictions: Tensor  # [B, S] 1. where the discriminator says so

    def backward(self) -> None:
        """Gradients of `loss`."""
        self.loss.backward()


class Electra(nn.Module):
    """ELECTRA's two losses for a generator and a discriminator that take ids [B, S] (interface of electra-pytorch).

    generator: returns logits [B, S, V]. discriminator: returns logits [B, S] or [B, S, 1]; with discr_dim > 0 the
    output [B, S, discr_dim] of its layer discr_layer (name, or index of a child) is taken, and a linear head of the
    wrapper makes the logits. Nothing stays behind in the two modules: torch.save(discriminator) saves it alone;
    state_dict() of the wrapper holds the head too.

    mask_prob: share of the real tokens that is chosen, a row at a time, at distinct places; never pad_token_id,
    mask_token_id or mask_ignore_token_ids. random_token_prob of them become random tokens (needs num_tokens),
    replace_prob of the others mask_token_id, the rest stay. Tokens with pad_token_id count in no loss.
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
        mask_ignore_token_ids: tuple[int, ...] | list[int] | set[int] = (),
        disc_weight: float = 50.0,
        gen_weight: float = 1.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        shares = {
            "mask_prob": mask_prob,
            "replace_prob": replace_prob,
            "random_token_prob": random_token_prob,
        }
        if odd := [name for name, share in shares.items() if not 0 <= share <= 1]:
            raise UserError(f"{odd[0]} = {shares[odd[0]]}: expected a share, 0 to 1")
        if random_token_prob > 0 and num_tokens is None:
            raise UserError("random_token_prob needs num_tokens, the number of tokens to draw from")
        self.generator, self.discriminator = (
            generator,
            Discriminator(discriminator, discr_dim, discr_layer),
        )
        self.ties, self.num_tokens = tied(generator, discriminator), num_tokens
        self.mask_prob, self.replace_prob, self.random_token_prob = (
            mask_prob,
            replace_prob,
            random_token_prob,
        )
        self.mask_id, self.pad_id = mask_token_id, pad_token_id
        self.never_chosen = sorted({mask_token_id, pad_token_id, *mask_ignore_token_ids})
        self.disc_weight, self.gen_weight, self.temperature = disc_weight, gen_weight, temperature

    def forward(self, input: Tensor, **kwargs: Any) -> Result:
        """Losses of ids [B, S] int64. Keyword arguments go to each module whose forward takes them; UserError for one
        that neither takes. What is chosen, masked and drawn comes from torch's random numbers."""
        given = {
            module: {k: v for k, v in kwargs.items() if takes(module, k)}
            for module in (self.generator, self.discriminator.module)
        }
        if lost := kwargs.keys() - set().union(*given.values()):
            raise UserError(
                f"neither the generator's nor the discriminator's forward takes {', '.join(sorted(lost))}"
            )
        chosen, weights = self._choose(input)  # [B, K]
        originals = input.gather(1, chosen)
        masked = put(input, chosen, self._mask(originals), weights)
        logits = gather_positions(
            call_generator(self.generator, masked, self.ties, given[self.generator]), chosen
        )
        uniforms = torch.rand(chosen.shape, device=input.device)
        drawn = logits_head(logits, originals, weights, uniforms, self.temperature, with_best=True)
        corrupted = put(input, chosen, drawn.sampled, weights)
        is_replaced, real = corrupted != input, input != self.pad_id
        found = self.discriminator(corrupted, **given[self.discriminator.module])  # [B, S]
        count, tokens = weights.sum().clamp(min=1), real.sum().clamp(min=1)
        mlm_loss, disc_loss = (
            drawn.nll / count,
            discriminator_nll(found, is_replaced, real) / tokens,
        )
        says = found > 0
        return Result(
            self.gen_weight * mlm_loss + self.disc_weight * disc_loss,
            mlm_loss.detach(),
            disc_loss.detach(),
            (weights * (drawn.best == originals)).sum() / count,
            ((says == is_replaced) & real).sum() / tokens,
            is_replaced.float(),
            says.float(),
        )

    def _choose(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct places [B, K] of each row, and 1 for those that count, 0 for the row's surplus."""
        candidates = ~torch.isin(ids, torch.tensor(self.never_chosen, device=ids.device))
        count = (
            ((ids != self.pad_id).sum(1) * self.mask_prob)
            .round()
            .clamp(min=1)
            .minimum(candidates.sum(1))
        )  # [B]
        slots = max(1, round(ids.shape[1] * self.mask_prob))
        dice = torch.rand(ids.shape, device=ids.device).masked_fill(~candidates, -1.0)
        places = torch.arange(slots, device=ids.device)
        return dice.topk(slots).indices, (places < count[:, None]).float()

    def _mask(self, originals: Tensor) -> Tensor:
        """What stands at the masked positions before the generator sees them, [B, K]."""
        to_mask, to_random, which = torch.rand(3, *originals.shape, device=originals.device)
        masked = originals.masked_fill(to_mask < self.replace_prob, self.mask_id)
        if self.random_token_prob == 0:
            return masked
        random = uniform_tokens(which, self.num_tokens, self.never_chosen)
        return torch.where(to_random < self.random_token_prob, random, masked)

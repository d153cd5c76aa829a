"""Rows -> losses: replaced token detection with a generator trained beside (ELECTRA, section 2), and the objectives
it is compared with (section 3.4), pure torch.

Letters: B rows, S sequence, K masked positions, V vocabulary, H hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.schema import (
    GeneratorConfig,
    ModelConfig,
    ObjectiveConfig,
)
from electra_ds.data.batch import Batch
from electra_ds.model.encoder import Embeddings, Encoder, Layer
from electra_ds.model.heads import DiscriminatorHead, GeneratorHead
from electra_ds.model.initialization import initialize
from electra_ds.model.kernels.linear import Linear
from electra_ds.model.kernels.vocab_head import HeadResult
from electra_ds.model.losses import Losses, Totals, count


class Objective(nn.Module):
    """The loss of every kind, over what a subclass gives: `generate`, `discriminate`, and `predict` where the main
    encoder predicts tokens."""

    def __init__(self, objective: ObjectiveConfig, special_ids: SpecialIds, vocab_size: int | None):
        super().__init__()
        self.objective, self.special_ids, self.vocab_size = objective, special_ids, vocab_size

    def forward(
        self,
        batch: Batch,
        totals: Totals = Totals(1.0, 1.0),
        *,
        with_counts: bool = False,
        task: str = "losses",
    ) -> Losses | Tensor:
        """The losses of one micro-batch, or with task="discriminate" the logits [B, S] of batch.input_ids as they are.

        totals: counts of the whole global batch, by which the sums over masked positions and over real
        tokens are divided. All losses are 0-d fp32. There is no host sync on devices
        other than the CPU. Everything goes through this forward because ZeRO-3 gathers parameters only there.
        """
        if task == "discriminate":
            return self.discriminate(batch.input_ids, batch)
        options = self.objective
        drawn = self._draw(batch, with_best=with_counts)
        corrupted = put(
            batch.input_ids, batch.masked_positions, drawn.sampled, batch.masked_weights
        )  # [B, S]
        is_replaced = (
            corrupted != batch.input_ids
        )  # a sample that hits the original counts as original
        places = batch.document_ids if options.counts_all_tokens else masked_indicator(batch)
        logits = torch.zeros_like(corrupted, dtype=torch.float32)
        if options.detects:
            logits = self.discriminate(corrupted, batch)  # [B, S]
            nll = discriminator_nll(logits, is_replaced, places)
        else:
            nll = logits.sum() if options.kind == "mlm" else self.predict(corrupted, batch)
        mlm_loss = drawn.nll / totals.masked_count
        disc_loss = nll / (totals.token_count if options.counts_all_tokens else totals.masked_count)
        gen_weight, disc_weight = options.loss_weights
        total = gen_weight * mlm_loss + disc_weight * disc_loss
        counts = count(batch, drawn, logits.detach(), is_replaced, places) if with_counts else None
        return Losses(total, mlm_loss.detach(), disc_loss.detach(), counts)

    def recompute_layers(self, on: bool = True) -> None:
        """Activation checkpointing of every layer of both encoders."""
        for part in self.modules():
            if isinstance(part, Encoder):
                part.recompute_layers = on

    def compile_layers(self) -> None:
        """torch.compile every layer in place, before DeepSpeed wraps the module; parameter names stay."""
        # Two encoders, with and without gradient, each in the few sizes of `document_cu_seqlens`: past the limit, which is 8,
        # layers would run uncompiled.
        torch._dynamo.config.recompile_limit = 64
        for part in self.modules():
            if isinstance(part, Layer):
                part.compile(dynamic=False)

    def _draw(self, batch: Batch, with_best: bool) -> HeadResult:
        options = self.objective
        if options.generator == "model":
            return self.generate(mask_input(batch, self.special_ids.mask), batch, with_best)
        avoid = (
            batch.input_ids.gather(1, batch.masked_positions) if options.disallow_correct else None
        )
        special = list(self.special_ids.model_dump().values())
        sampled = uniform_tokens(batch.uniforms, self.vocab_size, special, avoid)
        return HeadResult(batch.uniforms.new_zeros(()), sampled, sampled)


class ElectraObjective(Objective):
    """Both encoders and the loss in one module, the one that DeepSpeed wraps; what is shared is here once.

    Parameter names are the canonical ones of checkpoints: embeddings.*, generator.*, generator_head.*,
    discriminator.*, discriminator_head.*; with model.sharing = "untied" generator_embeddings.* besides (as wide as
    the generator, as in the authors' code), with "all" no generator.* (the discriminator's encoder serves both).
    Kinds whose main encoder predicts tokens have mlm_head.* instead of discriminator_head.*, all_tokens_mlm also
    copy_gate.*; without a generator network none of its names is there.
    """

    def __init__(
        self,
        model: ModelConfig,
        generator: GeneratorConfig,
        objective: ObjectiveConfig,
        special_ids: SpecialIds,
        seed: int | None = None,
    ):
        super().__init__(objective, special_ids, model.vocab_size)
        self.sharing = model.sharing
        width, eps = model.embedding_size, model.layer_norm_eps
        self.embeddings = Embeddings(model, width, model.hidden_dropout)
        if objective.has_generator:
            if model.sharing == "untied":
                width = generator.hidden_size
                self.generator_embeddings = Embeddings(model, width, generator.hidden_dropout)
            if model.sharing != "all":
                self.generator = Encoder(generator, width, eps)
            self.generator_head = GeneratorHead(model, generator.hidden_size, width)
        self.discriminator = Encoder(model, model.embedding_size, eps)
        if objective.detects:
            self.discriminator_head = DiscriminatorHead(model.hidden_size)
        else:
            self.mlm_head = GeneratorHead(model, model.hidden_size, model.embedding_size)
        if objective.kind == "all_tokens_mlm":
            self.copy_gate = Linear(model.hidden_size, 1)
        initialize(self, model, seed)

    def generate(self, masked_ids: Tensor, batch: Batch, with_best: bool = False) -> HeadResult:
        """Run the generator (for mlm: the main encoder) on masked rows [B, S]: summed loss at the masked positions,
        samples (and best) [B, K]."""
        is_main = self.objective.kind == "mlm"
        encoder = self.discriminator if is_main or self.sharing == "all" else self.generator
        embeddings = (
            self.generator_embeddings
            if self.sharing == "untied" and not is_main
            else self.embeddings
        )
        head = self.mlm_head if is_main else self.generator_head
        hidden = encoder(
            embeddings(masked_ids, batch.segment_ids, batch.position_ids),
            batch.document_ids,
            batch.cu_seqlens,
        )
        return head(
            gather_positions(hidden, batch.masked_positions),
            embeddings.word,
            self._at_chosen(batch, with_best),
        )

    def discriminate(self, input_ids: Tensor, batch: Batch) -> Tensor:
        """Logits [B, S] fp32 that each token of input_ids was replaced; the batch gives pieces and positions."""
        return self.discriminator_head(self._encode(input_ids, batch))

    def predict(self, corrupted: Tensor, batch: Batch) -> Tensor:
        """Summed loss, 0-d, of the main encoder that names the original tokens behind corrupted rows [B, S]."""
        hidden, word = self._encode(corrupted, batch), self.embeddings.word
        if self.objective.kind == "replace_mlm":
            return self.mlm_head(
                gather_positions(hidden, batch.masked_positions),
                word,
                self._at_chosen(batch, False),
            ).nll
        everywhere = {
            "targets": batch.input_ids,
            "weights": batch.document_ids > 0,
            "uniforms": torch.zeros_like(batch.input_ids, dtype=torch.float32),
            "gate": self.copy_gate(hidden).squeeze(-1).float(),
            "copied": corrupted == batch.input_ids,
        }
        return self.mlm_head(hidden, word, everywhere).nll

    def _encode(self, input_ids: Tensor, batch: Batch) -> Tensor:  # [B, S, H]
        embedded = self.embeddings(input_ids, batch.segment_ids, batch.position_ids)
        return self.discriminator(embedded, batch.document_ids, batch.cu_seqlens)

    def _at_chosen(self, batch: Batch, with_best: bool) -> dict:
        return {
            "targets": batch.input_ids.gather(1, batch.masked_positions),
            "weights": batch.masked_weights,
            "uniforms": batch.uniforms,
            "temperature": self.objective.temperature,
            "with_best": with_best,
            "disallow": self.objective.disallow_correct,
        }


def mask_input(batch: Batch, mask_id: int) -> Tensor:
    """input_ids [B, S] with [MASK] at the masked positions that do not keep their token."""
    hidden = batch.masked_weights * ~batch.keep_original
    return put(
        batch.input_ids,
        batch.masked_positions,
        torch.full_like(batch.masked_positions, mask_id),
        hidden,
    )


def put(ids: Tensor, places: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """ids [B, S] with values [B, K] at places [B, K]; a place of weight 0 writes into a column that is cut off."""
    length = ids.shape[1]
    return F.pad(ids, (0, 1)).scatter(1, torch.where(weights > 0, places, length), values)[
        :, :length
    ]


def gather_positions(hidden: Tensor, places: Tensor) -> Tensor:
    """Hidden states at places: [B, S, H], [B, K] -> [B, K, H]."""
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def masked_indicator(batch: Batch) -> Tensor:
    """[B, S] int64: 1 at the masked positions, else 0."""
    return put(
        torch.zeros_like(batch.input_ids),
        batch.masked_positions,
        torch.ones_like(batch.masked_positions),
        batch.masked_weights,
    )


def uniform_tokens(
    uniforms: Tensor, vocab_size: int, special: list[int], avoid: Tensor | None = None
) -> Tensor:
    """One token per number of [0, 1), all alike likely, never a special one nor that of `avoid`, shaped as uniforms."""
    special = sorted({s for s in special if s < vocab_size})
    ordinary = vocab_size - len(special)
    if avoid is None:
        index = (uniforms.double() * ordinary).long()  # among the ordinary tokens
    else:
        rank = avoid - sum((avoid > s).long() for s in special)
        can_hit = ~sum(avoid == s for s in special).bool()
        index = (uniforms.double() * (ordinary - can_hit.long())).long()
        index += (can_hit & (index >= rank)).long()
    for s in special:
        index += (index >= s).long()
    return index


def discriminator_nll(logits: Tensor, is_replaced: Tensor, places: Tensor) -> Tensor:
    """Binary cross-entropy summed over the tokens whose places [B, S] are above 0 (document_ids: all real ones), fp32."""
    weight = (places > 0).float()
    return F.binary_cross_entropy_with_logits(
        logits.float(), is_replaced.float(), weight=weight, reduction="sum"
    )

"""Losses of replaced token detection with a generator (ELECTRA, section 2).

Also the objectives that the paper compares with it (section 3.4).

Dimensions: B rows, S sequence, K masked positions, V vocabulary, H hidden.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.architectures import EncoderConfig, ModelConfig
from electra_ds.config.schema import ObjectiveConfig
from electra_ds.data.batch import Batch
from electra_ds.model.encoder import EmbeddingsBase, EncoderBase, encode, known_vocab_size
from electra_ds.model.heads import MaskedLMHead
from electra_ds.model.initialization import initialize
from electra_ds.model.kernels.linear import Linear
from electra_ds.model.kernels.vocab_head import HeadResult
from electra_ds.model.losses import Losses, Totals, count
from electra_ds.model.registry import architecture_of

# Largest number of compilations per layer: it is compiled for two encoders, each kind of attention,
# with and without gradient, for each length of cu_seqlens. With torch's limit of 8, layers would run
# uncompiled.
RECOMPILE_LIMIT = 256


class Objective(nn.Module):
    """Base class of objectives: the losses of every kind.

    A subclass defines `generate`, `discriminate`, and `predict` where the main encoder predicts
    tokens.
    """

    def __init__(
        self, objective: ObjectiveConfig, special_ids: SpecialIds, vocab_size: int
    ) -> None:
        super().__init__()
        self.objective = objective
        self.special_ids = special_ids
        self.vocab_size = vocab_size
        self.temperature = objective.temperature_at(math.inf)  # of the present forward
        self.hidden: Tensor | None = None  # [B, S, H], set by `discriminate` for the metrics

    def forward(
        self,
        batch: Batch,
        totals: Totals = Totals(1.0, 1.0),
        *,
        with_counts: bool = False,
        progress: float = math.inf,
        task: str = "losses",
    ) -> Losses | Tensor:
        """Return the losses of one micro-batch.

        All losses are 0-d fp32. The device is not synchronized with the host. Every computation
        uses this method, because ZeRO-3 gathers parameters only in forward.

        totals: counts of the whole global batch; the sums over masked positions and over real
                tokens are divided by them
        with_counts: also compute `Losses.counts`, the sums for the metrics
        progress: share of the run that is done, for the temperature of sampling
                (`ObjectiveConfig.temperature_at`); by default that at the end
        task:   "losses", or "discriminate" to return only the discriminator's logits [B, S] fp32 of
                the unchanged batch.input_ids
        """
        if task == "discriminate":
            logits = self.discriminate(batch.input_ids, batch)
            self.hidden = None
            return logits
        options = self.objective
        self.temperature = options.temperature_at(progress)
        drawn = self._draw(batch, with_predictions=with_counts)
        corrupted = scatter_tokens(
            batch.input_ids, batch.masked_positions, drawn.sampled, batch.masked_weights
        )  # [B, S]
        # A sample that equals the original token counts as original.
        is_replaced = corrupted != batch.input_ids
        counted = batch.document_ids if options.counts_all_tokens else masked_tokens_mask(batch)
        logits = torch.zeros_like(corrupted, dtype=torch.float32)
        if options.detects:
            logits = self.discriminate(corrupted, batch)  # [B, S]
            nll = discriminator_nll(logits, is_replaced, counted)
        else:
            nll = logits.sum() if options.kind == "mlm" else self.predict(corrupted, batch)
        mlm_loss = drawn.nll / totals.masked_count
        disc_loss = nll / (totals.token_count if options.counts_all_tokens else totals.masked_count)
        gen_weight, disc_weight = options.loss_weights
        total = gen_weight * mlm_loss + disc_weight * disc_loss
        counts = None
        if with_counts:
            hidden = None if self.hidden is None else self.hidden.detach()
            counts = count(batch, drawn, logits.detach(), is_replaced, counted, hidden)
        self.hidden = None  # its memory is free before backward needs memory
        return Losses(total, mlm_loss.detach(), disc_loss.detach(), counts)

    def generate(
        self, masked_ids: Tensor, batch: Batch, with_predictions: bool = False
    ) -> HeadResult:
        """Run the generator on masked rows [B, S].

        Returns the summed loss at the masked positions (0-d fp32), samples [B, K] int64 and, if
        with_predictions, the most likely tokens [B, K] int64.
        """
        raise NotImplementedError

    def discriminate(self, input_ids: Tensor, batch: Batch) -> Tensor:
        """Return logits [B, S] fp32 that each token of input_ids was replaced.

        Documents and positions are those of batch.
        """
        raise NotImplementedError

    def predict(self, corrupted: Tensor, batch: Batch) -> Tensor:
        """Return the summed loss, 0-d, of predicting the original tokens of corrupted [B, S]."""
        raise NotImplementedError

    def apply_phase(self, objective: ObjectiveConfig, model: Any) -> None:
        """Continue with the values of another phase that no parameter depends on.

        model: the section `model`, or the config of a factory, which has no such values.
        """
        self.objective = objective

    def recompute_layers(self, on: bool = True) -> None:
        """Turn activation checkpointing on or off for every layer of both encoders."""
        for part in self.modules():
            if isinstance(part, EncoderBase):
                part.recompute_layers = on

    def compile_layers(self) -> None:
        """torch.compile every layer in place, before DeepSpeed wraps the module.

        Parameter names do not change.
        """
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        for part in self.modules():
            if isinstance(part, EncoderBase):
                part.compile_layers()

    def _draw(self, batch: Batch, with_predictions: bool) -> HeadResult:
        """Return the generator's loss and samples, or uniform samples without a generator."""
        options = self.objective
        if options.generator != "uniform":
            masked_ids = mask_input(batch, self.special_ids.mask)
            return self.generate(masked_ids, batch, with_predictions)
        originals = batch.input_ids.gather(1, batch.masked_positions)
        excluded = originals if options.disallow_correct else None
        special = list(self.special_ids.model_dump().values())
        sampled = uniform_tokens(batch.uniforms, self.vocab_size, special, excluded)
        return HeadResult(batch.uniforms.new_zeros(()), sampled, sampled)


class ElectraObjective(Objective):
    """Both encoders, their heads and the losses in one module, which DeepSpeed wraps.

    Parameter names are the canonical names of checkpoints: embeddings.*, generator.*,
    generator_head.*, discriminator.*, discriminator_head.*.

    - model.sharing = "untied": also generator_embeddings.*, as wide as the generator (as in the
      authors' code)
    - model.sharing = "gdes": generator_embeddings.* and embedding_deltas.* instead of embeddings.*
    - model.sharing = "all": no generator.*; the discriminator's encoder is also the generator's
    - kinds with a main encoder that predicts tokens: mlm_head.* instead of discriminator_head.*
    - all_tokens_mlm: also copy_gate.*
    - no generator network: none of the generator's names
    """

    def __init__(
        self,
        model: ModelConfig,
        generator: EncoderConfig,
        objective: ObjectiveConfig,
        special_ids: SpecialIds,
        seed: int | None = None,
    ) -> None:
        super().__init__(objective, special_ids, known_vocab_size(model))
        self.sharing = model.sharing
        architecture = architecture_of(model)
        width = model.word_width
        if model.sharing == "gdes":
            self.generator_embeddings = architecture.embeddings(generator, width)
            self.embedding_deltas = architecture.embeddings(model, width)
            self.embedding_deltas.is_delta = True
        else:
            self.embeddings = architecture.embeddings(model, width)
        if objective.has_generator:
            width = model.generator_width(generator)
            if model.sharing == "untied":
                self.generator_embeddings = architecture.embeddings(generator, width)
            if model.sharing != "all":
                self.generator = architecture.encoder(generator, width)
            self.generator_head = architecture.masked_lm_head(generator, width)
        self.discriminator = architecture.encoder(model, model.word_width)
        if objective.detects:
            self.discriminator_head = architecture.discriminator_head()
        else:
            self.mlm_head = architecture.masked_lm_head(model, model.word_width)
        if objective.kind == "all_tokens_mlm":
            self.copy_gate = Linear(model.hidden_size, 1)
        initialize(self, architecture, seed)
        if objective.is_frozen:
            for part in self._frozen_parts().values():
                part.requires_grad_(False)

    def apply_phase(self, objective: ObjectiveConfig, model: Any) -> None:
        super().apply_phase(objective, model)
        # A frozen generator may be no child of this module.
        for encoder in (self.discriminator, getattr(self, "generator", None)):
            if encoder is not None:
                encoder.apply_phase(model)

    def _frozen_parts(self) -> dict[str, nn.Module]:
        """The modules of a frozen generator by name."""
        names = ("generator_embeddings", "generator", "generator_head")
        return {name: getattr(self, name) for name in names}

    def set_generator_apart(self) -> nn.ModuleDict:
        """Return the modules of a frozen generator, which are no children of this module afterwards.

        `forward` uses them as before. DeepSpeed does not see their parameters: they have no
        gradients, no moments and no shards. The caller moves them to the device and dtype.
        """
        parts = self._frozen_parts()
        for name, part in parts.items():
            delattr(self, name)
            object.__setattr__(self, name, part)  # not registered as a child
        return nn.ModuleDict(parts).eval()

    def generate(
        self, masked_ids: Tensor, batch: Batch, with_predictions: bool = False
    ) -> HeadResult:
        embeddings, encoder, head = self._generator_parts()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.objective.is_frozen):
            hidden = encode(embeddings, encoder, masked_ids, batch)
            return head(
                gather_positions(hidden, batch.masked_positions),
                embeddings.word,
                self._masked_loss_inputs(batch, with_predictions),
            )

    def discriminate(self, input_ids: Tensor, batch: Batch) -> Tensor:
        self.hidden = self._encode(input_ids, batch)
        return self.discriminator_head(self.hidden)

    def predict(self, corrupted: Tensor, batch: Batch) -> Tensor:
        hidden = self._encode(corrupted, batch)
        if self.objective.kind == "replace_mlm":
            hidden = gather_positions(hidden, batch.masked_positions)
            loss_inputs = self._masked_loss_inputs(batch, with_predictions=False)
        else:
            loss_inputs = {
                "targets": batch.input_ids,
                "weights": batch.document_ids > 0,
                "uniforms": torch.zeros_like(batch.input_ids, dtype=torch.float32),
                "gate": self.copy_gate(hidden).squeeze(-1).float(),
                "copied": corrupted == batch.input_ids,
            }
        return self.mlm_head(hidden, self.embeddings.word, loss_inputs).nll

    def _generator_parts(self) -> tuple[EmbeddingsBase, EncoderBase, MaskedLMHead]:
        """Embeddings, encoder and head that fill in [MASK]; for mlm those of the main encoder."""
        if self.objective.kind == "mlm":
            return self.embeddings, self.discriminator, self.mlm_head
        has_own = self.sharing in ("untied", "gdes")
        embeddings = self.generator_embeddings if has_own else self.embeddings
        encoder = self.discriminator if self.sharing == "all" else self.generator
        return embeddings, encoder, self.generator_head

    def _encode(self, input_ids: Tensor, batch: Batch) -> Tensor:
        """Hidden states of the main encoder, [B, S, H]."""
        if self.sharing == "gdes":
            base = self.generator_embeddings
            return encode(self.embedding_deltas, self.discriminator, input_ids, batch, base=base)
        return encode(self.embeddings, self.discriminator, input_ids, batch)

    def _masked_loss_inputs(self, batch: Batch, with_predictions: bool) -> dict[str, Any]:
        """Arguments of `vocab_head` for the masked positions."""
        return {
            "targets": batch.input_ids.gather(1, batch.masked_positions),
            "weights": batch.masked_weights,
            "uniforms": batch.uniforms,
            "temperature": self.temperature,
            "with_predictions": with_predictions,
            "disallow_target": self.objective.disallow_correct,
        }


def mask_input(batch: Batch, mask_id: int) -> Tensor:
    """Return input_ids [B, S] with [MASK] at the masked positions that do not keep their token."""
    return scatter_tokens(
        batch.input_ids,
        batch.masked_positions,
        torch.full_like(batch.masked_positions, mask_id),
        batch.masked_weights * ~batch.keep_original,
    )


def scatter_tokens(ids: Tensor, positions: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Return ids [B, S] with tokens [B, K] at positions [B, K] of weight above 0.

    A token of weight 0 is written to an additional column, which is cut off.
    """
    length = ids.shape[1]
    columns = torch.where(weights > 0, positions, length)
    return F.pad(ids, (0, 1)).scatter(1, columns, tokens)[:, :length]


def gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the hidden states at positions: [B, S, H], [B, K] -> [B, K, H]."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def masked_tokens_mask(batch: Batch) -> Tensor:
    """Return [B, S] int64: 1 at the masked positions, else 0."""
    return scatter_tokens(
        torch.zeros_like(batch.input_ids),
        batch.masked_positions,
        torch.ones_like(batch.masked_positions),
        batch.masked_weights,
    )


def uniform_tokens(
    uniforms: Tensor, vocab_size: int, special: list[int], excluded: Tensor | None = None
) -> Tensor:
    """Return one token per uniform number, uniform over the ordinary tokens, int64.

    uniforms: [...] in [0, 1)
    special:  ids that are never returned
    excluded: [...] one more id per position that is not returned there
    Returns [...] token ids.
    """
    special = sorted({s for s in special if s < vocab_size})
    ordinary = vocab_size - len(special)
    if excluded is None:
        index = (uniforms.double() * ordinary).long()  # among the ordinary tokens
    else:
        smaller = torch.stack([excluded > s for s in special]).sum(0)
        excluded_index = excluded - smaller  # among the ordinary tokens
        is_ordinary = ~torch.stack([excluded == s for s in special]).any(0)
        index = (uniforms.double() * (ordinary - is_ordinary.long())).long()
        index += (is_ordinary & (index >= excluded_index)).long()
    for s in special:
        index += (index >= s).long()
    return index


def discriminator_nll(logits: Tensor, is_replaced: Tensor, counted: Tensor) -> Tensor:
    """Return the binary cross-entropy summed over the tokens where counted is above 0, 0-d fp32.

    logits:      [B, S]
    is_replaced: [B, S] bool
    counted:     [B, S], for example document_ids for all real tokens
    """
    weight = (counted > 0).float()
    return F.binary_cross_entropy_with_logits(
        logits.float(), is_replaced.float(), weight=weight, reduction="sum"
    )

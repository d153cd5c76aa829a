"""Rows -> losses: replaced token detection with a generator trained beside (ELECTRA, section 2), pure torch.

Letters: B rows, S sequence, K chosen places, V vocabulary, H hidden.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_ds.config import GeneratorConfig, ModelConfig, ObjectiveConfig, SpecialIds
from electra_ds.errors import UserError
from electra_ds.model import DiscriminatorHead, Embeddings, Encoder, GeneratorHead, Layer, initialise, padded_rows
from electra_ds.ops.vocab_head import HeadResult
from electra_ds.values import Batch, Counts, Losses

BINS, LIMIT = 2000, 20.0  # the histogram of discriminator logits behind the AUC: bins over [-LIMIT, LIMIT]


class ElectraObjective(nn.Module):
    """Both encoders and the loss in one module, the one that DeepSpeed wraps; what is shared is here once.

    Parameter names are the canonical ones of checkpoints: embeddings.*, generator.*, generator_head.*,
    discriminator.*, discriminator_head.*; with model.sharing = "untied" generator_embeddings.* besides (as wide as
    the generator, as in the authors' code), with "all" no generator.* (the discriminator's encoder serves both).
    """

    def __init__(
        self,
        model: ModelConfig,
        generator: GeneratorConfig,
        objective: ObjectiveConfig,
        special_ids: SpecialIds,
        seed: int | None = None,
    ):
        super().__init__()
        if model.sharing == "all" and any(getattr(model, k) != v for k, v in generator.model_dump().items()):
            raise UserError("model.sharing = 'all' is one encoder: every field of generator must equal that of model")
        self.objective, self.mask_id, self.sharing = objective, special_ids.mask, model.sharing
        width, eps = model.embedding_size, model.layer_norm_eps
        self.embeddings = Embeddings(model, width, model.hidden_dropout)
        if model.sharing == "untied":
            width = generator.hidden_size
            self.generator_embeddings = Embeddings(model, width, generator.hidden_dropout)
        if model.sharing != "all":
            self.generator = Encoder(generator, width, eps)
        self.generator_head = GeneratorHead(model, generator.hidden_size, width)
        self.discriminator = Encoder(model, model.embedding_size, eps)
        self.discriminator_head = DiscriminatorHead(model.hidden_size)
        if not self.embeddings.word.weight.is_meta:
            initialise(self, model, seed)

    def forward(
        self,
        batch: Batch,
        chosen_count: Tensor | float = 1.0,
        token_count: Tensor | float = 1.0,
        *,
        with_counts: bool = False,
        task: str = "losses",
    ) -> Losses | Tensor:
        """The losses of one micro-batch, or with task="discriminate" the logits [B, S] of batch.input_ids as they are.

        chosen_count, token_count: what the sums over chosen places and over real tokens are divided by, the counts
        of the whole global batch (seams: normalisers are global). All losses are 0-d fp32; no host sync on devices
        other than the CPU. Everything goes through this forward because ZeRO-3 gathers parameters only there.
        """
        if task == "discriminate":
            return self.discriminate(batch.input_ids, batch)
        drawn = self.generate(mask_input(batch, self.mask_id), batch, with_best=with_counts)
        corrupted = put(batch.input_ids, batch.chosen, drawn.sampled, batch.chosen_weights)  # [B, S]
        logits = self.discriminate(corrupted, batch)  # [B, S]
        is_replaced = corrupted != batch.input_ids  # a sample that hits the original counts as original
        mlm_loss = drawn.nll / chosen_count
        disc_loss = discriminator_nll(logits, is_replaced, batch.piece_ids) / token_count
        total = self.objective.gen_weight * mlm_loss + self.objective.disc_weight * disc_loss
        counts = count(batch, drawn, logits.detach(), is_replaced) if with_counts else None
        return Losses(total, mlm_loss.detach(), disc_loss.detach(), counts)

    def generate(self, masked_ids: Tensor, batch: Batch, with_best: bool = False) -> HeadResult:
        """Run the generator on masked rows [B, S]: summed loss at the chosen places, samples (and best) [B, K]."""
        encoder = self.discriminator if self.sharing == "all" else self.generator
        embeddings = self.generator_embeddings if self.sharing == "untied" else self.embeddings
        hidden = encoder(embeddings(masked_ids, batch.segment_ids, batch.position_ids), batch.piece_ids)
        draw = {
            "targets": batch.input_ids.gather(1, batch.chosen),
            "weights": batch.chosen_weights,
            "uniforms": batch.uniforms,
            "temperature": self.objective.temperature,
            "with_best": with_best,
        }
        return self.generator_head(gather_places(hidden, batch.chosen), embeddings.word, draw)

    def discriminate(self, input_ids: Tensor, batch: Batch) -> Tensor:
        """Logits [B, S] fp32 that each token of input_ids was replaced; the batch gives pieces and positions."""
        embedded = self.embeddings(input_ids, batch.segment_ids, batch.position_ids)
        return self.discriminator_head(self.discriminator(embedded, batch.piece_ids))

    def recompute_layers(self, on: bool = True) -> None:
        """Activation checkpointing of every layer of both encoders."""
        for part in self.modules():
            if isinstance(part, Encoder):
                part.recompute_layers = on

    def compile_layers(self) -> None:
        """torch.compile every layer in place, before DeepSpeed wraps the module; parameter names stay."""
        for part in self.modules():
            if isinstance(part, Layer):
                part.compile(dynamic=False)


def mask_input(batch: Batch, mask_id: int) -> Tensor:
    """input_ids [B, S] with [MASK] at the chosen places that do not keep their token."""
    hidden = batch.chosen_weights * ~batch.keep
    return put(batch.input_ids, batch.chosen, torch.full_like(batch.chosen, mask_id), hidden)


def put(ids: Tensor, places: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """ids [B, S] with values [B, K] at places [B, K]; a place of weight 0 writes into a column that is cut off."""
    length = ids.shape[1]
    return F.pad(ids, (0, 1)).scatter(1, torch.where(weights > 0, places, length), values)[:, :length]


def gather_places(hidden: Tensor, places: Tensor) -> Tensor:
    """Hidden states at places: [B, S, H], [B, K] -> [B, K, H]."""
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def discriminator_nll(logits: Tensor, is_replaced: Tensor, piece_ids: Tensor) -> Tensor:
    """Binary cross-entropy summed over the real tokens, 0-d fp32; [CLS], [SEP] and untouched tokens count."""
    real = (piece_ids > 0).float()
    return F.binary_cross_entropy_with_logits(logits.float(), is_replaced.float(), weight=real, reduction="sum")


@torch.no_grad()
def count(batch: Batch, drawn: HeadResult, logits: Tensor, is_replaced: Tensor) -> Counts:
    """The sums behind the metrics, on the device (float64: exact up to 2**53)."""
    weights, real = batch.chosen_weights.double(), (batch.piece_ids > 0).double()
    targets = batch.input_ids.gather(1, batch.chosen)
    label, guess = is_replaced.double() * real, (logits > 0).double() * real
    return Counts(
        chosen=weights.sum(),
        tokens=real.sum(),
        mlm_correct=(weights * (drawn.best == targets)).sum(),
        sampled_correct=(weights * (drawn.sampled == targets)).sum(),
        replaced=label.sum(),
        true_positive=(label * guess).sum(),
        false_positive=((1 - label) * guess).sum(),
        false_negative=(label * (1 - guess)).sum(),
        histogram=histogram(logits, is_replaced, real),
    )


def histogram(logits: Tensor, is_replaced: Tensor, real: Tensor) -> Tensor:
    """Discriminator logits of the real tokens binned by label, [2, BINS] float64: original, replaced."""
    clipped = logits.double().nan_to_num(0.0).clamp(-LIMIT, LIMIT)  # a broken run is reported by its losses
    place = ((clipped + LIMIT) * (BINS / (2 * LIMIT))).long().clamp(max=BINS - 1)
    filled = torch.zeros(2 * BINS, dtype=torch.float64, device=logits.device)
    return filled.scatter_add_(0, (place + BINS * is_replaced).flatten(), real.double().flatten()).view(2, BINS)


def auc(filled: Tensor) -> float:
    """Area under the ROC curve of a histogram [2, BINS]; pairs in one bin count half. nan without both labels."""
    original, replaced = filled.double().cpu()
    below = original.cumsum(0) - original / 2
    pairs = original.sum() * replaced.sum()
    return float((replaced * below).sum() / pairs) if pairs else float("nan")


def rates(sums: Counts) -> dict[str, float]:
    """Readable metrics of summed counts; nan where a class is empty. Positive means replaced."""
    chosen, tokens, mlm_correct, sampled_correct, replaced, tp, fp, fn = (float(value) for value in sums[:8])

    def share(part: float, whole: float) -> float:
        return part / whole if whole else float("nan")

    original = tokens - replaced
    return {
        "mlm_accuracy": share(mlm_correct, chosen),
        "sampled_accuracy": share(sampled_correct, chosen),
        "replaced_fraction": share(replaced, tokens),
        "disc_auc": auc(sums.histogram),
        "disc_precision": share(tp, tp + fp),
        "disc_recall": share(tp, tp + fn),
        "disc_accuracy": share(tokens - fp - fn, tokens),
        "disc_accuracy_original": share(original - fp, original),
    }


class ParameterCount(NamedTuple):
    """True parameters, without rows that only pad the word table in memory."""

    discriminator: int
    joint: int


def parameter_count(model: ModelConfig, generator: GeneratorConfig) -> ParameterCount:
    """Parameters of the discriminator alone and of both encoders trained jointly; no tensor is made."""
    ids = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
    with torch.device("meta"):
        parts = ElectraObjective(model, generator, ObjectiveConfig(), ids)
    rows = padded_rows(parts)
    sizes = {n: p.numel() // len(p) * rows.get(n, len(p)) for n, p in parts.named_parameters()}
    own = sum(size for name, size in sizes.items() if name.startswith(("embeddings.", "discriminator")))
    return ParameterCount(own, sum(sizes.values()))

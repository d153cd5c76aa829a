"""Contenders of the comparisons: this project's objective, and the same model in other code.

ours:     the objective with torch's fused AdamW, without DeepSpeed.
HF:       the stock classes of the architecture (ElectraForMaskedLM and ElectraForPreTraining,
          ModernBertForMaskedLM and ModernBertForTokenClassification, or DebertaV2ForMaskedLM and
          DebertaV2ForSequenceClassification with its head applied to every token) with one
          embedding module, logits at every position, Gumbel sampling. Packed rows of modernbert
          have a mask [B, 1, S, S] for each kind of layer.
tuned HF: the same with compiled layers and fused AdamW, and for `electra` eager attention.
wrapper:  the electra-pytorch package around the classes of HF, for `electra` only. Install it with
          `pip install --no-deps electra-pytorch`, because it requires transformers 3.

All contenders get the weights of ours. Before any timing they must give the loss of ours on the
same rows, masks and samples.

Dimensions: B rows, S sequence, K masked positions of a row, M masked positions of a batch,
V vocabulary.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from shards import SPECIAL_IDS, VOCAB_SIZE
from torch import Tensor, nn

from electra_ds.config.loading import load_run
from electra_ds.config.schema import RunConfig
from electra_ds.data.batch import Batch
from electra_ds.data.masking import max_masked_positions
from electra_ds.interop.hf import format_of
from electra_ds.model.build import build_objective
from electra_ds.model.kernels.attention_mask import with_cu_seqlens
from electra_ds.model.losses import Totals
from electra_ds.model.objective import mask_input
from electra_ds.model.weights import true_state

try:
    from electra_pytorch import electra_pytorch as wrapper_module
except ImportError:
    wrapper_module = None


# Has the attributes `module` and `optimizer`, and the method
# `loss(batch: Batch, samples: Tensor | None = None) -> Tensor` (ours: without samples).
Contender = Any


def run_config(size: str, length: int, rows: int, dropout: float | None) -> RunConfig:
    """The shipped run `size` with rows of `length` tokens and one micro-batch of `rows` per step.

    dropout: probability of all dropout layers; None: those of the file. The vocabulary is BERT's.
    """
    settings = [
        f"data.sequence_length={length}",
        f"train.global_batch_size={rows}",
        f"train.micro_batch_size={rows}",
    ]
    sections = ("model", "generator")
    names = load_run(size).model.dropout_fields()
    if dropout is not None:
        settings += [f"{section}.{name}={dropout}" for section in sections for name in names]
    return load_run(size, settings).with_data(VOCAB_SIZE, SPECIAL_IDS, length)


def batch_totals(batch: Batch) -> Totals:
    """The counts of a batch of full rows."""
    return Totals(batch.masked_positions.numel(), batch.input_ids.numel())


# ---------------------------------------------------------------------------------- contenders


class Ours:
    """This project's objective and torch's fused AdamW, without DeepSpeed."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.module = build_objective(config, seed=0)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, eps=1e-6, fused=True)

    def loss(self, batch: Batch) -> Tensor:
        return self.module(batch, batch_totals(batch)).total


class HuggingFace:
    """The stock classes with one embedding module.

    The generator computes logits over the whole vocabulary at every position; tokens are sampled
    with Gumbel noise.
    """

    def __init__(self, ours: Ours, tuned: bool = False):
        generator = self._make_part(ours, "generator", tuned)
        discriminator = self._make_part(ours, "discriminator", tuned)
        discriminator.base_model.embeddings = generator.base_model.embeddings
        self.module = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
        self.window = getattr(discriminator.config, "sliding_window", None)
        if tuned:
            for part in self.module.values():
                for layer in layers_of(part):
                    layer.compile()
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=1e-4, eps=1e-6, fused=tuned or None
        )

    @staticmethod
    def _make_part(ours: Ours, part: str, tuned: bool) -> nn.Module:
        model, form = ours.config.model, format_of(ours.config.model)
        is_generator = part == "generator"
        sizes = ours.config.generator if is_generator else None
        options = form.config(
            model, sizes, SPECIAL_IDS, "prediction" if is_generator else "detection"
        )
        kind = getattr(transformers, options["architectures"][0])
        config = kind.config_class(**options)
        # DeBERTa-v2 has no other attention than the eager one.
        is_eager = form.architecture == "deberta_v2" or (tuned and form.architecture == "electra")
        config._attn_implementation = "eager" if is_eager else "sdpa"
        module = kind(config)
        unused = module.load_state_dict(form.to_hf(true_state(ours.module), part), strict=False)
        assert not unused.unexpected_keys, unused
        module.tie_weights()
        return module

    def loss(self, batch: Batch, samples: Tensor | None = None) -> Tensor:
        """samples: [B, K] tokens of the generator; None: they are drawn."""
        return self.joined_loss(
            batch.input_ids,
            mask_input(batch, SPECIAL_IDS.mask),
            masked_indicator(batch),
            batch.document_ids,
            self._inputs(batch),
            samples,
        )

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Arguments of the stock classes beside the ids."""
        if self.window is None:  # electra
            return {"attention_mask": batch.document_ids, "token_type_ids": batch.segment_ids}
        ids = batch.document_ids
        if batch.cu_seqlens is not None and len(batch.cu_seqlens) == len(ids) + 1:
            return {"attention_mask": ids, "position_ids": batch.position_ids}
        same = ids[:, None, :, None] == ids[:, None, None, :]  # [B, 1, S, S]
        columns = torch.arange(ids.shape[1], device=ids.device)
        near = (columns[:, None] - columns).abs() <= self.window
        masks = {"full_attention": same, "sliding_attention": same & near}
        return {"attention_mask": masks, "position_ids": batch.position_ids}

    def joined_loss(
        self,
        ids: Tensor,
        masked_ids: Tensor,
        is_masked: Tensor,
        document_ids: Tensor,
        inputs: dict[str, Any],
        samples: Tensor | None = None,
    ) -> Tensor:
        """The loss of the generator plus 50 times that of the discriminator.

        Tensors are [B, S], samples [B, K]. is_masked: bool, True at masked positions. inputs: other
        arguments of the stock classes.
        """
        generator_output = self.module["generator"](masked_ids, **inputs)
        masked_logits = generator_output.logits[is_masked]  # [M, V]
        with torch.no_grad():
            noise = -torch.empty_like(masked_logits, dtype=torch.float32).exponential_().log()
            drawn = (masked_logits.float() + noise).argmax(-1)  # [M]
            corrupted = ids.clone()
            corrupted[is_masked] = drawn if samples is None else samples.flatten()
        real = document_ids > 0
        logits = token_logits(self.module["discriminator"], corrupted, inputs).float()
        logits = logits.view(ids.shape)
        is_replaced = (corrupted != ids).float()
        mlm_loss = F.cross_entropy(masked_logits.float(), ids[is_masked])
        disc_loss = F.binary_cross_entropy_with_logits(logits[real], is_replaced[real])
        return mlm_loss + 50 * disc_loss


def token_logits(discriminator: nn.Module, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The logits of every token, B * S numbers."""
    if not hasattr(discriminator, "pooler"):
        return discriminator(ids, **inputs).logits
    hidden = discriminator.base_model(ids, **inputs).last_hidden_state
    return discriminator.classifier(discriminator.pooler(hidden.flatten(0, 1)[:, None]))


def layers_of(part: nn.Module) -> nn.ModuleList:
    """The layers of a stock class."""
    encoder = getattr(part.base_model, "encoder", part.base_model)
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


class LogitsOnly(nn.Module):
    """Returns the logits of a stock class, as the documentation of electra-pytorch requires."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        return self.module(*arguments, **keywords).logits


class Wrapper:
    """electra-pytorch around the stock classes. It draws the masked positions itself."""

    def __init__(self, ours: Ours):
        parts = HuggingFace(ours).module
        self.module = wrapper_module.Electra(
            LogitsOnly(parts["generator"]),
            LogitsOnly(parts["discriminator"]),
            num_tokens=VOCAB_SIZE,
            mask_token_id=SPECIAL_IDS.mask,
            pad_token_id=SPECIAL_IDS.pad,
            mask_ignore_token_ids=[SPECIAL_IDS.cls, SPECIAL_IDS.sep],
        )
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, eps=1e-6)

    def loss(self, batch: Batch, samples: Tensor | None = None) -> Tensor:
        """samples: [B, K] tokens of the generator, used with the batch's masked positions.

        None: the package draws positions and tokens.
        """
        if samples is None:
            return self._drawn_loss(batch)
        is_masked = masked_indicator(batch)
        becomes_mask = torch.zeros_like(is_masked)
        becomes_mask.scatter_(1, batch.masked_positions, ~batch.keep_original)
        with mock.patch.multiple(
            wrapper_module,
            get_mask_subset_with_prob=lambda *_: is_masked,
            prob_mask_like=lambda *_: becomes_mask,
            gumbel_sample=lambda *_, **__: samples.flatten(),
        ):
            return self._drawn_loss(batch)

    def _drawn_loss(self, batch: Batch) -> Tensor:
        return self.module(batch.input_ids, attention_mask=batch.document_ids).loss


def masked_indicator(batch: Batch) -> Tensor:
    """[B, S] bool, True at the masked positions of full rows."""
    indicator = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    return indicator.scatter_(1, batch.masked_positions, True)


def make_contenders(
    config: RunConfig, names: list[str], documents: int = 1
) -> dict[str, Contender]:
    """Ours and the named contenders that are installed, after a check of their losses.

    documents: of each row.
    """
    ours = Ours(config)
    makers: dict[str, Callable[[Ours], Contender]] = {
        "HF": HuggingFace,
        "tuned HF": lambda ours: HuggingFace(ours, tuned=True),
        "wrapper": Wrapper,
    }
    contenders: dict[str, Contender] = {"ours": ours}
    for name in names:
        if name != "wrapper" or wrapper_module is not None:
            contenders[name] = makers[name](ours)
    check_losses(contenders, random_batch(2, config.data.sequence_length, documents))
    # Two shapes of batches would make the compiled shapes dynamic.
    torch.compiler.reset()
    return contenders


@torch.no_grad()
def check_losses(contenders: dict[str, Contender], batch: Batch) -> None:
    """Compare the losses in fp32 without dropout on equal weights, rows, masks and samples.

    SystemExit if one differs from the loss of "ours" by more than 1e-5 of it.
    """
    for contender in contenders.values():
        contender.module.eval()
    ours = contenders["ours"]
    samples = ours.module.generate(mask_input(batch, SPECIAL_IDS.mask), batch).sampled
    expected = float(ours.loss(batch))
    for name, contender in contenders.items():
        loss = expected if contender is ours else float(contender.loss(batch, samples))
        if abs(loss / expected - 1) > 1e-5:
            raise SystemExit(
                f"{name}: loss {loss} on the same rows, masks and weights; expected {expected}, "
                "the loss of electra_ds"
            )
        contender.module.train()


# --------------------------------------------------------------------------- batches and steps


def random_batch(rows: int, length: int, documents: int = 1) -> Batch:
    """Full rows of random ids, each of this number of documents of random lengths.

    The masked positions ascend, because the other contenders select them in this order.
    """
    masked = max_masked_positions(0.15, length)
    ids = torch.randint(1000, VOCAB_SIZE, (rows, length))
    ids[:, 0] = SPECIAL_IDS.cls
    ids[:, -1] = SPECIAL_IDS.sep
    zeros = torch.zeros(rows, length, dtype=torch.long)
    shuffled = torch.rand(rows, length - 2).argsort(1) + 1  # without [CLS] and [SEP]
    cuts = torch.rand(rows, length - 2).argsort(1)[:, : documents - 1] + 1  # starts of documents
    is_start = zeros.scatter(1, cuts, 1)
    columns = torch.arange(length).expand(rows, -1)
    starts = (columns * is_start).cummax(1).values  # of the document of each token
    batch = Batch(
        input_ids=ids,
        segment_ids=zeros,
        document_ids=1 + is_start.cumsum(1),
        position_ids=columns - starts,
        masked_positions=shuffled[:, :masked].sort(1).values,
        masked_weights=torch.ones(rows, masked),
        keep_original=torch.rand(rows, masked) >= 0.85,
        uniforms=torch.rand(rows, masked),
    )
    return with_cu_seqlens(batch)


def autocast(bf16: bool) -> AbstractContextManager:
    """The precision of a training on a CPU: bf16 autocast, or fp32."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def train_step(contender: Contender, batch: Batch, bf16: bool) -> None:
    """Forward, backward, clipping, AdamW."""
    with autocast(bf16):
        loss = contender.loss(batch)
    loss.backward()
    update_weights(contender)


def update_weights(contender: Contender) -> None:
    """Clipping and AdamW."""
    torch.nn.utils.clip_grad_norm_(contender.module.parameters(), 1.0)
    contender.optimizer.step()
    contender.optimizer.zero_grad(set_to_none=True)


def measure_seconds(function: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """(CPU, wall) seconds of one call."""
    cpu_start = time.process_time()
    wall_start = time.perf_counter()
    function(*arguments)
    return time.process_time() - cpu_start, time.perf_counter() - wall_start

"""Discriminator and generator of a loaded model, each as one module on token ids.

Dimensions: B rows, S tokens a row, E embedding size, H hidden size, V vocabulary size.
"""

import copy

import torch
from torch import Tensor, nn

from electra_ds.common.errors import UserError
from electra_ds.config.architectures import ModelConfig
from electra_ds.interop.hf_folder import HfFolder
from electra_ds.model.heads import MaskedLMHead
from electra_ds.model.objective import ElectraObjective
from electra_ds.model.registry import architecture_of
from electra_ds.model.weights import (
    check_layers,
    check_state,
    check_values,
    load_true_state,
    shapes_of,
    true_state,
)


class EncoderWithHead(nn.Module):
    """One part of a model: embeddings, encoder, and its head, or None.

    head: that of the discriminator, or a MaskedLMHead.
    pad_id: the token that counts as padding when no attention_mask is given.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        encoder: nn.Module,
        head: nn.Module | None,
        pad_id: int,
    ):
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder
        self.head = head
        self.pad_id = pad_id

    def encode(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, S, H] of the last layer, in the dtype of the weights.

        input_ids: [B, S] int64, each row `[CLS] text [SEP]` followed by padding.
        segment_ids: [B, S] int64, 1 in the second text of a pair; zeros by default.
        attention_mask: [B, S] bool or int64, 0 for padding; default: 0 where input_ids is pad_id.
        """
        if segment_ids is None:
            segment_ids = torch.zeros_like(input_ids)
        if attention_mask is None:
            attention_mask = input_ids != self.pad_id
        document_ids = attention_mask.long()  # one document a row
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device) * document_ids
        embedded = self.embeddings(input_ids, segment_ids, position_ids)  # [B, S, E]
        return self.encoder(embedded, document_ids, position_ids=position_ids)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the head, arguments as in `encode`.

        Replaced token detection: [B, S], above 0 for a token that looks replaced. Language
        modelling: [B, S, V]. Raises UserError for an encoder without a head.
        """
        if self.head is None:
            raise UserError("this encoder has no head; use encode() for its hidden states")
        hidden = self.encode(input_ids, segment_ids, attention_mask)
        if isinstance(self.head, MaskedLMHead):
            return self.head(hidden, self.embeddings.word)
        return self.head(hidden)


def parts_of_objective(
    module: ElectraObjective, pad_id: int
) -> tuple[EncoderWithHead, EncoderWithHead | None]:
    """(discriminator, generator) that share the parameters of a built-in objective.

    With model.sharing = "gdes" the discriminator's embeddings are sums, and parameters of their own.
    The generator is None if the objective trains none. A main encoder that predicts tokens has
    its language-modelling head; the copy gate of all_tokens_mlm is left out.
    """
    main_head = module.discriminator_head if module.objective.detects else module.mlm_head
    embeddings = _summed(module) if module.sharing == "gdes" else module.embeddings
    discriminator = EncoderWithHead(embeddings, module.discriminator, main_head, pad_id)
    if not module.objective.has_generator:
        return discriminator, None
    has_own = module.sharing in ("untied", "gdes")
    embeddings = module.generator_embeddings if has_own else module.embeddings
    encoder = module.discriminator if module.sharing == "all" else module.generator
    generator = EncoderWithHead(embeddings, encoder, module.generator_head, pad_id)
    return discriminator, generator


@torch.no_grad()
def _summed(module: ElectraObjective) -> nn.Module:
    """The discriminator's embeddings without deltas: each table is a sum."""
    embeddings = copy.deepcopy(module.embedding_deltas)
    embeddings.is_delta = False
    pairs = zip(embeddings.tables(), module.generator_embeddings.tables(), strict=True)
    for (table, _), (base, _) in pairs:
        table.weight.add_(base.weight)
    return embeddings


def main_encoder(model: ModelConfig) -> nn.ModuleDict:
    """Embeddings and encoder of `model` under their names in checkpoints, weights not set."""
    architecture = architecture_of(model)
    return nn.ModuleDict(
        {
            "embeddings": architecture.embeddings(model, model.word_width),
            "discriminator": architecture.encoder(model, model.word_width),
        }
    )


def encoder_with_task_head(model: ModelConfig, outputs: int) -> nn.ModuleDict:
    """`main_encoder` with the head of a fine-tuned model under its name in checkpoints."""
    modules = main_encoder(model)
    modules["head"] = architecture_of(model).task_head(outputs)
    return modules


def encoder_from_hf(model: ModelConfig, content: HfFolder, where: str) -> dict[str, Tensor]:
    """Our tensors of the encoder of one Hugging Face folder, fp32, compared with its config.

    model: sizes of this folder. where: the folder, for messages. UserError for missing tensors,
    another number of layers, other shapes and values that are not finite.
    """
    check_layers(content.tensors, content.format.before_layer, model.num_layers, where)
    shapes = shapes_of(lambda: main_encoder(model), where)
    state = content.format.from_hf(content.tensors, shapes, "discriminator")
    check_state(state, shapes, where)
    return state


def part_from_hf(model: ModelConfig, content: HfFolder, pad_id: int, where: str) -> EncoderWithHead:
    """The encoder of one Hugging Face folder, with the head of pretraining that it contains.

    Arguments and UserError as in `encoder_from_hf`; UserError also for a head that predicts tokens
    with an output matrix other than the word table. Heads of tasks are left out.
    """
    encoder_from_hf(model, content, where)
    modules = main_encoder(model)
    head: nn.Module | None = None
    architecture = architecture_of(model)
    heads = content.format.heads(content.config, content.tensors)
    if "discriminator" in heads:
        head = architecture.discriminator_head()
        modules["discriminator_head"] = head
    elif "generator" in heads:
        content.format.check_tied(content.config, content.tensors, where)
        head = architecture.masked_lm_head(model, model.word_width)
        modules["mlm_head"] = head
    state = content.format.from_hf(content.tensors, true_state(modules), "discriminator")
    check_values(state, where)
    load_true_state(modules, state)
    return EncoderWithHead(modules["embeddings"], modules["discriminator"], head, pad_id)

"""The fine-tuned model: a pretrained encoder with one linear head (ELECTRA, appendix B), and its loss.

Letters: N examples in B rows of S tokens, H hidden, C outputs (classes, or 1 in regression).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_ds.config.schema import ModelConfig
from electra_ds.finetuning.batches import TaskBatch
from electra_ds.model.encoder import Embeddings, Encoder
from electra_ds.model.initialization import initialize
from electra_ds.model.kernels.dropout import dropout
from electra_ds.model.kernels.linear import Linear
from electra_ds.model.weights import load_true_state


class TaskLoss(NamedTuple):
    """What one forward gives in training: the part of the global batch's mean loss, 0-d fp32."""

    total: Tensor


class TaskTotals(NamedTuple):
    """Counts of the whole global batch, by which the summed loss is divided."""

    label_count: float


class Classifier(nn.Module):
    """Dropout and one linear layer on [CLS], or on every token; parameters embeddings.*, discriminator.*, head.*."""

    def __init__(self, model: ModelConfig, outputs: int, per_token: bool, regression: bool):
        super().__init__()
        self.dropout, self.per_token, self.regression = model.hidden_dropout, per_token, regression
        self.embeddings = Embeddings(model, model.embedding_size, model.hidden_dropout)
        self.discriminator = Encoder(model, model.embedding_size, model.layer_norm_eps)
        self.head = Linear(model.hidden_size, outputs)

    def start(self, model: ModelConfig, state: dict[str, Tensor] | None, seed: int) -> "Classifier":
        """Set every weight: the encoder from `state`, or drawn as in pretraining; the head always drawn (Xavier)."""
        initialize(self, model, seed)
        nn.init.xavier_uniform_(self.head.weight, generator=torch.Generator().manual_seed(seed))
        if state is not None:
            load_true_state(self, state, partial=True)
        return self

    def forward(
        self, batch: TaskBatch, totals: TaskTotals = TaskTotals(1.0), *, predict: bool = False
    ) -> TaskLoss | Tensor:
        """The loss summed over the labels and divided by their count, or with predict the logits.

        Logits: [N, C] (per token [B * S, C]) fp32. totals: labels of the whole global batch. Cross-entropy, in
        regression the squared error on labels in [0, 1].
        """
        embedded = self.embeddings(batch.input_ids, batch.segment_ids, batch.position_ids)
        # Behind attention the last layer works at [CLS] alone: 1 (CoLA) to 7 % (RTE) less time of Small on a CPU.
        places = None if self.per_token else batch.cls_positions
        seen = self.discriminator(embedded, batch.document_ids, batch.cu_seqlens, places)
        logits = (
            self.head(dropout(seen, self.dropout, self.training))
            .float()
            .view(len(batch.labels), -1)
        )
        if predict:
            return logits
        if self.regression:
            losses = (logits.squeeze(-1) - batch.labels) ** 2
        else:
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
        return TaskLoss((losses * batch.weights).sum() / max(1.0, totals.label_count))


def layerwise(num_layers: int, decay: float) -> Callable[[str], float]:
    """Factor of a parameter's rate: 1 in the head, decay in the top layer, ..., decay**(layers + 1) in the embeddings.

    (The authors' code gives the top layer decay**2, their issue 51; this is what the paper says.)
    """

    def scale(name: str) -> float:
        if name.startswith("head."):
            return 1.0
        layer = re.match(r"discriminator\.layers\.(\d+)\.", name)
        return decay ** (num_layers - int(layer[1]) if layer else num_layers + 1)

    return scale

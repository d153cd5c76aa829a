"""Fine-tuned model: encoder, head (ELECTRA, appendix B) and loss.

Dimensions: N examples in B rows of S tokens, H hidden size, C outputs (classes; 1 in regression and
for each choice in multiple choice).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_ds.config.architectures import ModelConfig
from electra_ds.finetuning.batches import TaskBatch
from electra_ds.model.encoder import encode
from electra_ds.model.initialization import initialize
from electra_ds.model.registry import architecture_of
from electra_ds.model.weights import load_true_state


class TaskLoss(NamedTuple):
    """The result of one forward in training.

    total: 0-d fp32, this micro-batch's part of the mean loss of the global batch.
    """

    total: Tensor


class TaskTotals(NamedTuple):
    """Counts of a global batch by which the loss is divided.

    label_count: scored labels of all ranks.
    """

    label_count: float


class Classifier(nn.Module):
    """Encoder, and the head of its architecture on [CLS], or on every token.

    Parameters are named embeddings.*, discriminator.* and head.*. model: sizes and dropout of the
    encoder. outputs: C. per_token: compute outputs for each token instead of [CLS] only.
    regression: use the squared error as the loss.
    """

    def __init__(self, model: ModelConfig, outputs: int, per_token: bool, regression: bool):
        super().__init__()
        self.per_token = per_token
        self.regression = regression
        architecture = architecture_of(model)
        self.embeddings = architecture.embeddings(model, model.word_width)
        self.discriminator = architecture.encoder(model, model.word_width)
        self.head = architecture.task_head(outputs)

    def start(self, model: ModelConfig, state: dict[str, Tensor] | None, seed: int) -> "Classifier":
        """Set every weight and return self.

        The head is initialized with `seed`. The encoder is loaded from `state`
        (canonical name -> tensor), or initialized as in pretraining if it is None.
        """
        architecture = architecture_of(model)
        initialize(self, architecture, seed)
        architecture.initialize_task_head(self.head, seed)
        if state is not None:
            load_true_state(self, state, partial=True)
        return self

    def forward(
        self, batch: TaskBatch, totals: TaskTotals = TaskTotals(1.0), *, predict: bool = False
    ) -> TaskLoss | Tensor:
        """Return the loss, summed over the labels and divided by totals.label_count, or logits.

        predict: return logits, fp32: [N, C], or [B * S, C] if they are computed for each token, or in
        multiple choice [N, most choices] with -inf for choices that an example does not have.
        """
        # After attention, the last layer computes only the [CLS] positions. On a CPU, this saves
        # 1 % (CoLA) to 7 % (RTE) of the time of Small.
        positions = None if self.per_token else batch.cls_positions
        hidden = encode(self.embeddings, self.discriminator, batch.input_ids, batch, positions)
        logits = self.head(hidden).float()
        if batch.choice_rows is None:
            logits = logits.view(-1, logits.shape[-1])
        else:
            logits = by_choice(logits.view(-1), batch.choice_rows)
        if predict:
            return logits
        losses = self.losses(logits, batch)
        return TaskLoss((losses * batch.weights).sum() / max(1.0, totals.label_count))

    def losses(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return the loss of each label, shaped as batch.labels, fp32.

        It is the cross-entropy, in regression the squared error of the scaled labels.
        """
        if self.regression:
            return (logits.squeeze(-1) - batch.labels) ** 2
        return F.cross_entropy(logits, batch.labels, reduction="none")


def by_choice(scores: Tensor, choice_rows: Tensor) -> Tensor:
    """Return the scores of each example's choices, [N, most choices]; -inf for a missing choice.

    scores: [M], of all choices. choice_rows: [N, most choices] as in TaskBatch.
    """
    return scores[choice_rows.clamp(min=0)].masked_fill(choice_rows < 0, -torch.inf)


def layerwise(num_layers: int, decay: float) -> Callable[[str], float]:
    """Return a function from a parameter name to the factor of its learning rate.

    The factor is 1 in the head, decay in the top layer and in a LayerNorm after it, decay**2 in the
    layer below it, ..., and decay**(num_layers + 1) in the embeddings and their projection. This
    follows the paper; the authors' code gives the top layer decay**2 (google-research/electra,
    issue 51).
    """

    def scale(name: str) -> float:
        if name.startswith("head."):
            return 1.0
        if name.startswith("discriminator.final_norm."):
            return decay
        layer = re.match(r"discriminator\.layers\.(\d+)\.", name)
        return decay ** (num_layers - int(layer[1]) if layer else num_layers + 1)

    return scale

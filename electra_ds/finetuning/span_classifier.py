"""Fine-tuned model of questions: start and end logits of every token.

Dimensions: N rows of questions in B rows of S tokens, T = B * S.
"""

import torch
from torch import Tensor

from electra_ds.config.architectures import ModelConfig
from electra_ds.finetuning.batches import TaskBatch
from electra_ds.finetuning.model import Classifier


class SpanClassifier(Classifier):
    """Encoder, and the head of its architecture with two outputs for each token.

    It is the head of transformers' classes for question answering. model: as in `Classifier`.
    """

    def __init__(self, model: ModelConfig):
        super().__init__(model, 2, per_token=True, regression=False)

    def losses(self, logits: Tensor, batch: TaskBatch) -> Tensor:
        """Return the cross-entropies of first and last token of the answer, [N, 2] fp32.

        logits: [T, 2]. The softmax is over [CLS] and the second text with its [SEP], as in the
        authors' code.
        """
        is_cls = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        is_cls[batch.cls_positions] = True
        owner = is_cls.cumsum(0) - 1  # [T], the row of a question that each token belongs to
        is_candidate = is_cls | (batch.segment_ids.flatten() == 1)
        numbers = torch.arange(len(batch.labels), device=logits.device)
        own = (owner == numbers[:, None]) & is_candidate  # [N, T]
        scores = logits.T.where(own[:, None], -torch.inf)  # [N, 2, T]
        chosen = logits.gather(0, batch.cls_positions[:, None] + batch.labels)  # [N, 2]
        return scores.logsumexp(-1) - chosen

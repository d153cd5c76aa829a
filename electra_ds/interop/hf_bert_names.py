"""What the folders of ELECTRA and DeBERTa-v2 have in common: BERT's names, and the head of a task."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from electra_ds.interop.hf_format import HfFormat, Role


class BertNamesFormat(HfFormat):
    """A format of an architecture with `model.electra.TaskHead` and BERT's names of modules."""

    # Module names in electra_ds -> those in Hugging Face, without `prefix` but for the heads.
    embeddings: ClassVar[Mapping[str, str]]
    encoder: ClassVar[Mapping[str, str]]  # of modules beside the layers
    layer: ClassVar[Mapping[str, tuple[str, ...]]]  # of one layer
    head_names: ClassVar[Mapping[str, str]]  # of the heads of pretraining
    sentence_head: ClassVar[tuple[str, str]]  # both linear layers of the stock head of texts
    choice_head: ClassVar[tuple[str, str]]  # those of the stock head of multiple choice

    def foreign_names(self, name: str) -> tuple[str, ...]:
        """One name, or three for the fused qkv of a layer."""
        name = name.replace("mlm_head.", "generator_head.")
        if name == "generator_head.bias":
            return (self.output_bias,)
        module, _, kind = name.rpartition(".")  # kind: weight or bias
        if module in self.head_names:
            return (f"{self.head_names[module]}.{kind}",)
        part, *middle, last = module.split(".")
        if part.endswith("embeddings"):
            return (f"{self.prefix}embeddings.{self.embeddings[last]}.{kind}",)
        if last in self.encoder:
            return (f"{self.prefix}{self.encoder[last]}.{kind}",)
        layer = f"{self.prefix}{self.before_layer}{middle[1]}"  # discriminator.layers.LAYER.qkv
        return tuple(f"{layer}.{module}.{kind}" for module in self.layer[last])

    def classifier(
        self,
        state: Mapping[str, Tensor],
        kind: str,
        label_range: tuple[float, float] | None = None,
    ) -> tuple[Role, dict[str, Tensor]]:
        """The stock sentence head is linear, gelu, linear; that of electra_ds is one linear layer,
        head.weight [labels, H] and head.bias [labels].

        Since gelu(z) - gelu(-z) = z, 2 x labels rows of the first stock layer reproduce it, and the
        other rows are zero. With more than H / 2 labels the class is the one for tokens, and the
        logits at [CLS] are those of the text.
        """
        tensors = self.to_hf(state, "discriminator")
        weight, bias = state["head.weight"], state["head.bias"]
        labels, hidden = weight.shape
        if kind == "question_answering":
            tensors |= {"qa_outputs.weight": weight, "qa_outputs.bias": bias}
            return "question_answering", tensors
        if kind == "token_classification" or 2 * labels > hidden:
            tensors |= {"classifier.weight": weight, "classifier.bias": bias}
            return "token_classification", tensors
        low, high = label_range or (0.0, 1.0)
        weight = weight * (high - low)
        bias = bias * (high - low) + low
        unused = hidden - 2 * labels
        identity = torch.eye(labels)
        is_choice = kind == "multiple_choice"
        dense, output = self.choice_head if is_choice else self.sentence_head
        tensors |= {
            f"{dense}.weight": torch.cat([weight, -weight, torch.zeros(unused, hidden)]),
            f"{dense}.bias": torch.cat([bias, -bias, torch.zeros(unused)]),
            f"{output}.weight": torch.cat([identity, -identity, torch.zeros(labels, unused)], 1),
            f"{output}.bias": torch.zeros(labels),
        }
        return "multiple_choice" if is_choice else "sequence_classification", tensors

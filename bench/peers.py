"""Whom are we compared with? The same model by other hands, and what every comparison needs.

"HF": ElectraForMaskedLM and ElectraForPreTraining with one embedding module, logits for every position, Gumbel noise.
"tuned HF": the same with eager attention, compiled layers and fused AdamW. "wrapper": the electra-pytorch package
around those classes (`pip install --no-deps electra-pytorch`: its own requirements ask for transformers 3).
All get our weights, and before any timing the same rows, masks and samples must give them our losses.

Letters: B rows, S sequence, K masked positions.
"""

import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from electra_ds.common.special_ids import SpecialIds
from electra_ds.config.loading import load_run
from electra_ds.config.schema import RunConfig
from electra_ds.data.batch import Batch
from electra_ds.data.masking import max_masked_positions
from electra_ds.interop.hf import hf_config, to_hf
from electra_ds.model.build import build_objective
from electra_ds.model.objective import mask_input
from electra_ds.model.weights import true_state

try:
    from electra_pytorch import electra_pytorch as wrapper
except ImportError:
    wrapper = None

IDS = SpecialIds(pad=0, unk=100, cls=101, sep=102, mask=103)
VOCAB = 30522


def run_config(size: str, length: int, rows: int, dropout: float) -> RunConfig:
    """A shipped run at another length and batch; the length of its rows is full."""
    values = {
        "data.sequence_length": length,
        "train.global_batch_size": rows,
        "train.micro_batch_size": rows,
    }
    values |= {
        f"{part}.{kind}_dropout": dropout
        for part in ("model", "generator")
        for kind in ("hidden", "attention")
    }
    return load_run(size, [f"{key}={value}" for key, value in values.items()]).with_data(
        VOCAB, IDS, length
    )


class Ours:
    """The bare step: our module and torch's fused AdamW, without DeepSpeed."""

    def __init__(self, config: RunConfig):
        self.config, self.module = config, build_objective(config, seed=0)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, eps=1e-6, fused=True)

    def loss(self, batch: Batch) -> Tensor:
        return self.module(batch, batch.masked_positions.numel(), batch.input_ids.numel()).total


class HuggingFace:
    """The stock classes joined: one embedding module, the whole vocabulary at every position, Gumbel sampling."""

    def __init__(self, ours: Ours, tuned: bool = False):
        parts = {}
        for part, kind in (
            ("generator", transformers.ElectraForMaskedLM),
            ("discriminator", transformers.ElectraForPreTraining),
        ):
            config = transformers.ElectraConfig(
                **hf_config(ours.config.model, ours.config.generator, part, IDS.pad)
            )
            config._attn_implementation = "eager" if tuned else "sdpa"
            parts[part] = kind(config)
            parts[part].load_state_dict(to_hf(true_state(ours.module), part), strict=False)
        parts["discriminator"].electra.embeddings = parts["generator"].electra.embeddings
        for layer in (
            layer for part in parts.values() for layer in part.electra.encoder.layer if tuned
        ):
            layer.compile()
        self.module = torch.nn.ModuleDict(parts)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=1e-4, eps=1e-6, fused=tuned or None
        )

    def loss(self, batch: Batch, samples: Tensor | None = None) -> Tensor:
        chosen = torch.zeros_like(batch.input_ids, dtype=torch.bool).scatter_(
            1, batch.masked_positions, True
        )
        rows = (
            batch.input_ids,
            mask_input(batch, IDS.mask),
            chosen,
            batch.document_ids,
            batch.segment_ids,
        )
        return self.joined_loss(*rows, samples)

    def joined_loss(
        self,
        ids: Tensor,
        masked: Tensor,
        chosen: Tensor,
        real: Tensor,
        segments: Tensor,
        samples: Tensor | None = None,
    ) -> Tensor:
        """Rows [B, S] and what stands at their masked positions (bool) -> both losses; samples: in place of drawn ones."""
        logits = self.module["generator"](
            masked, attention_mask=real, token_type_ids=segments
        ).logits
        at_chosen = logits[chosen]  # [masked positions, V]
        with torch.no_grad():
            noise = -torch.empty_like(at_chosen, dtype=torch.float32).exponential_().log()
            drawn = (at_chosen.float() + noise).argmax(-1) if samples is None else samples.flatten()
            corrupted = ids.clone()
            corrupted[chosen] = drawn
        guess = self.module["discriminator"](
            corrupted, attention_mask=real, token_type_ids=segments
        ).logits
        mlm_loss = F.cross_entropy(at_chosen.float(), ids[chosen])
        label = (corrupted != ids).float()
        return mlm_loss + 50 * F.binary_cross_entropy_with_logits(
            guess.float()[real > 0], label[real > 0]
        )


class Logits(torch.nn.Module):
    """What the wrapper's documentation puts around a stock class: its logits alone."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **keywords) -> Tensor:
        return self.module(*arguments, **keywords).logits


class Wrapper:
    """electra-pytorch around the same classes; it chooses the places by itself."""

    def __init__(self, ours: Ours):
        parts = HuggingFace(ours).module
        self.module = wrapper.Electra(
            Logits(parts["generator"]),
            Logits(parts["discriminator"]),
            num_tokens=VOCAB,
            mask_token_id=IDS.mask,
            pad_token_id=IDS.pad,
            mask_ignore_token_ids=[IDS.cls, IDS.sep],
        )
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, eps=1e-6)

    def loss(self, batch: Batch, samples: Tensor | None = None) -> Tensor:
        if samples is None:
            return self.module(batch.input_ids, attention_mask=batch.document_ids).loss
        chosen = torch.zeros_like(batch.input_ids, dtype=torch.bool).scatter_(
            1, batch.masked_positions, True
        )
        becomes_mask = torch.zeros_like(chosen).scatter_(
            1, batch.masked_positions, ~batch.keep_original
        )
        given = {
            "get_mask_subset_with_prob": lambda *_: chosen,
            "prob_mask_like": lambda *_: becomes_mask,
            "gumbel_sample": lambda *_, **__: samples.flatten(),
        }
        own = {name: getattr(wrapper, name) for name in given}
        try:
            vars(wrapper).update(given)
            return self.loss(batch)
        finally:
            vars(wrapper).update(own)


def contenders_of(config: RunConfig, names: list[str]) -> dict:
    """Ours and those of the names that are installed, checked for equal losses; compiled ones start afresh."""
    found = {"ours": (ours := Ours(config))}
    makers = {
        "HF": HuggingFace,
        "tuned HF": lambda ours: HuggingFace(ours, tuned=True),
        "wrapper": Wrapper,
    }
    for name in names:
        if name != "wrapper" or wrapper is not None:
            found[name] = makers[name](ours)
    check_losses(found, config.data.sequence_length)
    torch.compiler.reset()  # the check's small batch must not make the compiled shapes dynamic
    return found


def random_batch(rows: int, length: int) -> Batch:
    """Full rows of random ids; the masked positions in rising order, as the other contenders walk through them."""
    chosen = max_masked_positions(0.15, length)
    ids = torch.randint(1000, VOCAB, (rows, length))
    ids[:, 0], ids[:, -1] = IDS.cls, IDS.sep
    zeros = torch.zeros(rows, length, dtype=torch.long)
    places = (torch.rand(rows, length - 2).argsort(1)[:, :chosen] + 1).sort(1).values
    coins = torch.rand(rows, chosen) >= 0.85
    full = torch.arange(length).expand(rows, -1)
    return Batch(
        ids,
        zeros,
        zeros + 1,
        full,
        places,
        torch.ones(rows, chosen),
        coins,
        torch.rand(rows, chosen),
    )


def autocast(bf16: bool):
    """bf16 as a CPU trains in it, or fp32."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def step(contender, batch: Batch, bf16: bool) -> None:
    """Forward, backward, clipping, AdamW."""
    with autocast(bf16):
        loss = contender.loss(batch)
    loss.backward()
    update(contender)


def update(contender) -> None:
    """Clipping, AdamW."""
    torch.nn.utils.clip_grad_norm_(contender.module.parameters(), 1.0)
    contender.optimizer.step()
    contender.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def check_losses(contenders: dict, length: int) -> None:
    """Same weights, rows, masks and samples must give the same loss, in fp32 and without dropout."""
    batch = random_batch(2, length)
    for contender in contenders.values():
        contender.module.eval()
    samples = contenders["ours"].module.generate(mask_input(batch, IDS.mask), batch).sampled
    ours = float(contenders["ours"].loss(batch))
    for name, contender in contenders.items():
        theirs = ours if name == "ours" else float(contender.loss(batch, samples))
        if abs(theirs / ours - 1) > 1e-5:
            raise SystemExit(
                f"{name}: loss {theirs} on the same rows, masks and weights, ours is {ours}"
            )
        contender.module.train()


def seconds(work) -> tuple[float, float]:
    """(CPU, wall) seconds of work()."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall

"""Vocabulary head of the generator: linear layer, cross-entropy and sampling at masked positions.

Dimensions: M masked positions of a micro-batch, V vocabulary, P = V padded in memory, E embedding.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_ds.model.kernels.linear import product

# The word table is padded to a multiple of CHUNK. Sampling selects a chunk, then a token in it.
CHUNK = 64
# Positions per block, so that a block of logits stays in the processor's cache.
ROWS_ON_CPU = 64
ROWS_ON_GPU = 1024
# Positions for which the gradient of the logits is held at once; a multiple of both block sizes.
GROUP = 4096


class HeadResult(NamedTuple):
    """Loss and samples at the masked positions."""

    nll: Tensor  # 0-d fp32, sum over the positions of weight x negative log likelihood
    sampled: Tensor  # token ids, shaped as the targets
    predicted: Tensor | None  # the most likely token ids, if requested


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw one token per position from softmax(logits / temperature) by inverse transform sampling.

    logits:   [..., P] any float dtype; the draw is made in fp32
    uniforms: [...] in [0, 1), a function of the row, so that the draw is the same at any world size
    Returns [...] token ids. No gradient passes.
    """
    scaled = logits.detach().float() / temperature
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    return sample_weights(weights.flatten(0, -2), uniforms.flatten()).view(uniforms.shape)


def sample_weights(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first token at which the running sum exceeds uniforms x the total, [M] int64.

    The search has two levels: sums of chunks of 64 tokens, then the weights in one chunk. A token
    of weight 0 is never drawn.

    weights:  [M, P] fp32
    uniforms: [M] in [0, 1)
    """
    if weights.shape[-1] % CHUNK:
        weights = F.pad(weights, (0, -weights.shape[-1] % CHUNK))
    chunks = weights.view(len(weights), -1, CHUNK)
    chunk_sums = running_sums(chunks.sum(-1))  # [M, P/64]
    threshold = uniforms.float()[:, None] * chunk_sums[:, -1:]
    chunk = _first_above(chunk_sums, threshold)
    before = torch.where(chunk > 0, chunk_sums.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = running_sums(_select_chunk(chunks, chunk))
    return (chunk * CHUNK + _first_above(inside, threshold - before)).squeeze(1)


def running_sums(x: Tensor) -> Tensor:
    """Return the cumulative sums over the last axis of x [M, N] fp32.

    In deterministic mode they are computed by a matrix product, because torch has no deterministic
    cumsum on CUDA.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    ones = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device).triu()
    return (x.double() @ ones).float()


def most_likely_tokens(logits: Tensor) -> Tensor:
    """Return the argmax of logits [M, P], [M] int64; P is a multiple of 64.

    The search by chunks is ten times as fast as argmax on a CPU.
    """
    chunks = logits.view(len(logits), -1, CHUNK)
    chunk = chunks.amax(-1).argmax(-1, keepdim=True)  # [M, 1]
    inside = _select_chunk(chunks, chunk).argmax(-1, keepdim=True)
    return (chunk * CHUNK + inside).squeeze(1)


def _select_chunk(chunks: Tensor, chunk: Tensor) -> Tensor:
    """Return one chunk of each row: chunks [M, P/64, 64], chunk [M, 1] -> [M, 64]."""
    return chunks.gather(1, chunk[:, :, None].expand(-1, 1, CHUNK)).squeeze(1)


def _first_above(sums: Tensor, threshold: Tensor) -> Tensor:
    """Return the index of the first running sum above threshold [M, 1].

    Where rounding leaves no such sum, return the index of the last increase.
    """
    first = (sums <= threshold).sum(-1, keepdim=True)
    last_increase = (sums < sums[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(first, last_increase)


class _HeadOptions(NamedTuple):
    vocab_size: int
    temperature: float
    with_predictions: bool
    disallow_target: bool
    with_grad: bool


def vocab_head(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    *,
    targets: Tensor,
    weights: Tensor,
    uniforms: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    with_predictions: bool = False,
    disallow_target: bool = False,
    gate: Tensor | None = None,
    copied: Tensor | None = None,
) -> HeadResult:
    """Return loss and samples at the masked positions, computed block by block.

    The logits of a block are overwritten by their own gradient. Logits of the rows beyond
    vocab_size have no effect. Gradients reach x, table, bias and gate.

    x:        [..., E] in the compute dtype
    table:    [P, E] word table, in the compute dtype or fp32
    bias:     [P], in the compute dtype or fp32
    targets:  [...] int64 token ids
    weights:  [...] 1 or 0
    uniforms: [...] in [0, 1)
    with_predictions: also return the most likely tokens
    disallow_target: the target itself is never drawn
    gate, copied: [...] fp32 and bool, the copy mechanism (ELECTRA, section 3.4): the likelihood of
              a target is (1 - sigmoid(gate)) x its softmax, plus sigmoid(gate) where copied is True
    """
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, table, bias))
    nll, sampled, predicted = _FusedHead.apply(
        x.flatten(0, -2),
        table,
        bias,
        None if gate is None else gate.flatten(),
        targets.flatten(),
        weights.flatten().float(),
        uniforms.flatten(),
        None if copied is None else copied.flatten(),
        _HeadOptions(vocab_size, temperature, with_predictions, disallow_target, with_grad),
    )
    shape = targets.shape
    return HeadResult(nll, sampled.view(shape), predicted.view(shape) if with_predictions else None)


def logits_head(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    with_predictions: bool = False,
    disallow_target: bool = False,
) -> HeadResult:
    """Return loss and samples of complete logits (`vocab_head` without the linear layer).

    logits:   [..., V] any float dtype; loss and samples are computed in fp32
    targets:  [...] int64 token ids
    weights:  [...] 1 or 0
    uniforms: [...] in [0, 1)
    disallow_target: the target itself is never drawn
    Gradients reach logits.
    """
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    nll = (losses * weights.flatten()).sum()
    sampling_logits = logits.detach().float()
    if disallow_target:
        sampling_logits = sampling_logits.scatter(-1, targets[..., None], -math.inf)
    sampled = sample_tokens(sampling_logits, uniforms, temperature)
    return HeadResult(nll, sampled, logits.argmax(-1) if with_predictions else None)


class _FusedHead(torch.autograd.Function):
    """vocab_head on flattened positions.

    Forward computes the gradient, so that backward does not need the table. ZeRO-3 releases the
    table between forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        bias: Tensor,
        gate: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        uniforms: Tensor,
        copied: Tensor | None,
        options: _HeadOptions,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        num_positions = len(x)
        block_rows = ROWS_ON_CPU if x.device.type == "cpu" else ROWS_ON_GPU
        weight, offset = table.detach().to(x.dtype), bias.detach().to(x.dtype)
        sampled = torch.empty_like(targets)
        predicted = torch.empty_like(targets) if options.with_predictions else None
        nll = torch.empty(num_positions, dtype=torch.float32, device=x.device)
        dgate = None if gate is None else torch.empty_like(nll)
        grads = _HeadGradients(x, table) if options.with_grad else None
        for start in range(0, num_positions, block_rows):
            block = slice(start, start + block_rows)
            logits = product(x[block], weight, offset)
            logits[:, options.vocab_size :] = -math.inf
            target = targets[block, None]
            probs = logits.float()  # [rows, P]; logits at first, changed in place below
            if predicted is not None:
                predicted[block] = most_likely_tokens(probs)
            maximum = probs.amax(-1, keepdim=True)
            target_logits = probs.gather(1, target)
            probs.sub_(maximum)
            sampled[block], total = _exp_and_sample(probs, target, uniforms[block], options)
            nll[block] = (total.log() + maximum - target_logits).squeeze(1)
            scale = weights[block, None]
            if gate is not None and copied is not None and dgate is not None:
                nll[block], softmax_share, dgate[block] = _with_copies(
                    nll[block], gate[block], copied[block]
                )
                scale = scale * softmax_share[:, None]
            if grads is not None:
                probs.mul_(scale / total)
                probs.scatter_add_(1, target, -scale)
                grads.add(start, probs, weight)
        ctx.mark_non_differentiable(sampled, *([] if predicted is None else [predicted]))
        if grads is not None:
            dgate = None if dgate is None else dgate * weights
            dx = torch.cat(grads.dx)
            ctx.save_for_backward(dx, grads.dtable, grads.dbias.to(bias.dtype), dgate)
        return (nll * weights).sum(), sampled, predicted

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Scaled in fp32: a scale rounded to bf16 would bias the whole gradient.
        grads = [
            grad if grad is None else (grad.float() * scale).to(grad.dtype)
            for grad in ctx.saved_tensors
        ]
        return *grads, None, None, None, None, None


def _exp_and_sample(
    probs: Tensor, target: Tensor, uniforms: Tensor, options: _HeadOptions
) -> tuple[Tensor, Tensor]:
    """Exponentiate shifted logits [rows, P] in place and draw one token per row.

    Returns the samples [rows] and the sums of the exponentials [rows, 1].
    """
    is_plain = options.temperature == 1 and not options.disallow_target
    if not is_plain:
        scaled = probs / options.temperature
        if options.disallow_target:
            scaled.scatter_(1, target, -math.inf).sub_(scaled.amax(-1, keepdim=True))
        sampled = sample_weights(scaled.exp_(), uniforms)
    probs.exp_()
    total = probs.sum(-1, keepdim=True)
    if is_plain:
        sampled = sample_weights(probs, uniforms)
    return sampled, total


class _HeadGradients:
    """Accumulates the gradients of x, table and bias from blocks of gradients of the logits.

    The products are made for GROUP positions at a time.
    """

    def __init__(self, x: Tensor, table: Tensor) -> None:
        self.x = x
        self.table_dtype = table.dtype
        self.dx: list[Tensor] = []
        self.dtable: Tensor | None = None
        self.dbias = torch.zeros(len(table), dtype=torch.float32, device=x.device)
        self._group = x.new_empty(min(len(x), GROUP), len(table))  # d nll / d logits

    def add(self, start: int, dlogits: Tensor, weight: Tensor) -> None:
        """Add the gradient of the logits [rows, P] fp32 of the positions from `start` on."""
        self.dbias += dlogits.sum(0)
        group_start = start - start % GROUP
        end = start + len(dlogits)
        self._group[start - group_start : end - group_start] = dlogits
        if end not in (len(self.x), group_start + GROUP):
            return
        group = self._group[: end - group_start]
        self.dx.append(product(group, weight.T))
        change = (group.T @ self.x[group_start:end]).to(self.table_dtype)
        self.dtable = change if self.dtable is None else self.dtable.add_(change)


def _with_copies(nll: Tensor, gate: Tensor, copied: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add the copy mechanism to the softmax's nll [rows].

    Returns the nll of the mixture, the softmax's share of its likelihood, and d nll / d gate.
    """
    softmax_part = F.logsigmoid(-gate) - nll
    copy_part = torch.where(copied, F.logsigmoid(gate), -math.inf)
    log_likelihood = torch.logaddexp(softmax_part, copy_part)
    softmax_share = (softmax_part - log_likelihood).exp()
    return -log_likelihood, softmax_share, gate.sigmoid() - (1 - softmax_share)

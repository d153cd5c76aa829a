"""The generator's vocabulary: linear, cross-entropy and sampling at the masked positions.

Letters: M masked positions of a micro-batch, V vocabulary, P = V padded in memory, E embedding.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_ds.model.kernels.linear import product

CHUNK = 64  # the word table is padded to a multiple of it; sampling looks for the chunk first, then inside it
ROWS_ON_CPU, ROWS_ON_GPU = (
    64,
    1024,
)  # places per block: a block of logits stays in the processor's cache
GROUP = 4096  # places whose gradient of the logits is held at once; a multiple of both


class HeadResult(NamedTuple):
    """nll [] fp32: sum over the places of weight x negative log likelihood; sampled, best [M] int64 ids."""

    nll: Tensor
    sampled: Tensor
    best: Tensor | None  # the most likely tokens, when asked for


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw one token per place from softmax(logits / temperature) by inverting its distribution function.

    logits:   [..., P] any float dtype; the draw is made in fp32
    uniforms: [...] in [0, 1), the row's own numbers, so that the draw is the same at any world size
    Returns [...] token ids. No gradient passes.
    """
    scaled = logits.detach().float() / temperature
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    return sample_weights(weights.flatten(0, -2), uniforms.flatten()).view(uniforms.shape)


def sample_weights(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the running sum of weights [M, P] fp32 passes uniforms [M] x their total. [M] int64.

    Two levels: the sums of chunks of 64, then the 64 weights inside one. A token of weight 0 is never drawn.
    """
    if weights.shape[-1] % CHUNK:
        weights = F.pad(weights, (0, -weights.shape[-1] % CHUNK))
    chunks = weights.view(len(weights), -1, CHUNK)
    sums = running_sums(chunks.sum(-1))  # [M, P/64]
    aim = uniforms.float()[:, None] * sums[:, -1:]
    chunk = _first_above(sums, aim)
    before = torch.where(chunk > 0, sums.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = running_sums(
        chunks.gather(1, chunk[:, :, None].expand(-1, 1, CHUNK)).squeeze(1)
    )  # [M, 64]
    return (chunk * CHUNK + _first_above(inside, aim - before)).squeeze(1)


def running_sums(x: Tensor) -> Tensor:
    """cumsum over the last axis of x [M, N] fp32; in deterministic mode, which CUDA's cumsum refuses, by a product."""
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    ones = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device).triu()
    return (x.double() @ ones).float()


def most_likely(logits: Tensor) -> Tensor:
    """argmax over the tokens of logits [M, P], P a multiple of 64: by chunks, ten times as fast on a CPU. [M] int64."""
    chunks = logits.view(len(logits), -1, CHUNK)
    chunk = chunks.amax(-1).argmax(-1, keepdim=True)  # [M, 1]
    inside = (
        chunks.gather(1, chunk[:, :, None].expand(-1, 1, CHUNK)).squeeze(1).argmax(-1, keepdim=True)
    )
    return (chunk * CHUNK + inside).squeeze(1)


def _first_above(running: Tensor, aim: Tensor) -> Tensor:
    """Index of the first running sum above aim [M, 1]; where rounding leaves none, of the last rise."""
    found = (running <= aim).sum(-1, keepdim=True)
    last_rise = (running < running[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(found, last_rise)


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
    with_best: bool = False,
    disallow: bool = False,
    gate: Tensor | None = None,
    copied: Tensor | None = None,
) -> HeadResult:
    """Loss and samples at the masked positions, block by block; a block's logits become their own gradient in place.

    x:       [..., E] in the compute dtype; table [P, E] and bias [P] in that dtype or fp32
    targets: [...] ids; weights [...] 1 or 0; uniforms [...] in [0, 1)
    disallow: the target itself is never drawn.
    gate [...] fp32, copied [...] bool: the likelihood of a target is sigmoid(gate) where it is copied, plus
    1 - sigmoid(gate) times its softmax (the copy mechanism of section 3.4); the gradient reaches gate too.
    Logits of the rows beyond vocab_size count for nothing. Gradients reach x, table and bias.
    """
    shape = targets.shape
    x, targets, weights, uniforms = (
        x.flatten(0, -2),
        targets.flatten(),
        weights.flatten(),
        uniforms.flatten(),
    )
    gate, copied = (None, None) if gate is None else (gate.flatten(), copied.flatten())
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, table, bias))
    options = vocab_size, temperature, with_best, disallow, wants_grad
    nll, sampled, best = _FusedHead.apply(
        x, table, bias, gate, targets, weights.float(), uniforms, copied, options
    )
    return HeadResult(nll, sampled.view(shape), best.view(shape) if with_best else None)


def logits_head(
    logits, targets, weights, uniforms, temperature=1.0, with_best=False, disallow=False
) -> HeadResult:
    """Loss and samples of logits [..., P] that are there as a whole; targets, weights, uniforms [...]."""
    nll = (
        F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
        * weights.flatten()
    )
    drawn_from = logits.detach().float()
    if disallow:
        drawn_from = drawn_from.scatter(-1, targets[..., None], -math.inf)
    sampled = sample_tokens(drawn_from, uniforms, temperature)
    return HeadResult(nll.sum(), sampled, logits.argmax(-1) if with_best else None)


class _FusedHead(torch.autograd.Function):
    """The gradient is made in forward, so nothing of the table is kept for backward (ZeRO-3 takes it away)."""

    @staticmethod
    def forward(ctx, x, table, bias, gate, targets, weights, uniforms, copied, options):
        vocab_size, temperature, with_best, disallow, wants_grad = options
        places, padded = len(x), len(table)
        rows = ROWS_ON_CPU if x.device.type == "cpu" else ROWS_ON_GPU
        weight, offset = table.detach().to(x.dtype), bias.detach().to(x.dtype)
        grad = x.new_empty(min(places, GROUP), padded) if wants_grad else None  # d nll / d logits
        sampled, best = torch.empty_like(targets), torch.empty_like(targets) if with_best else None
        nll = torch.empty(places, dtype=torch.float32, device=x.device)
        dx, dtable, dgate = [], None, torch.empty_like(nll) if gate is not None else None
        dbias = torch.zeros(padded if wants_grad else 0, dtype=torch.float32, device=x.device)
        for start in range(0, places, rows):
            part = slice(start, start + rows)
            logits = product(x[part], weight, offset)
            logits[:, vocab_size:] = -math.inf
            target = targets[part, None]
            probs = logits.float()  # [rows, P]
            if with_best:
                best[part] = most_likely(probs)
            top = probs.amax(-1, keepdim=True)
            at_target = probs.gather(1, target)
            probs.sub_(top)
            is_plain = temperature == 1 and not disallow
            if not is_plain:
                scaled = probs / temperature
                if disallow:
                    scaled.scatter_(1, target, -math.inf).sub_(scaled.amax(-1, keepdim=True))
                sampled[part] = sample_weights(scaled.exp_(), uniforms[part])
            probs.exp_()
            total = probs.sum(-1, keepdim=True)
            nll[part] = (total.log() + top - at_target).squeeze(1)
            if is_plain:
                sampled[part] = sample_weights(probs, uniforms[part])
            weight_here = weights[part, None]
            if gate is not None:
                nll[part], by_softmax, dgate[part] = _with_copies(
                    nll[part], gate[part], copied[part]
                )
                weight_here = weight_here * by_softmax[:, None]
            if wants_grad:
                probs.mul_(weight_here / total)
                probs.scatter_add_(1, target, -weight_here)
                dbias += probs.sum(0)
                first = start - start % GROUP
                grad[start - first : start - first + len(probs)] = probs
                if (last := min(start + rows, places)) in (places, first + GROUP):
                    group = grad[: last - first]
                    dx.append(product(group, weight.T))
                    change = (group.T @ x[first:last]).to(table.dtype)
                    dtable = dtable.add_(change) if first else change
        ctx.mark_non_differentiable(sampled, *([best] if with_best else []))
        if wants_grad:
            dgate = None if gate is None else dgate * weights
            ctx.save_for_backward(torch.cat(dx), dtable, dbias.to(bias.dtype), dgate)
        return (nll * weights).sum(), sampled, best

    @staticmethod
    def backward(ctx, scale, *_):
        # scaled in fp32: a scale rounded to bf16 would shift the whole gradient
        return *(g if g is None else (g.float() * scale).to(g.dtype) for g in ctx.saved_tensors), *[
            None
        ] * 5


def _with_copies(nll: Tensor, gate: Tensor, copied: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the softmax's nll [rows] to that of the mixture, the softmax's share of it, and d nll / d gate."""
    by_softmax = F.logsigmoid(-gate) - nll
    by_copy = torch.where(copied, F.logsigmoid(gate), -math.inf)
    likelihood = torch.logaddexp(by_softmax, by_copy)
    share = (by_softmax - likelihood).exp()
    return -likelihood, share, gate.sigmoid() - (1 - share)

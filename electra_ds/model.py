"""The encoder with its embeddings and heads (ELECTRA, section 3.1; BERT's post-LN transformer), and how they start.

Letters: B rows, S sequence, K chosen places, H hidden, E embedding, V vocabulary, P = V padded in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from electra_ds.config import EncoderConfig, ModelConfig
from electra_ds.errors import UserError
from electra_ds.ops.attention import Pieces, attention, pieces_of
from electra_ds.ops.dropout import dropout
from electra_ds.ops.linear import GeluLinear, Linear, linear
from electra_ds.ops.vocab_head import CHUNK, HeadResult, vocab_head


def padded_size(vocab_size: int) -> int:
    """Rows of the word table in memory: the next multiple of 64, for the matrix units and the sampling chunks."""
    return -(-vocab_size // CHUNK) * CHUNK


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of x are made: autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Embeddings(nn.Module):
    """Word + token type + position, LayerNorm, dropout: [B, S] ids -> [B, S, E]."""

    def __init__(self, config: ModelConfig, embedding_size: int, hidden_dropout: float):
        super().__init__()
        if config.vocab_size is None:
            raise UserError("model.vocab_size is not known: it comes with the data, or set it")
        self.dropout = hidden_dropout
        self.word = nn.Embedding(padded_size(config.vocab_size), embedding_size)
        self.position = nn.Embedding(config.max_positions, embedding_size)
        self.token_type = nn.Embedding(config.type_vocab_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, config.layer_norm_eps)
        self.true_rows = {"word.weight": config.vocab_size}

    def forward(self, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.word(input_ids) + self.token_type(segment_ids) + self.position(position_ids)
        return dropout(self.norm(x), self.dropout, self.training)


class Layer(nn.Module):
    """One post-LN transformer layer: x = norm(x + attention(x)); x = norm(x + ffn(x))."""

    def __init__(self, sizes: EncoderConfig, eps: float):
        super().__init__()
        hidden = sizes.hidden_size
        self.num_heads, self.dropout = sizes.num_heads, sizes.hidden_dropout
        self.attention_dropout = sizes.attention_dropout
        self.qkv = Linear(hidden, 3 * hidden)
        self.out = Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.ffn_in = Linear(hidden, sizes.ffn_size)
        self.ffn_out = GeluLinear(sizes.ffn_size, hidden)
        self.ffn_norm = nn.LayerNorm(hidden, eps)

    def forward(
        self, x: Tensor, pieces: Pieces, places: Tensor | None = None
    ) -> Tensor:  # [B, S, H]
        seen = attention(
            self.qkv(x), self.num_heads, pieces, self.attention_dropout if self.training else 0.0
        )
        if (
            places is not None
        ):  # [N] in the flattened batch: the result is needed there alone, [N, H]
            x, seen = (t.flatten(0, 1).index_select(0, places) for t in (x, seen))
        x = self.attention_norm(x + dropout(self.out(seen), self.dropout, self.training))
        change = self.ffn_out(self.ffn_in(x))
        return self.ffn_norm(x + dropout(change, self.dropout, self.training))


class Encoder(nn.Module):
    """Embedded rows [B, S, E] -> hidden [B, S, H], or at places [N] of the flattened batch alone [N, H]; a projection
    first where E != H."""

    def __init__(self, sizes: EncoderConfig, embedding_size: int, eps: float):
        super().__init__()
        self.recompute_layers = False  # activation checkpointing: less memory, the same numbers
        self.head_size = sizes.hidden_size // sizes.num_heads
        same = sizes.hidden_size == embedding_size
        self.project = None if same else Linear(embedding_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Layer(sizes, eps) for _ in range(sizes.num_layers))

    def forward(
        self,
        x: Tensor,
        piece_ids: Tensor,
        bounds: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        dtype = compute_dtype(x)
        x = x.to(dtype) if self.project is None else self.project(x)
        pieces = pieces_of(piece_ids, dtype, bounds, self.head_size)
        for i, layer in enumerate(self.layers, 1):
            at = places if i == len(self.layers) else None
            if self.recompute_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, pieces, at, use_reentrant=False)
            else:
                x = layer(x, pieces, at)
        return x


class GeneratorHead(nn.Module):
    """Hidden states at the chosen places -> logits over the vocabulary by the word table, or loss and samples."""

    def __init__(self, config: ModelConfig, hidden_size: int, embedding_size: int):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.dense = Linear(hidden_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(padded_size(config.vocab_size)))
        self.true_rows = {"bias": config.vocab_size}

    def forward(
        self, hidden: Tensor, word: nn.Embedding, draw: dict | None = None
    ) -> Tensor | HeadResult:
        """hidden [B, K, H], the embedding whose table is the output matrix; logits [B, K, V], or with `draw`
        (the other arguments of ops.vocab_head: targets, weights, uniforms [B, K], ...) its HeadResult."""
        x = self.norm(F.gelu(self.dense(hidden)))  # [B, K, E]
        x = x.to(compute_dtype(x))
        if draw is None:
            return linear(x, word.weight.to(x.dtype), self.bias.to(x.dtype))[..., : self.vocab_size]
        return vocab_head(x, word.weight, self.bias, vocab_size=self.vocab_size, **draw)


class DiscriminatorHead(nn.Module):
    """Hidden states -> one logit per token: was it replaced? [B, S, H] -> [B, S] fp32."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense = Linear(hidden_size, hidden_size)
        self.classify = Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classify(F.gelu(self.dense(hidden))).squeeze(-1).float()


@torch.no_grad()
def initialise(module: nn.Module, config: ModelConfig, seed: int | None = None) -> None:
    """Set every weight of module in place; biases 0, LayerNorm 1 and 0.

    `normal`: truncated at two deviations, init_std for matrices and embedding_init_std for tables; Xavier-uniform for
    the embedding projection and the last layer of the discriminator (the authors' code leaves TensorFlow's default
    there). `fan_in`: plain normal, 1 / sqrt(inputs) for matrices, embedding_init_std for tables. Rows that only pad
    the word table stay 0 and draw nothing, so that the padding never changes the others. With a seed, drawn from a
    stream of its own.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            if config.init == "fan_in":
                part.weight.normal_(0, part.in_features**-0.5, generator=generator)
            elif name.rpartition(".")[2] in ("project", "classify", "copy_gate"):
                nn.init.xavier_uniform_(part.weight, generator=generator)
            else:
                _truncated(part.weight, config.init_std, generator)
            part.bias.zero_()
        elif isinstance(part, Embeddings):
            for table, rows in (
                (part.word, config.vocab_size),
                (part.position, None),
                (part.token_type, None),
            ):
                table.weight.zero_()
                if config.init == "fan_in":
                    table.weight[:rows].normal_(0, config.embedding_init_std, generator=generator)
                else:
                    _truncated(table.weight[:rows], config.embedding_init_std, generator)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, GeneratorHead):
            part.bias.zero_()


def _truncated(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def padded_rows(module: nn.Module) -> dict[str, int]:
    """Parameter name -> true rows, for the parameters whose first axis is padded in memory."""
    return {
        f"{prefix}.{name}" if prefix else name: rows
        for prefix, part in module.named_modules()
        for name, rows in getattr(part, "true_rows", {}).items()
    }


def true_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by canonical name, detached views without padded rows; a shared tensor once."""
    rows = padded_rows(module)
    return {name: p.detach()[: rows.get(name, len(p))] for name, p in module.named_parameters()}


@torch.no_grad()
def load_true_state(module: nn.Module, state: dict[str, Tensor], partial: bool = False) -> None:
    """Copy tensors of true rows into module. UserError names what is missing, unknown or of another shape."""
    own = true_state(module)
    missing = [] if partial else sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    if missing or unknown:
        raise UserError(
            f"weights do not fit: missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}"
        )
    for name, value in state.items():
        found, expected = tuple(value.shape), tuple(own[name].shape)
        if found != expected:
            raise UserError(f"weights: {name} has shape {found}, the model expects {expected}")
        own[name].copy_(value)

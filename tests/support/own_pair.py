"""Encoders for model.factory: a GRU and a convolution with shared word embeddings."""

import torch
from torch import nn


class Generator(nn.Module):
    """Returns hidden states; `predict` maps those at the masked positions to logits."""

    def __init__(self, words, width):
        super().__init__()
        self.words = words
        self.gru = nn.GRU(words.embedding_dim, width, batch_first=True, bidirectional=True)
        self.predict = nn.Linear(2 * width, words.num_embeddings)

    def forward(self, ids, attention_mask):
        return self.gru(self.words(ids) * attention_mask[..., None])[0]


class Discriminator(nn.Module):
    """Returns a scalar that training does not use; it uses the output of the layer `conv`."""

    def __init__(self, words, width):
        super().__init__()
        self.words = words
        self.turn = nn.Linear(words.embedding_dim, width)
        self.conv = nn.Linear(3 * width, width)

    def forward(self, x, *, document_ids):
        hidden = self.turn(self.words(x)) * (document_ids > 0)[..., None]
        around = [hidden.roll(1, 1), hidden, hidden.roll(-1, 1)]
        return self.conv(torch.cat(around, -1)).mean()


def build(config):
    """Return (generator, discriminator) for a run config."""
    words = nn.Embedding(config.model.vocab_size, 24)
    width = config.model.options["width"]
    return Generator(words, width), Discriminator(words, width)


def build_buffered(config):
    """As `build`, with a buffer of running statistics."""
    generator, discriminator = build(config)
    discriminator.average = nn.BatchNorm1d(4)
    return generator, discriminator


def build_frozen(config):
    """As `build`, with a frozen layer."""
    generator, discriminator = build(config)
    discriminator.turn.requires_grad_(False)
    return generator, discriminator


def build_one(config):
    """Return a discriminator without a generator."""
    return build(config)[1]

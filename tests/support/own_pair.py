"""A generator (GRU) and a discriminator (convolution) with shared tables, for model.factory."""

import torch
from torch import nn


class Generator(nn.Module):
    """Returns hidden states; `predict` gives the logits at the masked positions."""

    def __init__(self, words, width):
        super().__init__()
        self.words, self.gru = (
            words,
            nn.GRU(words.embedding_dim, width, batch_first=True, bidirectional=True),
        )
        self.predict = nn.Linear(2 * width, words.num_embeddings)

    def forward(self, ids, attention_mask):
        return self.gru(self.words(ids) * attention_mask[..., None])[0]


class Discriminator(nn.Module):
    """Returns a number; the output of its layer `conv` is what a run trains."""

    def __init__(self, words, width):
        super().__init__()
        self.words, self.turn = words, nn.Linear(words.embedding_dim, width)
        self.conv = nn.Linear(3 * width, width)

    def forward(self, x, *, document_ids):
        hidden = self.turn(self.words(x)) * (document_ids > 0)[..., None]
        around = [hidden.roll(1, 1), hidden, hidden.roll(-1, 1)]
        return self.conv(torch.cat(around, -1)).mean()


def build(config):
    words = nn.Embedding(config.model.vocab_size, 24)
    width = config.model.options["width"]
    return Generator(words, width), Discriminator(words, width)


def build_buffered(config):
    """With running statistics, which no checkpoint holds."""
    generator, discriminator = build(config)
    discriminator.average = nn.BatchNorm1d(4)
    return generator, discriminator


def build_frozen(config):
    """With a table that is not trained."""
    generator, discriminator = build(config)
    discriminator.turn.requires_grad_(False)
    return generator, discriminator


def build_one(config):
    """A discriminator alone."""
    return build(config)[1]

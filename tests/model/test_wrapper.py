"""electra_ds.Electra: masking and losses around two modules of the user."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from electra_ds import Electra
from electra_ds.common.errors import UserError

VOCAB, PAD, MASK = 50, 0, 2


class Language(nn.Module):
    """A small language model with a layer named reformer; returns logits or embeddings."""

    def __init__(self, dim=16, return_embeddings=False, length=64):
        super().__init__()
        self.token_emb, self.pos_emb = nn.Embedding(VOCAB, dim), nn.Embedding(length, dim)
        self.reformer = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Tanh())
        self.to_logits = nn.Identity() if return_embeddings else nn.Linear(dim, VOCAB)

    def forward(self, x, input_mask=None):
        hidden = self.token_emb(x) + self.pos_emb(torch.arange(x.shape[1]))
        if input_mask is not None:
            hidden = hidden * input_mask[..., None]
        return self.to_logits(self.reformer(hidden))


def pair(**options):
    torch.manual_seed(0)
    generator, discriminator = Language(), Language(**options)
    generator.token_emb, generator.pos_emb = discriminator.token_emb, discriminator.pos_emb
    return generator, discriminator


def with_layer(**options):
    return Electra(*pair(), discr_dim=16, discr_layer="reformer", **options)


def ids(rows=6, length=64):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def record_calls(module):
    """The list to which every call of the module adds (first input, output)."""
    calls = []
    module.register_forward_hook(lambda _module, inputs, output: calls.append((inputs[0], output)))
    return calls


@pytest.mark.parametrize("kind", ["layer", "index", "sigmoid", "logits"])
def test_the_losses_equal_their_definition_for_every_kind_of_discriminator(kind):
    generator, body = pair(return_embeddings=kind in ("sigmoid", "logits"))
    if kind in ("layer", "index"):
        trainer = Electra(
            generator,
            body,
            discr_dim=16,
            discr_layer="reformer" if kind == "layer" else 2,
            gen_weight=2.0,
        )
        head = trainer.discriminator.head
    else:
        head = nn.Linear(16, 1)
        if kind == "sigmoid":
            with pytest.warns(UserWarning, match="last Sigmoid is left out"):
                trainer = Electra(
                    generator, nn.Sequential(body, head, nn.Sigmoid()), gen_weight=2.0
                )
        else:
            trainer = Electra(generator, nn.Sequential(body, head, nn.Flatten(1)), gen_weight=2.0)
    data = ids()
    generator_calls = record_calls(generator)
    body_calls = record_calls(body)
    layer_calls = record_calls(body.reformer)
    result = trainer(data)
    masked, logits = generator_calls[0]
    corrupted, _ = body_calls[0]
    _, hidden = layer_calls[0]
    changed = corrupted != data
    assert torch.equal(result.disc_labels, changed.float())
    real = data != PAD
    disc_logits = head(hidden).squeeze(2)
    disc_loss = F.binary_cross_entropy_with_logits(disc_logits[real], changed[real].float())
    torch.testing.assert_close(result.disc_loss, disc_loss)
    torch.testing.assert_close(result.disc_acc, ((disc_logits > 0) == changed)[real].float().mean())
    torch.testing.assert_close(result.loss, 2 * result.mlm_loss + 50 * result.disc_loss)
    is_mask = (masked == MASK) & (data != MASK)
    nll = F.cross_entropy(logits[is_mask], data[is_mask], reduction="sum")
    # mlm_loss also covers the masked positions that keep their token
    assert nll < result.mlm_loss * 1.3 * is_mask.sum()
    result.backward()
    assert head.weight.grad.any()
    assert generator.to_logits.weight.grad.any()
    assert body.token_emb.weight.grad.any()


def test_mlm_loss_is_the_mean_over_the_masked_positions():
    """With replace_prob 1 all of them are visible in the generator's input."""
    generator, discriminator = pair()
    trainer = Electra(generator, discriminator, discr_dim=16, discr_layer=2, replace_prob=1.0)
    data = ids()
    calls = record_calls(generator)
    result = trainer(data)
    masked, logits = calls[0]
    at = masked != data  # [PAD] and [MASK] in the data are never masked
    expected = ((data != PAD).sum(1) * 0.15).round()
    assert torch.equal(at.sum(1), expected.long()) and (masked[at] == MASK).all()
    assert not at[(data == PAD) | (data == MASK)].any()
    torch.testing.assert_close(result.mlm_loss, F.cross_entropy(logits[at], data[at]))
    torch.testing.assert_close(result.gen_acc, (logits[at].argmax(-1) == data[at]).float().mean())
    assert not result.disc_labels[~at].any()


def test_random_tokens_are_drawn_at_masked_positions_only():
    generator, discriminator = pair()
    options = dict(
        num_tokens=VOCAB,
        random_token_prob=0.5,
        replace_prob=0.4,
        mask_prob=0.3,
        mask_ignore_token_ids=(7, 8),
    )
    trainer = Electra(generator, discriminator, discr_dim=16, discr_layer=2, **options)
    calls = record_calls(generator)
    data = ids(rows=400)
    trainer(data)
    masked, _ = calls[0]
    changed = masked != data
    assert (changed.sum(1) <= ((data != PAD).sum(1) * 0.3).round()).all()
    assert not changed[torch.isin(data, torch.tensor([PAD, MASK, 7, 8]))].any()
    assert not torch.isin(masked[changed], torch.tensor([PAD, 7, 8])).any()
    counts = torch.stack([(masked == MASK)[changed].sum(), (masked != MASK)[changed].sum()])
    shares = counts / ((data != PAD).sum() * 0.3)
    torch.testing.assert_close(
        shares, torch.tensor([0.5 * 0.4, 0.5 * 44 / 45]), rtol=0.05, atol=0.0
    )


def test_rows_of_padding_and_short_rows_give_finite_losses():
    data = ids(rows=3)
    data[0], data[1, 2:] = PAD, PAD
    result = with_layer()(data)
    result.backward()
    assert torch.isfinite(result.loss) and not result.disc_labels[0].any()
    assert torch.isfinite(with_layer()(torch.zeros(1, 8, dtype=torch.long)).loss)


def test_the_discriminator_is_left_as_it_is():
    def size(module):
        file = io.BytesIO()
        torch.save(module, file)
        return file.tell()

    generator, discriminator = pair()
    before = size(discriminator)
    trainer = Electra(generator, discriminator, discr_dim=16, discr_layer="reformer")
    trainer(ids()).backward()
    discriminator.zero_grad()
    assert abs(size(discriminator) - before) < 64
    other = with_layer()
    assert "discriminator.head.weight" in trainer.state_dict()
    other.load_state_dict(trainer.state_dict())
    torch.manual_seed(1)
    first = trainer(ids()).loss
    torch.manual_seed(1)
    assert torch.equal(first, other(ids()).loss)


def test_keyword_arguments_are_passed_to_the_modules_that_accept_them():
    data, mask = ids(), torch.ones(6, 64)
    mask[:, 40:] = 0
    losses = []
    for arguments in ({}, {"input_mask": mask}, {"input_mask": torch.ones(6, 64)}):
        torch.manual_seed(1)
        losses.append(with_layer()(data, **arguments).disc_loss)
    assert losses[0] == losses[2] != losses[1]
    with pytest.raises(UserError, match=r"neither .* takes attention_mask"):
        with_layer()(data, attention_mask=mask)
    generator, body = pair()
    plain = nn.Sequential(body, nn.Linear(VOCAB, 1))
    Electra(generator, plain)(data, input_mask=mask)  # nn.Sequential does not accept it


def test_modules_and_options_that_do_not_fit_are_refused():
    generator, discriminator = pair()
    for layer in ("performer", 9):
        with pytest.raises(
            UserError, match="no such layer; it has token_emb, pos_emb, reformer, to_logits"
        ):
            Electra(generator, discriminator, discr_dim=16, discr_layer=layer)
    with pytest.raises(
        UserError, match=r"returned \[6, 64, 16\]; expected one tensor \[6, 64, 24\]"
    ):
        Electra(generator, discriminator, discr_dim=24, discr_layer="reformer")(ids())
    with pytest.raises(UserError, match=r"must return logits \[6, 64\].* returned \[6, 64, 50\]"):
        Electra(generator, discriminator)(ids())
    for last in (
        lambda x: x.squeeze(-1),
        lambda x: x.double().float().clamp(0, 1),
        lambda x: x[..., 0].contiguous(),
    ):

        class EndsInSigmoid(Language):
            def forward(self, x, last=last):
                return last(torch.sigmoid(super().forward(x)[..., :1]))

        with pytest.raises(UserError, match="ends in a sigmoid"):
            Electra(generator, EndsInSigmoid())(ids())
    with pytest.raises(UserError, match=r"mask_prob = 1\.2: expected a share"):
        Electra(generator, discriminator, mask_prob=1.2)
    with pytest.raises(UserError, match="random_token_prob needs num_tokens"):
        with_layer(random_token_prob=0.1)
    wide = Language(dim=24)
    generator.token_emb = wide.token_emb
    with pytest.raises(UserError, match=r"token_emb.weight \[50, 24\].*\(16\).*equal width"):
        Electra(generator, wide, discr_dim=24, discr_layer="reformer")(ids())

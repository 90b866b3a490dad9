import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from gradiometer.demo.characters import (
    CONTEXT,
    UNKNOWN,
    VOCABULARY_SIZE,
    CausalSelfAttention,
    CharacterTransformer,
    encode,
    topics_fingerprint,
    topics_loaders,
    topics_text,
)


def test_batches_have_the_documented_shapes_and_are_shifted_by_one():
    train, val = topics_loaders(batch_size=32)
    tokens, following = next(iter(train))
    assert tokens.shape == following.shape == (32, CONTEXT)
    assert tokens.dtype == following.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], following[:, :-1])
    windows = len(train.dataset) + len(val.dataset)
    assert windows == (len(topics_text()) - 1) // CONTEXT
    assert len(val.dataset) == windows // 10


def test_loader_order_depends_on_the_seed_alone():
    def first_tokens(seed):
        train, _ = topics_loaders(seed=seed)
        return torch.stack([tokens for tokens, _ in islice(train, 3)])

    torch.manual_seed(1)
    first = first_tokens(0)
    torch.manual_seed(2)
    assert torch.equal(first, first_tokens(0))
    assert not torch.equal(first, first_tokens(1))


def test_encode_gives_one_index_to_every_other_character():
    assert encode("0Z\N{DEGREE SIGN}\N{EM DASH}").tolist() == [0, 61, UNKNOWN, UNKNOWN]
    assert (encode(topics_text()) == UNKNOWN).double().mean() < 0.01


def test_fingerprint_names_the_text():
    length, digest = topics_fingerprint()
    assert length == len(topics_text())
    assert len(digest) == 64
    assert topics_fingerprint() == (length, digest)


def test_a_position_sees_no_later_one():
    torch.manual_seed(0)
    model = CharacterTransformer()
    tokens = torch.randint(VOCABULARY_SIZE, (2, CONTEXT))
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % VOCABULARY_SIZE
    logits, others = model(tokens), model(changed)
    assert logits.shape == (2, CONTEXT, VOCABULARY_SIZE)
    torch.testing.assert_close(logits[:, :40], others[:, :40])
    assert not torch.allclose(logits[:, 40:], others[:, 40:])


def test_attention_agrees_with_the_formula_written_out():
    torch.manual_seed(0)
    attention = CausalSelfAttention(width=8, heads=2).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    query, key, value = attention.query_key_value(x).split(8, dim=-1)
    mixed = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = query[..., head] @ key[..., head].mT / math.sqrt(4)
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(diagonal=1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        mixed.append(weights @ value[..., head])
    expected = attention.projection(torch.cat(mixed, dim=-1))
    torch.testing.assert_close(attention(x), expected)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads must divide width, got heads=3 and width=64"):
        CharacterTransformer(heads=3)


def test_loss_falls():
    torch.manual_seed(0)
    model = CharacterTransformer()
    optimizer = model.configure_optimizers()
    train, _ = topics_loaders()
    losses = []
    for tokens, following in islice(train, 40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCABULARY_SIZE), rel=0.1)
    assert sum(losses[-5:]) / 5 < 2.9

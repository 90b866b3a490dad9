"""Published architectures, small and with random weights."""

import pytest
import torch

from gradiometer import empirical_ntk, layer_ntks

from ..zoo import COUNT, disturb, draws, error, jacobian, kernel, owners, pick, tokens

transformers = pytest.importorskip("transformers")

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 4, "intermediate_size": 6}


def some_tokens(length):
    return tokens(7, length)(COUNT, torch.Generator().manual_seed(0))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=6, n_embd=4, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel, config, some_tokens(COUNT), last_logits


def last_logits(model, x):
    return model(input_ids=x).logits[:, -1]


def bert():
    config = transformers.BertConfig(vocab_size=7, max_position_embeddings=6, **SIZES)
    mask = torch.ones(COUNT, 4, dtype=torch.int64).tril(1)  # padding behind two to four tokens
    return transformers.BertModel, config, {"input_ids": some_tokens(4), "attention_mask": mask}, pooled


def pooled(model, x):
    return model(**x).pooler_output


def vit():
    config = transformers.ViTConfig(image_size=4, patch_size=2, num_channels=1, **SIZES)
    return transformers.ViTModel, config, {"pixel_values": draws(COUNT, 1, 4, 4)}, pooled


MODELS = {"gpt2": gpt2, "bert": bert, "vit": vit}


@pytest.fixture(params=["eager", None], ids=["eager", "default"])
def attention(request):
    return request.param


def build(name, attention):
    kind, config, x, forward = MODELS[name]()
    if attention is not None:
        config._attn_implementation = attention
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = kind(config).double()
    assert model.config._attn_implementation == (attention or "sdpa")
    return disturb(model), x, forward


@pytest.mark.parametrize("name", MODELS)
def test_kernel(name, attention):
    model, x, forward = build(name, attention)
    rows = jacobian(model, x, forward)
    assert all(row.norm() > 0 for row in rows.values())
    for outputs in ("trace", "diagonal", "full"):
        found = empirical_ntk(model, x, outputs=outputs, forward=forward)
        assert error(found, kernel(rows, outputs=outputs)) < 1e-10
    other = {each: row[1:3] for each, row in rows.items()}
    found = empirical_ntk(model, x, pick(x, slice(1, 3)), forward=forward, chunk_size=2)
    assert error(found, kernel(rows, other)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_layers(name, attention):
    model, x, forward = build(name, attention)
    rows = jacobian(model, x, forward)
    found = layer_ntks(model, x, forward=forward)
    assert error(sum(found.values()), kernel(rows)) < 1e-10
    total = kernel(rows).norm()
    assert set(found) == set(owners(model))
    for path, names in owners(model).items():
        expected = kernel({each: rows[each] for each in names})
        assert (found[path] - expected).norm() < 1e-10 * expected.norm() + 1e-14 * total, path


@pytest.mark.parametrize("name", MODELS)
def test_single_precision(name):
    model, x, forward = build(name, None)
    expected = kernel(jacobian(model.float().double(), x, forward))
    single = {k: v.float() if v.is_floating_point() else v for k, v in x.items()} if name == "vit" else x
    assert error(empirical_ntk(model.float(), single, forward=forward), expected) < 1e-5

import torch
import torch.nn.functional as F

from gradiometer.demo.digits import DigitsConvNet, digits_loaders


def test_batches_have_the_documented_shapes_and_scale():
    train, val = digits_loaders(batch_size=16)
    x, y = next(iter(train))
    assert x.shape == (16, 1, 8, 8)
    assert x.dtype == torch.float32
    assert y.shape == (16,)
    assert y.dtype == torch.int64
    assert len(train.dataset) == 1437
    assert len(val.dataset) == 360
    pixels = train.dataset.tensors[0]
    torch.testing.assert_close(pixels.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std(), torch.tensor(1.0))


def test_loader_order_depends_on_the_seed_alone():
    def labels(seed):
        train, _ = digits_loaders(seed=seed)
        return torch.cat([y for _ in range(2) for _, y in train])

    torch.manual_seed(1)
    first = labels(0)
    torch.manual_seed(2)
    assert torch.equal(first, labels(0))
    assert not torch.equal(first, labels(1))


def test_loaders_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    train, _ = digits_loaders()
    next(iter(train))
    assert torch.equal(before, torch.get_rng_state())


def test_logits_of_an_image_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    model = DigitsConvNet()
    x = torch.randn(5, 1, 8, 8)
    logits = model(x)
    assert logits.shape == (5, 10)
    torch.testing.assert_close(model(x[:1]), logits[:1])


def test_number_of_parameters_is_as_documented():
    assert sum(p.numel() for p in DigitsConvNet().parameters()) == 9930


def test_loss_falls():
    torch.manual_seed(0)
    model = DigitsConvNet()
    optimizer = model.configure_optimizers()
    train, val = digits_loaders()
    for x, y in train:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = next(iter(val))
    with torch.no_grad():
        assert F.cross_entropy(model(x), y) < 0.6

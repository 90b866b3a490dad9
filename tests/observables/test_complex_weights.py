"""Complex weights count as pairs of reals: every reading is that of the twin whose weights are such pairs."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from gradiometer import (
    FluctuationDissipation,
    GradientCosine,
    GradientNoiseScale,
    Monitor,
    NoiseCurvature,
    SecondFluctuationDissipation,
)
from gradiometer.autodiff.ride_along import RideAlong
from gradiometer.errors import UnsupportedError

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: Adagrad(p, lr=0.01),
}


class Spectral(nn.Module):
    """A filter of the spectrum, a complex product and a real layer; the first two complex or as pairs."""

    def __init__(self, *, is_complex):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        response = 0.3 * torch.randn(5, dtype=torch.cdouble, generator=generator)
        mixing = 0.3 * torch.randn(3, 8, dtype=torch.cdouble, generator=generator)
        form = (lambda w: w) if is_complex else torch.view_as_real
        self.response, self.mixing = (nn.Parameter(form(w).clone()) for w in (response, mixing))
        self.layer = nn.Linear(8, 3, dtype=torch.double)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(0.3 * torch.randn(p.shape, dtype=torch.double, generator=generator))

    def forward(self, x):
        response, mixing = (
            w if w.is_complex() else torch.view_as_complex(w) for w in (self.response, self.mixing)
        )
        y = torch.fft.irfft(torch.fft.rfft(x) * response, n=8)
        return self.layer(y) + (y.to(mixing.dtype) @ mixing.mT).abs()


def trained(observables, optimizer, *, is_complex, micro_batches=1, **settings):
    """Readings after thirty steps, with the weights that were reached."""
    net = Spectral(is_complex=is_complex)
    loss_fn = nn.functional.cross_entropy
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    generator = torch.Generator().manual_seed(3)
    monitor = Monitor(net, optimizer, observables, loss_fn=loss_fn, dataset_size=500, **settings)
    for _ in range(30):
        for _ in range(micro_batches):
            x = torch.randn(12, 8, dtype=torch.double, generator=generator)
            y = torch.randint(3, (12,), generator=generator)
            with monitor.micro_batch(x, y):
                (loss_fn(net(x), y) / micro_batches).backward()
        monitor.before_step()
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    readings = {key: reading.value for key, reading in monitor.latest.items() if "/cost/" not in key}
    return readings, net.response.detach()


def equal_to_the_twin(observables, optimizer, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        readings, weights = trained(observables, optimizer, is_complex=True, **settings)
    assert not [str(w.message) for w in caught if "complex" in str(w.message).lower()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin, pairs = trained(observables, optimizer, is_complex=False, **settings)
    torch.testing.assert_close(torch.view_as_real(weights), pairs, rtol=1e-9, atol=1e-12)
    assert readings.keys() == twin.keys()
    for key, value in twin.items():
        assert readings[key] == pytest.approx(value, rel=1e-6, abs=1e-12, nan_ok=True), key
    return readings


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fluctuation_dissipation_of_the_whole_and_of_layers(optimizer):
    observables = [FluctuationDissipation(schedule=1, verify=True), GradientCosine(schedule=1)]
    readings = equal_to_the_twin(observables, optimizer, layers=True)
    assert any("/right/layer." in key for key in readings)
    assert abs(readings["dynamics/fdr/residual"]) < 1e-9
    assert math.isfinite(readings["dynamics/gradient_cosine/cosine"])


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adamw"])
def test_fluctuation_dissipation_about_a_centre(optimizer):
    equal_to_the_twin([FluctuationDissipation(schedule=5, sampling=1, centred=True)], optimizer)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "amsgrad"])
def test_noise_of_micro_batches_and_of_a_split_batch(optimizer, micro_batches):
    adaptive = optimizer != "momentum"
    observable = GradientNoiseScale(schedule=1, preconditioned=adaptive)
    readings = equal_to_the_twin([observable], optimizer, micro_batches=micro_batches)
    names = ["trace", "preconditioned_trace"] if adaptive else ["trace", "temperature", "sgd_scale"]
    assert all(readings[f"dynamics/noise/{name}"] > 0 for name in names)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov"])
def test_curvature_of_noise_and_the_second_relation(optimizer):
    observables = [NoiseCurvature(schedule=1), SecondFluctuationDissipation(schedule=1)]
    readings = equal_to_the_twin(observables, optimizer)
    assert math.isfinite(readings["dynamics/fdr2/left"])


@pytest.mark.filterwarnings("error")
def test_single_examples_of_complex_layers_are_refused_by_name():
    net = nn.Linear(3, 2, dtype=torch.cdouble)
    tape = RideAlong(net, 4)
    net(torch.ones(4, 3, dtype=torch.cdouble)).abs().square().sum().backward()
    tape.detach()
    with pytest.raises(UnsupportedError, match="it is complex"):
        tape.result()


def test_single_examples_leave_complex_parameters_out():
    net = nn.Sequential(nn.Linear(3, 2, dtype=torch.double), nn.Linear(2, 2, dtype=torch.cdouble))
    tape = RideAlong(net, 4)
    hidden = net[0](torch.ones(4, 3, dtype=torch.double))
    net[1](hidden.to(torch.cdouble)).abs().square().sum().backward()
    tape.detach()
    norms, skipped = tape.result()
    assert set(norms) == {"0.weight", "0.bias"}
    assert skipped == {"1.weight": "it is complex", "1.bias": "it is complex"}

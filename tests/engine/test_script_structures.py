"""Scripts in the structures of public ones, measured without any argument, against gradients by hand.

What cannot be measured is refused in words that say what to write; that is then written, and measured.
"""

import copy
import warnings

import pytest
import torch

from gradiometer import MemoryRecorder, Monitor
from gradiometer.errors import MeasurementWarning

from . import scripts, scripts_two

LATER = "From the next sample on they are added up."
MAKERS = [
    make
    for module in (scripts, scripts_two)
    for name, make in vars(module).items()
    if getattr(make, "__module__", "") == module.__name__ and name in module.SCRIPTS
]


def gradients(values, tensors):
    """One row of derivatives for each value."""
    rows = []
    for value in values:
        taken = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)
        filled = [
            torch.zeros_like(t) if g is None else g.to_dense() for g, t in zip(taken, tensors, strict=True)
        ]
        rows.append(torch.cat([g.flatten() for g in filled]))
    return torch.stack(rows)


def noise_by_hand(script):
    trained = [
        p
        for name, p in script.net.named_parameters()
        if p.requires_grad and not (script.without and name.startswith(script.without))
    ]
    rows = gradients(script.parts(), trained)
    trace = script.size * rows.var(0).sum()
    return {"trace": trace, "grad_sq_norm": rows.mean(0).square().sum() - trace / script.size / len(rows)}


def kernel_by_hand(script, state, count):
    """Trace and largest eigenvalue of the kernel, and the norm of the Jacobian, in evaluation mode."""
    before = copy.deepcopy(script.net.state_dict())
    modes = {module: module.training for module in script.net.modules()}
    script.net.load_state_dict(state)
    for module in modes:
        module.training = False
    trained = [p for p in script.net.parameters() if p.requires_grad]
    tangents, norms = [], []
    for i in range(count):
        outputs, inputs = script.call(i)
        tangents.append(gradients(outputs, trained))
        norms += [gradients(outputs, inputs).square().sum().sqrt()] if inputs else []
    tangents = torch.stack(tangents)
    kernel = torch.einsum("aop,bop->ab", tangents, tangents) / tangents.shape[1]
    for module, mode in modes.items():
        module.training = mode
    script.net.load_state_dict(before)
    right = {"ntk/trace": kernel.diagonal().mean(), "ntk/spectrum": torch.linalg.eigvalsh(kernel)[-1]}
    return right | ({"jacobian/frobenius_norm": torch.stack(norms).mean()} if norms else {})


def run(script, take_step, **settings):
    """Three steps under a monitor; what is read first and last, what is said, and the loss that was seen."""
    memory, states = MemoryRecorder(), []
    recorders = [memory, lambda step, readings: states.append(copy.deepcopy(script.net.state_dict()))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(script.net, script.optimizer, recorders=recorders, **settings) as monitor:
            for _ in range(3):
                take_step(monitor)
            loss = monitor._measurement.calls.loss
    said = [str(warning.message) for warning in caught if issubclass(warning.category, MeasurementWarning)]
    assert len(said) == len(caught), [str(warning.message) for warning in caught]
    return memory, states[0], said, loss


def check(script, memory, state, groups, count):
    """What is read, group by group: of kernel and Jacobian the first record, of the noise the last."""
    right = kernel_by_hand(script, state, count) if script.call is not None else {}
    if script.parts is not None:
        right |= {f"noise/{name}": value for name, value in noise_by_hand(script).items()}
    first = {reading.key: reading for _, readings in reversed(memory.records) for reading in readings}
    for name, value in right.items():
        group, key = name.split("/")[0], f"dynamics/{name}"
        reading = (memory.latest() if group == "noise" else first).get(key)
        if group not in groups:
            assert reading is None or not reading.is_finite, name
            continue
        got = max(reading.value) if name == "ntk/spectrum" else reading.value
        assert got == pytest.approx(float(value), rel=1e-6), name


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_script_is_read_rightly_or_refused_with_what_to_write(make):
    torch.manual_seed(0)
    script = make()
    memory, state, said, loss = run(script, script.step)
    if script.loss.startswith("refused: "):
        assert isinstance(loss, str)
        assert loss.startswith(script.loss.removeprefix("refused: ")), loss
    else:
        assert loss.name == script.loss
    wanted = [part for part in (script.probe, script.noise) if part]
    assert all(any(part in message for message in said) for part in wanted), said
    assert all(any(part in message for part in (*wanted, LATER)) for message in said), said
    groups = set() if script.probe and not script.probe_is_read else {"ntk", "jacobian"}
    check(script, memory, state, groups if script.noise else groups | {"noise"}, script.count)
    if script.remedy or script.mended:
        memory, state, said, _ = run(script, script.mended or script.step, **script.remedy)
        check(script, memory, state, {"ntk", "jacobian", "noise"}, script.mended_count or script.count)
        assert said == []

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradiometer.cli import main
from gradiometer.demo.run import STEPS, demo_observables, run_demo
from gradiometer.errors import InputError

CURVES = (
    "ntk/drift",
    "ntk/top_eigenvalue",
    "jacobian/frobenius_norm",
    "jacobian/spectral_norm",
    "noise/trace",
    "noise/sgd_scale",
    "fdr/weight_norm_sq",
    "fdr/left",
    "fdr/right",
    "fdr/ratio",
    "cost/fraction",
)


WINDOWED = {"fdr/left", "fdr/right", "fdr/ratio"}  # need two records, 25 steps apart


@pytest.mark.parametrize(("model", "steps"), [("convnet", 30), ("gpt", 2)])
def test_the_demo_writes_finite_curves_beside_the_loss(model, steps, tmp_path, capsys):
    arguments = ["demo", "--model", model, "--steps", str(steps), "--quiet", "--logdir", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "what it says" in shown
    assert f"tensorboard --logdir {tmp_path}" in shown
    events = EventAccumulator(str(tmp_path / model / "version_0"), size_guidance={"images": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    absent = {"noise/sgd_scale"} if model == "gpt" else set()  # AdamW
    absent |= WINDOWED if steps < 25 else set()
    for name in CURVES:
        if name in absent:
            assert f"dynamics/{name}" not in tags
            continue
        curve = events.Scalars(f"dynamics/{name}")
        assert curve, name
        assert all(math.isfinite(event.value) for event in curve), name
        assert all(0 <= event.step < steps for event in curve)
    drift = events.Scalars("dynamics/ntk/drift")
    due = [step for step in (0, 1, 2, 5, 10, 20) if step < steps]
    assert [event.step for event in drift] == due
    assert drift[0].value == 0.0
    assert drift[-1].value > 0.0
    assert [event.step for event in events.Images("dynamics/ntk/kernel")] == due
    losses = [event.step for event in events.Scalars("train_loss")] if steps >= 10 else []
    assert losses == list(range(9, steps, 10))
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"unknown demo model, got 'mlp'\. Write one of \['convnet', 'gpt'\]"
    ):
        run_demo("mlp", log_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", STEPS)
def test_cadences_give_curves_on_the_demos_own_length(model):
    for observable in demo_observables(model):
        recorded = sum(observable.due(step) for step in range(STEPS[model]))
        assert recorded >= 10, observable.group

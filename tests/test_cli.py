import subprocess
import sys
from pathlib import Path

import pytest

from gradiometer import __version__
from gradiometer.cli import main


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "command" in capsys.readouterr().err


def test_an_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["demo", "--model", "perceptron"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "convnet" in error
    assert "gpt" in error


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    shown = capsys.readouterr().out
    for option in ("--model", "--steps", "--logdir", "--quiet"):
        assert option in shown


def test_options_reach_the_demo(monkeypatch, tmp_path):
    import gradiometer.demo.run

    seen = []
    monkeypatch.setattr(gradiometer.demo.run, "run_demo", lambda *args, **kwargs: seen.append((args, kwargs)))
    assert main(["demo", "--model", "gpt", "--steps", "3", "--logdir", str(tmp_path), "--quiet"]) == 0
    assert main(["demo"]) == 0
    assert seen == [
        (("gpt",), {"steps": 3, "log_dir": tmp_path, "quiet": True}),
        (("convnet",), {"steps": None, "log_dir": Path("runs"), "quiet": False}),
    ]


def test_the_installed_command_runs():
    script = Path(sys.executable).with_name("gradiometer")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be at least 1, got 0"),
        (["--steps", "-5"], "must be at least 1, got -5"),
        (["--logdir", "/dev/null/runs"], "cannot write to --logdir"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_verify_ends_with_0_when_all_passed(capsys):
    assert main(["verify", "--adapter", "gradiometer.conformance:reference", "--kind", "relation"]) == 0
    shown = capsys.readouterr().out
    assert "identity: plain" in shown
    assert shown.rstrip().endswith("all passed")


def test_verify_ends_with_1_when_something_failed(tmp_path, monkeypatch, capsys):
    (tmp_path / "one_for_everything.py").write_text("def one(steps):\n    return {'trace': 1.0}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["verify", "--adapter", "one_for_everything:one", "--kind", "noise"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("FAILED")


def test_verify_checks_this_packages_own_estimators_by_default(monkeypatch):
    import gradiometer.conformance.verify

    seen = []
    monkeypatch.setattr(gradiometer.conformance.verify, "verify", lambda *args: seen.append(args) or True)
    assert main(["verify"]) == 0
    assert seen == [(None, None)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "heat"], "invalid choice: 'heat'"),
        (["--adapter", "mine"], "an adapter is a module and a function, got 'mine'"),
        (["--adapter", "no_such_module:mine"], "the adapter was not found"),
    ],
)
def test_bad_arguments_of_verify_end_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

"""The command line: ``gradiometer demo`` and ``gradiometer verify``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ._version import __version__
from .errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command-line arguments; those of the process when ``None``.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="gradiometer", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small network under the instruments")
    demo.add_argument("--model", choices=("convnet", "gpt"), default="convnet", help="what to train")
    demo.add_argument("--steps", type=_positive, default=None, help="optimizer steps")
    demo.add_argument("--logdir", type=Path, default=Path("runs"), help="folder for TensorBoard")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    verify = commands.add_parser("verify", help="check an estimator against cases with known answers")
    verify.add_argument("--adapter", help="package.module:function; this package's own when left out")
    verify.add_argument("--kind", choices=("noise", "relation"), help="one kind of case; both when left out")
    options = parser.parse_args(arguments)
    return _demo(parser, options) if options.command == "demo" else _verify(parser, options)


def _demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Train a small network under the instruments."""
    from .demo.run import run_demo

    try:
        options.logdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write to --logdir {options.logdir}: {error.strerror}")
    run_demo(options.model, steps=options.steps, log_dir=options.logdir, quiet=options.quiet)
    return 0


def _verify(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Check an estimator; status 1 when a case fails."""
    from .conformance.verify import verify

    try:
        return 0 if verify(options.adapter, options.kind) else 1
    except InputError as error:
        parser.error(str(error))


def _positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number

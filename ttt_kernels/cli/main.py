"""Parse, dispatch, and turn a user's mistake into one message."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ttt_kernels import __version__
from ttt_kernels.cli import (
    bench_command,
    demo_command,
    generate_command,
    info,
    kernels_command,
    report_command,
    verify_command,
)
from ttt_kernels.cli.errors import UserError

BAD_USAGE = 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ttt_kernels", description="In-place test-time training kernels."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (
        info, demo_command, generate_command, bench_command, report_command, kernels_command, verify_command,
    ):  # fmt: skip
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 fine, 1 a check failed, 2 bad arguments or a missing package."""
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args)
    except UserError as error:
        print(f"ttt_kernels: {error}", file=sys.stderr)
        return BAD_USAGE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

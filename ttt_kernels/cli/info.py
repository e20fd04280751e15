"""`python -m ttt_kernels info`."""

from __future__ import annotations

import argparse

import ttt_kernels


def add_parser(commands) -> None:
    parser = commands.add_parser("info", help="what is built, what runs here, and why")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    print(ttt_kernels.info())
    return 0

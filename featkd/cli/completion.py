"""Completion scripts for shells, made from the parsers of all commands."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

from featkd.cli import bench
from featkd.cli.arguments import Parser, UsageError, with_dashes

SHELLS = ("bash", "zsh")


def completion_script(shell: str, commands: Mapping[str, str]) -> str:
    """Return the completion script of `featkd` for a shell.

    Args:
        shell: one of `SHELLS`.
        commands: command -> description.

    Raises:
        UsageError: no such shell, or shtab is not installed.
    """
    if shell not in SHELLS:
        raise UsageError(f"--print-completion: expected {' or '.join(SHELLS)}, got {shell!r}")
    if find_spec("shtab") is None:
        raise UsageError("--print-completion: shtab is not installed; pip install shtab")
    parser, of_bench = Parser(prog="featkd"), Parser(prog="featkd bench")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--print-completion", choices=SHELLS, help="print a completion script")
    subcommands = parser.add_subcommands()
    for name, text in commands.items():
        own = of_bench if name == "bench" else import_module(f"featkd.cli.{name}").parser()
        subcommands.add_subcommand(name, own, help=text)
    subcommands = of_bench.add_subcommands()
    for name, own in bench.parsers().items():
        subcommands.add_subcommand(name, own, help=bench.COMMANDS[name])
    return with_dashes(parser.get_completion_script(f"shtab-{shell}"))

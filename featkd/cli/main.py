"""Entry point of the command line: finds the command, reports errors.

Exit codes: 0 done, 1 failed while running, 2 bad arguments or recipe, 128 + N stopped by signal N.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from importlib import import_module

import featkd
from featkd.cli.output import plain_warnings, printable_streams, warn
from featkd.runtime import interrupt, openmp

COMMANDS = {
    "distill": "train a student, with or without a teacher",
    "compare": "train arms of a recipe over several seeds, with intervals",
    "cache": "store a teacher's outputs for several runs, or verify stored ones",
    "export": "write a trained student for timm, ONNX or torch.export",
    "evaluate": "score models: top-k accuracy, kNN and a linear probe",
    "predict": "write classes, probabilities and features of images",
    "diagnose": "measure the mismatch between feature maps of a student and a teacher",
    "bench": "time the ops, the loaders and training updates",
    "env": "print versions, devices and backends, for bug reports",
    "demo": "compare students with and without a mismatch, on digits",
}
_OPTIONS = {
    "--help": "print this help",
    "--version": "print the versions of featkd, torch and Triton, and the backends",
    "--print-completion SHELL": "print a completion script for bash or zsh",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's arguments) and return the exit code."""
    openmp.set_defaults()  # before a command loads torch
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # a caller in this process keeps its handlers
        interrupt.exit_while_loading()
    with printable_streams(restore=argv is not None), plain_warnings():
        code = _reported(words)
    if argv is None and any(x.name == interrupt.CHECKPOINT_THREAD for x in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # torch would abort the process beside a thread that is saving
    return code


def _reported(words: list[str]) -> int:
    """Run a command line and print the error that ends it, unless it is a bug."""
    try:
        return _run(words)
    except KeyboardInterrupt:
        # Clears CPython's note of an interrupt within exec, which would become the exit status.
        exec("")
        return _fail("interrupted", 130)
    except Exception as error:
        from featkd.cli.errors import described

        found = described(error)
        if found is None:
            raise
        return _fail(*found)
    finally:
        interrupt.loading_done()


def _run(words: list[str]) -> int:
    word = words[0].replace("_", "-") if words else ""
    if word in ("", "-h", "--help"):
        print(_help(), end="")
        return 0 if words else 2
    if word == "--version":
        print(_versions())
        return 0
    if word.partition("=")[0] == "--print-completion":
        from featkd.cli.completion import completion_script

        shell = word.partition("=")[2] or "".join(words[1:2])
        print(completion_script(shell, COMMANDS))
        return 0
    if word in COMMANDS:
        # a module is loaded with its command: most load torch, which takes seconds
        code: int = getattr(import_module(f"featkd.cli.{word}"), word)(words[1:])
        return code
    from featkd.runtime.suggest import suggestion

    kind, known = "command", list(COMMANDS)
    if word.startswith("-"):
        kind, known = "option", [name.split()[0] for name in _OPTIONS]
    return _fail(f"no {kind} {words[0]!r}{suggestion(word, known)} (see featkd --help)", 2)


def _versions() -> str:
    """Return versions and backends as installed; `featkd env` loads torch and knows more."""
    from importlib.util import find_spec
    from pathlib import Path

    from featkd.runtime.environment import versions

    found = versions()
    backends = ["reference"]
    if find_spec("triton"):
        backends.append("triton (for CUDA tensors)")
    if Path(featkd.__file__).with_name("_csrc.so").exists():
        backends.append("csrc")
    names = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "triton"))
    return f"featkd {found['featkd']}\n{names}\nbackends: {', '.join(backends)}"


def _help() -> str:
    return (
        f"featkd {featkd.__version__}: feature distillation of Vision Transformers\n\n"
        "usage: featkd COMMAND [arguments]\n\n"
        f"commands:\n{_table(COMMANDS)}\n"
        f"options:\n{_table(_OPTIONS)}\n"
        "featkd COMMAND --help lists the arguments of a command and two examples.\n"
    )


def _table(lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "".join(f"  {name:{width}}  {text}\n" for name, text in lines.items())


def _fail(message: str, code: int) -> int:
    warn(message)
    return code

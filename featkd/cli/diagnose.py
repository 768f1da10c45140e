"""`featkd diagnose`: builds a `DiagnoseConfig` from the command line and prints the findings."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from docstring_parser import parse

from featkd.cli.arguments import Parser, add_json, add_quiet, check_folders
from featkd.cli.output import results_unless
from featkd.diagnostics import DiagnoseConfig, Settings
from featkd.diagnostics import diagnose as run_diagnose
from featkd.diagnostics.process_run import Interrupted
from featkd.runtime import interrupt
from featkd.runtime.files import atomic_write
from featkd.runtime.names import plural

_DESCRIPTION = """\
Spectra, dataset PCA, subspace rotation and SEP of feature maps, beside null models.
Give --features; or --data with --model; or --data with --student and --teacher.
Under torchrun the processes share the images; the figures do not depend on their number."""


def diagnose(words: Sequence[str]) -> int:
    """Runs `featkd diagnose` with the arguments of a command line; returns the exit code."""
    args = parser().parse_args(words)
    interrupt.loading_done()
    check_folders(args, ("json",))
    settings = Settings(**{f.name: _as_tuple(args[f.name]) for f in fields(Settings)})
    values = {field.name: args[field.name] for field in _option_fields()}
    config = DiagnoseConfig(**values, settings=settings, command=_command(words))
    is_main = os.environ.get("RANK", "0") == "0"
    for name in config.random_models if is_main and not args.quiet else ():
        print(f"featkd: {name} {args[name]} has random weights", file=sys.stderr)
    try:
        findings = run_diagnose(config, quiet=args.quiet)
    except Interrupted as stop:
        hint = f"the same command continues from {args.out}/state"
        print(f"featkd: {stop}; {hint}", file=sys.stderr)
        return 128 + stop.signal
    if findings.layers:  # on process 0
        out = Path(args.out)
        if args.json is not None:
            with atomic_write(Path(args.json)) as file:
                file.write((out / "summary.json").read_bytes())
        speed = findings.images_per_s
        where = " in process 0" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        pace = "" if speed is None else f", {speed:.1f} images/s{where}"
        with results_unless(args.quiet):
            print(*findings.conclusions(), sep="\n")
            print(f"{plural(findings.images, 'image')}{pace}: {out / 'report.html'}")
        if args.quiet and findings.left_out:  # in the conclusions otherwise
            count = plural(len(findings.left_out), "image")
            print(f"featkd: {count} left out, listed in {out}/summary.json", file=sys.stderr)
    return 0


def _command(words: Sequence[str]) -> str:
    """The command line, including the torchrun call that started several processes."""
    launcher = ["featkd"]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        nodes = [] if local == processes else ["--nnodes", str(processes // local)]
        launcher = ["torchrun", *nodes, "--nproc-per-node", str(local), "-m", "featkd"]
    return shlex.join([*launcher, "diagnose", *words])


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _option_fields() -> list[Any]:
    """Fields of `DiagnoseConfig` that become options; those of `Settings` are added as a group."""
    return [f for f in fields(DiagnoseConfig) if f.name not in ("settings", "command")]


def parser() -> Parser:
    """Returns the parser; options, defaults and help texts are those of the dataclasses."""
    parser = Parser(
        prog="featkd diagnose",
        description=_DESCRIPTION,
        examples=(
            "featkd diagnose --model runs/cifar/best.pt --data CIFAR/test --out report",
            "featkd diagnose --student deit_tiny_patch16_224 --teacher cait_s24_224 --pretrained "
            "--data PHOTOS --out report",
        ),
    )
    hints = get_type_hints(DiagnoseConfig)
    texts = {p.arg_name: p.description for p in parse(DiagnoseConfig.__doc__ or "").params}
    for field in _option_fields():
        how: dict[str, Any] = {"type": hints[field.name], "default": field.default}
        if hints[field.name] is bool:
            how = {"action": "store_true"}
        if field.name == "out":
            how = {"type": str, "required": True}
        parser.add_argument(f"--{field.name}", help=texts[field.name], **how)
    add_json(parser)
    add_quiet(parser)
    parser.add_class_arguments(Settings)
    return parser

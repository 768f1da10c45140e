"""`featkd diagnose`: builds a `DiagnoseConfig` from the command line and prints the findings."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from featkd.cli.arguments import Parser, add_json, add_quiet, from_options
from featkd.cli.output import results_unless, warn
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
    settings = from_options(Settings, args)
    config = from_options(DiagnoseConfig, args, settings=settings, command=_command(words))
    is_main = os.environ.get("RANK", "0") == "0"
    for name in config.random_models if is_main and not args.quiet else ():
        warn(f"{name} {args[name]} has random weights")
    try:
        findings = run_diagnose(config, quiet=args.quiet)
    except Interrupted as stop:
        warn(f"{stop}; the same command continues from {args.out}/state")
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
            warn(f"{count} left out, listed in {out}/summary.json")
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
    parser.add_options_of(DiagnoseConfig, skip=("settings", "command"), out=str)
    add_json(parser)
    add_quiet(parser)
    parser.add_class_arguments(Settings)
    return parser

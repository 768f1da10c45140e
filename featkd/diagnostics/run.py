"""The entry point of the diagnostics: `diagnose` takes a configuration and returns findings."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from featkd.diagnostics.build_source import build_source
from featkd.diagnostics.config import DiagnoseConfig
from featkd.diagnostics.findings import Findings
from featkd.diagnostics.model_features import ModelFeatures
from featkd.diagnostics.process_run import ProcessRun
from featkd.diagnostics.source import Source
from featkd.diagnostics.student_reach import StudentReach, student_reach
from featkd.models.lift import LiftStudent
from featkd.runtime import distributed, environment
from featkd.runtime.distributed import ProcessContext


def diagnose(config: DiagnoseConfig, *, quiet: bool = False) -> Findings:
    """Measures the mismatch of feature maps in two passes over the images.

    Under torchrun each process calls this with the same configuration and computes a share of the
    images; the figures are the same for any number of processes. A progress bar is shown if
    stderr is a terminal.

    Args:
        config: source of the feature maps, output folder and settings.
        quiet: show no progress bar.

    Returns:
        The findings, already written if `config.out` is set. Under torchrun process 0 has them;
        on the other processes they are empty.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM stopped the run. If `config.out` is set, its state is
            saved there, and the same call continues it.
        FileNotFoundError: a folder, a checkpoint or every image is missing.
        UnreadableError: an image or a feature file cannot be used, with on_bad "error".
        StateError: `config.out` holds the state of another run.
        ValueError: a field does not fit the models or files.

    Examples:
        >>> import tempfile, numpy as np
        >>> from featkd.diagnostics import DiagnoseConfig, Settings, diagnose
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for number, maps in enumerate(np.random.default_rng(0).normal(size=(6, 2, 16, 8))):
        ...         np.save(f"{folder}/{number}.npy", maps)  # (layers, tokens, channels)
        ...     findings = diagnose(DiagnoseConfig(features=folder, settings=Settings(sample=4)))
        >>> findings.images, [str(layer) for layer in findings.layers]
        (6, ['layer 0', 'layer 1'])
        >>> findings.conclusions()[0]
        "Layer 1: the maps' energy ranks are no lower than those of noise of the same size."
    """
    with ExitStack() as stack:
        context = stack.enter_context(distributed.joined(config.device))
        remedy = f"the same command continues from {config.out}/state"
        if config.out is None:
            remedy = "start the run again"
        stack.enter_context(distributed.explain_lost_processes(remedy))
        folder = config.out
        if folder is None:  # the features for the second pass still need a place on disk
            folder = stack.enter_context(TemporaryDirectory(prefix="featkd-diagnose-"))
        return _run(config, context, Path(folder) / "state", quiet)


def _run(config: DiagnoseConfig, context: ProcessContext, folder: Path, quiet: bool) -> Findings:
    source = build_source(config, context.device)
    run = ProcessRun(source, config, folder, context, quiet)
    findings = run.run()
    if findings is not None:
        about = _about(config, source)
        findings = replace(findings, reach=_reach(findings, source), about=about)
        if config.out is not None:
            findings.write(config.out)
    run.clear()
    return findings or Findings()


def _reach(findings: Findings, source: Source) -> list[StudentReach]:
    """Limits of the student on each teacher layer; a Lift student has its width before the lift."""
    layers = findings.layers.items()
    widths = {layer.index: r.channels for layer, r in layers if layer.model == "student"}
    if not widths or not isinstance(source, ModelFeatures):
        return []
    student = source.model("student")
    width = student.embed_dim if isinstance(student, LiftStudent) else widths[max(widths)]
    return [student_reach(layer, r, width) for layer, r in layers if layer.model == "teacher"]


def _about(config: DiagnoseConfig, source: Source) -> dict[str, Any]:
    return {
        "command": config.command or config.call(),
        "run": config.describe(),
        "source": source.identity(),
        "settings": asdict(config.settings),
        "facts": {
            **environment.versions(),
            "commit": environment.commit(),
            "uncommitted changes": "yes" if environment.has_changes() else "no",
            **environment.machine(),
            "processes": os.environ.get("WORLD_SIZE", "1"),
        },
    }

"""Runs on several processes, killed, interrupted and resumed: the figures are the same."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from featkd.cli import diagnose
from featkd.cli.main import main
from featkd.diagnostics import process_run
from tests.diagnostics.commands import arguments, copy_with_bad_value, figures

pytestmark = pytest.mark.usefixtures("one_thread")


def test_four_processes_give_the_same_figures(features, uninterrupted, tmp_path, server):
    result = server.call(*arguments(features, tmp_path), elastic=4)
    assert result.returncode == 0, result.stderr
    assert figures(tmp_path) == figures(uninterrupted)
    about = json.loads((tmp_path / "summary.json").read_text())["about"]
    assert about["command"].startswith("torchrun --nproc-per-node 4 -m featkd diagnose --features")


def test_lost_process_is_reported(features, tmp_path, server):
    """Process 1 stops at a NaN, while process 0 waits for it at the end of the pass."""
    folder = copy_with_bad_value(features, tmp_path / "features", "006.npy", count=8)
    ranks = server.ranks(2, *arguments(folder, tmp_path / "out", "--device", "cpu"))
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert "006.npy: layer 0: NaN" in ranks[1].stderr
    message = ranks[0].stderr.splitlines()[-1]
    assert message.startswith(f"featkd: lost rank 1 (process {ranks[1].pid} on host ")
    assert f"the same command continues from {tmp_path}/out/state" in message
    assert "Traceback" not in ranks[0].stderr


@pytest.mark.usefixtures("no_figures")
def test_killed_run_is_resumed(features, uninterrupted, tmp_path, server):
    words = arguments(features, tmp_path, "--save-seconds", "0", "--batch-size", "4")
    state = tmp_path / "state" / "process-0-of-1.pt"
    process = server.start(*words, "--device", "cpu")
    while process.poll() is None and not state.exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert torch.load(state)["state"]["pass"] == 1
    assert main(words) == 0
    assert figures(tmp_path) == figures(uninterrupted)
    assert not (tmp_path / "state").exists()


@pytest.mark.usefixtures("no_figures")
def test_state_of_another_run_is_refused(features, tmp_path, capsys, monkeypatch):
    update = process_run.LayerDiagnostics.update

    def fail_late(self, *arguments):
        if self.images >= 8:
            raise OSError(28, "No space left on device")
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(process_run.LayerDiagnostics, "update", fail_late)
        assert main(arguments(features, tmp_path, "--save-seconds", "0")) == 1
    assert "No space left" in capsys.readouterr().err
    assert main(arguments(features, tmp_path, "--layers", "[1]")) == 1
    message = capsys.readouterr().err
    assert "is the state of another run" in message
    assert "layers: [0, 1] there, [1] here" in message
    assert main(arguments(features, tmp_path, "--resume", "never", "--layers", "[1]")) == 0


@pytest.mark.usefixtures("no_figures")
def test_full_disk_keeps_the_saved_state(
    features, uninterrupted, tmp_path, server, capsys, monkeypatch
):
    """Writing kept maps fails half-way; with more room the same command continues."""
    words = arguments(features, tmp_path, "--save-seconds", "0", "--device", "cpu")
    failed = server.call(*words, file_size=10_000)  # less than the maps of a chunk
    assert failed.returncode == 1
    message = f"could not write {tmp_path}/state/kept-0.safetensors: "
    assert message in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    write = Path.write_bytes

    def fail_late(self, content):
        if self.name == "kept-3.safetensors":
            write(self, content[:100])
            raise OSError(28, "No space left on device")
        write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail_late)
        assert main(words) == 1
    assert "kept-3.safetensors: [Errno 28] No space left" in capsys.readouterr().err
    assert 0 < torch.load(tmp_path / "state" / "process-0-of-1.pt")["state"]["done"] < 4
    assert main(words) == 0
    assert figures(tmp_path) == figures(uninterrupted)


@pytest.mark.usefixtures("no_figures")
def test_kept_features_without_a_state_are_discarded(features, uninterrupted, tmp_path):
    """A run that ends before its first state leaves kept features only."""
    folder = copy_with_bad_value(
        features, tmp_path / "features", "030.npy", at=(0, 0, 0), value=np.inf
    )
    assert main(arguments(folder, tmp_path / "out", "--prefix-tokens", "0")) == 1
    assert list((tmp_path / "out" / "state").glob("kept-*"))
    assert not list((tmp_path / "out" / "state").glob("*.pt"))
    assert main(arguments(features, tmp_path / "out")) == 0
    assert figures(tmp_path / "out") == figures(uninterrupted)


@pytest.mark.usefixtures("no_figures")
def test_interrupted_run_is_resumed(features, uninterrupted, tmp_path, capsys, monkeypatch):
    update = process_run.LayerDiagnostics.update
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(self, *arguments):
        if self.images == 8 and signal.getsignal(signal.SIGTERM) is not before:
            signal.raise_signal(signal.SIGTERM)  # a second one would end this process
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(process_run.LayerDiagnostics, "update", interrupt)
        assert main(arguments(features, tmp_path)) == 128 + signal.SIGTERM
    message = f"the same command continues from {tmp_path}/state"
    assert message in capsys.readouterr().err
    assert torch.load(tmp_path / "state" / "process-0-of-1.pt")["state"]["done"] == 3
    assert main(arguments(features, tmp_path)) == 0
    assert figures(tmp_path) == figures(uninterrupted)


@pytest.mark.parametrize(
    ("processes", "local", "launcher"),
    [
        (1, None, "featkd"),
        (4, "4", "torchrun --nproc-per-node 4 -m featkd"),
        (8, "4", "torchrun --nnodes 2 --nproc-per-node 4 -m featkd"),
        (2, None, "torchrun --nproc-per-node 2 -m featkd"),  # another launcher
    ],
)
def test_command_includes_its_launcher(monkeypatch, processes, local, launcher):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert diagnose._command(["--out", "a b"]) == f"{launcher} diagnose --out 'a b'"

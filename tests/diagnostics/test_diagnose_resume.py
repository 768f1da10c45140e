"""`featkd diagnose` on several processes, killed, and going on: no figure depends on it."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest
import torch

from featkd.cli import diagnose
from featkd.cli.main import main
from featkd.diagnostics import run
from featkd.runtime.distributed import ProcessContext
from tests.diagnostics.commands import arguments, figures, spoiled

pytestmark = pytest.mark.usefixtures("one_thread")


def test_four_processes_give_the_same(features, unbroken, tmp_path, server):
    result = server.call(*arguments(features, tmp_path), elastic=4)
    assert result.returncode == 0, result.stderr
    assert figures(tmp_path) == figures(unbroken)
    about = json.loads((tmp_path / "summary.json").read_text())["about"]
    assert about["command"].startswith("torchrun --nproc-per-node 4 -m featkd diagnose --features")


def test_a_lost_process_is_named(features, tmp_path, server):
    """Process 1 stops at its file with a NaN; process 0 waits for it at the end of the pass."""
    folder = spoiled(features, tmp_path / "features", "006.npy", count=8)
    ranks = server.ranks(2, *arguments(folder, tmp_path / "out", "--device", "cpu"))
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert "006.npy: layer 0: NaN" in ranks[1].stderr
    said = ranks[0].stderr.splitlines()[-1]
    assert said.startswith("featkd: another process of the run has ended")
    assert f"the same command goes on from {tmp_path}/out/state" in said
    assert "Traceback" not in ranks[0].stderr


@pytest.mark.usefixtures("no_figures")
def test_killed_and_resumed_gives_the_same(features, unbroken, tmp_path, server):
    words = arguments(features, tmp_path, "--save-seconds", "0", "--batch-size", "4")
    state = tmp_path / "state" / "process-0-of-1.pt"
    process = server.start(*words, "--device", "cpu")
    while process.poll() is None and not state.exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was faster than the kill"
    assert torch.load(state)["state"]["pass"] == 1
    assert main(words) == 0
    assert figures(tmp_path) == figures(unbroken)
    assert not (tmp_path / "state").exists()


@pytest.mark.usefixtures("no_figures")
def test_state_of_another_run_is_refused(features, tmp_path, capsys, monkeypatch):
    interrupted = run.LayerDiagnostics.update

    def fail_late(self, *arguments):
        if self.images >= 8:
            raise OSError(28, "No space left on device")
        interrupted(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run.LayerDiagnostics, "update", fail_late)
        assert main(arguments(features, tmp_path, "--save-seconds", "0")) == 1
    assert "No space left" in capsys.readouterr().err
    assert main(arguments(features, tmp_path, "--layers", "[1]")) == 1
    message = capsys.readouterr().err
    assert "is the state of another run" in message
    assert "layers: [0, 1] there, [1] here" in message
    assert main(arguments(features, tmp_path, "--resume", "never", "--layers", "[1]")) == 0


def test_a_full_disk_costs_nothing_that_was_saved(features, unbroken, tmp_path, server):
    """The write of a kept map fails half-way; the same command goes on, given more room."""
    words = arguments(features, tmp_path, "--save-seconds", "0", "--device", "cpu")
    size = 80_000  # more than a state takes, and half of what is kept of a layer
    failed = server.call(*words, file_size=size)
    assert failed.returncode == 1
    message = f"File too large: '{tmp_path}/state/kept-0-of-process-0.bin'"
    assert message in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    kept = (tmp_path / "state" / "kept-0-of-process-0.bin").stat().st_size
    state = torch.load(tmp_path / "state" / "process-0-of-1.pt")["state"]
    seen = sum(state["kept"]["lengths"])
    assert seen * 25 * 24 * 4 < kept == size  # the failed write left a part behind
    assert server.call(*words).returncode == 0
    assert figures(tmp_path) == figures(unbroken)


@pytest.mark.usefixtures("no_figures")
def test_what_a_run_left_before_its_first_state_is_not_taken_up(features, unbroken, tmp_path):
    """A NaN, a full disk or a kill in the first seconds leaves kept features and no state."""
    folder = spoiled(features, tmp_path / "features", "030.npy", at=(0, 0, 0), value=np.inf)
    assert main(arguments(folder, tmp_path / "out", "--prefix-tokens", "0")) == 1
    assert list((tmp_path / "out" / "state").glob("kept-*"))
    assert not list((tmp_path / "out" / "state").glob("*.pt"))
    assert main(arguments(features, tmp_path / "out")) == 0
    assert figures(tmp_path / "out") == figures(unbroken)


def test_a_bar_begins_where_the_run_goes_on(monkeypatch):
    """Or the images of before would count into its rate."""
    bars = []
    tqdm = diagnose.tqdm
    monkeypatch.setattr(diagnose, "tqdm", lambda **k: bars.append(k) or tqdm(**k))
    with diagnose._Progress(ProcessContext(0, 1, torch.device("cpu"))) as progress:
        for number, done in ((1, 40), (1, 44), (2, 0), (2, 4)):
            progress(number, done, 60)
    assert [bar["initial"] for bar in bars] == [40, 0]


@pytest.mark.parametrize(
    ("processes", "local", "launcher"),
    [
        (1, None, "featkd"),
        (4, "4", "torchrun --nproc-per-node 4 -m featkd"),
        (8, "4", "torchrun --nnodes 2 --nproc-per-node 4 -m featkd"),
        (2, None, "torchrun --nproc-per-node 2 -m featkd"),  # not torchrun's, but the same run
    ],
)
def test_the_command_has_its_launcher(monkeypatch, processes, local, launcher):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    words = ["--out", "a b"]
    assert diagnose._command(words, processes) == f"{launcher} diagnose --out 'a b'"

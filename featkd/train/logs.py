"""Where a run's figures go: CSV files, TensorBoard, and a progress bar."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from featkd.files import atomic_write


class CsvLog:
    """A CSV file with one row an event, cut back to the resumed update when a run goes on.

    Args:
        path: the file.
        columns: its columns; the first is the update after which the row was written.
        start: rows of later updates than this are dropped (they will be written again).
    """

    def __init__(self, path: Path, columns: tuple[str, ...], start: int) -> None:
        self.path = path
        self.columns = columns
        rows = [row for row in read_csv(path) if int(row[columns[0]]) <= start]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def write(self, row: Mapping[str, float | int | str]) -> None:
        """Append a row; on disk when this returns."""
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none where it is missing; a torn last line is left out."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


TRAIN_COLUMNS = ("update", "epoch", "lr", "loss", "logits_loss", "feature_loss", "images_per_s")
EVAL_COLUMNS = ("update", "epoch", "weights", "top1", "top5", "loss", "images")


class RunLog:
    """All of a run's outputs; a silent one for the processes that don't write.

    Args:
        folder: `metrics.csv`, `eval.csv` and TensorBoard's files go there; None is silent.
        start: update that the run goes on from.
        total: updates of the whole run.
        quiet: write the files, print nothing.
    """

    def __init__(self, folder: Path | None, start: int, total: int, quiet: bool = False) -> None:
        self.active = folder is not None
        self.quiet = quiet
        self.start = start
        self.total = total
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._train = CsvLog(folder / "metrics.csv", TRAIN_COLUMNS, start)
        self._eval = CsvLog(folder / "eval.csv", EVAL_COLUMNS, start)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="update",
            dynamic_ncols=True,
            disable=True if quiet else None,  # None: no bar where stderr is no terminal
            file=sys.stderr,
        )

    def advance(self) -> None:
        """Count one update on the bar; touches no tensor."""
        if self.active:
            self._bar.update()

    def train(self, row: Mapping[str, float | int | str]) -> None:
        """A row of TRAIN_COLUMNS."""
        if not self.active:
            return
        self._train.write(row)
        for name in TRAIN_COLUMNS[2:]:
            self._board.add_scalar(f"train/{name}", row[name], int(row["update"]))
        news = f"{row['images_per_s']} images/s, loss {float(row['loss']):.4f}"
        if self._bar.disable:  # no terminal: a line in the log instead
            self.say(f"update {row['update']} of {self.total}: {news}")
        else:
            self._bar.set_postfix_str(news)

    def evaluation(self, row: Mapping[str, float | int | str]) -> None:
        """A row of EVAL_COLUMNS."""
        if not self.active:
            return
        self._eval.write(row)
        for name in ("top1", "top5", "loss"):
            self._board.add_scalar(f"eval/{row['weights']}/{name}", row[name], int(row["update"]))
        self.say(
            f"epoch {row['epoch']} {row['weights']}: top-1 {float(row['top1']):.2f} %, "
            f"top-5 {float(row['top5']):.2f} %, loss {float(row['loss']):.4f} "
            f"({row['images']} images)"
        )

    def say(self, message: str) -> None:
        """A line for the user, above the bar."""
        if self.active and not self.quiet:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._board.close()
            self._train.close()
            self._eval.close()

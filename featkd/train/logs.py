"""Where a run's figures go: CSV files, TensorBoard, and a progress bar.

Object stores can't append. Behind a URL, rows and events are collected here and go up whole with
every checkpoint: those after it would be dropped by a resumed run anyway.
"""

from __future__ import annotations

import csv
import io
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

from featkd.runtime.files import atomic_write
from featkd.runtime.remote import Location, RemotePath


class CsvLog:
    """A CSV file with one row an event, cut back to the resumed update when a run goes on.

    Args:
        path: the file.
        columns: its columns; the first is the update after which the row was written.
        start: rows of later updates than this are dropped (they will be written again).
    """

    def __init__(self, path: Location, columns: tuple[str, ...], start: int) -> None:
        self.path = path
        rows = [row for row in read_csv(path) if int(row[columns[0]]) <= start]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())
        self._file: IO[str] = path.open("a", newline="") if isinstance(path, Path) else text
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def write(self, row: Mapping[str, float | int | str]) -> None:
        """Append a row; on disk when this returns, or behind a URL after `publish`."""
        with _naming(self.path):
            self._writer.writerow(row)
            self._file.flush()

    def publish(self) -> None:
        """Bring all rows to where they belong, if they are not there yet."""
        if isinstance(self._file, io.StringIO):
            with atomic_write(self.path) as file:
                file.write(self._file.getvalue().encode())

    def close(self) -> None:
        with _naming(self.path):
            self._file.close()


def read_csv(path: Location) -> list[dict[str, str]]:
    """The rows of a CSV file, none where it is missing; a torn last line is left out."""
    if not path.is_file():
        return []
    text = io.StringIO(path.read_bytes().decode(), newline="")
    return [row for row in csv.DictReader(text) if None not in row.values()]


class EventLog:
    """TensorBoard's files of a run.

    Its writer takes fsspec's URLs too, yet appends to the file at every single event, which an
    object store answers by copying the whole object.

    Args:
        folder: where they belong.
        start: update that the run goes on from; later events of an older writer don't count.
    """

    def __init__(self, folder: Location, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._aside = None if isinstance(folder, Path) else tempfile.TemporaryDirectory()
        self._local = Path(self._aside.name if self._aside else str(folder))
        self._board = SummaryWriter(str(self._local), purge_step=start + 1)

    def add(self, name: str, value: float | int | str, update: int) -> None:
        """A point of the curve `name`."""
        with _naming(self._folder):
            self._board.add_scalar(name, value, update)

    def publish(self) -> None:
        """Bring all events to where they belong, if they are not there yet."""
        if isinstance(self._folder, RemotePath):
            with _naming(self._folder):
                self._board.flush()
            for path in self._local.iterdir():
                (self._folder / path.name).replace_with(path.read_bytes())

    def close(self) -> None:
        with _naming(self._folder):
            self._board.close()
        if self._aside is not None:
            self._aside.cleanup()


@contextmanager
def _naming(place: Location) -> Iterator[None]:
    """Say where, which a write to an open file does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(place)) from error


TRAIN_COLUMNS = ("update", "epoch", "lr", "loss", "logits_loss", "feature_loss", "images_per_s")
EVAL_COLUMNS = ("update", "epoch", "weights", "top1", "top5", "loss", "images")


class RunLog:
    """All of a run's outputs; a silent one for the processes that don't write.

    Args:
        folder: `metrics.csv`, `eval.csv` and TensorBoard's files go there, on disk or behind a
            URL; None is silent.
        start: update that the run goes on from.
        total: updates of the whole run.
        quiet: write the files, print nothing.
        due: the evaluation at `start` is still to come: rows of one that was cut short are dropped.
            (Its TensorBoard points, if any, come twice: a purge would take the training's as well.)
    """

    def __init__(
        self,
        folder: Location | None,
        start: int,
        total: int,
        quiet: bool = False,
        *,
        due: bool = False,
    ) -> None:
        self.active = folder is not None
        self.quiet = quiet
        self.total = total
        if folder is None:
            return
        self._train = CsvLog(folder / "metrics.csv", TRAIN_COLUMNS, start)
        self._eval = CsvLog(folder / "eval.csv", EVAL_COLUMNS, start - due)
        self._board = EventLog(folder / "tensorboard", start)
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
            self._board.add(f"train/{name}", row[name], int(row["update"]))
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
            self._board.add(f"eval/{row['weights']}/{name}", row[name], int(row["update"]))
        self.say(
            f"epoch {row['epoch']} {row['weights']}: top-1 {float(row['top1']):.2f} %, "
            f"top-5 {float(row['top5']):.2f} %, loss {float(row['loss']):.4f} "
            f"({row['images']} images)"
        )

    def say(self, message: str) -> None:
        """A line for the user, above the bar."""
        if self.active and not self.quiet:
            tqdm.write(message, file=sys.stderr)

    def publish(self) -> None:
        """Bring everything to where it belongs; to be called before a checkpoint is saved."""
        if self.active:
            for log in (self._train, self._eval, self._board):
                log.publish()

    def close(self) -> None:
        """Close the files; what can't be written any more is said, as an error may be under way."""
        if not self.active:
            return
        self._bar.close()
        for step in (self.publish, self._board.close, self._train.close, self._eval.close):
            try:
                step()
            except OSError as error:
                self.say(f"the end of the logs is missing: {error}")

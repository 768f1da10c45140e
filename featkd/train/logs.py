"""Logs of a run: CSV files, TensorBoard, trackers and a progress bar.

Object stores can't append. Behind a URL, rows and events are therefore buffered and uploaded with
each checkpoint. A resumed run drops later rows in any case.
"""

from __future__ import annotations

import csv
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tqdm import tqdm

from featkd.runtime.files import atomic_link, atomic_write
from featkd.runtime.names import plural, printable_lines
from featkd.runtime.remote import Location
from featkd.train.trackers import Tracker, one_line


class CsvLog:
    """CSV file with one row per event.

    Args:
        path: the file.
        columns: columns; "update" is the one after which the row was written.
        start: existing rows of later updates are dropped; the resumed run writes them again.

    Attributes:
        kept: rows of the file that this one continues.
        note: message for the user if the file holds other content than rows of this log; it is
            then kept under another name.
    """

    def __init__(self, path: Location, columns: tuple[str, ...], start: int) -> None:
        self.path = path
        self.note = ""
        found, stray = _read_rows(path, columns)
        if stray:
            aside = _set_aside(path)
            self.note = f"{path}: {stray}; the file is kept as {aside}, its other rows are used"
        self.kept = [row for row in found if int(row["update"]) <= start]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.kept)
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())
        self._file: IO[str] = path.open("a", newline="") if isinstance(path, Path) else text
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def write(self, row: Mapping[str, float | int | str]) -> None:
        """Appends a row; it is on disk when this returns, or behind a URL after `publish`."""
        with _naming(self.path):
            self._writer.writerow(row)
            self._file.flush()

    def publish(self) -> None:
        """Uploads all rows if the file is behind a URL."""
        if isinstance(self._file, io.StringIO):
            with atomic_write(self.path) as file:
                file.write(self._file.getvalue().encode())

    def close(self) -> None:
        with _naming(self.path):
            self._file.close()


def read_csv(path: Location) -> list[dict[str, str]]:
    """Reads the rows of a log; none if it is missing, and without a truncated last line."""
    return _read_rows(path)[0]


def _read_rows(path: Location, columns: Sequence[str] = ()) -> tuple[list[dict[str, str]], str]:
    """Reads the rows of a log that a user or another program may have edited.

    Returns:
        The rows whose update is a number, and a description of the first other line; "" without
        one. A truncated last line, which a killed run leaves, is dropped.
    """
    if not path.is_file():
        return [], ""
    text = path.read_bytes().decode(errors="replace").replace("\0", "\ufffd")
    lines = [line.rstrip("\r") for line in text.split("\n")[:-1]]
    if not lines:
        return [], ""
    header = next(csv.reader(lines[:1]), [])
    if "update" not in header:
        return [], f"line 1 is {lines[0][:60]!r}, expected {','.join(columns)!r}"
    rows, stray = [], ""
    for number, line in enumerate(lines[1:], 2):
        try:
            values = next(csv.reader([line]), [])
        except csv.Error:  # a field of more than 128 KB
            values = []
        row = dict(zip(header, values, strict=False))
        update = row.get("update", "")
        if len(values) == len(header) and update.isascii() and update.isdigit():
            rows.append(row)
        else:
            expected = f"{len(header)} values, update a whole number"
            stray = stray or f"line {number} is {line[:60]!r}, expected {expected}"
    return rows, stray


def _set_aside(path: Location) -> Location:
    """Copies a file to the first free name "<name>.<n>.bak"; returns the new name."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}.bak")).exists():
        number += 1
    atomic_link(path, aside)
    return aside


class EventLog:
    """TensorBoard events of a run.

    TensorBoard's writer accepts fsspec URLs, but appends after every event, and object stores copy
    the whole object each time. It refuses paths that are not UTF-8. In both cases events are
    written to a temporary folder first.

    Args:
        folder: folder of the event files.
        start: update that the run resumes from; later events in the folder are purged.
    """

    def __init__(self, folder: Location, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        is_utf8 = os.fsencode(str(folder)).decode(errors="replace") == str(folder)
        direct = isinstance(folder, Path) and is_utf8
        self._temporary = None if direct else tempfile.TemporaryDirectory()
        self._local = Path(self._temporary.name if self._temporary else str(folder))
        self._board = SummaryWriter(str(self._local), purge_step=start + 1)

    def add(self, name: str, value: float, update: int) -> None:
        """Adds a point to the curve `name`."""
        with _naming(self._folder):
            self._board.add_scalar(name, value, update)

    def publish(self) -> None:
        """Copies all events from the temporary folder, if there is one."""
        if self._temporary is None:
            return
        with _naming(self._folder):
            self._board.flush()
            if isinstance(self._folder, Path):
                self._folder.mkdir(exist_ok=True)
        for path in self._local.iterdir():
            with atomic_write(self._folder / path.name) as file:
                file.write(path.read_bytes())

    def close(self) -> None:
        with _naming(self._folder):
            self._board.close()
        if self._temporary is not None:
            self._temporary.cleanup()


@contextmanager
def _naming(place: Location) -> Iterator[None]:
    """Adds the path to an OSError; a failed write to an open file does not name it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(place)) from error


# New columns are appended: rows of an earlier version's file get empty values.
TRAIN_COLUMNS = (
    *("update", "epoch", "lr", "loss", "logits_loss", "feature_loss", "images_per_s"),
    "pooled_loss",
)
# A run without labels has no top1 and top5; only such a run has the last three.
EVAL_COLUMNS = (
    *("update", "epoch", "weights", "top1", "top5", "loss", "images"),
    *("knn_top1", "logits_loss", "feature_loss", "pooled_loss"),
)
_EVAL_TEXTS = {
    "top1": "top-1 {:.2f} %",
    "top5": "top-5 {:.2f} %",
    "knn_top1": "kNN top-1 {:.2f} %",
    "loss": "loss {:.4f}",
}


class RunLog:
    """Writes all logs of a run; does nothing on processes other than the main one.

    Args:
        folder: folder or URL of `metrics.csv`, `eval.csv` and TensorBoard's files; None writes
            nothing.
        start: update that the run resumes from.
        total: updates of the whole run.
        quiet: write the files, but print warnings only.
        evaluation_pending: drop rows of an interrupted evaluation at `start`, which is repeated.
            Its TensorBoard points are not dropped: that would drop training points as well.
        trackers: they receive the rows of both files, first those of earlier sessions. One that
            fails receives no more; the run goes on.
    """

    def __init__(
        self,
        folder: Location | None,
        start: int,
        total: int,
        quiet: bool = False,
        *,
        evaluation_pending: bool = False,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.active = folder is not None
        self.quiet = quiet
        self.total = total
        self.notes: list[str] = []  # for the user
        self._trackers = [*trackers]
        self._failed: set[str] = set()  # trackers that get no more rows
        if folder is None:
            return
        self._train = CsvLog(folder / "metrics.csv", TRAIN_COLUMNS, start)
        self._eval = CsvLog(folder / "eval.csv", EVAL_COLUMNS, start - evaluation_pending)
        self._board = EventLog(folder / "tensorboard", start)
        self.notes = [log.note for log in (self._train, self._eval) if log.note]
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="update",
            dynamic_ncols=True,
            disable=True if quiet else None,  # None: no bar unless stderr is a terminal
            file=sys.stderr,
        )
        kept = [*self._train.kept, *self._eval.kept]
        for row in sorted(kept, key=lambda row: int(row["update"])):
            self._track(_points(row), int(row["update"]))

    def advance(self) -> None:
        """Advances the bar by one update."""
        if self.active:
            self._bar.update()

    def train(self, row: Mapping[str, float | int | str]) -> None:
        """Writes a row of TRAIN_COLUMNS."""
        if not self.active:
            return
        self._train.write(row)
        self._add(row)
        summary = f"{row['images_per_s']} images/s, loss {float(row['loss']):.4f}"
        if self._bar.disable:
            self.message(f"update {row['update']} of {self.total}: {summary}")
        else:
            self._bar.set_postfix_str(summary)

    def evaluation(self, row: Mapping[str, float | int | str]) -> None:
        """Writes a row of EVAL_COLUMNS; scores that the run does not have may be missing."""
        if not self.active:
            return
        self._eval.write(row)
        self._add(row)
        texts = [text.format(row[name]) for name, text in _EVAL_TEXTS.items() if name in row]
        self.message(
            f"epoch {row['epoch']} {row['weights']}: {', '.join(texts)} "
            f"({plural(int(row['images']), 'image')})"
        )

    def _add(self, row: Mapping[str, float | int | str]) -> None:
        points, update = _points(row), int(row["update"])
        for name, value in points.items():
            self._board.add(name, value, update)
        self._track(points, update)

    def _track(self, points: Mapping[str, float], update: int) -> None:
        for tracker in self._trackers:
            if tracker.name in self._failed:
                continue
            try:
                tracker.log(points, update)
            except Exception as error:  # a tracker's, of any type
                self._failed.add(tracker.name)
                self.message(
                    f"{tracker.name}: gets no rows from update {update} on: {one_line(error)}; the "
                    "run goes on, and sends them when it is resumed",
                    warning=True,
                )

    def message(self, text: str, *, warning: bool = False) -> None:
        """Prints a line above the bar; only warnings if `quiet` is set."""
        if self.active and (warning or not self.quiet):
            tqdm.write(printable_lines(text), file=sys.stderr)

    def publish(self) -> None:
        """Uploads everything if behind a URL; called before a checkpoint is saved."""
        if self.active:
            for log in (self._train, self._eval, self._board):
                log.publish()

    def close(self, *, complete: bool = True) -> None:
        """Closes the files; errors are printed, so as not to hide one that ended the run.

        Args:
            complete: the run has reached its last epoch.
        """
        if not self.active:
            return
        self._bar.close()
        for step in (self.publish, self._board.close, self._train.close, self._eval.close):
            try:
                step()
            except OSError as error:
                self.message(f"the end of the logs is missing: {error}", warning=True)
        for tracker in self._trackers:
            try:
                tracker.close(complete=complete and tracker.name not in self._failed)
            except Exception as error:
                self.message(f"{tracker.name}: {one_line(error)}", warning=True)


def _points(row: Mapping[str, float | int | str]) -> dict[str, float]:
    """Values of a row by curve; without those that are missing, or text in an edited file."""
    prefix, names = "train", [*TRAIN_COLUMNS[1:]]
    if "weights" in row:
        prefix, names = f"eval/{row['weights']}", [*EVAL_COLUMNS[3:]]
        names.remove("images")
    points = {}
    for name in names:
        with suppress(ValueError):
            points[f"{prefix}/{name}"] = float(row.get(name, ""))
    return points

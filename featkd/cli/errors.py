"""Messages and exit codes of the errors that a user can correct."""

from __future__ import annotations

from featkd.cli.arguments import UsageError


def described(error: Exception) -> tuple[str, int] | None:
    """Return the message and the exit code of an error.

    Returns:
        Code 1 for a failed run and 2 for bad arguments; None for a bug, to be shown with its
        traceback.
    """
    if isinstance(error, UsageError):
        return str(error), 2
    # not at the top: loading torch would delay the message above by seconds
    from featkd.cache import CacheError
    from featkd.data.imageset import DATA_ERRORS
    from featkd.data.workers import is_worker_error
    from featkd.diagnostics.source import UnreadableError
    from featkd.diagnostics.state import StateError
    from featkd.evaluation.topk import EvaluationError
    from featkd.models.export import ExportError
    from featkd.runtime.heartbeat import ProcessLost
    from featkd.train.checkpoint import CheckpointError
    from featkd.train.meter import TrainingDiverged
    from featkd.train.trackers import TrackerError

    failures = (
        *DATA_ERRORS, CacheError, CheckpointError, EvaluationError, ExportError, ProcessLost,
        StateError, TrackerError, TrainingDiverged, UnreadableError,
    )  # fmt: skip
    if isinstance(error, failures):  # first: some are ValueErrors
        return str(error), 1
    if isinstance(error, (ValueError, TypeError, FileNotFoundError, NotADirectoryError)):
        return str(error), 2
    if isinstance(error, OSError) or type(error) is ImportError:  # a missing optional dependency
        return str(error), 1
    if isinstance(error, RuntimeError) and is_worker_error(error):
        return f"{error} It was killed, perhaps for lack of memory.", 1
    return None

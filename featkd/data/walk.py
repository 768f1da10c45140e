"""Search of a folder for files, with one rule for hidden names and links in all commands."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from featkd.runtime.names import listed

_FolderId = tuple[int, int]  # device and inode


def is_hidden(name: str) -> bool:
    """Checks if a name is that of a hidden file or folder, which all commands skip."""
    return name.startswith(".")


def subfolders(folder: str) -> list[str]:
    """Returns the sorted names of the folders in `folder`, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not is_hidden(e.name) and _is_folder(e))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def find_files(
    folder: str, endings: tuple[str, ...], within: str | None = None
) -> tuple[list[str], list[str]]:
    """Searches a folder and the folders below it.

    Links to folders are followed. Each folder is read once, under its own name if it has one
    below `folder`. Links to folders above `folder` are not followed.

    Args:
        folder: the folder.
        endings: endings of the files, in lower case.
        within: folder that holds `folder`, if `folder` can be a link; links to it and to folders
            above it are not followed.

    Returns:
        The files, sorted by folder, then by name; and the links that were not followed.
    """
    seen = _folders_above(folder)
    if within is not None:
        seen |= {_folder_id(within)} | _folders_above(within)
    found: dict[str, list[str]] = {}
    links: list[str] = [folder]
    repeated: list[str] = []
    while links:
        # All real folders come before the next links, so that they are found under their own names.
        pending, links = links, []
        for start in sorted(pending):
            if (number := _folder_id(start)) in seen:
                repeated.append(start)
                continue
            seen.add(number)
            for place, folders, files in os.walk(start, onerror=_raise):
                if names := sorted(n for n in files if is_visible(n, endings)):
                    found[place] = names
                folders[:] = _new_folders(place, folders, seen, links)
    return [os.path.join(place, name) for place in sorted(found) for name in found[place]], repeated


def is_visible(name: str, endings: tuple[str, ...]) -> bool:
    """Checks if a name is not hidden and has one of the endings, given in lower case."""
    return not is_hidden(name) and name.lower().endswith(endings)


def _new_folders(place: str, names: list[str], seen: set[_FolderId], links: list[str]) -> list[str]:
    """Returns the real folders that were not read; extends `seen`, and `links` by the others."""
    new = []
    for name in names:
        path = os.path.join(place, name)
        if is_hidden(name):
            continue
        if os.path.islink(path):
            links.append(path)
        elif (number := _folder_id(path)) not in seen:
            seen.add(number)
            new.append(name)
    return new


def _raise(error: OSError) -> None:
    raise error


def _folders_above(folder: str) -> set[_FolderId]:
    return {_folder_id(above) for above in Path(folder).resolve().parents}


def _folder_id(folder: str | Path) -> _FolderId:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def warn_of_repeated_links(links: Iterable[str]) -> None:
    """Warns if links lead to folders that were already searched."""
    if links := sorted(links):
        warnings.warn(
            f"{len(links)} links to folders that contain them or were already searched are not "
            f"followed: {listed(links, 3)}",
            stacklevel=3,
        )

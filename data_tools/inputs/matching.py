"""Files that a pattern or the URL of a folder names, searched with limits.

Links may lead in circles, and a server may invent folders without end.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from electra_ds.common.errors import UserError
from electra_ds.common.printable import printable
from electra_ds.common.redaction import redacted

# Limits of the folders at a URL, for one input.
MAX_REMOTE_FOLDERS = 10_000
MAX_REMOTE_DEPTH = 32


def local_matches(pattern: str) -> Iterator[str]:
    """Yield the files and folders that a pattern matches, as `glob.iglob(recursive=True)` does.

    A folder that links reach several times is searched once for the part after `**`.
    """
    yield from _matches(pattern, set())


def _matches(pattern: str, searched: set[tuple[str, str | None]]) -> Iterator[str]:
    """searched: (real path of a folder, the part of the pattern after its `**`)."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    first = parts.index("**")
    before = "/".join(parts[:first]) + "/" * (parts[:first] == [""])
    after = "/".join(parts[first + 1 :]) if parts[first + 1 :] else None
    for start in glob.iglob(before) if before else [""]:
        left = [start] if os.path.isdir(start or ".") else []
        while left:
            folder = left.pop()
            key = (os.path.realpath(folder), after)
            if key in searched:
                continue
            searched.add(key)
            folders, files = _inside(folder)
            left += sorted(folders, reverse=True)
            if after:
                yield from _matches(os.path.join(glob.escape(folder), after), searched)
            else:
                found = (folder, *files) if after is None else (folder,)
                yield from filter(None, found)


def _inside(folder: str) -> tuple[list[str], list[str]]:
    """Return (folders, files) in a folder that are not hidden; none if it cannot be read."""
    try:
        names = [name for name in os.listdir(folder or ".") if not name.startswith(".")]
    except OSError:
        return [], []
    paths = [os.path.join(folder, name) for name in names]
    is_folder = {path: os.path.isdir(path) for path in paths}
    return [path for path in paths if is_folder[path]], [p for p in paths if not is_folder[p]]


class RemoteFolders:
    """Folders of a file system of fsspec, with limits of their number and depth.

    Methods raise UserError for more than MAX_REMOTE_FOLDERS folders, all calls together, or
    MAX_REMOTE_DEPTH levels of them.
    """

    def __init__(self, system: Any) -> None:
        self.system = system
        self.count = 0  # of the folders listed so far

    def files(self, path: str, *, is_folder: bool) -> Iterator[tuple[str, str]]:
        """Yield (path, path below the matched folder) of the files of a folder, or of a pattern.

        The second one is "" for a file that the pattern itself matches.
        """
        folders = [path.rstrip("/")] if is_folder else []
        if not is_folder:
            for info in self._matches(path):
                if info["type"] == "directory":
                    folders.append(info["name"].rstrip("/"))
                else:
                    yield info["name"], ""
        for folder in folders:
            for info in self._below(folder, None):
                name = info["name"].removeprefix(f"{folder}/")
                # A server may list files of other folders and of other servers.
                is_outside = name == info["name"] or ".." in re.split(r"[/\\]", unquote(name))
                if info["type"] != "directory" and not is_outside:
                    yield f"{folder}/{name}", name

    def _matches(self, pattern: str) -> Iterator[dict[str, Any]]:
        """Yield what a pattern of fsspec matches. Folders are left out if files in them match."""
        from fsspec.utils import glob_translate

        is_http = pattern.startswith(("http://", "https://"))  # there "?" begins a query
        fixed = re.split("[*[]" if is_http else "[*?[]", pattern, maxsplit=1)[0]
        root = fixed[: fixed.rfind("/") + 1]
        levels = None if "**" in pattern else pattern[len(root) :].count("/") + 1
        matcher = re.compile(glob_translate(pattern))
        for info in self._below(root, levels):
            is_repeated = info["type"] == "directory" and pattern.endswith("/**")
            if matcher.match(info["name"].rstrip("/")) and not is_repeated:
                yield info

    def _below(self, folder: str, levels: int | None) -> Iterator[dict[str, Any]]:
        """Yield the entries of a folder and of the folders below it."""
        name = folder.rstrip("/")
        for path, folders, files in self.system.walk(folder, maxdepth=levels, detail=True):
            depth = path.rstrip("/").removeprefix(name).count("/")
            if self.count >= MAX_REMOTE_FOLDERS or depth > MAX_REMOTE_DEPTH:
                raise UserError(
                    f"{printable(redacted(folder))}: more than {MAX_REMOTE_FOLDERS:,} folders, or "
                    f"{MAX_REMOTE_DEPTH} levels of them; give the folders with the texts one by one"
                )
            self.count += 1
            yield from (*folders.values(), *files.values())

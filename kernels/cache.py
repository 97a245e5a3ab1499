"""Where compiled and generated code is kept: a directory that only its owner can write to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def cache_dir() -> Path:
    """The directory for compiled and generated code, made with mode 0700. Raises BuildError if somebody else could write to it.

    Raises OSError where it cannot be made.
    """
    path = Path(os.environ.get("ATTNFUSE_CACHE_DIR") or _default())
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    refuse_unsafe(path, stat.S_ISDIR, "directory")
    return path


def _default() -> str | Path:
    try:
        import platformdirs
    except ImportError:
        # run from the source tree, with nothing installed
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnfuse"
    return platformdirs.user_cache_dir("attnfuse")


def refuse_unsafe(path: Path, right_kind: object, kind: str) -> None:
    """Raises BuildError for a path that is not what it should be, or that somebody else owns or may write to."""
    info = os.lstat(path)
    if stat.S_ISLNK(info.st_mode) or not right_kind(info.st_mode):  # type: ignore[operator]
        raise BuildError(f"the cache {kind} {path} is a symlink or not a {kind}; remove it or set ATTNFUSE_CACHE_DIR")
    if info.st_uid != os.getuid():
        raise BuildError(f"the cache {kind} {path} belongs to user {info.st_uid}, not to {os.getuid()}")
    if info.st_mode & 0o022:
        raise BuildError(
            f"the cache {kind} {path} is writable by others (mode {stat.S_IMODE(info.st_mode):o}); chmod go-w it"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file with mode 0600 so that a reader sees the old one or the new one, whole. Raises OSError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As write_text."""
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        os.chmod(temporary, 0o600)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_sealed(path: Path, content: bytes) -> None:
    """Write a file with its digest in front, for read_sealed. Raises OSError."""
    write_bytes(path, _digest(content) + b"\n" + content)


def read_sealed(path: Path) -> bytes | None:
    """What write_sealed wrote; None if there is no such file, or not as it was written.

    Raises BuildError for one that somebody else could have written, and OSError for one that cannot be read.
    """
    try:
        refuse_unsafe(path, stat.S_ISREG, "file")
        digest, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    return content if digest == _digest(content) else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()

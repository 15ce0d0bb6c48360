"""The connections of a gloo process group, to break them from the side of a rank that fails.

Torch has no call for it: ``ProcessGroup.abort`` does nothing for gloo, and ``destroy_process_group`` closes the connections
only when nobody holds the group any more, which DDP does. Until then the other ranks would wait, for as long as the failed
one takes to end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def noted_connections(into: dict[int, int]) -> Iterator[None]:
    """Note the TCP connections that are opened in this context: their file descriptors and inodes. Linux only, else none."""
    before = _connections()
    yield
    into.update({fd: inode for fd, inode in _connections().items() if before.get(fd) != inode})


def break_connections(noted: dict[int, int]) -> None:
    """Shut the connections down; whoever waits at the other end gets an error at once. Those that were closed are left alone."""
    here = _connections()
    for fd, inode in noted.items():
        if here.get(fd) == inode:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
                connection.shutdown(socket.SHUT_RDWR)


def _connections() -> dict[int, int]:
    """The TCP sockets of this process that are connected: inodes by file descriptor."""
    found: dict[int, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):  # not a socket, closed meanwhile, or not connected
                status = os.fstat(fd)
                if stat.S_ISSOCK(status.st_mode):
                    with socket.socket(fileno=os.dup(fd)) as connection:
                        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                            found[fd] = status.st_ino
    return found

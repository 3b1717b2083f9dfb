"""Terminals and standard inputs of executables: the side that stays outside the cell.

The spawner makes the pseudo-terminal or pipe, gives its inner side to the executable and keeps the outer one until
the executable is forgotten: so a terminal lives on while its client is away or is started again (a master that is
closed hangs up the session, tty_ioctl(4)). A terminal is handed out as often as asked; of a pipe there is one writing
end, handed out once, so that its holder can end the standard input by closing it.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios

from aether.spawner.protocol import RefusedError

_WINSIZE = struct.Struct("HHHH")


class Line:
    """The outer side of one executable's terminal (`tty`) or standard input (`pipe`)."""

    def __init__(self, kind: str, fd: int) -> None:
        self.kind = kind
        self._fd = fd

    def hand_out(self) -> int:
        """A descriptor for the client, the caller's to close; raises RefusedError NOT_READY when it is gone."""
        if self._fd < 0:
            raise RefusedError("NOT_READY", "cannot attach: the standard input was handed out before")
        if self.kind == "tty":
            return os.dup(self._fd)
        fd, self._fd = self._fd, -1
        return fd

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size; the kernel sends SIGWINCH. Raises RefusedError NOT_READY for a pipe."""
        if self.kind != "tty":
            raise RefusedError("NOT_READY", "cannot size the terminal: the executable has none")
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, _WINSIZE.pack(rows, columns, 0, 0))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_terminal() -> tuple[Line, int]:
    """A new pseudo-terminal: the outer side, and the inner one as a descriptor of the caller's."""
    outer, inner = os.openpty()
    return Line("tty", outer), inner


def open_input() -> tuple[Line, int]:
    """A pipe: its writing end as a line, its reading end as a descriptor of the caller's."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    return Line("pipe", writing), reading

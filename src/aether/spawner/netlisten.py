"""A listening socket on the loopback of a cell's network namespace, held outside of it.

A socket belongs to the namespace it was made in, whoever holds it (network_namespaces(7)): a process outside that
accepts on it serves the cell without a forwarder inside and without a route out. It is made by a forked child, since
joining a user namespace, which an unprivileged spawner must do first, cannot be undone (setns(2)); the child does
nothing else and runs nothing of the cell's.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import socket

_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000
BACKLOG = 128
_libc = ctypes.CDLL(None, use_errno=True)


def listen_inside(pidfd: int, port: int, network: int, *, join_user: bool) -> int:
    """A descriptor of a TCP socket that listens on 127.0.0.1:`port` in the network namespace of `pidfd`.

    `network` is that namespace's inode, so that a pid which was used again is nobody else's. `join_user`: by way of
    its user namespace, for a caller without CAP_SYS_ADMIN. Raises OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = os.fork()
        if child == 0:
            try:
                _serve(theirs, pidfd, port, network, _CLONE_NEWNET | (_CLONE_NEWUSER if join_user else 0))
            finally:
                os._exit(0)
        theirs.close()
        try:
            return _receive(ours)
        finally:
            os.waitpid(child, 0)


def _serve(to: socket.socket, pidfd: int, port: int, network: int, namespaces: int) -> None:
    """In the child: sends the listener, or the errno."""
    try:
        if _libc.setns(pidfd, namespaces) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        if os.stat("/proc/thread-self/ns/net").st_ino != network:  # noqa: PTH116
            raise OSError(errno.ESRCH, "another namespace")
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("127.0.0.1", port))
            listener.listen(BACKLOG)
            to.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener.fileno()]))])
    except OSError as error:
        to.send(str(error.errno).encode())


def _receive(of: socket.socket) -> int:
    size = array.array("i").itemsize
    data, ancillary, _, _ = of.recvmsg(16, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return array.array("i", content[:size])[0]
    number = int(data) if data.isdigit() else 0
    raise OSError(number, os.strerror(number) if number else "the child ended without an answer")

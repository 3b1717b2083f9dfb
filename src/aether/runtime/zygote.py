"""A started interpreter that becomes one job: `python -m aether.runtime.zygote [MODULE ...]`.

It imports the named modules, then waits on descriptor 3 for one SOCK_SEQPACKET message: JSON `{argv, env, cwd}` with
three descriptors, the job's stdin, stdout and stderr. `argv` is what would follow `python` on a command line: a
script, `-c CODE` or `-m MODULE`, then arguments. It runs that as `__main__` and ends with its exit status. The end
of the socket before an order ends it.

Unlike a fresh interpreter: `PYTHON...` variables of the job come too late to count; a module that could not be
imported shows only now, on the job's stderr; and after threads, atexit functions and flushing the process ends at
once, without tearing modules down (milliseconds with numpy loaded).
"""

from __future__ import annotations

import array
import atexit
import builtins
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import socket
import sys
import threading
import time
import traceback
from types import ModuleType
from typing import Any

CHANNEL_FD = 3
_ORDER_BYTES_MAX = 256 * 1024


def preload(modules: list[str]) -> str:
    """Import `modules`; the traceback of the first that cannot be, else nothing."""
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException:
            return traceback.format_exc()
    return ""


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The order and its descriptors; None at the end of the socket."""
    room = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    data, ancillary, _, _ = channel.recvmsg(_ORDER_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return (json.loads(data), list(fds)) if data else None


def take_place(order: dict[str, Any], fds: list[int]) -> None:
    """The job's streams, environment and directory; raises OSError."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()
    os.chdir(order["cwd"])


def run(argv: list[str]) -> None:
    """Run what `argv` names as `__main__`, as the interpreter's own command line would."""
    first, rest = argv[0], argv[1:]
    if first == "-m":
        sys.argv = rest
        sys.path[0] = os.getcwd()  # noqa: PTH109
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        code = compile(rest[0], "<string>", "exec")
    else:
        sys.argv, sys.path[0] = argv, os.path.dirname(os.path.realpath(first))  # noqa: PTH120
        main.__dict__["__file__"] = first
        with io.open_code(first) as file:
            code = compile(file.read(), first, "exec")
    exec(code, main.__dict__)


def status_of(argv: list[str]) -> int:
    """Run it; the exit status that the interpreter would have given."""
    try:
        run(argv)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        _show(error)
        return 1
    return 0


def _show(error: BaseException) -> None:
    """The traceback from the job's first own frame on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)


def leave(status: int) -> None:
    """Threads, atexit functions, buffers, then the end of the process."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120  # as CPython: the output could not be written
    os._exit(status)


def main() -> None:
    failure = preload(sys.argv[1:])
    gc.collect()
    gc.freeze()
    channel = socket.socket(fileno=CHANNEL_FD)
    with channel:
        received = receive(channel)
    if received is None:
        return
    order, fds = received
    status = 1
    try:
        take_place(order, fds)
        if failure:
            sys.stderr.write(failure)
        else:
            status = status_of(order["argv"])
    except OSError as error:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"cannot start: {error}\n")
    leave(status)


if __name__ == "__main__":
    main()

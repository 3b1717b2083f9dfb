"""An untrusted script: each attempt is something that a job must not be able to do.

Usage: intruder.py secret PATH | processes | network PORT | forks | memory | flood. Exits 0 only if an attempt
succeeded; its last line says what it met.
Harmless by construction: it reads, connects to this machine, and uses up nothing but its own bounds.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path


def secret(path: str) -> bool:
    """Read a file of the user who started the job."""
    for candidate in (path, f"/proc/1/root{path}", f"/proc/self/root/../..{path}"):
        try:
            with open(candidate) as file:
                print("the secret is", file.read())
                return True
        except OSError as error:
            print(f"open: {error.strerror}")
    return False


def processes() -> bool:
    """See what else runs on this machine."""
    own = {os.getpid(), os.getppid(), 1}
    others = [path for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) not in own]
    print(f"saw {len(others)} other processes")
    return bool(others)


def network(port: str) -> bool:
    """Reach a listener on this machine, or anything by name."""
    reached = False
    try:
        with socket.create_connection(("127.0.0.1", int(port)), timeout=2):
            print("reached the host's listener")
            reached = True
    except OSError as error:
        print(f"TCP to the host: {error.strerror}")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect(("192.0.2.1", 9))  # documentation address (RFC 5737); connecting UDP sends nothing
            print("there is a route to the world")
            reached = True
    except OSError as error:
        print(f"route to the world: {error.strerror}")
    return reached


def forks() -> bool:
    """Fork without end."""
    children: list[int] = []
    try:
        while len(children) < 4096:
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            children.append(pid)
    except OSError as error:
        print(f"no fork after {len(children)}: {error.strerror}")
        return False
    return True


def memory() -> bool:
    """Take a gibibyte, a mebibyte at a time."""
    taken: list[bytearray] = []
    try:
        while len(taken) < 1024:
            taken.append(bytearray(os.urandom(4096) * 256))
    except MemoryError:
        count = len(taken)
        taken.clear()
        print(f"no more memory after {count} MiB")
        return False
    return True


def flood() -> bool:
    """Write to stdout as fast as possible until the time is over."""
    line = b"all work and no play makes an agent a dull process\n" * 1024
    while True:
        os.write(1, line)


if __name__ == "__main__":
    attempts = {f.__name__: f for f in (secret, processes, network, forks, memory, flood)}
    sys.exit(0 if attempts[sys.argv[1]](*sys.argv[2:]) else 13)

"""bpf(2) by ctypes: maps, programs, raw tracepoints. Descriptors that are returned are the caller's and close-on-exec.

Commands and attribute layouts: include/uapi/linux/bpf.h. Every function raises OSError with the kernel's errno;
a program that the verifier refuses raises LoadError with the end of its log.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from typing import Final

from aether.spawner.linux import kernel

HASH, ARRAY, RING_BUFFER = 1, 2, 27
_MMAPABLE: Final = 1 << 10
_RAW_TRACEPOINT: Final = 17
_NUMBERS: Final = {"x86_64": 321, "aarch64": 280}
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD, _RAW_TRACEPOINT_OPEN = 0, 1, 2, 3, 5, 17
_ATTRIBUTES_BYTES: Final = 128
_LOG_BYTES: Final = 64 * 1024
_VERIFIER_LOG: Final = 1

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class LoadError(OSError):
    """The verifier refused a program; the text ends with its last words."""


def _bpf(command: int, attributes: bytes) -> int:
    number = _NUMBERS.get(kernel.ARCH)
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf: no system call number for {kernel.ARCH}")
    buffer = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    result: int = _syscall(ctypes.c_long(number), ctypes.c_long(command), buffer, ctypes.c_long(_ATTRIBUTES_BYTES))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf: {os.strerror(code)}")
    return result


def create_map(
    kind: int, key_bytes: int, value_bytes: int, entries_max: int, name: str, *, shared: bool = False
) -> int:
    """A map's descriptor; `shared`: an array that processes may mmap. A ring buffer's `entries_max` is its bytes."""
    flags = _MMAPABLE if shared else 0
    attributes = struct.pack("<5I8x16s", kind, key_bytes, value_bytes, entries_max, flags, name.encode()[:15])
    return _bpf(_MAP_CREATE, attributes)


def _element(fd: int, key: ctypes.Array[ctypes.c_char], value: ctypes.Array[ctypes.c_char] | None) -> bytes:
    return struct.pack("<I4xQQQ", fd, ctypes.addressof(key), ctypes.addressof(value) if value is not None else 0, 0)


def update(fd: int, key: bytes, value: bytes) -> None:
    """Insert or replace one element."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    _bpf(_MAP_UPDATE, _element(fd, key_buffer, value_buffer))


def lookup(fd: int, key: bytes, value_bytes: int) -> bytes | None:
    """A copy of one element; None when there is none."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value = ctypes.create_string_buffer(value_bytes)
    try:
        _bpf(_MAP_LOOKUP, _element(fd, key_buffer, value))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value.raw


def delete(fd: int, key: bytes) -> None:
    """Remove one element; a missing one is removed."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    try:
        _bpf(_MAP_DELETE, _element(fd, key_buffer, None))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def load(code: bytes, name: str) -> int:
    """A raw tracepoint program's descriptor. A refused one is verified again for the log, which costs time."""
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")  # the tracing helpers ask for it
    log = ctypes.create_string_buffer(_LOG_BYTES)

    def attempt(level: int) -> int:
        attributes = struct.pack(
            "<IIQQIIQII16s",
            _RAW_TRACEPOINT,
            len(code) // 8,
            ctypes.addressof(instructions),
            ctypes.addressof(licence),
            level,
            _LOG_BYTES if level else 0,
            ctypes.addressof(log) if level else 0,
            0,
            0,
            name.encode()[:15],
        )
        return _bpf(_PROG_LOAD, attributes)

    try:
        return attempt(0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
        with contextlib.suppress(OSError):
            return attempt(_VERIFIER_LOG)
        last = log.value.decode(errors="replace").strip().splitlines()[-4:]
        raise LoadError(error.errno, f"the verifier refused {name}: {' | '.join(last)}") from error


def attach(program: int, tracepoint: str) -> int:
    """The descriptor of the link: the program runs at each pass until it is closed everywhere."""
    name = ctypes.create_string_buffer(tracepoint.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("<QI", ctypes.addressof(name), program))

"""`python -m aether.runtime.cfcd --fd 3 --package DIR (--key FILE | --keys DIR)`: load, say Hello, serve.

Runs inside a cell without a network. Every package is verified before Hello; a package that is refused ends the start
with one line on stderr and the error's exit code. Exit 0 on SIGTERM, after what was received is answered, and on EOF.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import onnxruntime as ort  # type: ignore[import-untyped]
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aether.contract.errors import EXIT_UNREACHABLE, AetherError
from aether.contract.modelwire import PROTOCOL_VERSION, Hello
from aether.runtime.cfcd.service import Service, serve
from aether.runtime.inference import Inference
from aether.runtime.modelpackage import load_package, load_public_key

_LOG_ERRORS_ONLY: Final = 3


def _keys(files: list[Path], directory: Path | None) -> list[Ed25519PublicKey]:
    found = list(files)
    if directory is not None:
        found += sorted(directory.glob("*.pub"))
    return [load_public_key(path) for path in found]


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="aether.runtime.cfcd", description="Serve verified model packages.")
    parser.add_argument("--fd", type=int, default=3, help="connected AF_UNIX stream socket (3)")
    parser.add_argument("--package", type=Path, action="append", required=True, help="package directory; repeatable")
    parser.add_argument("--key", type=Path, action="append", default=[], help="trusted public key, PEM; repeatable")
    parser.add_argument("--keys", type=Path, help="directory of trusted public keys (*.pub)")
    return parser.parse_args(argv)


def _ignored(_number: int, _frame: object) -> None:
    """The wake-up descriptor carries the signal; Python only needs a handler to be set."""


def main(argv: list[str]) -> int:
    given = _parsed(argv)
    # a cell shows no /sys, which ONNX Runtime's device discovery would warn about on stderr
    ort.set_default_logger_severity(_LOG_ERRORS_ONLY)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _ignored)
    signal.signal(signal.SIGINT, _ignored)
    try:
        keys = _keys(given.key, given.keys)
        packages = [load_package(directory, keys) for directory in given.package]
        with socket.socket(fileno=given.fd) as link:
            hello = Hello(
                protocol_version=PROTOCOL_VERSION, pid=os.getpid(), models=tuple(one.info for one in packages)
            )
            # what is alive now lives as long as the process: no collection needs to walk it
            gc.collect()
            gc.freeze()
            serve(link, wake_read, hello, Service([Inference.of(one) for one in packages]))
    except AetherError as error:
        print(error, file=sys.stderr)
        return error.kind.exit
    except OSError as error:
        print(f"cannot serve models: {error}", file=sys.stderr)
        return EXIT_UNREACHABLE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`make bench`: every benchmark, one after the other."""

from __future__ import annotations

import argparse
import subprocess
import sys

ALL = ("footprint", "access", "cells", "launch", "oci", "egress", "revoke", "audit", "jobs")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", default="60")
    parser.add_argument("only", nargs="*", choices=[*ALL, []], default=[])
    asked = parser.parse_args()
    for name in asked.only or ALL:
        more = ["--seconds", asked.seconds] if name == "jobs" else []
        subprocess.run([sys.executable, "-m", f"bench.{name}", *more], check=True)


if __name__ == "__main__":
    main()

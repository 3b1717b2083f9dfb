"""`python -m tests.guest.boot [--short] [pytest arguments]`: the cell suite in a QEMU guest whose cgroups are all v2.

The guest has its own kernel, the host's root read-only by 9p over virtio and a scratch disk (`inside.py` mounts the
rest); nothing of the host is written but a temporary directory, and nothing of the guest reaches a network. KVM is
used where it boots a guest: a hypervisor may offer /dev/kvm and yet hang at the first stock kernel, so a guest
that says nothing within BOOT_WAIT_S is ended and started again under TCG, which is some ten times slower.

The last line is `test-v2: ` and how many passed, were skipped and failed. Exit status: that of pytest; 0 with one line
that says SKIPPED and why where QEMU, a kernel or a compiler is absent.
Environment: AETHER_GUEST_ACCEL (kvm, tcg), AETHER_GUEST_KERNEL (a vmlinuz with its modules in /lib/modules),
AETHER_GUEST_LIMIT_S (ends the guest; 5400, and 240 for the short form).
"""

from __future__ import annotations

import json
import lzma
import os
import re
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
MODULES = ("virtio_pci", "9pnet_virtio", "9p")
"""What it takes to mount the root; everything else the guest's own modprobe finds there."""
SUITE = (
    *(
        f"tests/kernel/test_{name}.py"
        for name in ("cell_bounds", "cgroup_limits", "cgroup_real", "disk_bound", "executor", "observe")
    ),
    "tests/kernel/test_spawner_process.py",
    "tests/conformance/cell_driver",
    "tests/security/escape",
    "tests/security/test_cell_escape.py",
    "-k=not runc and not crun and not runsc",
)
"""What depends on cgroups, by limits, ends, usage or events. Left out, since they are the same on either kind and take
the emulator longer than all of these: roots, overlays, differences, programs of a cell, sanitizers; OCI runtimes, which
are told to manage no cgroup (a gVisor takes half a minute to start there); egress and HTTP."""
SHORT = ("tests/kernel/test_cgroup_limits.py", "tests/kernel/test_cgroup_real.py")
"""The limits themselves, in a minute or two."""
BOOT_WAIT_S = {"kvm": 20.0, "tcg": 180.0}
LIMIT_S, SHORT_LIMIT_S = 5400.0, 240.0
DISK_BYTES = 1 << 30
UP, DONE = "AETHER-GUEST-UP", "AETHER-GUEST-EXIT"


class AbsentError(Exception):
    """What this machine lacks for a guest."""


@dataclass(frozen=True)
class Kernel:
    image: Path
    modules: Path


def find_kernel() -> Kernel:
    """The named kernel, else the newest one in /boot that has 9p as a module or built in; raises AbsentError."""
    named = os.environ.get("AETHER_GUEST_KERNEL")
    images = [Path(named)] if named else sorted(Path("/boot").glob("vmlinuz-*"), key=_version, reverse=True)
    for image in images:
        modules = Path("/lib/modules") / image.name.removeprefix("vmlinuz-")
        if os.access(image, os.R_OK) and (modules / "modules.dep").exists() and _offers_9p(modules):
            return Kernel(image, modules)
    raise AbsentError("no readable kernel with 9p in /boot: apt-get install linux-image-amd64")


def _version(image: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", image.name)]


def _offers_9p(modules: Path) -> bool:
    names = (modules / "modules.dep").read_text() + (modules / "modules.builtin").read_text()
    return "/9p.ko" in names


def load_order(modules: Path) -> list[Path]:
    """MODULES and what they need, each after its dependencies (depmod(8), modules.dep); built-in ones drop out."""
    depends: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        depends[path] = rest.split()
    by_name = {Path(path).name.split(".ko")[0].replace("-", "_"): path for path in depends}
    order: list[str] = []

    def add(path: str) -> None:
        for needed in depends[path]:
            add(needed)
        if path not in order:
            order.append(path)

    for name in MODULES:
        if name in by_name:
            add(by_name[name])
    return [modules / path for path in order]


def unpacked(module: Path) -> bytes:
    """A module as the kernel takes it: distributions compress them with xz, zstd or gzip."""
    data = module.read_bytes()
    match module.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return zlib.decompress(data, 31)
        case ".zst":
            return subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data


def cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """An initramfs archive in the `newc` form (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    out = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + "".join(f"{field:08x}" for field in fields).encode() + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def build_initramfs(kernel: Kernel, directory: Path, arguments: list[str]) -> Path:
    """init, the modules and the command line of `inside.py`; raises AbsentError without a static C compiler."""
    if shutil.which("cc") is None:
        raise AbsentError("no C compiler for the guest's init: apt-get install gcc libc6-dev")
    init = directory / "init"
    built = subprocess.run(
        ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", init, HERE / "init.c"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if built.returncode != 0:
        raise AbsentError(f"the guest's init does not compile: {built.stderr.strip()[-300:]}")
    modules = load_order(kernel.modules)
    order = "".join(f"/modules/{number}.ko\n" for number in range(len(modules)))
    command = [sys.executable, "-P", str(HERE / "inside.py"), str(REPOSITORY), json.dumps(arguments)]
    folder, file = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644
    entries = [(name, folder, b"") for name in ("dev", "host", "modules")]
    entries.append(("init", stat.S_IFREG | 0o755, init.read_bytes()))
    entries.append(("exec", file, "".join(f"{word}\n" for word in command).encode()))
    entries.append(("modules/order", file, order.encode()))
    entries += [(f"modules/{number}.ko", file, unpacked(path)) for number, path in enumerate(modules)]
    path = directory / "initramfs"
    path.write_bytes(cpio(entries))
    return path


def command_line(accel: str, kernel: Kernel, initramfs: Path, disk: Path) -> list[str]:
    """The QEMU command: no network, no display, the serial line on standard output."""
    append = "console=ttyS0 quiet panic=-1 cgroup_no_v1=all mitigations=off psi=1"
    share = "local,id=root,path=/,security_model=passthrough,readonly=on,multidevs=remap"
    return [
        "qemu-system-x86_64", "-M", "q35", "-accel", accel if accel == "kvm" else "tcg,thread=multi",
        "-cpu", "max", "-smp", str(min(4, os.cpu_count() or 1)), "-m", "2048",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
        "-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", append,
        "-fsdev", share, "-device", "virtio-9p-pci,fsdev=root,mount_tag=host",
        "-drive", f"file={disk},if=none,id=disk,format=raw,cache=unsafe", "-device", "virtio-blk-pci,drive=disk",
        "-device", "virtio-rng-pci", "-net", "none",
    ]  # fmt: skip


def run_guest(command: list[str], boot_s: float, limit_s: float) -> int | None:
    """Copy the serial line to standard output until the guest ends; pytest's status, None if it never came up."""
    guest = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert guest.stdout is not None
    started, up, status, text, summary = time.monotonic(), False, None, "", "no result"
    selector = selectors.DefaultSelector()
    selector.register(guest.stdout, selectors.EVENT_READ)
    try:
        while True:
            left_s = (limit_s if up else boot_s) - (time.monotonic() - started)
            if left_s <= 0 or not selector.select(left_s):
                break
            data = os.read(guest.stdout.fileno(), 1 << 16)
            if not data:
                break
            told = data.decode(errors="replace").replace("\r\n", "\n")
            print(told, end="", flush=True)  # also half a line: a dot is a test
            *lines, text = (text + told).split("\n")
            for line in lines:
                up = up or UP in line
                found = re.search(rf"{DONE} (\d+)", line)
                status = int(found[1]) if found else status
                summary = line.strip("= ") if re.search(r"\d+ \w+.* in [\d.]+s", line) else summary
    finally:
        guest.kill()
        guest.wait()
    if not up:
        return None
    print(f"test-v2: {summary}; {time.monotonic() - started:.0f} s with the guest's start", flush=True)
    return 1 if status is None else status


def accelerators() -> list[str]:
    named = os.environ.get("AETHER_GUEST_ACCEL")
    if named:
        return [named]
    return ["kvm", "tcg"] if os.access("/dev/kvm", os.R_OK | os.W_OK) else ["tcg"]


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the guest and the directory go with us
    short = arguments[:1] == ["--short"]
    suite = SHORT if short else SUITE
    arguments = arguments[1:] if short else arguments
    limit_s = float(os.environ.get("AETHER_GUEST_LIMIT_S", SHORT_LIMIT_S if short else LIMIT_S))
    with tempfile.TemporaryDirectory(prefix="aether-guest-") as name:
        directory = Path(name)
        try:
            if shutil.which("qemu-system-x86_64") is None:
                raise AbsentError("no QEMU: apt-get install qemu-system-x86")
            kernel = find_kernel()
            named = any(not word.startswith("-") for word in arguments)
            initramfs = build_initramfs(kernel, directory, arguments if named else [*arguments, *suite])
        except AbsentError as absent:
            print(f"test-v2 SKIPPED: {absent}")
            return 0
        disk = directory / "disk"
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        for accel in accelerators():
            print(f"guest: {kernel.image.name} under {accel}", flush=True)
            command = command_line(accel, kernel, initramfs, disk)
            status = run_guest(command, BOOT_WAIT_S[accel], limit_s)
            if status is not None:
                return status
    print("the guest did not come up")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""The process that starts one cell for a test and tells what happened, as JSON on standard output.

A process of its own, because a spawner must be single-threaded, and so that it can run as an ordinary user. It
imports the standard library and the spawner's part of the package only. Request (JSON on standard input):
    executor native | portable | runc | crun | runsc; uid, gid to become; level; steps (added to the default root),
    prefixes (of a Python, as in rootfs.PythonFacts),
    replaced (steps instead of those of the same op); landlock; rlimits;
    write_zero, cgroup2 (paths to attach to);
    plan (fields that replace those of the plan); argv, env, cwd, extra (texts, one pipe per text, at 3, 4, ...);
    no_clone3 (answer it with ENOSYS, as Docker's default seccomp profile does);
    actions, carried out one after the other once the first executable has started:
      ["sleep", seconds], ["signal", exec_id, signo], ["exec", exec_id, argv], ["shutdown"], ["close"], ["kill"],
      ["wait", exec_id], ["read", path], ["die"] (this process kills itself)
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import select
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

from aether.contract import cellplan as cp
from aether.spawner.linux import executors, initwire, landlock, oci, remedies, rootfs
from aether.spawner.linux.executor import Attach, Executor, LaunchError

DEADLINE_S = 20.0
BLOCK = 0x7A00_0000


def without_clone3() -> None:
    """A filter on this process and its children: clone3 is ENOSYS, all else is allowed (seccomp(2))."""
    load, equal, answer = (0x20, 0, 0, 0), (0x15, 0, 1, 435), (0x06, 0, 0, 0x0005_0000 | errno.ENOSYS)
    code = b"".join(struct.pack("<HBBI", *line) for line in (load, equal, answer, (0x06, 0, 0, 0x7FFF_0000)))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.prctl(22, 2, program, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot filter clone3")


class Cell:
    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        if request.get("no_clone3"):
            without_clone3()
        facts = rootfs.gather_root_facts([(cell, host) for cell, host in request.get("prefixes", [])])
        self.plan, roots = make_plan(request, facts)
        kind = request["executor"]
        self.executor: Executor
        if kind in oci.KINDS:
            self.executor = executors.oci_executor(kind, roots)
        else:
            self.executor = executors.best_executor(roots, kind)
        self.events: list[dict[str, Any]] = []
        self.output = b""
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)

    def start(self) -> None:
        first = self.spec("first", self.request["argv"], len(self.request.get("extra", [])))
        extra = []
        for text in self.request.get("extra", []):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            os.write(writer, text.encode())
            os.close(writer)
            extra.append(reader)
        write_zero = [os.open(path, os.O_WRONLY) for path in self.request.get("write_zero", [])]
        directory = self.request.get("cgroup2")
        attach = Attach(write_zero, os.open(directory, os.O_PATH | os.O_DIRECTORY) if directory else None)
        self.launched = self.executor.launch(self.plan, attach, first, (self._writer, self._writer, *extra))
        for fd in extra:
            os.close(fd)

    def spec(self, exec_id: str, argv: list[str], extra: int = 0) -> cp.ExecSpec:
        env = {"PATH": "/usr/bin:/bin", "HOME": "/work", **self.request.get("env", {})}
        limits = tuple(cp.Rlimit(*limit) for limit in self.request.get("exec_rlimits", []))
        cwd = self.request.get("cwd", "/work" if self.plan.level == "cell" else "/")
        stdio = ("null", "fd", "fd")
        return cp.ExecSpec(exec_id, tuple(argv), tuple(env.items()), cwd, stdio, extra, limits)

    def until(self, *wanted: tuple[str, str]) -> None:
        """Until an event of these kinds and executables, or the end of PID 1."""
        end = time.monotonic() + DEADLINE_S
        while not any((e["kind"], e.get("exec_id", "")) in wanted or e["kind"] == "Closed" for e in self.events):
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no {wanted}: {self.events}")
            ready = select.select([self.launched.control, self._reader], [], [], left)[0]
            self._read(ready)

    def _read(self, ready: list[Any]) -> None:
        if self._reader in ready:
            self.output += os.read(self._reader, 1 << 16)
        if self.launched.control in ready:
            event = initwire.receive(self.launched.control)
            entry: dict[str, Any] = {"kind": type(event).__name__ if event else "Closed"}
            if event is not None:
                entry |= dataclasses.asdict(event)
            if isinstance(event, initwire.StepFailed):
                entry["why"], entry["remedy"] = remedies.explain_step(self.plan, event)
            self.events.append(entry)

    def act(self, name: str, *args: Any) -> None:
        control = self.launched.control
        match name:
            case "sleep":
                time.sleep(args[0])
            case "signal":
                initwire.send_signal(control, args[0], args[1])
            case "exec":
                initwire.send_exec(control, self.spec(args[0], args[1]), (self._writer, self._writer))
            case "read":
                self.events.append({"kind": "Read", "text": Path(args[0]).read_text()})
            case "wait":
                self.until(("Exited", args[0]), ("ExecFailed", args[0]))
            case "shutdown":
                initwire.send_shutdown(control)
            case "close":
                control.close()
            case "kill":
                signal.pidfd_send_signal(self.launched.pidfd, signal.SIGKILL)
            case "die":
                container = next((e["pid"] for e in self.events if e["kind"] == "Container"), None)
                print(json.dumps({"pid": self.launched.pid, "container": container}), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    def finish(self) -> dict[str, Any]:
        """End the cell if it still lives; its status and all output."""
        if self.launched.control.fileno() >= 0 and not any(e["kind"] == "Closed" for e in self.events):
            with contextlib.suppress(OSError):
                initwire.send_shutdown(self.launched.control)
        status = os.waitid(os.P_PIDFD, self.launched.pidfd, os.WEXITED)
        os.close(self._writer)
        while data := os.read(self._reader, 1 << 16):
            self.output += data
        while self.launched.control.fileno() >= 0 and not any(e["kind"] == "Closed" for e in self.events):
            self._read([self.launched.control])
        self.executor.close()
        return {"status": status.si_status if status else None, "pid": self.launched.pid}


def make_plan(request: dict[str, Any], facts: rootfs.RootFacts) -> tuple[cp.Plan, tuple[str, ...]]:
    uid, gid = os.geteuid(), os.getegid()
    ids = cp.IdMap(BLOCK, BLOCK, 65536) if uid == 0 else cp.IdMap(uid, gid, 1, 1000)
    level = request.get("level", "cell")
    writable = ("read", "execute", "write")
    if level == "cell":
        steps = [cp.to_plain(step) for step in rootfs.default_root_steps(facts)]
        steps += [cp.to_plain(cp.Tmpfs(path, 1 << 24)) for path in ("/tmp", "/work")]
        replaced = {step["op"]: step for step in request.get("replaced", [])}
        steps = [replaced.get(step["op"], step) for step in steps]
        rules = (*rootfs.default_landlock_rules(), *(cp.LandlockRule(p, writable) for p in ("/tmp", "/work")))
    else:
        steps = []
        rules = rootfs.process_landlock_rules(facts)
    ruleset = None
    if landlock.probe_abi() and request.get("landlock", True):
        ruleset = cp.to_plain(cp.Landlock(rules, tcp=level == "cell"))
    obj: dict[str, Any] = {
        "cell_id": "cell-1",
        "level": level,
        "namespaces": list(cp.NAMESPACES) if level == "cell" else [],
        "id_map": cp.to_plain(ids),
        "hostname": "cell",
        "steps": [*steps, *request.get("steps", [])],
        "seccomp_profile": "cell" if level == "cell" else "offline",
        "landlock": ruleset,
        "rlimits": [{"name": n, "soft": s, "hard": h} for n, s, h in request.get("rlimits", [])],
        **request.get("plan", {}),
    }
    roots = rootfs.source_roots(facts, *request.get("roots", []))
    return cp.parse_plan(obj, source_roots=roots), roots


def main() -> None:
    request = json.load(sys.stdin)
    if "uid" in request:
        os.setgroups([])
        os.setresgid(request["gid"], request["gid"], request["gid"])
        os.setresuid(request["uid"], request["uid"], request["uid"])
    cell = Cell(request)
    try:
        cell.start()
    except LaunchError as error:
        failure = {"step": error.step, "errno": error.errno, "remedy": error.remedy}
        print(json.dumps({"launch_error": failure}))
        cell.executor.close()
        return
    actions = request.get("actions", [["wait", "first"]])
    if request["executor"] in oci.KINDS:
        cell.until(("Container", ""), ("RuntimeRefused", ""))
    cell.until(("Started", "first"), ("ExecFailed", "first"), ("StepFailed", ""), ("RuntimeRefused", ""))
    for action in actions:
        cell.act(*action)
    ended = cell.finish()
    own = {kind: Path(f"/proc/self/ns/{kind}").stat().st_ino for kind in initwire.NAMESPACE_KINDS}
    result = {"events": cell.events, "output": cell.output.decode(errors="replace"), "host_ns": own, **ended}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The default root as data: from facts of a host to steps, without touching this one."""

from __future__ import annotations

import json

from aether.contract import cellplan as cp
from aether.spawner.linux import probe, rootfs

FACTS = rootfs.RootFacts(
    merged=(("/bin", "usr/bin"), ("/lib64", None)),
    etc=(("/etc/ssl/certs", "/etc/ssl/certs"), ("/etc/localtime", "/usr/share/zoneinfo/UTC")),
    masked=("/proc/kcore",),
    prefixes=(("/opt/py", "/opt/py"),),
)


def test_steps_parse_as_a_plan_under_their_own_roots() -> None:
    steps = rootfs.default_root_steps(FACTS, pty=True)
    plan = cp.Plan("c", "cell", cp.NAMESPACES, cp.IdMap(1, 1, 1, 1000), "cell", steps, "cell", None)
    parsed = cp.parse_plan(json.loads(json.dumps(cp.to_obj(plan))), source_roots=rootfs.source_roots(FACTS))
    assert parsed.steps == steps


def test_host_paths_are_only_shown_read_only() -> None:
    steps = rootfs.default_root_steps(FACTS)
    assert not [s for s in steps if isinstance(s, cp.BindRw | cp.BindDev)]
    assert cp.Symlink("/etc/localtime", "/usr/share/zoneinfo/UTC") in steps
    assert cp.BindRo("/lib64", "/lib64") in steps


def test_mask_follows_proc_and_dev() -> None:
    kinds = [type(s) for s in rootfs.default_root_steps(FACTS)]
    assert kinds.index(cp.Mask) > kinds.index(cp.Proc)
    assert kinds.index(cp.Mask) > kinds.index(cp.DevMinimal)


def test_python_keeps_its_path_unless_the_job_hides_it() -> None:
    found = rootfs.place_python(("/home/u/venv", "/home/u/py", "/usr"), "/home/u/venv/bin/python", "/home/u/venv/lib")
    assert found.executable == "/home/u/venv/bin/python"
    assert found.prefixes == (("/home/u/venv", "/home/u/venv"), ("/home/u/py", "/home/u/py"))
    moved = rootfs.place_python(("/work/p/.venv", "/work/p/src"), "/work/p/.venv/bin/python", "/work/p/src")
    assert (moved.executable, moved.path) == ("/opt/aether/venv/bin/python", "/opt/aether/src")


def test_the_process_level_rules_allow_no_writing_but_of_null_devices() -> None:
    writable = [r.path for r in rootfs.process_landlock_rules(FACTS) if "write" in r.access]
    assert writable == ["/dev/null", "/dev/zero", "/dev/full"]


def test_probe_is_json_and_every_lack_has_reason_and_remedy() -> None:
    found = json.loads(json.dumps(probe.probe()))
    names = [check["name"] for check in found["checks"]]
    assert len(names) == len(set(names))
    for check in found["checks"]:
        assert check["ok"] or (check["reason"] and check["remedy"])
    for lack in found["missing"].values():
        assert lack["reason"] and lack["remedy"]

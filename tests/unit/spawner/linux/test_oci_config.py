"""Plans as OCI bundles: valid by the published schema, and everything a plan asks for is said or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator  # type: ignore[import-untyped]
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from aether.contract import cellplan as cp
from aether.contract.cellids import IdSpace
from aether.spawner.linux import oci
from aether.spawner.linux.oci_config import INIT_PATH, oci_config

SCHEMAS = Path(__file__).parents[3] / "support/ocischema"
BLOCK = 0x7000_0000
STEPS: tuple[cp.Step, ...] = (
    cp.BindRo("/usr", "/usr"),
    cp.Symlink("/bin", "usr/bin"),
    cp.File("/etc/passwd", "job:x:1000:1000::/:/bin/sh\n"),
    cp.Proc(),
    cp.DevMinimal(),
    cp.Tmpfs("/dev/shm", 1 << 20, exec_allowed=False),
    cp.Mask(("/proc/keys", "/proc/kcore")),
    cp.Tmpfs("/tmp", 1 << 20, inodes_max=77),
    cp.BindRw("/work", "/state/cells/c"),
)
PLAN = cp.Plan("c", "cell", cp.NAMESPACES, cp.IdMap(BLOCK, BLOCK, 65536), "box", STEPS, "cell", None, driver="runc")


def errors_of(config: dict[str, Any]) -> list[str]:
    loaded = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    resources = [(name, Resource.from_contents(text, DRAFT7)) for name, text in loaded.items()]
    registry: Registry[Any] = Registry().with_resources(resources)
    validator = Draft7Validator(loaded["config-schema.json"], registry=registry)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(config)]


def mounts_of(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {mount["destination"]: mount for mount in config["mounts"]}


@pytest.mark.parametrize("runtime", oci.KINDS)
@pytest.mark.parametrize("profile", ["cell", "offline"])
def test_bundles_are_valid_by_the_published_schema(runtime: str, profile: str) -> None:
    config = oci_config(replace(PLAN, seccomp_profile=profile), runtime, "/opt/aether-init")
    assert errors_of(config) == []
    broken = config | {"process": {"cwd": 7}}
    assert errors_of(broken)


def test_everything_of_the_plan_is_said() -> None:
    config = oci_config(PLAN, "runc", "/opt/aether-init")
    mounts = mounts_of(config)
    assert mounts["/usr"]["source"] == "/usr" and {"ro", "nosuid", "nodev", "rbind"} <= set(mounts["/usr"]["options"])
    assert mounts["/work"]["source"] == "/state/cells/c" and "rw" in mounts["/work"]["options"]
    assert {"size=1048576", "nr_inodes=77", "mode=1777", "nosuid", "nodev"} <= set(mounts["/tmp"]["options"])
    assert "noexec" in mounts["/dev/shm"]["options"] and "noexec" not in mounts["/tmp"]["options"]
    assert "ro" in mounts["/proc"]["options"] and "ro" in mounts["/dev"]["options"]
    assert mounts[INIT_PATH]["source"] == "/opt/aether-init" and "ro" in mounts[INIT_PATH]["options"]
    linux = config["linux"]
    assert {space["type"] for space in linux["namespaces"]} == {
        "user", "pid", "mount", "network", "ipc", "uts", "cgroup",
    }  # fmt: skip
    assert linux["maskedPaths"] == ["/proc/keys", "/proc/kcore"] and config["root"]["readonly"]
    assert linux["uidMappings"] == linux["gidMappings"] == [{"containerID": 0, "hostID": BLOCK, "size": 65536}]
    assert config["hostname"] == "box" and "resources" not in linux and "cgroupsPath" not in linux
    process = config["process"]
    assert process["noNewPrivileges"] and process["args"] == [INIT_PATH, "serve", "3"] and process["user"]["uid"] == 0
    assert "CAP_SYS_ADMIN" not in json.dumps(process["capabilities"])
    assert "ambient" not in process["capabilities"]


def test_without_a_user_namespace_pid_1_has_the_ids_of_the_host() -> None:
    plan = replace(PLAN, namespaces=tuple(name for name in cp.NAMESPACES if name != "user"))
    config = oci_config(plan, "crun", "/i")
    assert config["process"]["user"] == {"uid": BLOCK, "gid": BLOCK} and "uidMappings" not in config["linux"]
    assert config["process"]["capabilities"]["ambient"] == config["process"]["capabilities"]["bounding"]


def test_staged_sources_replace_those_of_the_plan() -> None:
    mounts = mounts_of(oci_config(PLAN, "runc", "/run/init", {0: "/run/src/0", 8: "/run/src/8"}))
    assert (mounts["/usr"]["source"], mounts["/work"]["source"]) == ("/run/src/0", "/run/src/8")


def test_a_root_that_keeps_changes_is_the_one_that_may_be_written() -> None:
    kept = replace(PLAN, steps=(cp.Overlay("/", "/images/a", "/state/upper"), *STEPS))
    assert not oci_config(kept, "runc", "/i")["root"]["readonly"]
    in_memory = replace(PLAN, steps=(cp.Overlay("/", "/images/a"), *STEPS))
    assert oci_config(in_memory, "runc", "/i")["root"]["readonly"]


LATE = (*STEPS, cp.File("/work/late", "x"))
REFUSED: list[tuple[str, cp.Plan, str]] = [
    ("runc", replace(PLAN, steps=LATE), "order it before"),
    ("runc", replace(PLAN, steps=STEPS[:3]), "needs proc and dev_minimal"),
    ("runc", replace(PLAN, steps=(*STEPS[:3], cp.Proc("/p"), *STEPS[4:])), "know it at /proc only"),
    ("crun", replace(PLAN, id_map=cp.IdMap(1000, 1000, 1, 1000)), "block of ids"),
    ("runsc", replace(PLAN, landlock=cp.Landlock(())), "gVisor has none"),
    ("runsc", replace(PLAN, namespaces=("user", "pid", "mnt")), "network of its own"),
    ("runsc", replace(PLAN, namespaces=("net", "pid", "mnt")), "right to change ids"),
    ("runsc", replace(PLAN, steps=(*STEPS, cp.BindDev("/dev/kvm", "/dev/kvm"))), "no device"),
    ("runsc", replace(PLAN, steps=(*STEPS, cp.Mask(("/usr/secret",)))), "masks nothing"),
]


@pytest.mark.parametrize(("runtime", "plan", "why"), REFUSED, ids=[why for _, _, why in REFUSED])
def test_what_a_runtime_cannot_do_is_refused(runtime: str, plan: cp.Plan, why: str) -> None:
    with pytest.raises(cp.PlanError, match=why):
        oci_config(plan, runtime, "/i")


_PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
_STEPS = st.one_of(
    st.builds(cp.Dir, _PATHS),
    st.builds(cp.File, _PATHS, st.just("text")),
    st.builds(cp.Symlink, _PATHS, st.just("target")),
    st.builds(cp.BindRo, _PATHS, st.just("/usr")),
    st.builds(cp.Tmpfs, _PATHS, st.just(4096)),
    st.builds(lambda path: cp.Mask((path,)), _PATHS),
)


@given(st.lists(_STEPS, max_size=8), st.sampled_from(oci.KINDS))
def test_no_step_is_dropped(steps: list[cp.Step], runtime: str) -> None:
    plan = replace(PLAN, steps=(*steps, cp.Proc(), cp.DevMinimal()))
    try:
        config = oci_config(plan, runtime, "/i")
    except cp.PlanError:
        return
    mounted = [mount["destination"] for mount in config["mounts"]]
    wanted = [step.path for step in plan.steps if isinstance(step, cp.BindRo | cp.Tmpfs)]
    assert [path for path in mounted if path in wanted] == wanted
    masked = [path for step in plan.steps if isinstance(step, cp.Mask) for path in step.paths]
    assert config["linux"]["maskedPaths"] == masked


def test_a_program_that_others_may_change_is_no_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "runc"
    program.write_text("#!/bin/sh\necho runc version 9.9\n")
    program.chmod(0o777)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("aether.spawner.linux.native.BINARY", program)
    assert "root alone may change" in oci.find_runtimes({oci.SETTING: str(program)})["runc"].reason
    assert "cannot use /no/runc" in oci.find_runtimes({oci.SETTING: "/no/runc"})["runc"].reason
    assert oci.version_of(str(program)) == "9.9"


def test_ordinary_users_have_no_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.spawner.linux.idspace.here", lambda: IdSpace("own", 1000))
    assert all("not root" in found.reason and found.remedy for found in oci.find_runtimes({}).values())

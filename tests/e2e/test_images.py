"""Images from the outside: `aether image`, `aether run --image`, `aether cell diff|commit`, on a real instance."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.client import Client
from aether.contract.cells import Images
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.paths import Layout
from tests.support import cells, instance
from tests.support import ocilayout as oci
from tests.support.trees import make_tree


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    lack = cells.missing().get("cell")
    if lack:
        pytest.skip(f"{lack['reason']}: {lack['remedy']}")
    with instance.running() as made:
        yield made


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"))


def aether(layout: Layout, *words: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "aether.cli.main", *words]
    env = {**os.environ, "AETHER_STATE": str(layout.root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def archive(tree: Path, path: Path, **config: Any) -> Path:
    path.write_bytes(oci.archive([oci.layer_of(tree)], config=config))
    return path


def test_a_command_runs_in_an_imported_image(layout: Layout, tree: Path, tmp_path: Path) -> None:
    tar = archive(tree, tmp_path / "tools.tar", Env=["FROM_IMAGE=yes"], WorkingDir="/srv", Entrypoint=["sh", "-c"])
    digest = aether(layout, "image", "import", str(tar), "--name", "tools:1").strip()
    out = aether(
        layout,
        "run",
        "--image",
        "tools:1",
        "--",
        "cat /etc/motd; echo $FROM_IMAGE; id -u; ls data; ls /usr/share 2>/dev/null || echo apart",
    )
    assert out.split("\n")[:3] == ["hello from the image", "yes", "1000"]
    assert out.split("\n")[3:] == ["gone", "old", "apart", ""]
    shown = json.loads(aether(layout, "image", "show", "tools:1", "--json"))
    assert shown["digest"] == digest
    assert json.loads(aether(layout, "image", "list", "--json"))["images"][0]["names"] == ["tools:1"]


def test_a_directory_is_an_image_and_the_same_one_twice(layout: Layout, tree: Path) -> None:
    first = aether(layout, "image", "import", str(tree)).strip()
    assert aether(layout, "image", "import", str(tree)).strip() == first
    assert aether(layout, "run", "--image", str(tree), "--", "cat", "/etc/motd") == "hello from the image\n"


def test_changes_are_shown_committed_and_built_upon(layout: Layout, tree: Path) -> None:
    script = "cd /srv/data && echo new > new && rm gone && echo more >> old && mkdir /opt && echo out > /work/out"
    with instance.client(layout) as client:
        base = client.image_import(tree)
        images = Images(root=base.digest, writable=True, keep_diff=True)
        job = client.run(["sh", "-c", script], images=images, outputs=["out"])
        assert job.state is JobState.SUCCEEDED, job
        lines = aether(layout, "cell", "diff", job.job_id).splitlines()
        assert lines == ["A /opt", "D /srv/data/gone", "A /srv/data/new", "M /srv/data/old"]
        made = client.image_commit(job.job_id, name="built")
        assert made.layers[: len(base.layers)] == base.layers
        assert (
            aether(layout, "run", "--image", "built", "--", "cat", "/srv/data/old", "/srv/data/new")
            == "old\nmore\nnew\n"
        )
        assert aether(layout, "run", "--image", "built", "--", "ls", "/srv/data") == "new\nold\n"
        receipt = client.receipt(job.job_id)
        assert any(base.digest.removeprefix("sha256:") in text for text in receipt.documents.values())


def test_a_workspace_keeps_its_changes_apart(layout: Layout, tree: Path) -> None:
    with instance.client(layout) as client:
        source = client.image_import(tree / "srv")
        images = Images(work=source.digest, keep_diff=True)
        job = client.run(["sh", "-c", "cat data/old && echo x > data/made"], images=images, outputs=["data/made"])
        assert job.state is JobState.SUCCEEDED, job
        listing = client.image_diff(job.job_id)
        assert [(change.change, change.path) for change in listing.changes] == [("added", "data/made")]
        assert b"".join(client.logs(job.job_id)) == b"old\n"
    assert (tree / "srv/data/old").read_text() == "old\n"


def test_hostile_names_are_escaped_in_a_diff(layout: Layout, tree: Path) -> None:
    with instance.client(layout) as client:
        base = client.image_import(tree)
        images = Images(root=base.digest, writable=True, keep_diff=True)
        job = client.run(["sh", "-c", "touch \"/srv/$(printf 'a\\033[31mb\\377')\" /srv/.wh.old"], images=images)
        assert job.state is JobState.SUCCEEDED, job
    shown = aether(layout, "cell", "diff", job.job_id)
    assert "\x1b" not in shown
    assert shown == "A /srv/a^[[31mb\\xff\n"
    assert ".wh.old" not in shown


def test_without_leave_the_image_stays_as_it_is(layout: Layout, tree: Path) -> None:
    out = aether(layout, "run", "--image", str(tree), "--", "sh", "-c", "touch /etc/x || echo sealed")
    assert out == "sealed\n"


def test_what_is_not_the_tenants_or_not_there_is_refused(layout: Layout, tree: Path) -> None:
    with instance.client(layout) as client:
        absent = client.run(["true"], images=Images(root="sha256:" + "0" * 64))
        assert absent.error is not None
        assert absent.error.code == "NOT_FOUND"
        with pytest.raises(AetherError, match="kept no diff"):
            client.image_commit(client.run(["true"]).job_id)
        for images in ({"root": "/etc"}, {"writable": True}, {"keep_diff": True}):
            with pytest.raises(AetherError):
                client.run(["true"], images=Images(**images))  # type: ignore[arg-type]


def test_imports_and_removals_are_records(layout: Layout, tree: Path) -> None:
    with instance.client(layout) as client:
        info = client.image_import(tree, name="short-lived")
        client.image_remove("short-lived")
        with pytest.raises(AetherError, match="cannot find image"):
            client.image_show("short-lived")
        again = Client(state=layout.root).image_import(tree)
        assert again.digest == info.digest
    aether(layout, "audit", "verify")
    assert any(b"image.removed" in path.read_bytes() for path in layout.audit.rglob("*") if path.is_file())


def test_an_allocated_cell_of_an_image(layout: Layout, tree: Path) -> None:
    aether(layout, "cell", "allocate", "made-of-an-image", "--image", str(tree), "--writable-root")
    aether(layout, "cell", "exec", "made-of-an-image", "--", "sh", "-c", "echo one > /srv/data/kept")
    assert aether(layout, "cell", "exec", "made-of-an-image", "--", "cat", "/srv/data/kept") == "one\n"
    assert aether(layout, "cell", "diff", "made-of-an-image") == "A /srv/data/kept\n"
    aether(layout, "cell", "commit", "made-of-an-image", "--name", "kept")
    aether(layout, "cell", "free", "made-of-an-image")
    assert aether(layout, "run", "--image", "kept", "--", "cat", "/srv/data/kept") == "one\n"
    with instance.client(layout) as client, pytest.raises(AetherError, match="cannot find image"):
        client.cells.allocate("absent", images=Images(root="sha256:" + "0" * 64))
    assert not list(layout.cells.rglob(".root-*"))

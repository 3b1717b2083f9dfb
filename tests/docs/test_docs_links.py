"""Links lead somewhere, named files exist, and no page names a path of the machine it was written on."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import docpages

TOP = ("src/", "docs/", "tests/", "schema/", "packages/", "tools/", "bench/", "examples/", "scripts/")
# What a page may call by an absolute path: interfaces of ours, of Linux, and of cells (/work, /mnt);
# paths of SPIFFE IDs begin with /ns in examples.
ABSOLUTE = re.compile(
    r"/(v0|v1|jobs|healthz|openapi\.json|var/lib/aether|tmp|work|mnt|usr|bin|lib|lib64|sbin|etc|proc|sys|dev|run|ns)(/|$)"
)
# Made by the build or by a user, not in the repository.
BUILT = ("bench/out/", "src/aether/spawner/native/aether-init")
_MODULE = re.compile(r"[a-z_]+(/[a-z_0-9]+)+\.(py|c|h|cedar|json)")
_PLAIN = re.compile(r"[\w./-]+")
_PATH = re.compile(r"(?<![\w.~$}>/:*-])/[A-Za-z][\w./-]*")

everyone = pytest.mark.parametrize("path", docpages.pages(), ids=lambda p: str(p.relative_to(docpages.ROOT)))


@everyone
def test_links_lead_somewhere(path: Path) -> None:
    for link in docpages.links(path.read_text()):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name} links to {link}"
        if anchor:
            assert anchor in docpages.anchors(target.read_text()), f"{path.name} links to {link}: no such heading"


def named_files(text: str) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """Paths in code spans, with the places where they may be."""
    for span in docpages.code_spans(text):
        name = span.partition("::")[0].rstrip("/")
        if not _PLAIN.fullmatch(name):
            continue
        if span.startswith(TOP):
            yield span, (docpages.ROOT / name,)
        elif _MODULE.fullmatch(name) and (docpages.SRC / name.partition("/")[0]).is_dir():
            yield span, (docpages.SRC / name,)


@everyone
def test_named_files_exist(path: Path) -> None:
    for span, places in named_files(path.read_text()):
        if not span.startswith(BUILT):
            assert any(place.exists() for place in places), f"{path.name} names {span}"


@everyone
def test_no_path_of_this_machine(path: Path) -> None:
    text = path.read_text()
    for own in (str(docpages.ROOT), sys.prefix):
        assert len(Path(own).parts) < 3 or own not in text, f"{path.name} names {own}"
    for piece in docpages.code(text):
        for found in _PATH.findall(piece):
            assert ABSOLUTE.match(found), f"{path.name} names {found}"


@everyone
def test_lines_are_readable(path: Path) -> None:
    """Prose is wrapped at about 150 columns; tables and generated pages are as wide as they are."""
    text = docpages.prose(path.read_text())
    if "do not edit" in text.partition("\n")[0]:
        return
    for number, line in enumerate(text.splitlines(), 1):
        assert len(line) <= 250 or line.startswith(("|", "#")), f"{path.name}:{number} has {len(line)} columns"
        assert line == line.rstrip(), f"{path.name}:{number} ends in blanks"

"""A package index (PEP 503) with one wheel, as an answer of `web.Server`."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

from tests.support.web import Seen

NAME, VERSION = "aether-tiny", "1.0"
_MODULE = "aether_tiny"
_WHEEL = f"{_MODULE}-{VERSION}-py3-none-any.whl"
WORD = "installed from the index"


def wheel() -> bytes:
    """One module, `aether_tiny`, with a WORD (binary distribution format, PEP 427)."""
    info = f"{_MODULE}-{VERSION}.dist-info"
    files = {
        f"{_MODULE}.py": f"WORD = {WORD!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return out.getvalue()


def index(token: str | None = None) -> Callable[[Seen], tuple[int, dict[str, str], bytes]]:
    """Answers for /simple/; with a token only to those who send it."""
    data = wheel()

    def answer(seen: Seen) -> tuple[int, dict[str, str], bytes]:
        if token is not None and seen.headers.get("authorization") != f"Bearer {token}":
            return 401, {}, b"who are you?"
        if seen.path == f"/simple/{NAME}/":
            page = f'<!DOCTYPE html><html><body><a href="/files/{_WHEEL}">{_WHEEL}</a></body></html>'
            return 200, {"Content-Type": "text/html"}, page.encode()
        if seen.path == f"/files/{_WHEEL}":
            return 200, {"Content-Type": "application/octet-stream"}, data
        return 404, {}, b"no such page"

    return answer

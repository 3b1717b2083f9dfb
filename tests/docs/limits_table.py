"""The table of bounds in SPECIFICATION.md, made from `aether.contract.limits`.

`python tests/docs/limits_table.py` writes it again; `test_docs_tables.py` compares.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

from aether.contract import limits

ROOT: Final = Path(__file__).parents[2]
BEGIN: Final = "<!-- limits: written by tests/docs/limits_table.py -->"
END: Final = "<!-- end of limits -->"
_UNITS: Final = {"KIB", "MIB", "GIB"}
_SECTION = re.compile(r"# (?:-+ )?([A-Z].*)")


def rows() -> list[tuple[str, str, str, str]]:
    """(section, name, value, note) in the order of the module; the note is the text below a constant."""
    source = Path(limits.__file__).read_text(encoding="utf-8")
    sections = {
        number: match[1] for number, line in enumerate(source.splitlines(), 1) if (match := _SECTION.fullmatch(line))
    }
    body = ast.parse(source).body
    found = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id in _UNITS:
            continue
        section = max((line for line in sections if line < node.lineno), default=0)
        note = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            note = " ".join(str(after.value.value).split())
        found.append((sections.get(section, ""), node.target.id, _value(node.target.id), note))
    return found


def render() -> str:
    """The table between its marks, without them."""
    lines = ["| part | bound | value | |", "|---|---|---|---|"]
    last = None
    for section, name, value, note in rows():
        lines.append(f"| {section if section != last else ''} | `{name}` | {value} | {note} |")
        last = section
    return "\n".join(lines) + "\n"


def _value(name: str) -> str:
    value = getattr(limits, name)
    if isinstance(value, str):
        return f"`{value}`".replace("|", "\\|")
    text = f"{value:,}"
    if "BYTES" in name:
        for size, unit in ((limits.GIB, "GiB"), (limits.MIB, "MiB"), (limits.KIB, "KiB")):
            if value and value % size == 0:
                return f"{text} ({value // size} {unit})"
    if name.startswith(("CELL_UID_B", "DAEMON_UID_B")):
        return f"{text} ({value:#x})"
    return text


def main() -> None:
    path = ROOT / "SPECIFICATION.md"
    head, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n{render()}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Small plots for a terminal: a band with a line and points, and a bar chart of one series."""

from __future__ import annotations

from collections.abc import Sequence

_BARS = " ▁▂▃▄▅▆▇█"


def band(
    t: Sequence[float], truth: Sequence[float], mean: Sequence[float], low: Sequence[float], high: Sequence[float],
    *, width: int = 76, height: int = 13,
) -> list[str]:  # fmt: skip
    """Lines of text: `░` the interval, `·` the forecast, `o` the truth, `◉` where both fall together."""
    bottom, top = min(*low, *truth), max(*high, *truth)
    span = (top - bottom) or 1.0
    start, length = t[0], (t[-1] - t[0]) or 1.0
    grid = [[" "] * width for _ in range(height)]

    def row(value: float) -> int:
        return min(height - 1, max(0, round((top - value) / span * (height - 1))))

    columns = [min(width - 1, int((moment - start) / length * (width - 1))) for moment in t]
    for k, column in enumerate(columns):
        until = columns[k + 1] if k + 1 < len(columns) else column + 1
        for x in range(column, max(until, column + 1)):
            for y in range(row(high[k]), row(low[k]) + 1):
                grid[y][x] = "░"
    for k, column in enumerate(columns):
        y, y_truth = row(mean[k]), row(truth[k])
        grid[y][column] = "·"
        grid[y_truth][column] = "◉" if y == y_truth else "o"
    lines = [f"{top:6.2f} ┤" + "".join(grid[0])]
    lines += ["       │" + "".join(cells) for cells in grid[1:-1]]
    lines.append(f"{bottom:6.2f} ┤" + "".join(grid[-1]))
    lines.append("       └" + "─" * width)
    lines.append(f"        {start:<6.2f}{'time in s (irregular steps)':^{width - 12}}{t[-1]:>6.2f}")
    return lines


def bars(values: Sequence[float], *, mark: int, ceiling: float) -> list[str]:
    """One character per value, and a line that points at index `mark`."""
    shown = "".join(_BARS[max(0, min(8, int(value / ceiling * 8)))] for value in values)
    return [f"        {shown}", "        " + " " * mark + "▲ fault injected here"]

"""Notations of the command line: exact, total, never anything but a value or BAD_FIELD."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.cli import parse
from aether.contract.errors import AetherError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("256M", 256 << 20),
        ("1.5G", 3 << 29),
        ("1GiB", 1 << 30),
        ("10b", 10),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse.size_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("10s", 10_000),
        ("500ms", 500),
        ("10", 10_000),
        ("1.5m", 90_000),
        ("1h30m", 5_400_000),
        ("2d", 172_800_000),
        ("0.25", 250),
    ],
)
def test_durations(text: str, ms: int) -> None:
    assert parse.duration_ms(text) == ms


@given(st.integers(0, 1 << 40))
def test_sizes_round_trip(count: int) -> None:
    assert parse.size_bytes(str(count)) == count
    assert parse.size_bytes(f"{count}K") == count << 10


@given(st.integers(0, 23), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_durations_add_up(hours: int, minutes: int, seconds: int, ms: int) -> None:
    assert (
        parse.duration_ms(f"{hours}h{minutes}m{seconds}s{ms}ms") == ((hours * 60 + minutes) * 60 + seconds) * 1000 + ms
    )


@given(st.text(max_size=30))
def test_parsers_are_total(text: str) -> None:
    for parser in (parse.size_bytes, parse.duration_ms, parse.cpu_millis):
        try:
            assert parser(text) >= 0
        except AetherError as error:
            assert error.code == "BAD_FIELD"
    for pair in (
        lambda: parse.environment([text]),
        lambda: parse.file_spec(text, False),
        lambda: parse.horizons_s([text]),
    ):
        try:
            pair()
        except AetherError as error:
            assert error.code == "BAD_FIELD"


@pytest.mark.parametrize("text", ["", "M", "-1", "1e3", "1 M", "0x10", "1MM", "١", "1.5.5G"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(AetherError):
        parse.size_bytes(text)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1s ", "1x", "1h 30m", "1.2.3s", "10ms5"])
def test_durations_refused(text: str) -> None:
    with pytest.raises(AetherError):
        parse.duration_ms(text)


def test_cpu() -> None:
    assert [parse.cpu_millis(t) for t in ("0.5", "2", "250m", "0.001")] == [500, 2000, 250, 1]


def test_environment_and_files() -> None:
    assert parse.environment(["A=1", "B=x=y", "A=2", "C="]) == {"A": "2", "B": "x=y", "C": ""}
    assert parse.file_spec("data/x.csv", False) == ("data/x.csv", "data/x.csv")
    assert parse.file_spec("./data/x.csv", False) == ("./data/x.csv", "data/x.csv")
    assert parse.file_spec("/etc/hosts", False) == ("/etc/hosts", "hosts")
    assert parse.file_spec("../x.csv", False) == ("../x.csv", "x.csv")
    assert parse.file_spec("x.csv:in/x.csv", False) == ("x.csv", "in/x.csv")
    assert parse.file_spec("a:b", True) == ("a:b", "a:b")


def test_horizons() -> None:
    assert parse.horizons_s(["0.1", "0.5,1", "250ms"]) == (0.1, 0.5, 1.0, 0.25)
    for bad in ([], ["0"], ["-1"], ["nan"], ["inf"]):
        with pytest.raises(AetherError):
            parse.horizons_s(bad)

"""The random streams of one seed: disjoint data for each purpose, so that no split ever sees another's."""

from enum import IntEnum


class Stream(IntEnum):
    TRAIN = 0
    VALID = 1
    CALIBRATE_INTERVALS = 2
    CALIBRATE_SURPRISE = 3
    HELD_OUT = 4
    HELD_OUT_HORIZONS = 5
    HELD_OUT_FAULTS = 6
    GOLDEN = 7

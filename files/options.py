"""What train.py and sample.py ask of their options."""

import argparse
import math
import pathlib

from files.run import read_run


def pixels(text: str) -> tuple[int, int]:
    """An option's "512" or "512x768" -> (height, width)"""
    h, _, w = text.partition("x")
    size = int(h), int(w or h)
    if min(size) < 16:
        raise ValueError
    return size


def need_positive(p: argparse.ArgumentParser, o: argparse.Namespace, names: list[str]) -> None:
    """Refuses what is given and not above 0."""
    for name in names:
        value = getattr(o, name)
        if value is not None and not 0 < value < math.inf:
            p.error(f"--{name} must be above 0, not {value}")


def recall(p: argparse.ArgumentParser, o: argparse.Namespace) -> None:
    """--resume: makes the options of the run in --out the defaults."""
    begun = read_run(pathlib.Path(o.out))
    begun |= {"out": o.out, "size": "x".join(map(str, begun["size"]))}
    begun["device"] = None  # another machine may go on
    for name, value in begun.items():
        if name in vars(o) and value is not None:
            p.set_defaults(**{name: value if isinstance(value, bool) else str(value)})

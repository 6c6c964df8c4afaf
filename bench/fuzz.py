"""Hostile files: good ones are damaged at random, and whatever reads them must accept them or say one clear sentence.

    python bench/fuzz.py --cases 2000 --seed 0              # some minutes on two cores; the tests run 200

Each case takes a good file (weights, adapter, JSON, JSON lines, pictures), damages it (bits, cuts, pieces copied or doubled, values in JSON
replaced by others), puts it in its place and calls what train.py and sample.py call. A failure is any exception but UserError, more than
10 seconds, or more than 2 GB; the damaged file is then kept in bench/work/fuzz. The last line is one JSON object.
"""

import argparse
import collections
import contextlib
import importlib.util
import io
import itertools
import json
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from files.clips import VIDEOS, read_frames, write_clip  # noqa: E402
from files.disk import UserError, write_tensors  # noqa: E402
from files.pictures import SUFFIXES, load_image  # noqa: E402
from files.run import key_in_file, load_adapter, read_run  # noqa: E402
from frozen.load import load_base  # noqa: E402
from model import new_adapter  # noqa: E402
from train import Muon, restore  # noqa: E402

KEPT = ROOT / "bench" / "work" / "fuzz"
ODD = (
    None,
    True,
    -1,
    0,
    3,
    10**9,
    10**30,
    0.5,
    -1e308,
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "é" * 300,
    [],
    {},
    [1],
    {"a": 1},
    ["a", []],
)


def damage_bytes(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        i, j = sorted(int(v) for v in rng.integers(0, max(1, len(raw)), 2))
        if (how := rng.integers(6)) == 0:  # a few bits, mostly at the front, where headers are
            for k in rng.integers(0, max(1, min(len(raw), rng.choice([16, 200, 10**9]))), 4):
                raw[k : k + 1] = bytes([rng.integers(256)])
        elif how == 1:
            del raw[i:]
        elif how == 2:
            del raw[i : min(j, i + 50)]
        elif how == 3:
            raw[i:i] = raw[i : min(j, i + 50)] * 2
        elif how == 4:
            raw[i:i] = rng.bytes(rng.integers(1, 40))
        else:
            raw[:8] = int(rng.choice([0, 2, 10**6, 2**62])).to_bytes(8, "little")
    return bytes(raw)


def damage_json(value, rng):
    """Replaces, removes or adds one value somewhere."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[rng.integers(len(keys))]
        value = value.copy()
        if (chance := rng.random()) < 0.15:
            del value[key]
        elif chance < 0.25 and isinstance(value, dict):
            value[str(rng.integers(100))] = ODD[rng.integers(len(ODD))]
        else:
            value[key] = damage_json(value[key], rng)
        return value
    return ODD[rng.integers(len(ODD))]


def damage(raw, name, rng):
    """bytes of a good file -> bytes of a bad one, or sometimes of another good one"""
    with contextlib.suppress(ValueError):
        if name.endswith(".json") and rng.random() < 0.75:
            return json.dumps(damage_json(json.loads(raw), rng)).encode()
        if name.endswith(".jsonl") and rng.random() < 0.75:
            lines = raw.decode().splitlines()
            i = rng.integers(len(lines))
            lines[i] = json.dumps(damage_json(json.loads(lines[i]), rng))
            return "\n".join(lines).encode()
        if (
            name.endswith(".safetensors") and rng.random() < 0.5
        ):  # a header that parses, with other shapes, types and places
            size = int.from_bytes(raw[:8], "little")
            header = json.dumps(damage_json(json.loads(raw[8 : 8 + size]), rng)).encode()
            return len(header).to_bytes(8, "little") + header + raw[8 + size :]
    return damage_bytes(raw, rng)


def pictures(folder):
    """One small picture of every kind that data.py knows, and some odd but good ones."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    odd = {
        "i.png": Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100),
        "j.png": rgb.convert("LA"),
        "f.gif": rgb.convert("P"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "thin.png": rgb.resize((1, 10000)),
        "wide.png": rgb.resize((10000, 1)),
        "one.png": rgb.resize((1, 1)),
    }
    for name, img in (
        dict.fromkeys(("a.png", "b.jpg", "d.webp", "e.bmp", "g.ppm", "h.tif"), rgb) | odd
    ).items():
        img.save(folder / name)
    rgb.save(folder / "moving.gif", save_all=True, append_images=[rgb.rotate(9)] * 3)
    rgb.save(folder / "moving.webp", save_all=True, append_images=[rgb.rotate(9)] * 3)
    (folder / "wrong.png").write_bytes((folder / "b.jpg").read_bytes())  # a JPEG by another name


def clips(folder):
    """One short clip of every kind that data.py knows, where PyAV is installed."""
    rng = np.random.default_rng(0)
    frames = [
        (np.roll(rng.integers(0, 256, (48, 56, 3), dtype=np.uint8), 4 * i, 1), i / 8)
        for i in range(6)
    ]
    for name in ["a.webp", "b.gif", "c.png"] + [f"d{suffix}" for suffix in VIDEOS] * (
        importlib.util.find_spec("av") is not None
    ):
        write_clip(folder / name, frames)


def targets(work):
    """-> {name: (folder of good files, which of them to damage, reader)}; the reader gets the folder with one file damaged"""
    base, run, folder = work / "base", work / "run", work / "data"
    shutil.copytree(ROOT / "tiny" / "checkpoint", base)
    model = load_base(base)[0]
    adapter = new_adapter(model, 2)
    for out in (run, folder):
        out.mkdir()
    write_tensors(
        run / "adapter.safetensors",
        {key_in_file(k): v for k, v in adapter.items()},
        base="tiny",
        step=1,
    )
    state = {
        f"{part}.{k}": v.detach().clone()
        for part in ("now", "avg", "exp_avg")
        for k, v in adapter.items()
    }
    write_tensors(
        run / "checkpoint.safetensors", state | {"rng": torch.Generator().get_state()}, step=1
    )
    held = [
        {
            "path": str(ROOT / "tiny/examples/000.png"),
            "instr": "make it winter",
            "undo": "make it spring",
        }
    ]
    (run / "config.json").write_text(
        json.dumps({"base": "tiny", "instr": "make it winter", "size": [64, 64], "held": held})
    )
    pictures(folder)
    names = sorted(p.name for p in folder.iterdir())
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": n, "text": "a red house in autumn"}) for n in names[:9])
    )
    prompts = {
        "src": "a house",
        "tgt": "a house in winter",
        "instr": "make it winter",
        "undo": "make it summer",
    }
    (folder / "tuples.jsonl").write_text(
        "\n".join(json.dumps({"file_name": n} | prompts) for n in names)
    )

    def read_base(where):
        load_base(where)

    def read_adapter(where):
        load_adapter(where / "adapter.safetensors", model)

    def read_checkpoint(where):
        fresh = new_adapter(model, 2)
        average = {k: v.detach().clone() for k, v in fresh.items()}
        restore(
            where / "checkpoint.safetensors",
            fresh,
            average,
            Muon(fresh.values()),
            torch.Generator(),
        )

    def read_rows(where):
        rows = data.read_prompts(where, data.find(where, 1)[0])
        assert all(
            where in row["path"].parents
            and pathlib.Path(row["path"].parent).resolve() == where.resolve()
            for row in rows
        ), "a path outside"

    def read_captions(where):
        (where / "tuples.jsonl").unlink(missing_ok=True)
        data.read_prompts(where, data.find(where, 1)[0], "make it winter")

    def read_pictures(where):
        for path in sorted(where.glob("*.*")):
            if path.suffix in SUFFIXES:
                with contextlib.suppress(UserError):
                    assert load_image(path, (64, 64)).shape == (64, 64, 3)

    def read_clips(where):
        for path in data.find(where)[0]:
            with contextlib.suppress(UserError):
                assert all(
                    f.shape[2] == 3 for f, _ in itertools.islice(read_frames(where / path), 100)
                )

    moving = work / "clips"
    clips(moving)
    json_of_base = [p.relative_to(base) for p in base.rglob("*.json")] + [
        p.relative_to(base) for p in base.rglob("merges.txt")
    ]
    weights = [p.relative_to(base) for p in base.rglob("*.safetensors")]
    return {
        "base: JSON and merges": (base, json_of_base, read_base),
        "base: weights": (base, weights, read_base),
        "adapter": (run, ["adapter.safetensors"], read_adapter),
        "checkpoint": (run, ["checkpoint.safetensors"], read_checkpoint),
        "config.json of a run": (run, ["config.json"], read_run),
        "tuples.jsonl": (folder, ["tuples.jsonl"], read_rows),
        "metadata.jsonl": (folder, ["metadata.jsonl"], read_captions),
        "pictures": (folder, names, read_pictures),
        "clips": (moving, [p.name for p in moving.iterdir()], read_clips),
    }


class TooLong(BaseException):
    """No OSError, as TimeoutError is: a reader would take that for a broken file."""


def too_long(*_):
    raise TooLong("more than 10 seconds")


def one(good, name, read, rng, work):
    """-> what came of it: "accepted", "refused", or what went wrong; and the damaged bytes"""
    where = work / "case"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(good, where, copy_function=lambda a, b: pathlib.Path(b).symlink_to(a))
    raw = damage((good / name).read_bytes(), str(name), rng)
    (where / name).unlink()
    (where / name).write_bytes(raw)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            read(where)
        return "accepted", raw
    except UserError as error:
        return (
            "refused"
            if str(error).strip() and "\n" not in str(error)
            else f"no single sentence: {error!r}"
        ), raw
    except (Exception, TooLong) as error:
        return f"{type(error).__name__}: {str(error)[:200]}", raw
    finally:
        signal.alarm(0)


def fuzz(cases, seed, only=None):
    """-> {target: Counter of "accepted", "refused", "failed"}, [(target, file, what went wrong)]"""
    table, failures, rng = (
        collections.defaultdict(collections.Counter),
        [],
        np.random.default_rng(seed),
    )
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        every = targets(work)
        for good, _, read in every.values():  # the good ones are accepted
            with contextlib.redirect_stderr(io.StringIO()):
                read(shutil.copytree(good, work / "good"))
            shutil.rmtree(work / "good")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(cases):
            target = list(every)[i % len(every)]
            good, names, read = every[target]
            if only and only != target:
                continue
            name = names[rng.integers(len(names))]
            what, raw = one(good, name, read, rng, work)
            if (grown := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) > 2 * 2**20:
                what, before = f"{grown >> 10} MB", before + grown
            table[target][what if what in ("accepted", "refused") else "failed"] += 1
            if what not in ("accepted", "refused"):
                KEPT.mkdir(parents=True, exist_ok=True)
                (KEPT / f"{seed}-{i}-{pathlib.Path(name).name}").write_bytes(raw)
                failures.append((target, str(name), what))
    return table, failures


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--cases", type=int, default=2000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", help="one target")
    o = p.parse_args()
    begun = time.time()
    table, failures = fuzz(o.cases, o.seed, o.only)
    for failure in failures:
        print("FAILED " + " | ".join(failure))
    print("| file | cases | accepted | refused in one sentence | failed |\n|---|---|---|---|---|")
    for target, c in table.items():
        print(
            f"| {target} | {sum(c.values())} | {c['accepted']} | {c['refused']} | {c['failed']} |"
        )
    print(
        json.dumps(
            {
                "cases": o.cases,
                "seed": o.seed,
                "failed": len(failures),
                "seconds": round(time.time() - begun),
                "table": table,
            }
        )
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

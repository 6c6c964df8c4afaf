"""Hostile files: good ones are damaged at random, and whatever reads them must accept them or say
one clear sentence.

    python bench/fuzz.py --cases 2000 --seed 0      # some minutes on two cores; the tests run 200

Each case takes a good file (weights, adapter, JSON, JSON lines, pictures), damages it (bits, cuts,
pieces copied or doubled, values in JSON replaced by others), puts it in its place and calls what
train.py and sample.py call. A failure is any exception but UserError, more than 10 seconds, or more
than 2 GB; the damaged file is then kept in bench/work/fuzz. The last line is one JSON object.
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
from functools import partial

import numpy as np
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import read_prompts  # noqa: E402
from files.clips import VIDEOS, read_frames, write_clip  # noqa: E402
from files.disk import UserError, write_tensors  # noqa: E402
from files.folder import find  # noqa: E402
from files.pictures import SUFFIXES, load_image  # noqa: E402
from files.run import key_in_file, load_adapter, read_run, restore  # noqa: E402
from frozen.load import load_base  # noqa: E402
from model import new_adapter  # noqa: E402
from train import Muon  # noqa: E402

KEPT = ROOT / "bench" / "work" / "fuzz"
PROMPTS = {
    "src": "a house",
    "tgt": "a house in winter",
    "instr": "make it winter",
    "undo": "make it summer",
}
ODD = (None, True, -1, 0, 3, 10**9, 10**30, 0.5, -1e308, "", "x", "../../x", "/etc/passwd")
ODD += ("é" * 300, [], {}, [1], {"a": 1}, ["a", []])  # values for JSON


def damage_bytes(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        i, j = sorted(int(v) for v in rng.integers(0, max(1, len(raw)), 2))
        how = rng.integers(6)
        if how == 0:  # a few bits, mostly at the front, where headers are
            front = min(len(raw), rng.choice([16, 200, 10**9]))
            for k in rng.integers(0, max(1, front), 4):
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
    if not isinstance(value, (dict, list)) or not value or rng.random() >= 0.85:
        return ODD[rng.integers(len(ODD))]
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[rng.integers(len(keys))]
    value = value.copy()
    chance = rng.random()
    if chance < 0.15:
        del value[key]
    elif chance < 0.25 and isinstance(value, dict):
        value[str(rng.integers(100))] = ODD[rng.integers(len(ODD))]
    else:
        value[key] = damage_json(value[key], rng)
    return value


def damage_header(raw, rng):
    """A safetensors header that parses, with other shapes, types and places."""
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(damage_json(json.loads(raw[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


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
        if name.endswith(".safetensors") and rng.random() < 0.5:
            return damage_header(raw, rng)
    return damage_bytes(raw, rng)


# ---- good files ---------------------------------------------------------------------------------
def pictures(folder):
    """One small picture of every kind that is read, and some odd but good ones."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    images = dict.fromkeys(("a.png", "b.jpg", "d.webp", "e.bmp", "g.ppm", "h.tif"), rgb)
    images |= {
        "i.png": Image.fromarray(deep),
        "j.png": rgb.convert("LA"),
        "f.gif": rgb.convert("P"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "thin.png": rgb.resize((1, 10000)),
        "wide.png": rgb.resize((10000, 1)),
        "one.png": rgb.resize((1, 1)),
    }
    for name, img in images.items():
        img.save(folder / name)
    for name in ("moving.gif", "moving.webp"):
        rgb.save(folder / name, save_all=True, append_images=[rgb.rotate(9)] * 3)
    (folder / "wrong.png").write_bytes((folder / "b.jpg").read_bytes())  # a JPEG by another name


def clips(folder):
    """One short clip of every kind that is read, videos where PyAV is installed."""
    rng = np.random.default_rng(0)
    frames = []
    for i in range(6):
        picture = rng.integers(0, 256, (48, 56, 3), dtype=np.uint8)
        frames.append((np.roll(picture, 4 * i, 1), i / 8))
    names = ["a.webp", "b.gif", "c.png"]
    if importlib.util.find_spec("av") is not None:
        names += [f"d{suffix}" for suffix in VIDEOS]
    for name in names:
        write_clip(folder / name, frames)


def write_run(run, adapter):
    """What train.py leaves in a run's folder and reads again."""
    tensors = {key_in_file(name): v for name, v in adapter.items()}
    write_tensors(run / "adapter.safetensors", tensors, base="tiny", step=1)
    state = {"rng": torch.Generator().get_state()}
    for part in ("now", "avg", "exp_avg"):
        for name, v in adapter.items():
            state[f"{part}.{name}"] = v.detach().clone()
    write_tensors(run / "checkpoint.safetensors", state, step=1)
    path = str(ROOT / "tiny/examples/000.png")
    held = [{"path": path, "instr": "make it winter", "undo": "make it spring"}]
    config = {"base": "tiny", "instr": "make it winter", "size": [64, 64], "held": held}
    (run / "config.json").write_text(json.dumps(config))


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def write_data(folder):
    """Pictures with captions and prompts. -> the pictures' names"""
    pictures(folder)
    names = sorted(p.name for p in folder.iterdir())
    captions = [{"file_name": name, "text": "a red house in autumn"} for name in names[:9]]
    write_lines(folder / "metadata.jsonl", captions)
    write_lines(folder / "tuples.jsonl", [{"file_name": name} | PROMPTS for name in names])
    return names


# ---- their readers, which get a folder with one file damaged ------------------------------------
def read_adapter(where, model):
    load_adapter(where / "adapter.safetensors", model)


def read_checkpoint(where, model):
    adapter = new_adapter(model, 2)
    average = {name: v.detach().clone() for name, v in adapter.items()}
    opt = Muon(adapter.values(), lr=1e-3)
    restore(where, adapter, average, opt, torch.Generator())


def read_rows(where):
    for row in read_prompts(where, find(where, 1)[0]):
        path = row["path"]
        inside = where in path.parents and path.parent.resolve() == where.resolve()
        assert inside, "a path outside"


def read_captions(where):
    (where / "tuples.jsonl").unlink(missing_ok=True)
    read_prompts(where, find(where, 1)[0], "make it winter")


def read_pictures(where):
    for path in sorted(where.glob("*.*")):
        if path.suffix in SUFFIXES:
            with contextlib.suppress(UserError):
                assert load_image(path, (64, 64)).shape == (64, 64, 3)


def read_clips(where):
    for path in find(where)[0]:
        with contextlib.suppress(UserError):
            for picture, _ in itertools.islice(read_frames(where / path), 100):
                assert picture.shape[2] == 3


def targets(work):
    """-> {name: (folder of good files, which of them to damage, reader)}"""
    base, run, folder, moving = (work / name for name in ("base", "run", "data", "clips"))
    shutil.copytree(ROOT / "tiny" / "checkpoint", base)
    for new in (run, folder, moving):
        new.mkdir()
    model = load_base(base)[0]
    write_run(run, new_adapter(model, 2))
    names = write_data(folder)
    clips(moving)

    files = [p.relative_to(base) for p in base.rglob("*.*")]
    texts = [p for p in files if p.suffix == ".json" or p.name == "merges.txt"]
    weights = [p for p in files if p.suffix == ".safetensors"]
    return {
        "base: JSON and merges": (base, texts, load_base),
        "base: weights": (base, weights, load_base),
        "adapter": (run, ["adapter.safetensors"], partial(read_adapter, model=model)),
        "checkpoint": (run, ["checkpoint.safetensors"], partial(read_checkpoint, model=model)),
        "config.json of a run": (run, ["config.json"], read_run),
        "tuples.jsonl": (folder, ["tuples.jsonl"], read_rows),
        "metadata.jsonl": (folder, ["metadata.jsonl"], read_captions),
        "pictures": (folder, names, read_pictures),
        "clips": (moving, [p.name for p in moving.iterdir()], read_clips),
    }


# ---- a case, and many ---------------------------------------------------------------------------
class TooLong(BaseException):
    """No OSError, as TimeoutError is: a reader would take that for a broken file."""


def too_long(*_):
    raise TooLong("more than 10 seconds")


def link(source, target):
    pathlib.Path(target).symlink_to(source)


def one(good, name, read, rng, work):
    """-> what came of it: "accepted", "refused", or what went wrong; and the damaged bytes"""
    where = work / "case"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(good, where, copy_function=link)
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
        if not str(error).strip() or "\n" in str(error):
            return f"no single sentence: {error!r}", raw
        return "refused", raw
    except (Exception, TooLong) as error:
        return f"{type(error).__name__}: {str(error)[:200]}", raw
    finally:
        signal.alarm(0)


def most_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_good(every, work):
    """The files are accepted before they are damaged."""
    for good, _, read in every.values():
        with contextlib.redirect_stderr(io.StringIO()):
            read(shutil.copytree(good, work / "good"))
        shutil.rmtree(work / "good")


def fuzz(cases, seed, only=None):
    """-> {target: Counter of "accepted", "refused", "failed"}, [(target, file, what went wrong)]"""
    table = collections.defaultdict(collections.Counter)
    rng = np.random.default_rng(seed)
    failures = []
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        every = targets(work)
        check_good(every, work)
        before = most_kib()
        for i in range(cases):
            target = list(every)[i % len(every)]
            good, names, read = every[target]
            if only and only != target:
                continue
            name = names[rng.integers(len(names))]
            what, raw = one(good, name, read, rng, work)
            grown = most_kib() - before
            if grown > 2 * 2**20:
                what, before = f"{grown >> 10} MB", before + grown
            if what in ("accepted", "refused"):
                table[target][what] += 1
                continue
            table[target]["failed"] += 1
            KEPT.mkdir(parents=True, exist_ok=True)
            (KEPT / f"{seed}-{i}-{pathlib.Path(name).name}").write_bytes(raw)
            failures.append((target, str(name), what))
    return table, failures


def main():
    kind = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=kind)
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
        cells = [target, sum(c.values()), c["accepted"], c["refused"], c["failed"]]
        print(f"| {' | '.join(map(str, cells))} |")
    figures = {"cases": o.cases, "seed": o.seed, "failed": len(failures)}
    print(json.dumps(figures | {"seconds": round(time.time() - begun), "table": table}))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

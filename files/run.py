"""A run's folder: its lock, configuration, log, adapter, checkpoint, card and page."""

import hashlib
import json
import math
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys

import numpy as np
import torch
from torch import Tensor

from data import KINDS
from files.clips import write_sheets
from files.disk import (
    ROOT,
    UserError,
    note,
    read_json,
    read_tensors,
    replacing,
    why,
    write,
    write_tensors,
)
from files.folder import files_of
from files.pictures import write_image
from files.ranks import RANK, say
from frozen.load import NAMED, working_size
from frozen.probe import judge, warnings_of
from frozen.vae import to_images
from model import Adapter, MMDiT, merged, new_adapter
from routing import editor, integrate, noise

LOCKS = []  # of the runs that this process writes, held until it ends
PARTS = {"Muon": {"exp_avg"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}  # of their state
HELD = 6  # pictures kept out of training, for the sample sheets; an eighth of a small folder
NOTE = "nanoByG adapter: LoRA (alpha = rank) and source_proj, without which it does not edit"


# ---- beginning a run ----------------------------------------------------------------------------
def split_rows(n: int) -> tuple[Tensor, Tensor]:
    """-> the rows for the sample sheets, and those to train on; the same for any seed"""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    few = min(HELD, max(1, n // 8))
    return order[:few], order[few:] if n > few else order


def claim(out: pathlib.Path, resume: bool) -> None:
    """Makes the folder of a run and locks it; the lock ends with the process, however it ends.
    Raises UserError where another process trains there, or a run is there or not against `resume`.
    """
    if RANK:
        return
    if (out / "checkpoint.safetensors").exists() != resume:
        if resume:
            raise UserError(f"{out} holds no run to resume; omit --resume to begin one", 2)
        raise UserError(
            f"{out} holds a run already: add --resume to go on with it, or choose another --out", 2
        )
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
        LOCKS.append(lock)
    except OSError as error:
        raise UserError(f"{out} cannot be written to ({error}); choose another --out")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy = f"another process is training in {out}; wait for it, or choose another --out"
        raise UserError(busy, 2)
    except (ImportError, OSError):  # Windows and some shared disks have no locks
        pass


def begin(out: pathlib.Path, config: dict, data, held: Tensor) -> None:
    """Writes held-back pictures, config.json and card; warns where a resumed run has other data."""
    if RANK:
        return
    shown = []
    for n, i in enumerate(held.tolist()):  # copied: a run may be published, and --data be gone
        row = data.rows[i]
        path = row["path"]
        for file in files_of(path):
            with replacing(out / "held" / str(n) / file.relative_to(path.parent)) as tmp:
                shutil.copyfile(file, tmp)  # piecewise: a film may be larger than the memory
        shown.append(row | {"path": f"held/{n}/{path.name}"})
    made = origin() | {"fingerprint": fingerprint(data.rows)}
    if config["resume"]:
        before = read_run(out)
        config = config | {"probe": before.get("probe")}
        if before["made"].get("fingerprint") != made["fingerprint"]:
            other = f"these are not the pictures and prompts that the run in {out} was begun with"
            print(f"warning: {other}", file=sys.stderr)
    write(out / "config.json", config | {"held": shown, "made": made})
    write(out / "README.md", card(config, made))


def begin_adapter(model: MMDiT, rank: int, o) -> Adapter:
    """A new adapter or, with --init or --resume, that of the run it names, of its rank and kind;
    temporal attention is new where it has none. o: the options init, resume, out and frames"""
    old = {}
    run = o.out if o.resume else o.init
    if run:
        old = load_adapter(pathlib.Path(run) / "adapter.safetensors", model)
        rank = rank_of(old)
    adapter = new_adapter(model, rank, video=o.frames > 1) | old
    return {name: v.requires_grad_() for name, v in adapter.items()}


def rank_of(adapter: Adapter) -> int:
    return max(len(v) for name, v in adapter.items() if "lora_A" in name)


def training_size(size: tuple, model: MMDiT, vae, resumed: pathlib.Path | None) -> tuple[int, int]:
    """--size (h, w) in whole patches, and no larger in area than the base's own pictures."""
    if resumed and read_run(resumed)["size"] == list(size):
        return size  # is such a size already; rounded again it might be another
    side = math.prod(size) ** 0.5
    return working_size(*size, model, vae, min(vae.factor * model.sample_size, side))


def fingerprint(rows: list[dict]) -> str:
    """A digest of the prompts, and of the files' names and sizes: their latents would differ from
    one processor to another."""
    digest = hashlib.sha256()
    for row in rows:
        path = row["path"]
        size = sum(file.stat().st_size for file in files_of(path))
        digest.update(json.dumps(row | {"path": path.name, "size": size}).encode())
    return digest.hexdigest()[:16]


def origin() -> dict[str, str]:
    """What a run was made with. -> dict of command, commit, versions, machine"""
    # Only code makes a commit dirty: tables and pictures change while they are made.
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    commit = git("describe", "--always") or "unknown"
    return {
        "command": f"python {shlex.join(sys.argv)}",
        "commit": commit + "-dirty" * bool(dirty),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def git(*args: str) -> str:
    """What git says of this repository; nothing where there is no git."""
    if not shutil.which("git"):
        return ""
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def card(config: dict, made: dict[str, str]) -> str:
    """The model card, as Hugging Face's Hub reads it."""
    title, words = "An editor for many instructions", ' --instr "make it winter"'
    if config["instr"]:
        title, words = f'An editor for "{config["instr"]}"', ""
    base = NAMED.get(config["base"], config["base"])
    on_hub = base.count("/") == 1 and not pathlib.Path(base).exists()
    of_base = f"base_model: {base}\nbase_model_relation: adapter\n" if on_hub else ""
    return f"""---
{of_base}{licence_of(base)}pipeline_tag: image-to-image
library_name: nanobyg
tags: [image-to-image, lora, bootstrap-your-generator, unpaired]
---
# {title}

Trained without pairs by nanoByG: `{made["command"]}`

Use: `python sample.py --run {config["out"]} --input picture.png --output edited.png{words}`. The
adapter holds the source's projection besides its LoRA; other tools may load the LoRA, but cannot
edit with it. `samples/` and `held/` show pictures that were kept out of training: publish them only
if you may.

Made with seed {config["seed"]}, nanoByG {made["commit"]}, torch {made["torch"]}, Python
{made["python"]}, {made["machine"]}; data {made["fingerprint"]}.

![source, edit, edit undone](samples/latest.png)
"""


def licence_of(base: str) -> str:
    """The card's lines on the licence, which the base's passes on to its adapters; none where it is
    not known."""
    if base == NAMED["tiny"]:
        return "license: mit\n"
    if base.startswith(("stabilityai/", "tensorart/")):
        link = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md"
        name = "license: other\nlicense_name: stabilityai-ai-community\n"
        return f"{name}license_link: {link}\n"
    return ""


# ---- keeping it ---------------------------------------------------------------------------------
def open_log(out: pathlib.Path, step: int):
    """log.jsonl, to write on. A resumed run writes its steps again: of the lines up to `step` the
    whole ones are kept."""
    if RANK:
        return open(os.devnull, "w")
    file = out / "log.jsonl"
    lines = file.read_text("utf-8", "replace").splitlines(keepends=True) if file.exists() else []
    write(file, "".join(line for line in lines[:step] if line.endswith("}\n")))
    return open(file, "a", buffering=1)


def save(out: pathlib.Path, adapter: Adapter, average: Adapter, opt, rng, step: int, base: str):
    """The averaged adapter, which edits; the checkpoint, which --resume goes on from."""
    if RANK:
        return
    edits = {key_in_file(k): v for k, v in average.items()}
    meta = {"base": base, "rank": rank_of(adapter), "step": step, "format": "pt", "note": NOTE}
    write_tensors(out / "adapter.safetensors", edits, **meta)
    state = {"rng": rng.get_state()}
    for k, p in adapter.items():
        state[f"now.{k}"] = p
        state[f"avg.{k}"] = average[k]
        for part, v in opt.state.get(p, {}).items():
            state[f"{part}.{k}"] = v
    write_tensors(out / "checkpoint.safetensors", state, step=step)


def restore(out: pathlib.Path, adapter: Adapter, average: Adapter, opt, rng) -> int:
    """Puts everything back as it was saved. -> the step"""
    path = out / "checkpoint.safetensors"
    state, meta = read_tensors(path)
    try:
        rng.set_state(state["rng"])
        parts = {key.split(".")[0] for key in state} - {"rng", "now", "avg"}  # the optimizer's
        if parts and parts != PARTS[type(opt).__name__]:  # none before its first step
            raise ValueError("it was trained by another optimizer, or by an older nanoByG")
        for k, p in adapter.items():
            with torch.no_grad():
                p.copy_(fit(state[f"now.{k}"], p))
                average[k].copy_(fit(state[f"avg.{k}"], p))
            if parts:
                opt.state[p] = {part: fit(state[f"{part}.{k}"], p) for part in parts}
        return int(meta["step"])
    except (LookupError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{path}: does not fit this run ({why(error)}); give the options it was begun with, or "
            "another --out to begin anew"
        )


def fit(v: Tensor, like: Tensor) -> Tensor:
    """A copy of v, for Windows writes over no file that is mapped; AdamW's step is one number."""
    if v.ndim == 0:
        return v.clone()
    return v.to(like, copy=True).view_as(like)


@torch.no_grad()
def sheet(out, model, vae, average, data, held, how: tuple, step: int, late=False) -> dict:
    """Writes the sample sheet: the held-back sources, their edits, and the edits undone.

    how: frames of a clip; pictures or clips at a time, as in a step; time grid; autocast; late: see
    `warnings_of`. -> undone: PSNR of the edit undone to the source, dB; likelier: share of the
    edits that the base finds likelier under the target caption; surprise: see `judge`"""
    frames, few, ts, autocast = how
    if RANK:
        return {}
    device = model.proj_out.weight.device
    shape = data.latents[0].shape[1:]
    noises = noise(len(held), frames, shape, torch.Generator().manual_seed(1))
    with autocast:
        adapter = merged(model, average)
    columns, judged = [[], [], []], []
    for some, eps in zip(held.split(few), noises.split(few * frames)):
        x, eps = torch.cat([data.latents[i][:frames] for i in some]).to(device), eps.to(device)
        rows = some.repeat_interleave(frames)
        src, tgt, instr, undo = (data.prompt(kind, rows, device) for kind in KINDS)
        with autocast:
            *_, y = integrate(editor(model, adapter, instr, x, frames), eps, ts)
            *_, back = integrate(editor(model, adapter, undo, y, frames), eps, ts)
            judged.append(torch.stack(judge(model, x, y, src, tgt)))  # (2, few F)
        for column, state in zip(columns, (x, y, back)):
            column.append(to_images(vae.decode(state)))
    columns = [np.concatenate(column) for column in columns]
    latest = out / "samples" / f"latest.{'webp' if frames > 1 else 'png'}"
    picture = write_sheets(latest, columns, frames)
    for name in {"latest.png", f"{step:06d}.png"}:  # the card shows a still
        write_image(out / "samples" / name, picture)
    margin, surprise = torch.cat(judged, 1)
    figures = {
        "undone": psnr(columns[0], columns[2]),
        "likelier": (margin > 0).float().mean().item(),
        "surprise": surprise.mean().item(),
    }
    for text in warnings_of(figures, late):
        say(f"warning: step {step}: {text}")
    return figures


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of pictures (B, h, w, 3) uint8: the mean over them, in dB; 99 where they are the same."""
    error = np.square(a.astype(np.float32) - b).mean((1, 2, 3))  # (B,)
    return float(np.minimum(99, 10 * np.log10(255**2 / np.maximum(error, 1e-9))).mean())


def page(out: pathlib.Path) -> None:
    """Writes index.html, which opens from disk: pictures over the steps, curves, prompts."""
    if RANK:
        return
    lines = (out / "log.jsonl").read_text("utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    every = max(1, len(log) // 1000)
    run = {
        "config": read_json(out / "config.json"),
        "log": log[::-every][::-1],
        "sheets": sorted(p.name for p in (out / "samples").glob("[0-9]*.png")),
    }
    template = (ROOT / "files" / "page.html").read_text("utf-8")
    text = json.dumps(run).replace("</", "<\\/")  # nothing in it ends the script
    write(out / "index.html", template.replace("__RUN__", text))


# ---- reading it ---------------------------------------------------------------------------------
def find_run(name: str | None) -> pathlib.Path:
    """The folder of a run: the one that is named, else out, else the bundled editor. Raises
    UserError where nothing is trained there."""
    run = pathlib.Path(name or "out")
    if not name and not run.exists():
        run = ROOT / "tiny" / "editor"
        note("nothing is trained yet (out); this is the bundled editor")
    if not (run / "adapter.safetensors").exists():
        first = 'python train.py --data tiny/examples --instr "make it winter"'
        raise UserError(
            f"{run} holds no trained adapter: train one first ({first}), or name its folder with "
            "--run",
            2,
        )
    return run


def read_run(folder: pathlib.Path) -> dict:
    """config.json of a run. -> dict with base, instr (None: many), frames of a clip, size [h, w],
    and held, what was kept back. Raises UserError where one of them is not as train.py writes it.
    """
    config = {"frames": 1, "instr": None, "made": {}} | read_json(folder / "config.json")
    size, held, frames = config.get("size"), config.get("held"), config["frames"]
    good = isinstance(config.get("base"), str)
    good &= isinstance(config.get("instr"), str | None)
    good &= isinstance(frames, int) and 0 < frames < 1000
    good &= isinstance(config.get("shift"), float | None)
    good &= isinstance(config["made"], dict)
    good &= isinstance(size, list) and len(size) == 2
    good = good and all(isinstance(s, int) and 8 <= s <= 8192 for s in size)
    good = good and isinstance(held, list) and len(held) > 0
    if not good or not all(is_held(row) for row in held):
        raise UserError(
            f"{folder / 'config.json'}: is not as train.py writes it (damaged, or of an older "
            "nanoByG); train again"
        )
    return config


def is_held(row) -> bool:
    kinds = ("path", "instr", "undo")
    return isinstance(row, dict) and all(isinstance(row.get(kind), str) for kind in kinds)


def key_in_file(name: str) -> str:
    """An adapter tensor's key on disk. The LoRA has diffusers' own; its load_lora_weights refuses a
    file with a key that lacks "lora" and reads those that begin with "transformer.", so what it
    does not know (source_proj, temporal attention) is named to be passed over."""
    if "lora_" in name:
        return "transformer." + name
    return name.replace(".weight", ".beside_lora.weight")


def load_adapter(path: pathlib.Path, model: MMDiT) -> Adapter:
    """An adapter file, checked against the base it is to sit on."""
    tensors, _ = read_tensors(path)
    ranks = [v.shape[0] for k, v in tensors.items() if k.endswith("lora_A.weight") and v.ndim]
    video = any(".temporal." in k for k in tensors)
    like = new_adapter(model, max(ranks, default=1), video)
    gate = "source_gate.weight"  # in the bundled editor's file alone, see MMDiT.forward
    if key_in_file(gate) in tensors:
        like[gate] = torch.zeros_like(model.proj_out.weight, dtype=torch.float32)
    names = {key_in_file(name): name for name in like}
    for key in names.keys() | tensors.keys():
        known = key in names and key in tensors
        if not known or tensors[key].shape != like[names[key]].shape:
            raise UserError(
                f"{path}: does not fit this base at '{key}'; it was trained on another (--base), "
                "or by an older nanoByG"
            )
    # copies, for Windows writes over no file that is mapped
    return {name: tensors[key].to(like[name], copy=True) for key, name in names.items()}

"""A run's folder: its lock, log, configuration, adapter, card and page."""

import argparse
import json
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys

import torch

from files.disk import ROOT, UserError, read_json, read_tensors, write
from model import Adapter, MMDiT, new_adapter


def claim(out):
    """Makes the folder and refuses it while another process trains there; the lock ends with the process, however it ends."""
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as error:
        raise UserError(f"{out} cannot be written to ({error}); choose another --out")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is training in {out}; wait for it, or choose another --out", 2
        )
    except (ImportError, OSError):  # Windows and some shared disks have no locks
        pass
    return lock


def cut_log(file: pathlib.Path, step: int) -> None:
    """A resumed run writes its steps again: keeps the log's whole lines up to `step`."""
    lines = file.read_text("utf-8", "replace").splitlines(keepends=True) if file.exists() else []
    write(file, "".join(line for line in lines[:step] if line.endswith("}\n")))


def origin() -> dict[str, str]:
    """What a run was made of. -> dict of command, commit, versions"""
    git = lambda *args: (
        subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        if shutil.which("git")
        else ""
    )  # noqa: E731
    dirty = git(
        "status", "--porcelain", "--untracked-files=no", "--", "*.py"
    )  # only code: tables and pictures change while they are made
    commit = git("describe", "--always") + "-dirty" * bool(dirty)
    return {
        "command": f"python {shlex.join(sys.argv)}",
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def card(o: argparse.Namespace, made: dict[str, str]) -> str:
    return f"""---
base_model: {o.base}
tags: [image-to-image, lora, bootstrap-your-generator, unpaired]
---
# {f'An editor for "{o.instr}"' if o.instr else "An editor for many instructions"}

Trained without pairs by nanoByG: `{made["command"]}`

Use: `python sample.py --run {o.out} --input picture.png --output edited.png{"" if o.instr else ' --instr "make it winter"'}`. The adapter
holds the source's projection and gate besides its LoRA; other tools may load the LoRA, but cannot edit with it.

Made with seed {o.seed}, nanoByG {made["commit"]}, torch {made["torch"]}, Python {made["python"]}, {made["machine"]};
data {made["fingerprint"]}.

![source, edit, edit undone](samples/latest.png)
"""


def page(out: pathlib.Path) -> None:
    """Writes index.html, which opens from disk: pictures over the steps, curves, prompts. The template is files/page.html."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    run = {
        "config": read_json(out / "config.json"),
        "log": log[:: -max(1, len(log) // 1000)][::-1],
        "sheets": sorted(p.name for p in (out / "samples").glob("[0-9]*.png")),
    }
    template = (ROOT / "files" / "page.html").read_text("utf-8")
    write(out / "index.html", template.replace("__RUN__", json.dumps(run).replace("</", "<\\/")))


def read_run(folder: pathlib.Path) -> dict:
    """config.json of a run. -> dict with base, instr (None: many), frames and stride of clips, size [h, w] and held, what was kept back"""
    config, words = read_json(folder / "config.json"), ("path", "instr", "undo")
    size, held = config.get("size"), config.get("held")
    config = {"frames": 1, "stride": 1, "shared_noise": 0.0} | config
    if not (
        isinstance(config.get("base"), str)
        and isinstance(config.get("instr", 0), (str, type(None)))
        and all(isinstance(config[k], int) and 0 < config[k] < 1000 for k in ("frames", "stride"))
        and isinstance(config["shared_noise"], float)
        and 0 <= config["shared_noise"] <= 1
        and isinstance(size, list)
        and len(size) == 2
        and all(isinstance(s, int) and 8 <= s <= 8192 for s in size)
        and isinstance(held, list)
        and held
        and all(isinstance(h, dict) and all(isinstance(h.get(w), str) for w in words) for h in held)
    ):
        raise UserError(
            f"{folder / 'config.json'}: is not as train.py writes it (damaged, or of an older nanoByG); train again"
        )
    return config


def key_in_file(name: str) -> str:
    """An adapter tensor's key on disk. The LoRA has diffusers' own; its load_lora_weights refuses a file with a key that lacks
    "lora" and reads those that begin with "transformer.", so what it does not know (the source's, temporal attention) is named to be
    passed over."""
    return (
        "transformer." + name if "lora_" in name else name.replace(".weight", ".beside_lora.weight")
    )


def load_adapter(path: pathlib.Path, model: MMDiT) -> tuple[Adapter, dict[str, str]]:
    """An adapter file, checked against the base it is to sit on. -> (adapter, metadata)"""
    tensors, meta = read_tensors(path)
    ranks = [v.shape[0] for k, v in tensors.items() if k.endswith("lora_A.weight")]
    want = new_adapter(model, max(ranks, default=1), any(".temporal." in k for k in tensors))
    want = {key_in_file(k): (k, v) for k, v in want.items()}
    for k in want.keys() | tensors.keys():
        if k not in want or k not in tensors or want[k][1].shape != tensors[k].shape:
            raise UserError(
                f"{path}: does not fit this base at '{k}'; it was trained on another (--base), or by an older nanoByG"
            )
    return {name: tensors[k].to(v) for k, (name, v) in want.items()}, meta

"""What train.py says of an edit before training, and of its sheets, for several edits and runs.

    python bench/probe.py                              # winter, night, snow, castle: a minute
    python bench/probe.py --instr "make it foggy"
    python bench/probe.py --runs out out_other         # the sheets' figures of finished runs

The probe's table is the mean over the first eight pictures that the instruction changes. Of runs it
gives the figures of their last sheet and its warnings, edits made anew. The last line is one JSON
object.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
import tempfile

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from data import encode, read_prompts  # noqa: E402
from files import run  # noqa: E402
from files.folder import find  # noqa: E402
from frozen.load import edit_grid, load_base  # noqa: E402
from frozen.probe import probe, verdict, warnings_of  # noqa: E402

INSTRUCTIONS = (
    "make it winter",
    "make it night",
    "make it snow",
    "turn the house into a castle",
)


def encoded(o, base, instr, size):
    """--data under an instruction, as train.py reads it."""
    _, vae, text, _ = base
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        rows = read_prompts(o.data, find(o.data)[0], instr)
    return encode(rows, size, 1, vae, text, "cpu")


def examine(o, base, instr):
    """The probe of one instruction, printed. -> its table"""
    model, vae = base[:2]
    data = encoded(o, base, instr, (model.sample_size * vae.factor,) * 2)
    table, _ = probe(model, data, run.split_rows(len(data.rows))[1])
    print(f'\n"{instr}"\n{verdict(table, data.rows[0]["src"], data.rows[0]["tgt"])}', flush=True)
    return table


def look_at(o, base, folder):
    """The figures of a finished run's sheet, printed with its warnings."""
    model, vae, _, shift = base
    config = run.read_run(folder)
    data = encoded(o, base, config["instr"], tuple(config["size"]))
    adapter = run.load_adapter(folder / "adapter.safetensors", model)
    ts = edit_grid(data.latents[0], model, shift, config.get("shift"))
    held, _ = run.split_rows(len(data.rows))
    with tempfile.TemporaryDirectory() as tmp:
        out = pathlib.Path(tmp)
        (out / "samples").mkdir()
        whole = contextlib.nullcontext()
        how = 1, len(held), ts, whole
        figures = run.sheet(out, model, vae, adapter, data, held, how, 0)
    shown = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    print("\n".join([f"{folder}: {shown}", *warnings_of(figures)]), flush=True)
    return figures


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--data", default="tiny/examples", help="pictures with captions")
    p.add_argument("--base", default="tiny", help="the base")
    p.add_argument("--instr", nargs="+", default=INSTRUCTIONS, help="the edits")
    p.add_argument("--runs", nargs="+", type=pathlib.Path, help="folders of runs, instead")
    o = p.parse_args()
    torch.set_grad_enabled(False)
    base = load_base(o.base)
    if o.runs:
        found = {str(folder): look_at(o, base, folder) for folder in o.runs}
    else:
        found = {instr: examine(o, base, instr) for instr in o.instr}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""What only a GPU can tell: whether it computes what the CPU does, how fast, in how much memory.

    python bench/gpu.py                       # under 8 minutes on an H200, 12 GB of disk
    python bench/gpu.py --only attention same_numbers
    python bench/gpu.py --device cpu          # in small, what needs no GPU: a minute

It needs neither network nor weights: besides the embedded base there is one of SD3.5-medium's size
with random ones, whose pictures are noise. A JSON line for each check, in the order of CHECKS:
name, ok, seconds, figures and, where it fails, what is wrong; on stderr a table. Times are
measured, not judged. The exit status is 1 where a check fails.
"""

import argparse
import concurrent.futures
import functools
import gc
import json
import multiprocessing
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import steps  # noqa: E402
from memory import BASES, forward_tflop, in_gib, step_memory  # noqa: E402
from steps import (  # noqa: E402
    BF16,
    CAPTIONS,
    apart,
    bytes_on,
    cosine,
    flat,
    peak_of,
    seconds_of,
    size_of,
    small_step,
)

from files.disk import read_tensors, why  # noqa: E402
from files.ranks import guard  # noqa: E402
from frozen import machine  # noqa: E402
from frozen.load import load_base, load_part  # noqa: E402
from frozen.probe import passes  # noqa: E402
from model import T5_ZEROS, MMDiT, with_copies, with_weight  # noqa: E402
from train import RECIPES  # noqa: E402

EXAMPLES = ROOT / "tiny" / "examples"


@dataclass(frozen=True)
class Lab:
    """Where the checks run and write. On the CPU all is small."""

    device: torch.device
    out: pathlib.Path

    def pick(self, large, small):
        return small if self.device.type == "cpu" else large


# ---- tools --------------------------------------------------------------------------------------
def require(wrong, figures):
    """-> figures, where nothing is wrong. wrong: list of sentences"""
    if wrong:
        raise AssertionError("; ".join(wrong), figures)
    return figures


def command(script, *args):
    """Runs a command of the project. -> what it said on stdout, on stderr; seconds"""
    line, begun = [sys.executable, script, *map(str, args)], time.monotonic()
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 0, f"{script} ends with {done.returncode}: {last}"
    return done.stdout, done.stderr, round(time.monotonic() - begun, 1)


def at_once(*lines):
    """Several commands at a time. -> what `command` gives for each"""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(lambda line: command(*line), lines))


@functools.cache
def few_pictures(lab):
    """-> a folder of a few of the examples, with their captions"""
    folder = lab.out / "pictures"
    folder.mkdir(parents=True)
    lines = (EXAMPLES / "metadata.jsonl").read_text("utf-8").splitlines()[:16]
    for line in lines:
        shutil.copy(EXAMPLES / json.loads(line)["file_name"], folder)
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def training(lab, out, base, options=""):
    """-> script and arguments of a short training"""
    data = ["--data", few_pictures(lab), "--instr", CAPTIONS["instr"]]
    line = ["train.py", *data, "--base", base, "--out", out, "--device", lab.device]
    return [*line, *options.split(), *lab.pick("", "--n 2 --rank 4 --size 64").split()]


def log_of(out):
    file = out / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def stop_early(out, line):
    """Starts a training, and stops it after its third step as Ctrl-C would."""
    line, silent = [sys.executable, *map(str, line)], subprocess.DEVNULL
    with subprocess.Popen(line, cwd=ROOT, stdout=silent, stderr=silent) as process:
        end = time.monotonic() + 120
        while process.poll() is None and len(log_of(out)) < 3 and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)


@functools.cache
def random_base(lab):
    """-> the folder of a base with random weights"""
    steps.write_random_base(lab.out / "base", lab.device, lab.pick(False, True))
    return lab.out / "base"


@functools.cache
def random_model(lab):
    """Its network alone, as train.py runs it at full size."""
    folder, dtype = random_base(lab) / "transformer", lab.pick(BF16, torch.float32)
    model = load_part(MMDiT, folder, lab.device, dtype)
    model.checkpointing = True
    return model


# ---- the checks, cheapest first -----------------------------------------------------------------
def attention(lab):
    """The absent T5 as a mask and as copies: the same in fp32; of bf16 kernel, error and time."""
    device, wrong = lab.device, []
    figures = {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        figures["device"] = torch.cuda.get_device_name(device)
    for batch, heads, tokens in lab.pick(((8, 24, 1102), (2, 24, 4174)), ((1, 2, 40),)):
        q, k, v = torch.randn(3, batch, heads, tokens, 64, device=device)
        exact = with_weight(q, k, v)
        figures[f"{tokens} tokens"] = row = {"apart_fp32": apart(with_copies(q, k, v), exact)}
        if row["apart_fp32"] > 1e-4:
            wrong.append(f"mask and copies differ by {row['apart_fp32']} with {tokens} tokens")
        q, k, v = (a.to(BF16).requires_grad_() for a in (q, k, v))
        mask = torch.zeros(1, 1, 1, tokens, dtype=BF16, device=device)
        longer = torch.cat([k, k[:, :, -1:].expand(-1, -1, T5_ZEROS - 1, -1)], 2)
        ways = {"plain": (F.scaled_dot_product_attention, (k, v))}
        ways |= {"mask": (with_weight, (k, v, mask)), "copies": (with_copies, (longer, longer))}
        for name, (way, keys) in ways.items():
            forward = functools.partial(way, q, k, v)
            both = functools.partial(lambda f: f().sum().backward(), forward)
            kernel = SDPBackend(torch._fused_sdp_choice(q, *keys)).name
            times = [round(1000 * seconds_of(device, f, 9), 3) for f in (forward, both)]
            row[name] = {"ms": times[0], "with_backward_ms": times[1], "kernel": kernel}
            if name != "plain":  # without the T5 it is another attention
                row[name]["error"] = apart(forward(), exact)
        if device.type == "cuda" and row["copies"]["kernel"] == "MATH":
            wrong.append(f"copies find no fast kernel with {tokens} tokens")
    return require(wrong, figures)


def same_numbers(lab):
    """A step by either recipe, and one of clips, here and on the CPU, in fp32 and in bf16."""
    few = dict(batch=lab.pick(4, 2), n=2)  # in long rollouts bf16 may go astray
    torch.backends.cudnn.allow_tf32 = False  # convolutions would compute in it
    figures, wrong = {}, []
    loss, parts = ("prior", "cycle", "identity"), ("encode", "decode", "context", "pooled", "edit")
    limits = {BF16: dict.fromkeys(loss, 3e-2)}
    limits[None] = dict.fromkeys(loss, 1e-4) | dict.fromkeys(parts, 1e-3)
    least = {BF16: 0.99, None: 0.9999}
    cases = lab.pick((("default", 1), ("paper", 1), ("default", 4)), (("paper", 1), ("default", 2)))
    for name, frames in cases:
        recipe = replace(RECIPES[name], **few)
        exact = small_step(torch.device("cpu"), None, recipe, frames)
        for half in (None, BF16):
            step = small_step(lab.device, half, recipe, frames)
            row = {key: apart(step[key], exact[key]) for key in step}
            for key in ("gradient", "moved"):
                row[key] = cosine(step[key], exact[key])
            where = f"{name}, {frames} frames, {half or 'fp32'}"
            figures[where] = row
            for key, limit in limits[half].items():
                if not row[key] <= limit:  # also where it is no number
                    wrong.append(f"{where}: {key} is {row[key]} from the CPU's")
            if not row["gradient"] >= least[half]:
                wrong.append(f"{where}: the gradients' cosine is {row['gradient']}")
    torch.backends.cudnn.allow_tf32 = True
    return require(wrong, figures)


def repeats(lab):
    """Bit for bit? A step twice; a run stopped and resumed. Promised of the CPU alone."""
    recipe = replace(RECIPES["default"], batch=2, n=2)
    a, b = (small_step(lab.device, None, recipe, 1)["gradient"] for _ in range(2))
    figures = {"step_same": torch.equal(a, b), "step_apart": apart(a, b)}
    whole, cut = lab.out / "whole", lab.out / "cut"
    few = lab.pick("--steps 30 --batch 2 --n 2", "--steps 6 --batch 2") + " --no-probe"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        never_stopped = pool.submit(command, *training(lab, whole, "tiny", few))
        stop_early(cut, training(lab, cut, "tiny", few))
    never_stopped.result()
    figures["stopped_at"] = len(log_of(cut))
    command(*training(lab, cut, "tiny", few + " --resume"))
    read = [read_tensors(out / "adapter.safetensors")[0] for out in (cut, whole)]
    a, b = (flat(tensors[name] for name in read[0]) for tensors in read)
    figures |= {"resumed_same": torch.equal(a, b), "resumed_apart": apart(a, b)}
    same = figures["step_same"] and figures["resumed_same"]
    return require(lab.pick([], ["the CPU does not repeat itself"] * (not same)), figures)


def random_base_loads(lab):
    """A folder of SD3.5-medium's size: seconds, and no memory beyond the weights."""
    begun = time.monotonic()
    folder = random_base(lab)
    figures = {"write_seconds": round(time.monotonic() - begun, 1)}
    before, begun, kept = bytes_on(lab.device), time.monotonic(), []
    half = lab.pick(BF16, None)
    peak = peak_of(lab.device, lambda: kept.extend(load_base(str(folder), lab.device, half)))
    figures["load_seconds"] = round(time.monotonic() - begun, 1)
    weights = sum(map(size_of, kept[:3]))
    figures |= {"weights_gib": in_gib(weights), "peak_gib": in_gib(peak - before)}
    wasted = peak - before > 1.05 * weights
    return require(["loading takes more memory than the weights"] * wasted, figures)


def fp16(lab):
    """Some steps with a loss scale: how many are skipped."""
    out, options = lab.out / "fp16", "--batch 2 --no-probe --no-compile --dtype fp16 --steps "
    _, said, _ = command(*training(lab, out, random_base(lab), options + lab.pick("10", "3")))
    norms = [line["norm"] for line in log_of(out)]
    skipped = said.count("skipped: the gradient")
    figures = {"steps": len(norms), "skipped": skipped, "norm": norms[-1]}
    return require(["no step was taken"] * (skipped == len(norms)), figures)


def commands(lab):
    """Four steps on the random base, resumed to six; an edit without and with guidance."""
    out, base = lab.out / "run", random_base(lab)
    line = training(lab, out, base, "--batch 2 --no-compile")
    _, said, seconds = command(*line, "--steps", 4)
    figures = {"train_seconds": seconds}
    figures["foretold"] = [text for text in said.split("\n") if "steps take about" in text]
    command(*line, "--steps", 6, "--resume")
    figures["steps"] = len(log_of(out))
    ask = ["sample.py", "--run", out, "--input", EXAMPLES / "000.png", "--device", lab.device]
    edits = [out / "edit.png", out / "guided.png"]
    at_once([*ask, "--output", edits[0]], [*ask, "--output", edits[1], "--guidance", 3])
    wrong = ["sample.py wrote no picture"] * (not all(path.exists() for path in edits))
    wrong += ["the log has not six steps"] * (figures["steps"] != 6)
    return require(wrong, figures)


def memory_and_time(lab):
    """Steps of the recipe sd3.5: memory within 5 % of what bench/memory.py computes; time."""
    cases = lab.pick(((512, 1), (512, 4), (512, 8), (1024, 1)), ((64, 2),))
    recipe = lab.pick(RECIPES["sd3.5"], replace(RECIPES["sd3.5"], n=2, rank=4))
    config = lab.pick(BASES["sd3.5-medium"], steps.SMALL)
    model, figures, wrong = random_model(lab), {}, []
    elsewhere = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(lab.pick(8, 1), elsewhere) as pool:
        memory, work = [], []
        for size, batch in cases:
            memory.append(pool.submit(step_memory, config, size, batch, recipe.rank, recipe))
            work.append(pool.submit(forward_tflop, config, size, recipe.rank))
        for size, batch in cases:
            row = steps.priced(model, size, replace(recipe, batch=batch))
            figures[f"{size} x {batch}"] = row
        size, batch = cases[-2:][0]  # 512 x 8
        middle = replace(recipe, batch=batch)
        model.checkpointing = False
        try:
            figures["no checkpointing"] = steps.priced(model, size, middle)
        except torch.OutOfMemoryError:  # it is 46 GiB
            figures["no checkpointing"] = "out of memory"
        model.checkpointing = True
        figures["merged_gain"] = steps.merged_gain(model, size, middle)
        each = passes(replace(recipe, identity_share=0))
        for (size, batch), peak, tflop in zip(cases, memory, work):
            row = figures[f"{size} x {batch}"]
            row["tflop_s"] = round(batch * each * tflop.result() / row["step_seconds"], 2)
            row["computed_gib"] = peak.result()["peak"]
            off = row["peak_gib"] / row["computed_gib"] - 1
            if abs(off) > lab.pick(0.05, 1):
                wrong.append(f"{size} x {batch}: {100 * off:+.0f} % of the computed memory")
    return require(wrong, figures)


def embedded_base(lab):
    """train.py whole on the embedded base, in fp32 and bf16; how good its edits are."""
    kinds, least = lab.pick(("fp32", "bf16"), ("fp32",)), {"fp32": 0.85, "bf16": 0.7}
    runs = [lab.out / f"embedded-{kind}" for kind in kinds]
    n, options = lab.pick((100, f"--data {EXAMPLES}"), (2, "--steps 1 --batch 2 --no-probe"))
    lines = [
        training(lab, run, "tiny", f"{options} --dtype {kind}") for kind, run in zip(kinds, runs)
    ]
    figures = {"train_seconds": max(seconds for *_, seconds in at_once(*lines))}
    ask = ("--n", n, "--seed", 71107)
    judged = at_once(*(("bench/evaluate.py", "--run", out, *ask) for out in runs))
    wrong = []
    for kind, (said, *_) in zip(kinds, judged):
        found = json.loads(said.strip().split("\n")[-1])
        figures[kind] = {key: found[key] for key in ("success", "preservation_db", "n")}
        if found["success"] < lab.pick(least[kind], 0):
            wrong.append(f"{kind}: {100 * found['success']:.0f} % of the edits succeed")
    return require(wrong, figures)


def compiled(lab):
    """torch.compile at 512 x 8: no graphs but in the first step and sheet, eager's gradient. On the
    CPU only the graphs are made, no code."""
    recipe = replace(RECIPES["sd3.5"], batch=lab.pick(8, 2), n=2, rank=lab.pick(64, 4))
    to_graphs = functools.partial(torch.compile, backend="eager")
    with mock.patch.object(torch, "compile", lab.pick(torch.compile, to_graphs)):
        figures = steps.compiled(random_model(lab), lab.pick(512, 64), recipe)
    graphs, wrong = figures["graphs"], []
    if graphs[0] == 0:
        wrong.append("nothing was compiled")
    if graphs[-1] > graphs[0]:
        wrong.append("the number of graphs grows")
    if not (figures["losses"] < 1e-2 and figures["gradient"] > 0.995):
        wrong.append("the losses or their gradient are not eager's")
    return require(wrong, figures)


CHECKS = (attention, same_numbers, repeats, random_base_loads, fp16)
CHECKS += (commands, memory_and_time, embedded_base, compiled)


# ---- all of them --------------------------------------------------------------------------------
def examine(check, lab, late):
    """-> the check's line; late: the budget is spent"""
    line, begun = {"name": check.__name__, "ok": False}, time.monotonic()
    try:
        assert not late, "not begun: the budget is spent"
        line |= {"figures": check(lab), "ok": True}
    except AssertionError as error:
        line["error"], *figures = error.args or ("an assertion",)
        if figures:
            line["figures"] = figures[0]
    except Exception as error:
        traceback.print_exc()
        line["error"] = why(error)
    gc.collect()
    return line | {"seconds": round(time.monotonic() - begun, 1)}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [check.__name__ for check in CHECKS]
    p.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    p.add_argument("--device", help="cpu, cuda, mps, xpu (the machine's accelerator)")
    p.add_argument("--out", help="new folder for what is written (a temporary one)")
    p.add_argument("--budget", type=float, default=480, help="seconds to begin checks in (480)")
    o = p.parse_args()
    device, begun, lines = machine.choose_device(o.device), time.monotonic(), []
    if device.type == "cpu":
        print("on the CPU: what needs no accelerator, in small", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        lab = Lab(device, pathlib.Path(o.out or temporary).resolve())
        for check in CHECKS:
            if o.only is None or check.__name__ in o.only:
                lines.append(examine(check, lab, time.monotonic() - begun > o.budget))
                line = json.loads(json.dumps(lines[-1]), parse_constant=str)  # JSON has no NaN
                print(json.dumps(line), flush=True)
    for line in lines:
        verdict = line.get("error", "ok")
        print(f"{line['name']:18} {line['seconds']:6.1f} s  {verdict}", file=sys.stderr)
    sys.exit(int(not all(line["ok"] for line in lines)))


if __name__ == "__main__":
    guard("gpu.py", main)

"""How fast it is, beside its peers on the same weights: ratios of times taken in turn, in one
process, with equal threads and dtype.

    python bench/speed.py       # some twenty minutes on two cores; --rounds 3 for a first look

forward     one forward pass, diffusers' SD3Transformer2DModel and ours. diffusers is fed as its
            pipeline feeds it, with 256 zero vectors for the absent T5; ours makes them one token.
            The outputs are compared before the clock starts. "Same tokens": diffusers without those
            zeros, which no pipeline does; what remains is the code.
train       forward and backward with LoRA on the same layers, peft's and ours
sample      text to picture, diffusers' StableDiffusion3Pipeline and sample.py's functions
load        from a folder to a model ready to run, in a fresh process each: seconds, and peak memory
            beyond the imports
edit        editing against sampling from the base without and with guidance, and against an editor
            that reads the source as more tokens (written here only, for the comparison): 16
            pictures at once; one, where what each pass costs whatever its batch (a thousand small
            calls) hides that guidance is twice the work; and one of 512 pixels
step        one step of ByG in units of a supervised step of the same adapter and batch, and its
            parts; with --compile the same step compiled, and how long compiling takes

Each ratio is the median over rounds of (theirs / ours) or (ours / theirs), with its quartiles.
Writes bench/results/speed.md; the last line is one JSON object: forward_vs_diffusers and
train_vs_diffusers (above 1: we are faster; the worst config), edit_vs_base, edit_vs_guided and
byg_step_vs_supervised (costs).
"""

import argparse
import contextlib
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline  # noqa: E402
from memory import BASES  # noqa: E402
from peft import LoraConfig  # noqa: E402

import losses  # noqa: E402
import sample  # noqa: E402
from data import Encoded, draw  # noqa: E402
from files.disk import write  # noqa: E402
from files.run import origin  # noqa: E402
from frozen.load import load_base, load_part  # noqa: E402
from frozen.machine import compile_blocks  # noqa: E402
from frozen.vae import to_images  # noqa: E402
from model import MMDiT, merged, new_adapter  # noqa: E402
from routing import integrate, time_grid  # noqa: E402
from train import RECIPES, Muon  # noqa: E402

TINY = ROOT / "tiny" / "checkpoint"
READ = (
    "*A, in units of B*: the time of A over that of B. All else: the time of diffusers (with peft, "
    "where it goes backward) over ours, a gain."
)
ROWS = ["| what | ratio (quartiles) | ours |", "|---|---|---|"]
LORA = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LORA += ["net.0.proj", "net.2"]
CAPTIONS = {
    "src": "a red house in autumn",
    "tgt": "a red house in winter",
    "instr": "make it winter",
    "undo": "make it autumn",
    "null": "",
}


# ---- the clock ----------------------------------------------------------------------------------
def in_turn(rounds, **calls):
    """Calls each once to warm up, then all in turn, `rounds` times. -> {name: [seconds]}"""
    times = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - begun)
    return times


def ratio(above, below):
    """Median and quartiles of the ratio, round by round."""
    r = [a / b for a, b in zip(above, below)]
    low, middle, high = statistics.quantiles(r, n=4, method="inclusive")
    return {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def show(name, r, seconds):
    """Prints a row of the table and keeps it for speed.md."""
    low, high = r["quartiles"]
    ours = f"{1000 * statistics.median(seconds):.0f} ms"
    row = f"| {name} | {r['ratio']:.2f} ({low:.2f} to {high:.2f}) | {ours} |"
    print(row, flush=True)
    ROWS.append(row)
    return r


# ---- beside diffusers and peft ------------------------------------------------------------------
def both_models(config, dtype):
    """The same weights in both libraries: the embedded base's or, of another config, random ones
    that diffusers has written. -> theirs, ours"""
    if config is None:
        folder = TINY / "transformer"
        theirs = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=dtype)
        return theirs, load_part(MMDiT, folder, "cpu", dtype)
    torch.manual_seed(0)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    theirs = SD3Transformer2DModel(**config, caption_projection_dim=width)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim < 2 else p[0].numel() ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        theirs.to(dtype).save_pretrained(folder)
        return theirs, load_part(MMDiT, pathlib.Path(folder), "cpu", dtype)


def random_prompt(model, batch, tokens, dtype=torch.float32):
    """-> context (B, L, D_text) of the CLIP encoders alone, pooled (B, P)"""
    context = torch.randn(batch, tokens, min(2048, model.context_dim), dtype=dtype)
    pooled = model.time_text_embed["text_embedder"]["linear_1"].in_features
    return context, torch.randn(batch, pooled, dtype=dtype)


def against_diffusers(name, config, size, batch, tokens, dtype, rounds):
    """-> {"forward": ..., "forward same tokens": ..., "train": ...}, ratios above 1 where ours is
    faster"""
    model, ours = both_models(config, dtype)
    model.eval().requires_grad_(False)
    x = torch.randn(batch, ours.channels, size, size, dtype=dtype)
    t = torch.linspace(0.2, 0.9, batch, dtype=dtype)
    context, pooled = prompt = random_prompt(ours, batch, tokens, dtype)
    short = F.pad(context, (0, ours.context_dim - context.shape[-1]))
    padded = F.pad(short, (0, 0, 0, 256))

    def theirs(text=padded):
        return model(x, text, pooled, 1000 * t).sample

    with torch.no_grad():
        a, b = theirs(), ours(x, t, prompt)
        apart = ((a - b).abs().max() / a.abs().max()).item()
        if apart > (1e-3 if dtype == torch.float32 else 0.1):
            sys.exit(f"speed.py: {name}: the two models differ by {apart:.1e}")
        calls = {"theirs": theirs, "short": partial(theirs, short)}
        times = in_turn(rounds, **calls, ours=partial(ours, x, t, prompt))
    out = {}
    for key, peer in (("forward", "theirs"), ("forward same tokens", "short")):
        what = f"{name}: {key.replace('d s', 'd, s')}"
        out[key] = show(what, ratio(times[peer], times["ours"]), times["ours"])

    model.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=LORA))
    peft = [p for p in model.parameters() if p.requires_grad]
    adapter = new_adapter(ours, 64)
    target = torch.randn(x.shape)

    def step(parameters, v):
        F.mse_loss(v.float(), target).backward()
        for p in parameters:
            p.grad = None

    def step_theirs():
        step(peft, theirs())

    def step_ours():
        step(adapter.values(), ours(x, t, prompt, None, merged(ours, adapter)))

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        times = in_turn(rounds, theirs=step_theirs, ours=step_ours)
    gain = ratio(times["theirs"], times["ours"])
    out["train"] = show(f"{name}: forward and backward", gain, times["ours"])
    return out


OURS = """import sys
sys.path.insert(0, {root!r})
from frozen.load import load_base
def load():
    return load_base({base!r})
"""
THEIRS = """import torch, transformers
from diffusers import StableDiffusion3Pipeline as P
def load():
    none = dict(text_encoder_3=None, tokenizer_3=None)
    return P.from_pretrained({base!r}, torch_dtype=torch.float32, **none)
"""
CLOCK = """import time
def peak():
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024
before, begun = peak(), time.time()
kept = load()
print(time.time() - begun, peak() - before)
"""


def loading(rounds):
    """A fresh process each time. -> ratios (theirs / ours) of seconds, and of peak memory beyond
    the imports"""
    seconds, memory = {"theirs": [], "ours": []}, {"theirs": [], "ours": []}
    for i in range(rounds + 1):
        for name, code in (("ours", OURS), ("theirs", THEIRS)):
            code = code.format(root=str(ROOT), base=str(TINY)) + CLOCK
            command = [sys.executable, "-c", code]
            line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            if i:
                second, mib = line.split()[-2:]
                seconds[name].append(float(second))
                memory[name].append(float(mib))
    mib = {name: round(statistics.median(values), 1) for name, values in memory.items()}
    peaks = f"peak memory beyond the imports {mib['ours']} MiB, diffusers {mib['theirs']} MiB"
    gain = ratio(seconds["theirs"], seconds["ours"])
    shown = show(f"loading the embedded base; {peaks}", gain, seconds["ours"])
    return {"seconds": shown, "peak_mib": mib}


@torch.no_grad()
def sampling(base, rounds):
    """Text to picture, 28 steps with guidance, one picture."""
    model, vae, text, shift = base
    none = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY, torch_dtype=torch.float32, **none)
    pipe.set_progress_bar_config(disable=True)
    prompt, n = "a red house by two pine trees in winter", 28
    eps = torch.randn(1, model.channels, model.sample_size, model.sample_size)
    options = {"num_inference_steps": n, "guidance_scale": 4.5, "max_sequence_length": 256}
    options |= {"height": 64, "width": 64, "output_type": "np"}

    def theirs():
        pipe(prompt, negative_prompt="", latents=eps, **options)

    def ours():
        ts = time_grid(n, shift)
        x = sample.generate(model, text([prompt]), text([""]), eps, ts, 4.5)
        to_images(vae.decode(x))

    times = in_turn(rounds, theirs=theirs, ours=ours)
    gain = ratio(times["theirs"], times["ours"])
    return show("text to picture, 28 steps with guidance", gain, times["ours"])


# ---- an edit ------------------------------------------------------------------------------------
def concatenating(model, x_t, t, prompt, source):
    """The editor's usual alternative: the source's patches as further image tokens, thrown away at
    the end. Cost only, untrained."""
    h = x_t.shape[-2]
    return model(torch.cat([x_t, source], 2), t, prompt)[..., :h, :]


@torch.no_grad()
def editing(name, model, size, batch, tokens, rounds, n=20):
    """-> cost of `batch` edits at once in units of sampling from the base without guidance, with
    guidance, and of an editor by concatenation"""
    x, eps = torch.randn(2, batch, model.channels, size, size)
    adapter = merged(model, new_adapter(model, 64))  # as in sample.py; untrained, it is the base
    prompt, null = (random_prompt(model, batch, tokens) for _ in range(2))
    ts = time_grid(n, 3.0)
    base = sample.base(model, prompt)
    with_guidance = sample.guided(base, sample.base(model, null), 4.5)

    def by_tokens(y, t):
        return concatenating(model, y, t, prompt, x)

    def draw_with(velocity):
        for _ in integrate(velocity, eps, ts):
            pass

    times = in_turn(
        rounds,
        edit=lambda: sample.edit(model, adapter, x, prompt, eps, ts),
        base=lambda: draw_with(base),
        guided=lambda: draw_with(with_guidance),
        tokens=lambda: draw_with(by_tokens),
    )
    name += f": {batch} edits at once" if batch > 1 else ": one edit"
    units = {
        "base": "sampling from the base",
        "guided": "sampling with guidance",
        "tokens": "an edit by concatenated tokens",
    }
    out = {}
    for key, unit in units.items():
        cost = ratio(times["edit"], times[key])
        out[key] = show(f"{name}, in units of {unit}", cost, times["edit"])
    return out


# ---- a step -------------------------------------------------------------------------------------
def drawn_batch(base, recipe):
    """A batch as train.py draws it, of random latents."""
    model, _, text, _ = base
    n = recipe.batch
    latents = torch.randn(n, 1, model.channels, model.sample_size, model.sample_size)
    with torch.no_grad():
        texts = text(list(CAPTIONS.values()))
    ids = {kind: torch.full((n,), i) for i, kind in enumerate(CAPTIONS)}
    data = Encoded([], list(latents), texts, ids)
    rng = torch.Generator().manual_seed(0)
    return draw(data, torch.arange(n), recipe, 1, rng, slice(None), "cpu")


def steps_of(base, recipe):
    """-> two functions, each one step of the optimizer: supervised, ByG without identity"""
    model, _, _, shift = base
    batch, ts = drawn_batch(base, recipe), time_grid(recipe.n, shift)
    adapter = new_adapter(model, recipe.rank)
    average = {name: v.detach().clone() for name, v in adapter.items()}
    params = list(adapter.values())
    kind = Muon if recipe.muon else torch.optim.AdamW
    opt = kind(params, lr=recipe.lr, weight_decay=recipe.weight_decay)
    cue = losses.cosine_cue
    if recipe.cue != "cosine":
        cue = partial(losses.delta_cue, guidance=recipe.guidance)
    weights = recipe.prior, recipe.cycle, recipe.routing, recipe.bootstrap

    def finish(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad()

    def supervised():  # which is what identity costs where it is drawn
        finish(losses.identity_loss(model, merged(model, adapter), batch, ts))

    def byg():
        now, then = merged(model, adapter), merged(model, average)
        loss, _ = losses.byg_loss(model, now, then, batch, ts, cue, *weights)
        finish(loss)

    return supervised, byg


def timed(name, spent):
    """Wraps a function that byg_loss calls, to add to `spent` what each call takes."""
    call = getattr(losses, name)

    def wrapped(*args):
        begun = time.perf_counter()
        out = call(*args)
        spent.append(time.perf_counter() - begun)
        return out

    return mock.patch.object(losses, name, wrapped)


def byg_step(base, recipe, rounds, compiled=False):
    """-> a ByG step, and its parts, in units of a supervised step; how much faster compiled"""
    numbers, name = RECIPES[recipe], f"{recipe} recipe"
    supervised, byg = steps_of(base, numbers)
    rolled, asked = [], []
    with timed("rollout", rolled), timed("teacher", asked):
        times = in_turn(rounds, supervised=supervised, step=byg)
    unit = times["supervised"]
    step = [a + numbers.identity_share * b for a, b in zip(times["step"], unit)]
    rows = {
        "step": ("a ByG step", step),
        "rollout": (f"its rollout ({numbers.n} forwards)", rolled[1:]),
        "teacher": ("its teacher (the frozen base's answers)", asked[1:]),
    }
    out = {}
    for key, (what, seconds) in rows.items():
        shown = f"{name}: {what}, in units of a supervised step"
        out[key] = show(shown, ratio(seconds, unit), seconds)
    if compiled:
        out |= compiled_step(base[0], name, supervised, byg, rounds)
    return out


def compiled_step(model, name, supervised, byg, rounds):
    """-> seconds of compiling, and how much faster a ByG step is then"""
    begun = time.perf_counter()
    compile_blocks(model, torch.device("cpu"))
    for call in (supervised, byg) * 2:
        call()
    seconds = round(time.perf_counter() - begun)
    print(f"| {name}: compiling, with four steps | | {seconds} s |", flush=True)
    eager = torch.compiler.set_stance("force_eager")(byg)
    times = in_turn(rounds, step=byg, eager=eager)
    gain = ratio(times["eager"], times["step"])
    shown = show(f"{name}: a ByG step, eager in units of compiled", gain, times["step"])
    return {"compiling_s": seconds, "step_compiled": shown}


# ---- all of it ----------------------------------------------------------------------------------
def processor():
    """The processor's name and whether it has AVX-512, where the system tells."""
    with contextlib.suppress(OSError, IndexError):
        info = pathlib.Path("/proc/cpuinfo").read_text()
        name = info.split("model name\t: ")[1].split("\n")[0]
        return name + ", AVX-512" * (" avx512f" in info)
    return platform.machine()


def measure(rounds, compiled, bf16):
    """-> figures by name; of `peers`, by config"""
    slices = BASES["sd3.5-medium"] | {"num_layers": 4, "dual_attention_layers": (0, 1, 2, 3)}
    few = max(2, rounds // 3)
    base = load_base("tiny")
    model = base[0]
    results = {
        "step": byg_step(load_base("tiny"), "default", rounds, compiled),  # its own: it is compiled
        "paper step": byg_step(base, "paper", rounds),
        "edit": editing("embedded base", model, model.sample_size, 16, 24, rounds),
        "edit of one": editing("embedded base", model, model.sample_size, 1, 24, rounds),
        "sample": sampling(base, rounds),
        "load": loading(rounds),
    }
    _, big = both_models(slices, torch.float32)
    results["edit at size"] = editing("4 blocks of SD3.5-medium", big, 64, 1, 77, few, 1)
    del big
    peers = {}
    for dtype in (torch.float32, torch.bfloat16)[: 1 + bf16]:
        bits = str(dtype).removeprefix("torch.")
        name = f"embedded base, {bits}"
        peers[f"embedded {bits}"] = against_diffusers(name, None, 16, 8, 24, dtype, rounds)
        name = f"4 blocks of SD3.5-medium, {bits}"
        peers[f"slice {bits}"] = against_diffusers(name, slices, 64, 1, 77, dtype, few)
    return results | {"peers": peers}


def main():
    kind = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=kind)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--threads", type=int, help="default: all cores")
    p.add_argument("--compile", action="store_true", help="also the compiled step (three minutes)")
    slow = "also in bf16 (very slow on processors that do not compute in it)"
    p.add_argument("--bf16", action="store_true", help=slow)
    o = p.parse_args()
    if o.rounds < 2:
        p.error("--rounds must be at least 2")
    torch.set_num_threads(o.threads or torch.get_num_threads())
    torch.manual_seed(0)
    made = origin()  # before anything is written: the commit that is measured
    threads = torch.get_num_threads()
    told = f"{processor()}, {threads} threads, torch {torch.__version__}, {o.rounds} rounds"
    print("\n".join([told, "", *ROWS]), flush=True)
    results = measure(o.rounds, o.compile, o.bf16)
    head = f"`{made['command']}` ({told}; commit {made['commit']})"
    write(ROOT / "bench" / "results" / "speed.md", "\n".join([head, "", READ, "", *ROWS]) + "\n")
    peers = results["peers"].values()
    figures = {
        "forward_vs_diffusers": min(peer["forward"]["ratio"] for peer in peers),
        "train_vs_diffusers": min(peer["train"]["ratio"] for peer in peers),
        "edit_vs_base": results["edit"]["base"]["ratio"],
        "edit_vs_guided": results["edit"]["guided"]["ratio"],
        "byg_step_vs_supervised": results["step"]["step"]["ratio"],
        "rounds": o.rounds,
        "threads": threads,
    }
    print(json.dumps(figures | results))


if __name__ == "__main__":
    main()

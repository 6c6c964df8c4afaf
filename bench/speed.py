"""How fast it is, beside its peers on the same weights: ratios of times taken in turn, in one process, with equal threads and dtype.

    python bench/speed.py                                   # some twenty minutes on two cores; --rounds 3 for a first look

forward     one forward pass, diffusers' SD3Transformer2DModel and ours. diffusers is fed as its pipeline feeds it, with 256 zero
            vectors for the absent T5; ours folds them into one token. The outputs are compared before the clock starts.
            "same tokens": diffusers without those zeros, which no pipeline does; what remains is the code.
train       forward and backward with LoRA on the same layers, peft's and ours
sample      text to picture, diffusers' StableDiffusion3Pipeline and sample.py's functions
load        from a folder to a model ready to run, in a fresh process each: seconds, and peak memory beyond the imports
edit        editing against sampling from the base without and with guidance, and against an editor that reads the source as more
            tokens (written here only, for the comparison): 16 pictures at once, and one, where what each pass costs whatever its
            batch (a thousand small calls) hides that guidance is twice the work; and one of 512 pixels
step        one step of ByG in units of a supervised step of the same adapter and batch, and its parts; one of imitation, where the recipe has
            it, and the mean over a run; with --compile the same steps compiled, and how long that takes

Each ratio is the median over rounds of (theirs / ours) or (ours / theirs), with its quartiles. Writes bench/results/speed.md;
the last line is one JSON object: forward_vs_diffusers and train_vs_diffusers (above 1: we are faster; the worst config), edit_vs_base,
edit_vs_guided, byg_step_vs_supervised and mean_step_vs_supervised (costs).
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
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline  # noqa: E402
from memory import BASES  # noqa: E402
from peft import LoraConfig  # noqa: E402

import losses  # noqa: E402
from files.disk import write  # noqa: E402
from files.run import origin  # noqa: E402
from frozen.load import load_base, load_part  # noqa: E402
from frozen.vae import to_images  # noqa: E402
from model import MMDiT, fold, merged, new_adapter  # noqa: E402
from routing import integrate, time_grid  # noqa: E402
from sample import answers, edit, generate, guided  # noqa: E402
from train import RECIPES, new_optimizer  # noqa: E402

TINY = ROOT / "tiny" / "checkpoint"
READ = "*A, in units of B*: the time of A over that of B. All else: the time of diffusers (with peft, where it goes backward) over ours, a gain."
ROWS = ["| what | ratio (quartiles) | ours |", "|---|---|---|"]
LORA = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "net.0.proj",
    "net.2",
]


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
    row = f"| {name} | {r['ratio']:.2f} ({low:.2f} to {high:.2f}) | {1000 * statistics.median(seconds):.0f} ms |"
    print(row, flush=True)
    ROWS.append(row)
    return r


def both_models(config, folder, dtype):
    """The same weights in both libraries: the embedded base's, or random ones of another config, written by diffusers."""
    if config is None:
        return SD3Transformer2DModel.from_pretrained(
            TINY / "transformer", torch_dtype=dtype
        ), load_part(MMDiT, TINY / "transformer", "cpu", dtype)
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(
        **config,
        caption_projection_dim=config["num_attention_heads"] * config["attention_head_dim"],
    )
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim < 2 else p[0].numel() ** -0.5)
    theirs.to(dtype).save_pretrained(folder)
    return theirs, load_part(MMDiT, folder, "cpu", dtype)


def against_diffusers(name, config, size, batch, tokens, dtype, rounds):
    """-> {"forward": ..., "forward same tokens": ..., "train": ...}, ratios above 1 where ours is faster"""
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = both_models(config, pathlib.Path(folder), dtype)
    theirs.eval().requires_grad_(False)
    x, t = (
        torch.randn(batch, ours.channels, size, size, dtype=dtype),
        torch.linspace(0.2, 0.9, batch, dtype=dtype),
    )
    width = min(2048, ours.context_dim)
    text = torch.randn(batch, tokens, width, dtype=dtype)
    pooled = torch.randn(
        batch, ours.time_text_embed["text_embedder"]["linear_1"].in_features, dtype=dtype
    )
    short = F.pad(text, (0, ours.context_dim - width))
    padded = F.pad(short, (0, 0, 0, 256))
    with torch.no_grad():
        a, b = theirs(x, padded, pooled, 1000 * t).sample, ours(x, t, (text, pooled))
    apart = ((a - b).abs().max() / a.abs().max()).item()
    if apart > (1e-3 if dtype == torch.float32 else 0.1):
        sys.exit(f"speed.py: {name}: the two models differ by {apart:.1e}")

    def no_grad(call):
        with torch.no_grad():
            call()

    times = in_turn(
        rounds,
        theirs=lambda: no_grad(lambda: theirs(x, padded, pooled, 1000 * t)),
        short=lambda: no_grad(lambda: theirs(x, short, pooled, 1000 * t)),
        ours=lambda: no_grad(lambda: ours(x, t, (text, pooled))),
    )
    out = {
        "forward": show(f"{name}: forward", ratio(times["theirs"], times["ours"]), times["ours"]),
        "forward same tokens": show(
            f"{name}: forward, same tokens", ratio(times["short"], times["ours"]), times["ours"]
        ),
    }
    theirs.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=LORA))
    adapter = new_adapter(ours, 64)
    target = torch.randn(x.shape)

    def step(parameters, forward):
        F.mse_loss(forward().float(), target).backward()
        for p in parameters:
            p.grad = None

    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
    peft = [p for p in theirs.parameters() if p.requires_grad]
    with autocast:
        times = in_turn(
            rounds,
            theirs=lambda: step(peft, lambda: theirs(x, padded, pooled, 1000 * t).sample),
            ours=lambda: step(
                adapter.values(), lambda: ours(x, t, (text, pooled), None, merged(ours, adapter))
            ),
        )
    return out | {
        "train": show(
            f"{name}: forward and backward", ratio(times["theirs"], times["ours"]), times["ours"]
        )
    }


LOADERS = {
    "ours": "import sys; sys.path.insert(0, {root!r}); from frozen.load import load_base; load = lambda: load_base({base!r})",
    "theirs": "import torch, transformers; from diffusers import StableDiffusion3Pipeline as P; "
    "load = lambda: P.from_pretrained({base!r}, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32)",
}


def loading(rounds):
    """A fresh process each time. -> ratios (theirs / ours) of seconds, and of peak memory beyond the imports"""
    measured = {"theirs": [], "ours": []}
    for i in range(rounds + 1):
        for name, code in LOADERS.items():
            code = code.format(root=str(ROOT), base=str(TINY)) + (
                "; import time; peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024"
                "; before, begun = peak(), time.time(); kept = load(); print(time.time() - begun, peak() - before)"
            )
            line = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.split()
            if i:
                measured[name].append([float(v) for v in line[-2:]])
    seconds, memory = ({n: [m[i] for m in ms] for n, ms in measured.items()} for i in (0, 1))
    mib = {n: round(statistics.median(v), 1) for n, v in memory.items()}
    name = f"loading the embedded base; peak memory beyond the imports {mib['ours']} MiB, diffusers {mib['theirs']} MiB"
    return {
        "seconds": show(name, ratio(seconds["theirs"], seconds["ours"]), seconds["ours"]),
        "peak_mib": mib,
    }


@torch.no_grad()
def sampling(base, rounds):
    """Text to picture, 28 steps with guidance, one picture."""
    model, vae, text, shift = base
    pipe = StableDiffusion3Pipeline.from_pretrained(
        TINY, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    prompt, eps, n = (
        "a red house by two pine trees in winter",
        torch.randn(1, model.channels, model.sample_size, model.sample_size),
        28,
    )

    def theirs():
        pipe(
            prompt,
            negative_prompt="",
            num_inference_steps=n,
            guidance_scale=4.5,
            latents=eps,
            height=64,
            width=64,
            max_sequence_length=256,
            output_type="np",
        )

    def ours():
        to_images(
            vae.decode(generate(model, text([prompt]), text([""]), eps, time_grid(n, shift), 4.5))
        )

    times = in_turn(rounds, theirs=theirs, ours=ours)
    return show(
        "text to picture, 28 steps with guidance",
        ratio(times["theirs"], times["ours"]),
        times["ours"],
    )


def concatenating(model, x_t, t, prompt, source):
    """The editor's usual alternative: the source's patches as further image tokens, thrown away at the end. Cost only, untrained."""
    h = x_t.shape[-2]
    return model(torch.cat([x_t, source], 2), t, prompt)[..., :h, :]


@torch.no_grad()
def editing(name, model, size, batch, tokens, rounds, n=20):
    """-> cost of `batch` edits at once in units of sampling from the base without guidance, with guidance, and of an editor by concatenation"""
    x, eps = torch.randn(2, batch, model.channels, size, size)
    adapter = fold(
        model, new_adapter(model, 64)
    )  # as sample.py does; an untrained one leaves the base as it was
    prompt, null = (
        (
            torch.randn(batch, tokens, min(2048, model.context_dim)),
            torch.randn(batch, model.time_text_embed["text_embedder"]["linear_1"].in_features),
        )
        for _ in range(2)
    )
    ts = time_grid(n, 3.0)
    last = lambda velocity: list(integrate(velocity, eps, ts))[-1]  # noqa: E731
    times = in_turn(
        rounds,
        edit=lambda: edit(model, adapter, x, prompt, eps, ts),
        base=lambda: last(lambda y, t: model(y, t, prompt)),
        guided=lambda: last(guided(answers(model, prompt, null), 4.5)),
        tokens=lambda: last(lambda y, t: concatenating(model, y, t, prompt, x)),
    )
    name += f": {batch} edits at once" if batch > 1 else ": one edit"
    return {
        other: show(
            f"{name}, in units of {what}", ratio(times["edit"], times[other]), times["edit"]
        )
        for other, what in (
            ("base", "sampling from the base"),
            ("guided", "sampling with guidance"),
            ("tokens", "an edit by concatenated tokens"),
        )
    }


def byg_step(base, recipe, rounds, compiled=False):
    """-> a ByG step, and its parts, in units of a supervised step, which is what identity costs where it is drawn; how much faster compiled"""
    model, _, text, shift = base
    o = argparse.Namespace(routing="ste", bootstrap=True, frames=1, **RECIPES[recipe])
    shape, own = (model.channels, model.sample_size, model.sample_size), o.batch // o.states
    x, eps = torch.randn(2, own, *shape).repeat(1, o.states, 1, 1, 1)
    eps_cue, ts = torch.randn_like(x), time_grid(o.n, shift)
    captions = {
        "src": "a red house in autumn",
        "tgt": "a red house in winter",
        "instr": "make it winter",
        "undo": "make it autumn",
        "null": "",
    }
    with torch.no_grad():
        prompts = {k: text([c] * o.batch) for k, c in captions.items()}
    adapter = new_adapter(model, o.rank)
    average, params = {k: v.detach().clone() for k, v in adapter.items()}, list(adapter.values())
    opt, k = new_optimizer(adapter, o), (torch.arange(o.batch) / o.batch * o.n).long()
    t, spent = ts[k], {"rollout": [], "teacher": []}

    def timed(name):
        """Wraps a function that byg_loss calls, to add up what it takes there."""
        call = getattr(losses, name)

        def wrapped(*args):
            begun = time.perf_counter()
            out = call(*args)
            spent[name].append(time.perf_counter() - begun)
            return out

        return mock.patch.object(losses, name, wrapped)

    def finish(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad()

    def supervised():
        x_t = torch.lerp(x, eps, t[:, None, None, None])
        finish(
            losses.identity_loss(model, merged(model, adapter), x, x_t, t, eps - x, prompts["undo"])
        )

    def byg(known=None):
        finish(
            losses.byg_loss(
                model,
                merged(model, adapter),
                merged(model, average),
                x,
                prompts,
                eps,
                eps_cue,
                k,
                ts,
                o,
                known,
            )[0]
        )

    with timed("rollout"), timed("teacher"):
        times = in_turn(
            rounds,
            supervised=supervised,
            step=byg,
            **{"imitation": lambda: byg(x)} if o.imitate else {},
        )
    out, identity = {}, [o.identity_share * s for s in times["supervised"]]
    if o.imitate:
        times["mean"] = [
            o.imitate * a + (1 - o.imitate) * b for a, b in zip(times["imitation"], times["step"])
        ]
    for name in list(times)[1:]:
        seconds = [a + b for a, b in zip(times[name], identity)]
        what = {
            "step": "a ByG step",
            "imitation": "a step of imitation",
            "mean": "the mean step of a run",
        }[name]
        out[name] = show(
            f"{recipe} recipe: {what}, in units of a supervised step",
            ratio(seconds, times["supervised"]),
            seconds,
        )
    for part, why in (
        ("rollout", f"{o.n} forwards of a trajectory, {o.states} of the batch from each"),
        ("teacher", "the frozen base's answers"),
    ):
        seconds = spent[part][1:]
        out[part] = show(
            f"{recipe} recipe: its {part} ({why}), in units of a supervised step",
            ratio(seconds, times["supervised"]),
            seconds,
        )
    if compiled:
        torch._dynamo.config.recompile_limit, begun = 64, time.perf_counter()
        for block in model.transformer_blocks:
            block.compile()
        for call in 2 * [supervised, byg, lambda: byg(x)]:
            call()
        out["compiling_s"] = round(time.perf_counter() - begun)
        print(
            f"| {recipe} recipe: compiling, with six steps | | {out['compiling_s']} s |", flush=True
        )
        eager = torch.compiler.set_stance("force_eager")
        times = in_turn(
            rounds,
            imitation=lambda: byg(x),
            step=byg,
            eager_imitation=eager(lambda: byg(x)),
            eager_step=eager(byg),
        )
        for name, what in (("imitation", "a step of imitation"), ("step", "a ByG step")):
            gain = ratio(times[f"eager_{name}"], times[name])
            out[f"{name}_compiled"] = show(
                f"{recipe} recipe: {what}, eager in units of compiled", gain, times[name]
            )
    return out


def processor():
    """The processor's name and whether it has AVX-512, where the system tells."""
    with contextlib.suppress(OSError, IndexError):
        info = pathlib.Path("/proc/cpuinfo").read_text()
        return info.split("model name\t: ")[1].split("\n")[0] + (
            ", AVX-512" if " avx512f" in info else ""
        )
    return platform.machine()


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--threads", type=int, help="default: all cores")
    p.add_argument("--compile", action="store_true", help="also the compiled step (three minutes)")
    p.add_argument(
        "--bf16",
        action="store_true",
        help="also in bf16 (very slow on processors that do not compute in it)",
    )
    o = p.parse_args()
    if o.rounds < 2:
        p.error("--rounds must be at least 2")
    torch.set_num_threads(o.threads or torch.get_num_threads())
    torch.manual_seed(0)
    slices = BASES["sd3.5-medium"] | {"num_layers": 4, "dual_attention_layers": (0, 1, 2, 3)}
    made = origin()  # before anything is written: the commit that is measured
    told = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {o.rounds} rounds"
    print("\n".join([told, "", *ROWS]), flush=True)
    base = load_base("tiny")
    results = {
        "step": byg_step(load_base("tiny"), "tiny", o.rounds, o.compile),
        "paper step": byg_step(base, "paper", o.rounds),
        "edit": editing("embedded base", base[0], base[0].sample_size, 16, 24, o.rounds),
        "edit of one": editing("embedded base", base[0], base[0].sample_size, 1, 24, o.rounds),
        "sample": sampling(base, o.rounds),
        "load": loading(o.rounds),
    }
    with tempfile.TemporaryDirectory() as folder:
        big = both_models(slices, pathlib.Path(folder), torch.float32)[1]
    results["edit at size"], peers = (
        editing("4 blocks of SD3.5-medium", big, 64, 1, 77, max(2, o.rounds // 3), 1),
        {},
    )
    for dtype in (torch.float32, torch.bfloat16)[: 1 + o.bf16]:
        bits = str(dtype).removeprefix("torch.")
        peers[f"embedded {bits}"] = against_diffusers(
            f"embedded base, {bits}", None, 16, 8, 24, dtype, o.rounds
        )
        peers[f"slice {bits}"] = against_diffusers(
            f"4 blocks of SD3.5-medium, {bits}", slices, 64, 1, 77, dtype, max(2, o.rounds // 3)
        )
    worst = lambda what: min(r[what]["ratio"] for r in peers.values())  # noqa: E731
    head = f"`{made['command']}` ({told}; commit {made['commit']})"
    write(ROOT / "bench" / "results" / "speed.md", "\n".join([head, "", READ, "", *ROWS]) + "\n")
    print(
        json.dumps(
            {
                "forward_vs_diffusers": worst("forward"),
                "train_vs_diffusers": worst("train"),
                "edit_vs_base": results["edit"]["base"]["ratio"],
                "edit_vs_guided": results["edit"]["guided"]["ratio"],
                "byg_step_vs_supervised": results["step"]["step"]["ratio"],
                "mean_step_vs_supervised": results["step"]["mean"]["ratio"],
                "rounds": o.rounds,
                "threads": torch.get_num_threads(),
                **results,
                "peers": peers,
            }
        )
    )


if __name__ == "__main__":
    main()

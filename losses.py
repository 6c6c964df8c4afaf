"""The three signals of ByG and the step that adds them up (Algorithm 1, Eq. 2 to 5)."""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Adapter, MMDiT, Prompt
from routing import rollout, route, steady


def cosine_cue(v: Tensor, v_src: Tensor, v_tgt: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The paper's cue, Eq. 2: 1 - cos(v - v_src, d) + alpha mean (v - v_tgt)^2, with d = v_tgt - v_src what the text changes.
    All (B, C, H, W) -> loss, mean cosine in [-1, 1]"""
    v, v_src, v_tgt = (a.float().flatten(1) for a in (v, v_src, v_tgt))
    cos = F.cosine_similarity(v - v_src, v_tgt - v_src, dim=1).mean()
    return 1 - cos + alpha * F.mse_loss(v, v_tgt), cos.detach()


def fade(guidance: float, t: Tensor) -> Tensor:
    """The target's guidance at t: full below .72, none above .92. Measured to be better (bench/cue.py); our reading: up there
    the base hardly sees the house, and guidance amplifies what it imagines instead (in sampling: arXiv 2404.07724). t (B,) -> (B, 1, 1, 1)"""
    return 1 + (guidance - 1) * ((0.92 - t[:, None, None, None]) / 0.2).clamp(0, 1)


def delta_change(
    v_src: Tensor,
    v_tgt: Tensor,
    x: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    t: Tensor,
    sure: Tensor | float = 0.0,
) -> Tensor:
    """What the text changes. The edit y is right when the base errs on it as on the source: v_tgt - (eps - y) = v_src - (eps - x).

    The base's v_src is a blurry mean while the editor sees a sharp source: measured from v_src even the perfect edit is not
    parallel to d. So v_src is asked at the noised source x_t, v_tgt at y_t, the edit under the same noise: the base's blur cancels in
    d (Delta Denoising Score, arXiv 2304.07090; FlowEdit, 2412.08629). w = |d|^2 / (|d|^2 + |e|^2), at each place, is the trust in d:
    where e, the base's error on the source, is as large as what the text changes, the base does not see what stands there, and
    would paint winter over the house. It thins out what has nothing to do with what stands there, as snowfall: there sure = 1 makes w = 1.
    v_src, v_tgt, x, x_t, y_t (B, C, H, W), t (B,) in (0, 1], sure (B, 1, 1, 1) -> the wanted change w d of the velocity (B, C, H, W)
    """
    s = t[:, None, None, None]
    x_src, y_tgt = x_t - s * v_src, y_t - s * v_tgt  # what the base takes the clean pictures for
    d, e = (
        F.avg_pool2d(a.square().mean(1, keepdim=True), 3, 1, 1, count_include_pad=False)
        for a in (y_tgt - x_src, x - x_src)
    )
    return (d / (d + e)).clamp(min=sure) * (v_tgt - v_src)


def delta_cue(v: Tensor, v_x: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """The cue of the embedded recipe: v must be v_x, which leads back to the source, plus the wanted change.
    v, v_x, change (B, C, H, W) -> loss, mean cosine of the edit with the change in [-1, 1]"""
    cos = F.cosine_similarity((v - v_x).flatten(1), change.flatten(1), dim=1)
    return F.mse_loss(v, v_x + change), cos.mean().detach()


@torch.no_grad()
def teacher(model: MMDiT, queries: list[tuple], null: Prompt) -> list[Tensor]:
    """The frozen base on several (state, prompt, guidance w), state = (y, t), in one batch: v = v(null) + w (v(p) - v(null)).

    w, the same for all queries of a state, is a number or (B, 1, 1, 1); None: v(p) alone. v(null) is asked once for a state and, of
    a tensor w, only where it is not 1. -> list of (B, C, H, W)"""
    nulls = {
        id(s): (s, (w != 1).flatten() if torch.is_tensor(w) else slice(None))
        for s, _, w in queries
        if w is not None
    }
    parts = [(*s, *p) for s, p, _ in queries] + [
        tuple(a[m] for a in (*s, *null)) for s, m in nulls.values()
    ]
    y, t, *prompt = (torch.cat(a) for a in zip(*parts))
    v = model(y, t, prompt).float().split([len(part[0]) for part in parts])
    v_null = dict(zip(nulls, v[len(queries) :]))
    for u, (s, _, w) in zip(v, queries):
        if w is not None:
            m = nulls[id(s)][1]
            u[m] = v_null[id(s)] + (w[m] if torch.is_tensor(w) else w) * (u[m] - v_null[id(s)])
    return v[: len(queries)]


@torch.no_grad()
def follow(
    model: MMDiT,
    x: Tensor,
    prompts: dict[str, Prompt],
    guidance: Callable,
    ts: Tensor,
    generator: torch.Generator,
    draws: int = 2,
    own_noise: Tensor | None = None,
) -> Tensor:
    """An edit without an editor: begins as the source and takes, at each of the times ts, the change that the delta cue asks for, under
    fresh noise each time, the mean over `draws`, of which each second has the negative of the noise before it. So FlowEdit (arXiv
    2412.08629) goes, too. Above t = .9 only the change's mean over the picture is taken, of one draw: up there the base sees how light a
    picture is, which night needs, but not where its house stands.

    own_noise (B,) bool: where true, one noise all the way and the cue is sure: of what begins at random places the mean is none at all.
    x (B, C, H, W) source; prompts: src, tgt, null; guidance(t (B,)) -> (B, 1, 1, 1) -> the edit (B, C, H, W)"""
    y, first, eps = x, None, None
    own = (
        torch.zeros(len(x), 1, 1, 1, dtype=torch.bool)
        if own_noise is None
        else own_noise[:, None, None, None]
    )
    for t, t_next in zip(ts[:-1], ts[1:]):
        changes, times = [], t.repeat(len(x)).to(x.device)
        for draw in range(
            1 if t > 0.9 or own.all() else draws
        ):  # under one noise every draw is the same
            eps = -eps if draw % 2 else torch.randn(x.shape, generator=generator)
            first = eps if first is None else first
            x_t = torch.lerp(x, torch.where(own, first, eps).to(x.device), t.to(x.device))
            y_t = y + x_t - x  # the state of a straight path from eps to y
            v_src, v_tgt = teacher(
                model,
                [
                    ((x_t, times), prompts["src"], None),
                    ((y_t, times), prompts["tgt"], guidance(times)),
                ],
                prompts["null"],
            )
            changes.append(delta_change(v_src, v_tgt, x, x_t, y_t, times, own.to(x)))
        change = sum(changes) / len(changes)
        y = y - (t - t_next) * (change.mean((2, 3), keepdim=True) if t > 0.9 else change)
    return y


def identity_loss(
    model: MMDiT,
    adapter: Adapter,
    x: Tensor,
    x_t: Tensor,
    t: Tensor,
    v: Tensor,
    undo: Prompt,
    frames: int = 1,
) -> Tensor:
    """The source already satisfies the reverse instruction, so nothing may change."""
    return F.mse_loss(model(x_t, t, undo, x, adapter, frames).float(), v)


def byg_loss(
    model: MMDiT,
    adapter: Adapter,
    average: Adapter,
    x: Tensor,
    prompts: dict[str, Prompt],
    eps: Tensor,
    eps_cue: Tensor,
    k: Tensor,
    ts: Tensor,
    o: argparse.Namespace,
    known: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Everything of Algorithm 1 but identity, for one batch. Adapters may be `merged`.

    x, eps (B, C, H, W) clean source latent and noise: B / o.states trajectories, repeated o.states times; prompts: dict of (context,
    pooled) for src, tgt, instr, undo, null; eps_cue (B, C, H, W): noise for the delta cue, fresh, or eps for what begins at random places
    (then the cue is sure, too); k (B,) node of the time grid ts for each sample; average: the averaged adapter of the bootstrap; o: options
    frames (samples that are one clip), states, routing, bootstrap, cue, antithetic (the delta cue is the mean under eps_cue and -eps_cue), alpha,
    guidance, cycle, prior, reverse; known (B, C, H, W): edits to imitate, from `follow`, instead of rollout and teacher.
    -> loss, dict of figures
    """
    instr, undo, src, tgt = (prompts[p] for p in ("instr", "undo", "src", "tgt"))
    t = ts.to(x.device)[k]  # (B,)
    s = t[:, None, None, None]
    x_t = (1 - s) * x + s * eps
    first = slice(
        len(x) // o.states
    )  # the trajectories; the rest of the batch are more states of the same
    part = lambda p: tuple(a[first] for a in p)
    reverse = o.reverse if o.cue == "cosine" else 0  # the reverse cue: captions swapped
    w = None if o.guidance == 1 else o.guidance

    def own_rollout(a):
        velocity = lambda y, t: model(y, t, part(instr), x[first], a, o.frames)
        return rollout(steady(velocity, x[first], o.frames), eps[first], ts, k.to(x.device))

    y_0 = known
    if known is not None:
        y_t = torch.lerp(known, eps, s)
    elif o.bootstrap:
        with torch.no_grad():
            y_t, y_0 = own_rollout(average)
    else:
        y_t = x_t  # the ablation: the editor only ever meets the noised source
    if known is not None:
        change = x - known  # of the velocity, from eps - x to eps - known
    elif o.cue == "delta":  # the same states under eps_cue: if fresh, the editor cannot know it
        sure = (eps_cue == eps).flatten(1).all(1)[:, None, None, None]
        noises = [eps_cue] + [
            torch.where(sure, eps, -eps_cue)
        ] * o.antithetic  # what is odd in the noise cancels in the mean
        at = [[(z + s * (e - eps), t) for z in (x_t, y_t)] for e in noises]
        v = iter(
            teacher(
                model,
                [
                    q
                    for at_x, at_y in at
                    for q in ((at_x, src, None), (at_y, tgt, w and fade(w, t)))
                ],
                prompts["null"],
            )
        )
        change = sum(
            delta_change(next(v), next(v), x, at_x[0], at_y[0], t, sure.float())
            for at_x, at_y in at
        ) / len(at)
    else:
        at_y, at_x = (y_t, t), (x_t, t)
        v_src, v_tgt, *u = teacher(
            model,
            [(z, p, w) for z in (at_y, at_x)[: 1 + bool(reverse)] for p in (src, tgt)],
            prompts["null"],
        )

    v_fwd = model(y_t, t, instr, x, adapter, o.frames).float()  # forward edit
    y_hat = y_t - s * v_fwd
    if y_0 is None:  # nothing was rolled out
        y_0 = y_hat
    if o.cue == "delta":
        prior, cos = delta_cue(v_fwd, eps - x, change)
    else:
        prior, cos = cosine_cue(v_fwd, v_src, v_tgt, o.alpha)
        if o.cue == "anchor":  # the ablation: v_tgt alone, no direction
            prior = F.mse_loss(v_fwd, v_tgt)
    loss, figures = o.prior * prior, {"prior": prior.detach(), "cos": cos}  # Eq. 5
    if not (o.cycle or reverse):
        return loss, figures

    if known is None and o.routing == "backprop":
        y_0 = own_rollout(adapter)[1]
    v_rev = model(
        x_t, t, undo, route(o.routing, y_hat, y_0), adapter, o.frames
    ).float()  # and back (Eq. 3)
    cycle = F.mse_loss(v_rev, eps - x)
    loss, figures["cycle"] = loss + o.cycle * cycle, cycle.detach()
    if reverse:
        prior_rev, figures["cos_rev"] = cosine_cue(v_rev, u[1], u[0], o.alpha)
        loss, figures["prior_rev"] = loss + reverse * prior_rev, prior_rev.detach()
    return loss, figures

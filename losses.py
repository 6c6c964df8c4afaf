"""The three signals of ByG and the step that adds them up (Algorithm 1, Eq. 2 to 5)."""
import torch
import torch.nn.functional as F

from routing import rollout, route


def cue_loss(v, v_x, v_src, v_tgt, t, alpha, kind="reach"):
    """Teacher cue: L_dir + alpha L_mse. The direction d = v_tgt - v_src says what the text changes; the anchor keeps v near v_tgt.

    cosine  L_dir = 1 - cos(v - v_src, d), L_mse = mean (v - v_tgt)^2: the paper's Eq. 2
    reach   L_dir = max(0, |d| - <v - v_x, d/|d|>)^2 / D, L_mse = (1 - t) mean (v - v_tgt)^2. The base's v_src is a blurry mean of
            pictures, the editor sees its source: measured from v_src, the cosine of even the perfect edit is far below 1 and
            is raised by losing detail. So the edit is measured from v_x = (y_t - x)/t, the velocity that would give the source
            back: t (v_x - v) is what the edit changes, and it must reach as far along d as the text asks. More is free, as y_t
            shows the edit already at low t, where d vanishes. The anchor counts where the base sees what it draws.
    v, v_x, v_src, v_tgt (B, C, H, W), t (B,) in (0, 1] -> loss, mean of the paper's cosine in [-1, 1]
    """
    v, v_x, v_src, v_tgt = (a.float().flatten(1) for a in (v, v_x, v_src, v_tgt))
    d = v_tgt - v_src                                                       # (B, D)
    cos, anchor = F.cosine_similarity(v - v_src, d, dim=1), (v - v_tgt).square().mean(1)        # (B,)
    if kind == "cosine":
        direction = 1 - cos
    else:
        direction = (d.norm(dim=1) - ((v - v_x) * F.normalize(d, dim=1)).sum(1)).relu().square() / d.shape[1]
        anchor = (1 - t) * anchor
    return (direction + alpha * anchor).mean(), cos.mean().detach()


@torch.no_grad()
def teacher(model, states, prompts, null, guidance):
    """The frozen base on several (y, t) states under several prompts, in one batch; with guidance
    v = v(null) + w (v(p) - v(null)). states and prompts of equal length -> list of (B, C, H, W)"""
    pairs = list(zip(states, prompts))
    if guidance != 1:                                       # one null query per distinct state
        pairs += [(s, null) for i, s in enumerate(states) if all(s is not r for r in states[:i])]
    y, t = (torch.cat([s[i] for s, _ in pairs]) for i in (0, 1))
    v = model(y, t, tuple(torch.cat([p[i] for _, p in pairs]) for i in (0, 1))).float().chunk(len(pairs))
    if guidance == 1:
        return list(v)
    base = dict(zip((id(s) for i, s in enumerate(states) if all(s is not r for r in states[:i])), v[len(states):]))
    return [base[id(s)] + guidance * (v[i] - base[id(s)]) for i, s in enumerate(states)]


def identity_loss(model, adapter, x, x_t, t, v, undo):
    """The source already satisfies the reverse instruction, so nothing may change."""
    return F.mse_loss(model(x_t, t, undo, x, adapter).float(), v)


def byg_loss(model, adapter, average, x, prompts, eps, k, ts, o):
    """Everything of Algorithm 1 but identity, for one batch.

    x, eps (B, C, H, W) clean source latent and noise; prompts: dict of (context, pooled) for src, tgt, instr, undo, null;
    k (B,) node of the time grid ts for each sample; average: the averaged adapter of the bootstrap;
    o: options routing, cue, alpha, guidance, cycle, prior, reverse. -> loss, dict of figures
    """
    instr, undo, src, tgt = (prompts[p] for p in ("instr", "undo", "src", "tgt"))
    t = ts.to(x.device)[k]                                  # (B,)
    s = t[:, None, None, None]
    x_t = (1 - s) * x + s * eps
    with torch.no_grad():                                   # bootstrap
        y_t, y_0 = rollout(lambda y, t: model(y, t, instr, x, average), eps, ts, k)
    at_y, at_x = (y_t, t), (x_t, t)
    queries = [(at_y, src), (at_y, tgt)] + ([(at_x, src), (at_x, tgt)] if o.reverse else [])
    v_src, v_tgt, *u = teacher(model, *zip(*queries), prompts["null"], o.guidance)

    v_fwd = model(y_t, t, instr, x, adapter).float()        # forward edit
    y_hat = y_t - s * v_fwd
    prior, cos = cue_loss(v_fwd, (y_t - x) / s, v_src, v_tgt, t, o.alpha, o.cue)
    if o.routing == "backprop":
        y_0 = rollout(lambda y, t: model(y, t, instr, x, adapter), eps, ts, k)[1]

    v_rev = model(x_t, t, undo, route(o.routing, y_hat, y_0), adapter).float()      # and back (Eq. 3)
    cycle = F.mse_loss(v_rev, eps - x)
    loss = o.cycle * cycle + o.prior * prior                        # Eq. 5
    figures = {"cycle": cycle.detach(), "prior": prior.detach(), "cos": cos}
    if o.reverse:                                                   # the reverse cue: captions swapped
        prior_rev, figures["cos_rev"] = cue_loss(v_rev, (x_t - y_0.detach()) / s, u[1], u[0], t, o.alpha, o.cue)
        loss, figures["prior_rev"] = loss + o.reverse * prior_rev, prior_rev.detach()
    return loss, figures

"""The promises of the method, against the equations of the paper, autograd and known answers."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cue import follow
from torch._dynamo.testing import CompileCounter

from data import KINDS, Batch
from files.disk import write_tensors
from files.run import key_in_file, load_adapter
from losses import (
    byg_loss,
    change_of,
    cosine_cue,
    delta_cue,
    direction_loss,
    fade,
    identity_loss,
    teacher,
)
from model import MMDiT, merged, new_adapter
from routing import ROUTES, integrate, rollout, route, time_grid
from sample import edit
from tiny.parts import sincos
from train import Muon

C, S = 4, 8  # latent channels, side
PRIOR, CYCLE, GUIDANCE = 1.5, 0.7, 2.0
CUES = {
    "delta": partial(delta_cue, guidance=GUIDANCE),
    "delta-own": partial(delta_cue, guidance=GUIDANCE),  # on a batch whose eps_cue is eps
    "cosine": cosine_cue,
}
BASE = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": C,
    "out_channels": C,
    "qk_norm": "rms_norm",
    "dual_attention_layers": [0],
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 8,
}
WAYS = [(routing, True) for routing in ROUTES] + [("onestep", False)]  # False: no bootstrap


def prompts(b):
    return {k: (torch.randn(b, 5, 20), torch.randn(b, 12)) for k in (*KINDS, "null")}


def random_world(b=3, frames=1):
    """A small random base, an adapter whose zeros have left zero, another one for its average, and
    a batch of b pictures or clips."""
    torch.manual_seed(0)
    model = MMDiT(BASE).requires_grad_(False)
    model.pos_embed.pos_embed.copy_(sincos(32, 8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim < 2 else p[0].numel() ** -0.5)
    adapter = new_adapter(model, 4, video=frames > 1)
    with torch.no_grad():
        for v in adapter.values():
            if v.abs().max() == 0:
                v.normal_(std=0.1)
    average = {name: 1.3 * v.detach() for name, v in adapter.items()}
    x, eps, eps_cue = torch.randn(3, b * frames, C, S, S)
    k = torch.tensor([0, 2, 4])[:b].repeat_interleave(frames)  # guidance: none, fading, full
    batch = Batch(x, eps, eps_cue, k, **prompts(b * frames), frames=frames)
    ts = time_grid(5, shift=3.0)
    return SimpleNamespace(model=model, adapter=adapter, average=average, batch=batch, ts=ts)


@pytest.fixture
def world():
    return random_world()


def step(w, cue="delta", prior=PRIOR, cycle=CYCLE, routing="ste", bootstrap=True):
    batch = replace(w.batch, eps_cue=w.batch.eps) if cue == "delta-own" else w.batch
    weights = prior, cycle, routing, bootstrap
    return byg_loss(w.model, w.adapter, w.average, batch, w.ts, CUES[cue], *weights)


# ---- Algorithm 1 -------------------------------------------------------------------------------
def algorithm_1(w, rows, cue, routing, bootstrap):
    """The loss of one sample (or one clip), equation by equation, each query a pass of its own."""
    x, eps, eps_cue = w.batch.x[rows], w.batch.eps[rows], w.batch.eps_cue[rows]
    node, n = int(w.batch.k[rows][0]), len(w.ts) - 1
    t = w.ts[node]

    def ask(y, t, kind, *source_and_adapter):
        prompt = [a[rows] for a in getattr(w.batch, kind)]
        frames = w.batch.frames if source_and_adapter else 1
        return w.model(y, t.expand(len(y)), prompt, *source_and_adapter, frames=frames)

    def rolled_out(adapter, nodes):
        y = eps
        for now, then in zip(w.ts[:nodes], w.ts[1:]):
            y = y - (now - then) * ask(y, now, "instr", x, adapter)
        return y

    x_t = (1 - t) * x + t * eps  # 1
    y_t, y_0 = x_t, None
    if bootstrap:  # 2
        y_t, y_0 = rolled_out(w.average, node), rolled_out(w.average, n)
    if routing == "backprop":
        y_0 = rolled_out(w.adapter, n)
    v_fwd = ask(y_t, t, "instr", x, w.adapter)  # 3
    y_hat = y_t - t * v_fwd
    y_hyb = y_hat if routing == "onestep" else y_0  # 5, Eq. 4
    if routing == "ste":
        y_hyb = y_0 + y_hat - y_hat.detach()
    v_rev = ask(x_t, t, "undo", y_hyb, w.adapter)  # 6
    loss = CYCLE * (v_rev - (eps - x)).square().mean()  # Eq. 3

    def towards(v, v_src, v_tgt):  # Eq. 2
        a, b = (v - v_src).flatten(1), (v_tgt - v_src).flatten(1)
        cos = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
        return (1 - cos).mean() + 0.1 * (v - v_tgt).square().mean()

    if cue == "cosine":  # 4 and, with the captions swapped, 7
        there = towards(v_fwd, ask(y_t, t, "src"), ask(y_t, t, "tgt"))
        back = towards(v_rev, ask(x_t, t, "tgt"), ask(x_t, t, "src"))
        return loss + PRIOR * (there + back)
    other = eps if cue == "delta-own" else eps_cue  # the delta cue: the same states, its noise
    y_c, x_c = y_t - t * eps + t * other, (1 - t) * x + t * other
    guidance = 1 + (GUIDANCE - 1) * min(1, max(0, (0.92 - t) / 0.2))
    no_words = ask(y_c, t, "null")
    v_tgt = no_words + guidance * (ask(y_c, t, "tgt") - no_words)
    target = eps - x + v_tgt - ask(x_c, t, "src")
    return loss + PRIOR * (v_fwd - target).square().mean()


def assert_same_loss_and_gradients(w, loss, want):
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    tensors = list(w.adapter.values())
    ours, theirs = (torch.autograd.grad(total, tensors) for total in (loss, want))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("routing, bootstrap", WAYS)
@pytest.mark.parametrize("cue", CUES)
def test_a_step_is_algorithm_1_written_out(world, cue, routing, bootstrap):
    """Loss and gradients of byg_loss against the equations: which state meets which caption, noise,
    weights and source. The average differs from the adapter, eps_cue from eps (but for the cue
    delta-own), and every sample has its own node."""
    want = sum(algorithm_1(world, [i], cue, routing, bootstrap) for i in range(3)) / 3
    loss = step(world, cue, routing=routing, bootstrap=bootstrap)[0]
    assert_same_loss_and_gradients(world, loss, want)


def test_of_clips_a_step_is_the_same_algorithm_with_attention_between_frames():
    """Here the two frames of a clip are rows 2 i and 2 i + 1; the teacher sees single pictures."""
    w = random_world(b=2, frames=2)
    want = sum(algorithm_1(w, [2 * i, 2 * i + 1], "delta", "ste", True) for i in range(2)) / 2
    assert_same_loss_and_gradients(w, step(w)[0], want)


def test_identity_is_step_8_written_out(world):
    """Of the noised source, the source and the reverse instruction: its velocity is eps - x."""
    x, eps, s = world.batch.x, world.batch.eps, world.ts[world.batch.k].view(3, 1, 1, 1)
    x_t = (1 - s) * x + s * eps
    v = world.model(x_t, s.flatten(), world.batch.undo, x, world.adapter)
    want = (v - (eps - x)).square().mean()
    loss = identity_loss(world.model, world.adapter, world.batch, world.ts)
    assert_same_loss_and_gradients(world, loss, want)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name, cue",
    [("cycle", "delta"), ("prior", "delta"), ("prior", "cosine"), ("identity", None)],
)
def test_each_loss_alone_reaches_every_adapter_tensor(world, name, cue, checkpointing):
    world.model.checkpointing = checkpointing
    if name == "identity":
        loss = identity_loss(world.model, world.adapter, world.batch, world.ts)
    else:
        loss, _ = step(world, cue, **{"prior": 0.0, "cycle": 0.0, name: 1.0})
    loss.backward()
    grads = {key: v.grad for key, v in world.adapter.items()}
    assert [key for key, grad in grads.items() if grad is None or grad.abs().max() == 0] == []


@pytest.mark.parametrize("routing, bootstrap", WAYS)
def test_every_routing_gives_a_finite_gradient_and_figures_without_one(world, routing, bootstrap):
    loss, figures = step(world, routing=routing, bootstrap=bootstrap)
    loss.backward()
    assert all(v.grad.isfinite().all() for v in world.adapter.values())
    assert figures.keys() == {"prior", "cycle", "cos"}
    assert not any(figure.requires_grad for figure in figures.values())


# ---- routing, rollout, edit --------------------------------------------------------------------
def test_routed_value_is_the_rollouts_end_and_its_gradient_the_one_step_paths():
    y_0, weights = torch.randn(2, 2, C, S, S)
    y_hat = torch.randn(2, C, S, S, requires_grad=True)
    assert torch.equal(route("ste", y_hat, y_0), y_0)
    for how in ("ste", "onestep"):
        (grad,) = torch.autograd.grad((route(how, y_hat, y_0) * weights).sum(), y_hat)
        assert torch.equal(grad, weights)
    assert route("onestep", y_hat, y_0) is y_hat and route("backprop", y_hat, y_0) is y_0
    detached = route("detach", y_hat, y_0.requires_grad_())
    assert torch.equal(detached, y_0) and not detached.requires_grad


def test_rollout_is_inference_and_keeps_the_exact_state():
    """On the straight path x_t = (1 - t) x + t eps the true velocity, eps - x, leads to x through
    x_t."""
    x, eps = torch.randn(2, 4, 2, 8, 8)
    k, ts = torch.tensor([0, 1, 3, 4]), time_grid(5, shift=3.0)
    y_t, y_0 = rollout(lambda y, t: eps - x, eps, ts, k)
    t = ts[k].view(4, 1, 1, 1)
    torch.testing.assert_close(y_0, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(y_t, (1 - t) * x + t * eps, rtol=0, atol=1e-5)
    assert torch.equal(list(integrate(lambda y, t: eps - x, eps, ts))[-1], y_0)


@torch.no_grad()
def test_guidance_of_an_edit_is_plain_classifier_free_guidance(world):
    """Euler steps along v_null + g (v_instr - v_null); 1 is the edit itself and needs no null."""
    model, adapter, batch = world.model, world.adapter, world.batch
    inputs = model, adapter, batch.x, batch.instr, batch.eps, world.ts
    for guidance in (0.0, 1.0, 2.5):
        y = batch.eps
        for t, t_next in zip(world.ts, world.ts[1:]):
            v, v_null = (
                model(y, t.expand(3), prompt, batch.x, adapter)
                for prompt in (batch.instr, batch.null)
            )
            y = y - (t - t_next) * (v_null + guidance * (v - v_null))
        guided = edit(*inputs, null=batch.null, guidance=guidance)
        torch.testing.assert_close(guided, y, rtol=1e-4, atol=1e-4)
    assert torch.equal(edit(*inputs), edit(*inputs, null=batch.null, guidance=1.0))


# ---- the adapter -------------------------------------------------------------------------------
@torch.no_grad()
def test_at_step_0_the_editor_is_the_base_bit_for_bit(world):
    t, batch = world.ts[world.batch.k], world.batch
    fresh = new_adapter(world.model, 4)
    edited = world.model(batch.eps, t, batch.instr, batch.x, fresh)
    assert torch.equal(edited, world.model(batch.eps, t, batch.instr))


def test_the_merged_adapter_is_the_low_rank_detour_and_carries_its_gradient(world):
    """(W + B A) x against W x + B (A x): values, and gradients of every tensor."""
    t, batch = world.ts[world.batch.k], world.batch
    values, grads = [], []
    for form in (world.adapter, merged(world.model, world.adapter)):
        v = world.model(batch.eps, t, batch.instr, batch.x, form)
        values.append(v)
        grads.append(torch.autograd.grad((v * batch.eps).sum(), list(world.adapter.values())))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    for detour, weight in zip(*grads):
        torch.testing.assert_close(detour, weight, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_gate_of_an_old_adapter_file_mixes_the_source_into_the_clean_prediction(
    world, tmp_path
):
    """So a source that is the prediction changes nothing, whatever the gate; another changes it by
    a share that no source moves, in proportion to the gate. A file without a gate gets none."""
    model, batch, file = world.model, world.batch, tmp_path / "adapter.safetensors"
    t = torch.tensor([0.3, 0.6, 1.0])
    s = t.view(3, 1, 1, 1)
    no_source = {"source_proj.weight": torch.zeros_like(world.adapter["source_proj.weight"])}
    random_gate = 0.1 * torch.randn_like(model.proj_out.weight)

    def ask(x, gate):
        tensors = world.adapter | no_source
        if gate is not None:
            tensors = tensors | {"source_gate.weight": gate * random_gate}
        write_tensors(file, {key_in_file(name): v for name, v in tensors.items()})
        adapter = load_adapter(file, model)
        assert ("source_gate.weight" in adapter) == (gate is not None)
        return model(batch.eps, t, batch.instr, x, adapter)

    v = ask(batch.x, None)
    prediction = batch.eps - s * v
    torch.testing.assert_close(ask(prediction, 1.0), v, rtol=0, atol=1e-5)
    moved = ask(batch.x, 1.0) - v
    assert moved.abs().max() > 0.1
    torch.testing.assert_close(ask(batch.x, 2.0) - v, 2 * moved, rtol=0, atol=1e-4)
    share = s * moved / (prediction - batch.x)
    torch.testing.assert_close(
        s * (ask(0 * batch.x, 1.0) - v), share * prediction, atol=1e-3, rtol=0
    )


# ---- the teacher and its cues ------------------------------------------------------------------
@torch.no_grad()
def test_the_teacher_is_unaffected_by_the_adapter_and_asks_each_caption_at_its_own_state(world):
    """Against passes of the bare base, one for each query; a whole training step lies between."""
    model, batch, t = world.model, world.batch, world.ts[world.batch.k]
    queries = [(batch.eps, batch.src), (batch.x, batch.tgt), (batch.eps, batch.null)]
    bare = [model(y, t, caption) for y, caption in queries]
    with torch.enable_grad():
        step(world)[0].backward()
    for v in world.adapter.values():
        v -= v.grad
    for got, want in zip(teacher(model, t, *queries), bare):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_cosine_cue_is_one_minus_the_cosine_of_the_directions_and_a_tenth_of_the_distance():
    """Eq. 2 with v on the line through both: the cosine is the sign, the distance |f - 1| |d|."""
    v_src, d = torch.randn(2, 5, C, S, S)
    for f in (1.0, 3.0, -1.0):
        sign = f / abs(f)
        loss, cos = direction_loss(v_src + f * d, v_src, v_src + d)
        distance = (f - 1) ** 2 * d.square().mean().item()
        assert cos.item() == pytest.approx(sign, abs=1e-4)
        assert loss.item() == pytest.approx(1 - sign + 0.1 * distance, abs=1e-4)


def test_guidance_fades_with_noise():
    guidance = fade(3.0, torch.tensor([0.1, 0.72, 0.82, 0.92, 1.0]))
    assert guidance.flatten().tolist() == pytest.approx([3, 3, 2, 1, 1], abs=1e-5)


def gaussian_world(n=5, sigma=0.1):
    """A world with a known answer: pictures of a caption are N(mu, sigma^2), so the exact base is
    E[x | y_t] = mu + g (y_t - (1 - t) mu), g = (1 - t) sigma^2 / ((1 - t)^2 sigma^2 + t^2), and the
    true edit is x + mu_tgt - mu_src. -> base, sources, prompts (their context is mu), the truth"""
    torch.manual_seed(0)
    mu_src, mu_tgt = 2 * torch.randn(2, 1, C, S, S)
    x = mu_src + sigma * torch.randn(n, C, S, S)

    def base(y, t, prompt):
        s, mu = t.view(-1, 1, 1, 1), prompt[0]
        g = (1 - s) * sigma**2 / ((1 - s) ** 2 * sigma**2 + s**2)
        return (y - mu - g * (y - (1 - s) * mu)) / s

    src, tgt = ((mu.expand_as(x), torch.zeros(n, 1)) for mu in (mu_src, mu_tgt))
    return base, x, src, tgt, x + mu_tgt - mu_src


def test_the_delta_cue_is_zero_exactly_at_the_true_edit():
    """In a Gaussian world, under any noise: what is asked for at the true edit is the way to it."""
    base, x, src, tgt, y = gaussian_world()
    eps, eps_cue = torch.randn(2, *x.shape)
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0])
    x_t, y_t = (torch.lerp(a, eps, t.view(5, 1, 1, 1)) for a in (x, y))
    batch = Batch(x, eps, eps_cue, None, src, tgt, None, None, null=src, frames=1)
    change = change_of(base, batch, y_t, x_t, t, guidance=1.0)
    torch.testing.assert_close(eps - x + change, eps - y, rtol=0, atol=1e-4)
    loss, cos = delta_cue(base, batch, y_t, x_t, t, eps - y, None, guidance=1.0)
    assert loss < 1e-8 and cos > 0.9999
    for state in (x_t, y_t):  # an editor that copies the source
        loss, _ = delta_cue(base, batch, state, x_t, t, eps - x, None, guidance=1.0)
        assert loss > 0.5 * (y - x).square().mean()


def test_following_the_delta_cue_ends_at_the_true_edit():
    """In the same world, where bench/cue.py begins as the source and knows both captions."""
    base, x, src, tgt, truth = gaussian_world()
    rng = torch.Generator().manual_seed(0)
    y = follow(base, x, src, tgt, src, 1.0, time_grid(200), rng)
    assert (y - truth).square().mean() < 0.01 * (x - truth).square().mean()


# ---- the compiler and the optimizer ------------------------------------------------------------
@torch._dynamo.config.patch(recompile_limit=64)
def test_one_code_for_all_blocks_and_nothing_is_compiled_after_the_first_step():
    """The compiler's own counters: adapter off, averaged, trained, checkpointed, several sizes of
    batch. Eight blocks of three kinds (dual, plain, last) need at most four codes for each kind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    w, counter = random_world(), CompileCounter()
    w.model = MMDiT(BASE | {"num_layers": 8, "dual_attention_layers": [0, 1, 2]})
    w.model.requires_grad_(False).checkpointing = True
    w.adapter = new_adapter(w.model, 4)
    w.average = {name: v.detach().clone() for name, v in w.adapter.items()}
    for block in w.model.transformer_blocks:
        block.compile(backend=counter)
    compiled = []
    for _ in range(3):
        identity_loss(w.model, w.adapter, w.batch, w.ts).backward()
        step(w)[0].backward()
        compiled.append(counter.frame_count)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(set(compiled)) == 1 and 0 < compiled[0] <= 12, compiled


def test_muon_steps_along_the_nearest_orthogonal_matrix_as_torch_does():
    """The first step, where the momentum is the gradient: against an SVD, whose singular vectors
    the update must have with singular values near 1, and against torch.optim.Muon, to its bfloat16.
    The kernel of a convolution counts as a matrix."""
    shapes, rate = ((4, 12), (12, 4), (6, 2, 2, 2)), 0.01
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    before = [p.detach().clone() for p in ours]
    grads = [torch.randn(shape) for shape in shapes]
    for p, g in zip(ours, grads):
        p.grad = g.clone()
    Muon([{"params": ours}], lr=rate).step()
    for p, old, g in zip(ours, before, grads):
        g = g.flatten(1)
        update = ((old - p) / rate).detach().flatten(1) / (0.2 * max(g.shape) ** 0.5)
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        turned = u.T @ update @ vh.T
        assert (turned - turned.diag().diag()).abs().max() < 1e-3
        assert turned.diag().min() > 0.6 and turned.diag().max() < 1.25
    theirs = torch.nn.Parameter(before[0].clone())
    theirs.grad = grads[0].clone()
    options = {"weight_decay": 0.0, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    torch.optim.Muon([theirs], lr=rate, **options).step()
    moves = ours[0] - before[0], theirs - before[0]
    torch.testing.assert_close(*moves, rtol=0.05, atol=0.05 * rate)

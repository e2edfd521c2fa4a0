"""
One whole training step of GPT-2 by hand: the forward pass, keeping what the backward needs, then every gradient.

    layer norm     y = w xhat + b                      dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat))
    attention      P = softmax(Q K^T / sqrt(D))        dS = P (dP - rowsum(dP P)) / sqrt(D)
    GELU           h = z (1 + t) / 2, t = tanh(u)      dz = dh ((1 + t) / 2 + z (1 - t^2) u' / 2)
    cross-entropy  p = softmax(logits)                 dlogits = (p - onehot) / N

Every gradient of a GPT of three layers is compared with autograd's in float64.
"""

import math

import torch
import torch.nn.functional as F

from model import EPS, GPT, GPTConfig

SLOPE, CUBIC = math.sqrt(2 / math.pi), 0.044715


def layer_norm(x, w, b):
    mean = x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    xhat = (x - mean) * rstd
    return xhat * w + b, (xhat, rstd)


def forward(p, config, tokens):
    """Return the logits (B, T, V) and what `backward` needs. p: name -> parameter; tokens: (B, T) int64."""
    (B, T), C, H = tokens.shape, config.n_embd, config.n_head
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    x, kept = p["wte.weight"][tokens] + p["wpe.weight"][:T], []

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    for i in range(config.n_layer):
        a, norm1 = layer_norm(x, p[f"h.{i}.ln_1.weight"], p[f"h.{i}.ln_1.bias"])
        q, k, v = linear(a, f"h.{i}.attn.c_attn").view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        P = (q @ k.mT / math.sqrt(C // H)).masked_fill(future, -math.inf).softmax(-1)
        o = (P @ v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(o, f"h.{i}.attn.c_proj")
        m, norm2 = layer_norm(x, p[f"h.{i}.ln_2.weight"], p[f"h.{i}.ln_2.bias"])
        z = linear(m, f"h.{i}.mlp.c_fc")
        t = (SLOPE * (z + CUBIC * z**3)).tanh()
        h = z * (1 + t) / 2
        x = x + linear(h, f"h.{i}.mlp.c_proj")
        kept.append((a, norm1, q, k, v, P, o, m, norm2, z, t, h))
    last, norm = layer_norm(x, p["ln_f.weight"], p["ln_f.bias"])
    return last @ p["wte.weight"][: config.vocab_size].T, (kept, last, norm)


def backward(p, config, tokens, dlogits, saved):
    """Return the gradients, name -> tensor. dlogits: (B, T, V), the loss's derivative by the logits."""
    (B, T), C, H, V = tokens.shape, config.n_embd, config.n_head, config.vocab_size
    (kept, last, norm), g = saved, {name: torch.zeros_like(w) for name, w in p.items()}

    def linear(dy, x, name):  # y = x w^T + b
        g[f"{name}.weight"], g[f"{name}.bias"] = dy.flatten(0, 1).T @ x.flatten(0, 1), dy.sum((0, 1))
        return dy @ p[f"{name}.weight"]

    def layer_norm(dy, saved, name):
        (xhat, rstd), dxhat = saved, dy * p[f"{name}.weight"]
        g[f"{name}.weight"], g[f"{name}.bias"] = (dy * xhat).sum((0, 1)), dy.sum((0, 1))
        return rstd * (dxhat - dxhat.mean(-1, keepdim=True) - xhat * (dxhat * xhat).mean(-1, keepdim=True))

    g["wte.weight"][:V] = dlogits.flatten(0, 1).T @ last.flatten(0, 1)  # as the head
    dx = layer_norm(dlogits @ p["wte.weight"][:V], norm, "ln_f")
    for i in reversed(range(config.n_layer)):
        a, norm1, q, k, v, P, o, m, norm2, z, t, h = kept[i]
        dh = linear(dx, h, f"h.{i}.mlp.c_proj")
        dz = dh * ((1 + t) / 2 + z * (1 - t**2) * SLOPE * (1 + 3 * CUBIC * z**2) / 2)
        dx = dx + layer_norm(linear(dz, m, f"h.{i}.mlp.c_fc"), norm2, f"h.{i}.ln_2")
        dO = linear(dx, o, f"h.{i}.attn.c_proj").view(B, T, H, C // H).transpose(1, 2)
        dP, dv = dO @ v.mT, P.mT @ dO
        dS = P * (dP - (dP * P).sum(-1, keepdim=True)) / math.sqrt(C // H)
        dqkv = torch.stack((dS @ k, dS.mT @ q, dv)).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * C)
        dx = dx + layer_norm(linear(dqkv, a, f"h.{i}.attn.c_attn"), norm1, f"h.{i}.ln_1")
    g["wpe.weight"][:T] = dx.sum(0)
    g["wte.weight"].index_add_(0, tokens.flatten(), dx.flatten(0, 1))  # as the embedding
    return g


def test_every_gradient_of_a_gpt_is_the_one_computed_by_hand():
    torch.manual_seed(0)
    config = GPTConfig(n_layer=3, n_head=4, n_embd=32, block_size=24, vocab_size=61)
    model = GPT(config).double()
    for w in model.parameters():
        w.data += 0.05 * torch.randn_like(w)  # zeros and ones would hide a mistake
    tokens, targets = torch.randint(config.vocab_size, (2, 5, 20))
    p = {name.removeprefix("transformer."): w.detach() for name, w in model.named_parameters()}

    logits, saved = forward(p, config, tokens)
    loss = -logits.log_softmax(-1).gather(2, targets[..., None]).mean()
    dlogits = (logits.softmax(-1) - F.one_hot(targets, config.vocab_size)) / targets.numel()
    gradients = backward(p, config, tokens, dlogits, saved)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    expected.backward()

    assert abs(loss - expected) < 1e-14
    assert dlogits.sum(-1).abs().max() < 1e-15
    for name, w in model.named_parameters():
        error = (gradients[name.removeprefix("transformer.")] - w.grad).norm() / w.grad.norm()
        assert error < 1e-12, f"{name}: {error}"

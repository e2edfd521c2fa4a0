"""
GPT-2, the model: embeddings, blocks of attention and MLP, output head tied to the token embedding.

The forward pass, for B sequences, T tokens, C channels and a vocabulary of V tokens:

    residual = wte[token] + wpe[position]                         (B, T, C)   the residual stream
    in every block:  residual += attention(ln_1(residual))
                     residual += mlp(ln_2(residual))
    logits = ln_f(residual) @ wte.T                               (B, T, V)

Parameters have the names of Hugging Face's GPT-2. Operations that have a Triton version come from
`ops`, a bundle that kernels.select() fills with Triton or PyTorch functions.
Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, and OpenAI's
released weights.
"""

import dataclasses
import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.embedding import embedding

EPS = 1e-5  # of every LayerNorm: fixed by GPT-2, so not an option
INIT_STD = 0.02  # of random weights


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Raise ValueError, naming the option to change, if it is impossible."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # channels, C
    block_size: int = 1024  # longest sequence, in tokens
    vocab_size: int = 50257
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
                raise ValueError(f"{flag} is {value}, but must be at least 1")
        if self.n_layer < 0:
            raise ValueError(f"--n-layer is {self.n_layer}, but cannot be negative")
        if self.n_embd % self.n_head:
            multiple = self.n_head * max(1, round(self.n_embd / self.n_head))
            wrong = f"--n-embd {self.n_embd} is not divisible by --n-head {self.n_head}"
            raise ValueError(f"{wrong}: use a multiple, such as {multiple}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--dropout is {self.dropout}, but must be at least 0 and below 1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of wte. Those past vocab_size are zero; softmax, loss and sampling exclude them."""
        return math.ceil(self.vocab_size / kernels.VOCAB_MULTIPLE) * kernels.VOCAB_MULTIPLE


# ----------------------------------------------------------------------------------------- blocks


class KVCache:
    """KV cache of one attention layer: (B, block_size, 2C), of which `length` tokens are filled."""

    def __init__(self, block_size: int):
        self.block_size, self.length, self.kv = block_size, 0, None

    def append(self, qkv: Tensor) -> int:
        """Append the keys and values of qkv (B, T, 3C). Return the new length."""
        B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        if self.kv is None:
            self.kv = qkv.new_empty(B, self.block_size, 2 * C)
        self.kv[:, self.length : self.length + T] = qkv[..., C:]
        self.length += T
        return self.length

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """Attend from the newest T tokens to the cache. qkv: (B, T, 3C). Return (B, T, C)."""
        B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q = qkv[..., :C].view(B, T, n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k, v = self.kv[:, : self.length].view(B, self.length, 2, n_head, -1).permute(2, 0, 3, 1, 4)
        mask = qkv.new_ones(T, self.length, dtype=torch.bool).tril(self.length - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if T == 1 else mask)
        return y.transpose(1, 2).reshape(B, T, C)


class LayerNorm(nn.Module):
    """Fused residual add + LayerNorm: one pass over memory."""

    def __init__(self, config: GPTConfig, ops: kernels.Ops):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, residual: (B, T, C). Return (norm, x + residual); if residual is None, (norm, x)."""
        if residual is None:
            return self.ops.layer_norm(x, self.weight, self.bias, EPS), x
        return self.ops.add_layer_norm(x, residual, self.weight, self.bias, EPS)


class Attention(nn.Module):
    """Causal self-attention with n_head heads."""

    def __init__(self, config: GPTConfig, ops: kernels.Ops):
        super().__init__()
        self.ops, self.n_head, self.dropout = ops, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        """x: (B, T, C). Return (B, T, C). x also attends to the earlier tokens in the cache."""
        bias = self.c_attn.bias  # whose gradient causal_attention computes
        qkv = F.linear(x, self.c_attn.weight, bias.detach())
        if cache is None or cache.append(qkv) == qkv.shape[1]:  # no earlier tokens
            dropout = self.dropout if self.training else 0.0
            y = self.ops.causal_attention(qkv, self.n_head, dropout, bias)
        else:
            y = cache.attend(qkv, self.n_head)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Feed-forward layer: hidden width 4C, GELU in its tanh form."""

    def __init__(self, config: GPTConfig, ops: kernels.Ops):
        super().__init__()
        self.ops, self.dropout = ops, config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Return (B, T, C)."""
        x = self.ops.linear_gelu(x, self.c_fc.weight, self.c_fc.bias)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """One pre-norm layer. The MLP output is returned un-added; the next LayerNorm fuses the add."""

    def __init__(self, config: GPTConfig, ops: kernels.Ops):
        super().__init__()
        self.ln_1 = LayerNorm(config, ops)
        self.attn = Attention(config, ops)
        self.ln_2 = LayerNorm(config, ops)
        self.mlp = MLP(config, ops)

    def forward(self, x: Tensor, residual: Tensor | None, cache: KVCache | None):
        """x, residual: (B, T, C), un-added output and stream. Return both for the next block."""
        h, residual = self.ln_1(x, residual)
        h, residual = self.ln_2(self.attn(h, cache), residual)
        return self.mlp(h), residual


# ------------------------------------------------------------------------------------------ model


class GPT(nn.Module):
    """GPT-2 of any size. On the meta device it counts parameters and FLOPs, without memory."""

    def __init__(self, config: GPTConfig, ops: kernels.Ops | None = None):  # None: PyTorch's
        super().__init__()
        self.config, self.ops = config, ops or kernels.select("none")
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config, self.ops) for _ in range(config.n_layer))
        self.transformer.ln_f = LayerNorm(config, self.ops)
        self._initialize()

    @torch.no_grad()
    def _initialize(self):
        """Draw N(0, INIT_STD), c_proj scaled by 1 / sqrt(2 n_layer); zero biases and padding."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(std=INIT_STD / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(std=INIT_STD)
            elif not name.endswith("weight"):
                parameter.zero_()
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    @torch.no_grad()
    def zero_projections(self):
        """Set both c_proj of every block to 0: each block starts as the identity."""
        for name, parameter in self.named_parameters():
            if ".c_proj." in name:
                parameter.zero_()

    def hidden(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """tokens: (B, T) int64, which follow the cached ones. Return ln_f's output, (B, T, C)."""
        start = caches[0].length if caches else 0
        end, block_size = start + tokens.shape[1], self.config.block_size
        if end > block_size:
            raise ValueError(f"{end} tokens do not fit a block size of {block_size}")
        x = embedding(self.transformer.wte.weight, tokens) + self.transformer.wpe.weight[start:end]
        x, residual = F.dropout(x, self.config.dropout, self.training), None
        for layer, block in enumerate(self.transformer.h):
            x, residual = block(x, residual, caches[layer] if caches else None)
        return self.transformer.ln_f(x, residual)[0]

    def forward(self, tokens: Tensor, targets: Tensor | None = None, return_logits: bool = False):
        """
        Return the logits (B, T, V); with targets the loss; with return_logits (loss, logits).

        tokens, targets: (B, T) int64; targets of -100 are ignored
        loss: scalar mean, nats per token; the Triton version never holds all logits at once
        Raise ValueError if T exceeds block_size.
        """
        x, V, weight = self.hidden(tokens), self.config.vocab_size, self.transformer.wte.weight
        if targets is not None and not return_logits:
            return self.ops.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), V)
        logits = F.linear(x, weight)
        if targets is None:
            return logits[..., :V]
        return self.ops.cross_entropy(logits.flatten(0, 1), targets.flatten(), V), logits[..., :V]

    def parameter_count(self) -> int:
        """Count parameters as published: the tied head once, wte's padding rows not at all."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self) -> int:
        """Return training FLOPs per token as PaLM, appendix B: 6 (parameters - wpe) + 12 L C T."""
        c = self.config
        matmul_parameters = self.parameter_count() - self.transformer.wpe.weight.numel()
        return 6 * matmul_parameters + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.no_grad()
    def generate_stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop_token: int | None = None,
        use_cache: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Sample a token per sequence and step; yield tokens (B,) int64 and log-probabilities (B,).

        tokens:      (B, T) int64, T >= 1; the last block_size of them are the context
        temperature: divides the logits; 0 takes the most likely token
        top_k, top_p: sample among the k most likely tokens, or the fewest that sum to p
        generator:   source of randomness; torch's default if None
        stop_token:  ends a sequence, which then repeats it; when all have ended, the stream ends
        use_cache:   keep a KV cache, so a step computes one token; the same up to rounding. Past
                     block_size the window slides, and every step computes all of it

        Log-probabilities, in nats, are the model's own: before temperature, top_k and top_p.
        """
        block_size = self.config.block_size
        caches = [KVCache(block_size) for _ in self.transformer.h] if use_cache else []
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            if caches and tokens.shape[1] <= block_size:
                x = self.hidden(tokens[:, caches[0].length :], caches)
            else:
                x = self.hidden(tokens[:, -block_size:])
            logits = F.linear(x[:, -1], self.transformer.wte.weight)[:, : self.config.vocab_size]
            token = sample(logits.float(), temperature, top_k, top_p, generator)
            if stop_token is not None:
                token[ended] = stop_token
                ended |= token == stop_token
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            yield token, logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0]
            if stop_token is not None and ended.all():
                return

    def generate(self, tokens: Tensor, max_new_tokens: int, **options) -> Tensor:
        """Return tokens (B, T) and those sampled after them, (B, T + n); see generate_stream."""
        steps = self.generate_stream(tokens, max_new_tokens, **options)
        return torch.cat([tokens, *(token[:, None] for token, _ in steps)], dim=1)


def sample(logits: Tensor, temperature=1.0, top_k=None, top_p=None, generator=None) -> Tensor:
    """Return a token for each row of logits (B, V), float32: (B,) int64; see generate_stream."""
    if temperature < 1e-6:  # 0, or so small that dividing by it would overflow
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is None and top_p is None:  # no need to sort
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        logits[:, top_k:] = float("-inf")
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:  # a token stays if the more likely ones sum to less than p
        more_likely = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(more_likely >= top_p, 0.0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, choice)[:, 0]


def start_tokens(tokenizer) -> list[int]:
    """Token ids that start a document: <|endoftext|> if there is one, else newline, else id 0."""
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    return [next((i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\n"), 0)]


def sample_text(model: GPT, tokenizer, length: int, seed: int) -> str:
    """Return a text of `length` tokens from the start of a document; the seed decides it."""
    device, training = model.transformer.wte.weight.device, model.training
    start = torch.tensor([start_tokens(tokenizer)], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    tokens = model.eval().generate(start, length, temperature=0.8, generator=generator)
    model.train(training)
    return tokenizer.decode(tokens[0, 1:].tolist())


def main(arguments: list[str] | None = None) -> None:
    """Run sample.py, which writes text with a trained model, after a line that names it."""
    print("note: python sample.py writes text; model.py only defines the model", file=sys.stderr)
    script = str(Path(__file__).with_name("sample.py"))
    sys.argv[:] = [script, *(sys.argv[1:] if arguments is None else arguments)]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

"""
GPT-2, the model: embeddings, blocks of attention and feed-forward, output head tied to the token embedding.

Tokens meet the parts in this order (B sequences, T tokens, C channels, V vocabulary):

    residual = wte[token] + wpe[position]                         (B, T, C)   the residual stream
    in every block:  residual += attention(ln_1(residual))
                     residual += mlp(ln_2(residual))
    logits = ln_f(residual) @ wte.T                               (B, T, V)

Parameters carry the names of Hugging Face's GPT-2. The arithmetic between the matrix products comes in a bundle of
functions, `ops`, which kernels.select() fills with Triton or PyTorch versions.
Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, and OpenAI's released weights.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

EPS = 1e-5  # of every layer norm: part of GPT-2, so not an option
VOCAB_MULTIPLE = 128  # rows of wte are padded to it: tensor cores and 128-bit loads want even shapes


# ------------------------------------------------------------------------------------------------------ configuration


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Raises ValueError, in the words of the command line, for a shape that cannot be."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # channels, C
    block_size: int = 1024  # tokens a sequence can hold
    vocab_size: int = 50257
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be at least 1")
        if self.n_layer < 0:
            raise ValueError(f"--n-layer is {self.n_layer}, but cannot be negative")
        if self.n_embd % self.n_head:
            raise ValueError(f"--n-embd {self.n_embd} is not divisible by --n-head {self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--dropout is {self.dropout}, but must be at least 0 and below 1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of wte in memory; those past vocab_size stay out of softmax, loss and sampling."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# ------------------------------------------------------------------------------------------------------------- blocks


class LayerNorm(nn.Module):
    """Adds a branch to the residual stream, then normalises the sum: the two belong to one pass over memory."""

    def __init__(self, config: GPTConfig, ops: kernels.Ops):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, residual: (B, T, C); residual None at the start. Returns the normalised sum, and the sum itself."""
        if residual is None:
            return self.ops.layer_norm(x, self.weight, self.bias, EPS), x
        return self.ops.add_layer_norm(x, residual, self.weight, self.bias, EPS)


class Attention(nn.Module):
    """Causal self-attention with n_head heads."""

    def __init__(self, config: GPTConfig, ops: kernels.Ops):
        super().__init__()
        self.ops, self.n_head, self.dropout = ops, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: "KVCache | None") -> Tensor:
        """x: (B, T, C). Returns (B, T, C). A cache that holds earlier tokens lends their keys and values."""
        qkv = self.c_attn(x)
        if cache is None or cache.append(qkv) == qkv.shape[1]:  # no earlier tokens: plain causal attention
            y = self.ops.causal_attention(qkv, self.n_head, self.dropout if self.training else 0.0)
        else:
            y = cache.attend(qkv, self.n_head)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward layer: four times as wide inside, with GELU in its tanh form."""

    def __init__(self, config: GPTConfig, ops: kernels.Ops):
        super().__init__()
        self.ops, self.dropout = ops, config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        x = self.ops.linear_gelu(x, self.c_fc.weight, self.c_fc.bias)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """One layer, pre-norm. It hands on its last branch unadded, for the next layer norm to add."""

    def __init__(self, config: GPTConfig, ops: kernels.Ops):
        super().__init__()
        self.ln_1 = LayerNorm(config, ops)
        self.attn = Attention(config, ops)
        self.ln_2 = LayerNorm(config, ops)
        self.mlp = MLP(config, ops)

    def forward(self, x: Tensor, residual: Tensor | None, cache: "KVCache | None") -> tuple[Tensor, Tensor]:
        """x: the branch before, residual: the stream it belongs to, both (B, T, C). Returns the same pair, one on."""
        h, residual = self.ln_1(x, residual)
        h, residual = self.ln_2(self.attn(h, cache), residual)
        return self.mlp(h), residual


class KVCache:
    """Keys and values of the tokens that one attention layer has seen: (B, block_size, 2C), filled from the front."""

    def __init__(self, block_size: int):
        self.block_size, self.length, self.kv = block_size, 0, None

    def append(self, qkv: Tensor) -> int:
        """Keep the keys and values of qkv (B, T, 3C). Returns how many tokens are held now."""
        B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        if self.kv is None:
            self.kv = qkv.new_empty(B, self.block_size, 2 * C)
        self.kv[:, self.length : self.length + T] = qkv[..., C:]
        self.length += T
        return self.length

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """Attention of the newest T tokens over all that is held. qkv: (B, T, 3C). Returns (B, T, C)."""
        B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q = qkv[..., :C].view(B, T, n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k, v = self.kv[:, : self.length].view(B, self.length, 2, n_head, -1).permute(2, 0, 3, 1, 4)
        past_or_self = torch.ones(T, self.length, dtype=torch.bool, device=qkv.device).tril(self.length - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if T == 1 else past_or_self)
        return y.transpose(1, 2).reshape(B, T, C)


# -------------------------------------------------------------------------------------------------------------- model


class GPT(nn.Module):
    """GPT-2 of any size; ops are PyTorch's unless kernels.select() gave others."""

    def __init__(self, config: GPTConfig, ops: kernels.Ops | None = None):
        super().__init__()
        self.config, self.ops = config, ops or kernels.select("none")
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config, self.ops) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config, self.ops),
            }
        )
        self._initialise()

    @torch.no_grad()
    def _initialise(self):
        """N(0, 0.02), biases 0; projections into the residual stream scaled by 1 / sqrt(2 n_layer), as they add up."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(std=0.02)
            elif not name.endswith("weight"):
                parameter.zero_()
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    @torch.no_grad()
    def zero_projections(self):
        """Set both c_proj of every block to 0: each block starts as the identity."""
        for name, parameter in self.named_parameters():
            if ".c_proj." in name:
                parameter.zero_()

    def hidden(self, tokens: Tensor, caches: "list[KVCache] | None" = None) -> Tensor:
        """tokens: (B, T) int64. Returns ln_f's output (B, T, C). With caches, tokens continue what those hold."""
        start = caches[0].length if caches else 0
        if start + tokens.shape[1] > self.config.block_size:
            raise ValueError(f"{start + tokens.shape[1]} tokens do not fit a block size of {self.config.block_size}")
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)
        x, residual = F.dropout(x, self.config.dropout, self.training), None
        for layer, block in enumerate(self.transformer.h):
            x, residual = block(x, residual, caches[layer] if caches else None)
        return self.transformer.ln_f(x, residual)[0]

    def forward(self, tokens: Tensor, targets: Tensor | None = None, return_logits: bool = False):
        """
        The logits, or the loss, or both.

        tokens, targets: (B, T) int64; a target of -100 is left out of the loss
        Returns logits (B, T, V) without targets; with them the mean loss, a scalar in nats per token, for which the
        Triton version keeps no logits; with return_logits (loss, logits). ValueError when T exceeds block_size.
        """
        x, V = self.hidden(tokens), self.config.vocab_size
        if targets is not None and not return_logits:
            return self.ops.linear_cross_entropy(x.flatten(0, 1), self.transformer.wte.weight, targets.flatten(), V)
        logits = F.linear(x, self.transformer.wte.weight)
        if targets is None:
            return logits[..., :V]
        return self.ops.cross_entropy(logits.flatten(0, 1), targets.flatten(), V), logits[..., :V]

    def parameter_count(self) -> int:
        """Parameters as published: the tied head counted once, the padding of the vocabulary not at all."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self) -> int:
        """Of training, PaLM's way (its appendix B): 6 for each parameter but positions, 12 L C T for attention."""
        c = self.config
        matmul_parameters = self.parameter_count() - self.transformer.wpe.weight.numel()
        return 6 * matmul_parameters + 12 * c.n_layer * c.n_embd * c.block_size

    # ------------------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def generate_stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """
        Sample one token a step for every sequence, yielding each as a (B,) int64 tensor.

        tokens:      (B, T) int64, T >= 1; the last block_size of them are the context
        temperature: 0 takes the most likely token; above, it divides the logits
        top_k:       sample among the k most likely; top_p: among the fewest whose probabilities reach p
        generator:   source of the randomness; torch's own when None
        use_cache:   keep keys and values, so that a step costs one token; results change by rounding at most. Past
                     block_size the window slides, every position changes, and a step computes the whole window
        """
        block_size = self.config.block_size
        caches = [KVCache(block_size) for _ in self.transformer.h] if use_cache else []
        for _ in range(max_new_tokens):
            if caches and tokens.shape[1] <= block_size:
                x = self.hidden(tokens[:, caches[0].length :], caches)
            else:
                x = self.hidden(tokens[:, -block_size:])
            logits = F.linear(x[:, -1], self.transformer.wte.weight)[:, : self.config.vocab_size]
            token = sample(logits.float(), temperature, top_k, top_p, generator)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            yield token

    def generate(self, tokens: Tensor, max_new_tokens: int, **options) -> Tensor:
        """tokens: (B, T) int64. Returns them with max_new_tokens more, (B, T + max_new_tokens). Options: see stream."""
        new = [token[:, None] for token in self.generate_stream(tokens, max_new_tokens, **options)]
        return torch.cat([tokens, *new], dim=1)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token for every row of logits (B, V), float32. Returns (B,) int64. See GPT.stream for the rest."""
    if temperature < 1e-6:  # 0, or so small that dividing by it would overflow
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is None and top_p is None:  # no need to sort
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        logits[:, top_k:] = float("-inf")
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        ahead = probabilities.cumsum(dim=-1) - probabilities  # a token stays while those ahead of it sum to less than p
        probabilities = probabilities.masked_fill(ahead >= top_p, 0.0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, choice)[:, 0]


def start_tokens(tokenizer) -> list[int]:
    """What stands before the first token of a text: end-of-text, else a line break, else the first token there is."""
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    return [next((i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\n"), 0)]


def sample_text(model: GPT, tokenizer, length: int, seed: int) -> str:
    """A text of `length` tokens that begins as a document does; for the same weights and seed the same."""
    device = model.transformer.wte.weight.device
    start = torch.tensor([start_tokens(tokenizer)], device=device)
    training = model.training
    model.eval()
    ids = model.generate(start, length, temperature=0.8, generator=torch.Generator(device).manual_seed(seed))
    model.train(training)
    return tokenizer.decode(ids[0, start.shape[1] :].tolist())

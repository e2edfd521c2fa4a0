"""
The losses that a run should have: at its first step, and after so many tokens, a band in loss.png. Off them, it warns.

A run that is off by 0.15 nats still looks fine on a plot, so the band shows runs that ended well:

    GPT-2 (124M) on FineWeb      llm.c's run of 10.3B tokens, validated every 250 steps of 524,288 tokens:
                                 https://github.com/KellerJordan/modded-nanogpt, records/track_1_short/2024-10-13_llmc
    the same on FineWeb-Edu      the same curve, 0.21 lower: runs that end at 3.27 to 3.285 on FineWeb end at 3.03 to
                                 3.09 on FineWeb-Edu; the shift is inferred from the ends alone
    the laptop preset on pydocs  the preset itself, two threads, bfloat16
    shakespeare-char             the preset itself, one and two threads, bfloat16

A larger GPT-2 has the same band: it should leave it downwards.
"""

import bisect
import dataclasses
import math

from data.shards import Split
from model import INIT_STD, GPTConfig

FINEWEB = [
    (524e6, 4.317), (786e6, 4.006), (1.05e9, 3.859), (1.31e9, 3.765), (1.57e9, 3.697), (2.1e9, 3.618), (2.62e9, 3.554),
    (3.93e9, 3.457), (5.24e9, 3.392), (6.55e9, 3.341), (7.86e9, 3.300), (9.18e9, 3.277), (10.26e9, 3.272),
]  # fmt: skip
LAPTOP = [
    (204_800, 2.583), (409_600, 2.048), (614_400, 1.818), (819_200, 1.709), (1_024_000, 1.603), (1_228_800, 1.490),
    (1_433_600, 1.426),
]  # fmt: skip
SHAKESPEARE = [
    (1.638e6, 2.124), (3.277e6, 1.803), (4.915e6, 1.673), (6.554e6, 1.603), (8.192e6, 1.559), (9.83e6, 1.506),
    (11.47e6, 1.472), (13.11e6, 1.464), (14.75e6, 1.443), (16.38e6, 1.440),
]  # fmt: skip
# the tokenizer's type, and the least layers and channels
GPT2, SMALL, CHARACTERS = ("gpt2", 12, 768), ("char", 4, 128), ("char", 6, 384)
SHARDS = {  # the first validation shard, FOLDER/FILE or FILE of a ready-made .bin -> model, curve, nats to add to it
    "fineweb_val_000000.bin": (GPT2, FINEWEB, 0.0),
    "finewebedu_val_000000.bin": (GPT2, FINEWEB, -0.21),
    "fineweb-edu-10B/val_00000_000.npy": (GPT2, FINEWEB, -0.21),
    "pydocs/val_000000.npy": (SMALL, LAPTOP, 0.0),
    "shakespeare-char/val_000000.npy": (CHARACTERS, SHAKESPEARE, 0.0),
}
FIRST_MARGIN = 0.5  # nats per token on both sides of the first loss
MARGIN = 0.1  # nats per token on both sides: seeds differ by less, other batch sizes and schedules by about as much


def first_losses(shape: GPTConfig, identity: bool) -> tuple[float, float]:
    """
    Return the least and the largest loss, in nats per token, that random weights should have.

    By default every token is equally likely. With `identity`, when no block changes the residual stream (--zero-init,
    --n-layer 0), ln_f sees a sum of two embeddings, wte's and wpe's: C channels of variance 2 INIT_STD^2. The tied head
    therefore gives a position's own token a logit of C INIT_STD / sqrt(2), 10.9 for 768 channels, and all others logits
    of variance C INIT_STD^2. Dropout p scales the first by sqrt(1 - p). The loss is lower on text that repeats its
    tokens: up to a third of them, as in the characters of indented code.
    """
    loss, own = math.log(shape.vocab_size), 0.0
    if identity:
        own = shape.n_embd * INIT_STD * math.sqrt((1 - shape.dropout) / 2)
        others = loss + shape.n_embd * INIT_STD**2 / 2
        loss = max(own, others) + math.log1p(math.exp(-abs(own - others)))  # ln(e^own + e^others), which may overflow
    return loss - own / 3 - FIRST_MARGIN, loss + FIRST_MARGIN


@dataclasses.dataclass(frozen=True)
class Expected:
    """Points (tokens, validation loss in nats per token) of runs that ended well."""

    points: list[tuple[float, float]]

    def loss(self, tokens: float) -> float | None:
        """Return the loss after so many tokens, interpolated; None before the first, the last after the last."""
        place = bisect.bisect(self.points, (tokens, float("inf")))
        if place == 0 or place == len(self.points):
            return self.points[-1][1] if place else None
        (t0, high), (t1, low) = self.points[place - 1 : place + 1]
        return high + (low - high) * (tokens - t0) / (t1 - t0)

    def warning(self, tokens: int, loss: float) -> str:
        """Return what to say about a validation loss; "" unless it is above the band."""
        expected = self.loss(tokens)
        if expected is None or loss <= expected + MARGIN:
            return ""
        band = f"{expected - MARGIN:.2f} to {expected + MARGIN:.2f}"
        return (
            f"validation {loss:.2f} after {tokens:.3g} tokens: runs that end at {self.points[-1][1]:.2f} have {band} "
            "there; compare --lr, --batch-tokens and the data with the preset's"
        )


def expected_losses(split: Split, shape: GPTConfig) -> Expected | None:
    """Return what a run should have on a validation split, None if nothing is known for its text or shape."""
    first = split.shards[0].path
    name = first.name if first.suffix == ".bin" else f"{first.parent.name}/{first.name}"
    if name not in SHARDS:
        return None
    (tokenizer, n_layer, n_embd), curve, shift = SHARDS[name]
    if split.tokenizer_spec["type"] != tokenizer or shape.n_layer < n_layer or shape.n_embd < n_embd:
        return None
    return Expected([(tokens, loss + shift) for tokens, loss in curve])

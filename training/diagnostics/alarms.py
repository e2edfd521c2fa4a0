"""What looks wrong in a diagnosis: a sentence for every kind of trouble, and the limits that it is told by."""

import math

# matrices: name in a record -> place in a block
KINDS = {"c_attn": "attn.c_attn", "attn.c_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp.c_proj": "mlp.c_proj"}
USUAL_UPDATE = -3.0  # log10 of update / weight: Karpathy's rule of thumb for a step at the peak learning rate
SMALL_UPDATE = -4.5  # 30 times less
LARGE_UPDATE = -0.3  # half of the weight per step: what was learned before is gone
PEAK_UPDATE = 0.5  # extrapolated to the peak of the schedule: weights grow until then, but not by so much
GRADIENT_SPREAD = 1000.0  # between layers, for the same kind of matrix
MANY_DEAD = 0.5  # fraction of a layer's GELU inputs; a dead unit passes almost no gradient
MANY_FOCUSED = 0.9  # entropy collapse: Zhai et al. 2023, https://arxiv.org/abs/2303.06296
GROWTH = 30.0  # of the residual stream in half a layer; the first MLP of the laptop preset reaches 8
UNTRAINED_GROWTH = 6.0  # the same before anything is learned, so from the initialization; six layers as wide as XL: 4.9
UNTRAINED = 0.9  # entropy of the predictions, as a fraction of ln V, before anything is learned
GUESSING = 0.5  # nats by which the loss may exceed ln V, a uniform guess; fresh and as wide as GPT-2 XL: 0.4
OVERCONFIDENT = 1.0  # nats by which the loss may exceed the entropy; a calibrated model has them equal
LATE_LOSS = 1.0  # nats by which the last bin of positions may be worse than the one before


def find_warnings(found: dict, vocab_size: int) -> dict[str, str]:
    """Return what looks wrong in a record, the dict "diagnostics" of a step: kind -> sentence."""
    texts = {
        "updates": _check_updates(found["update_ratio"], found["schedule"]),
        "gradients": _check_gradients(found["gradient_std"]),
        "gelu": _check_fractions(found.get("gelu_dead"), MANY_DEAD, "GELU inputs are on the dead side"),
        "attention": _check_fractions(found.get("attention_focused"), MANY_FOCUSED, "queries look at one key"),
    }
    losses, loss, entropy, residual = (found[name] for name in ("loss_by_position", "loss", "entropy", "residual"))
    guess = math.log(vocab_size)
    if None in (found["logit_std"], entropy, *residual):
        texts["not_finite"] = "activations or predictions are not finite: the weights are lost"
    if None not in (entropy, *residual):
        texts["residual"] = _check_growth(residual, untrained=entropy > UNTRAINED * guess)
    if None not in (loss, entropy, *losses):
        # --zero-init: before the first step no block adds anything, and a position predicts its own token
        untouched = len(residual) > 1 and len(set(residual)) == 1
        if loss > guess + GUESSING and not untouched:
            texts["guessing"] = f"the loss, {loss:.2f}, is worse than a random guess, {guess:.2f}"
        if loss > entropy + OVERCONFIDENT and not untouched:
            texts["confidence"] = f"predictions are confident and wrong: loss {loss:.2f}, entropy {entropy:.2f}"
        if len(losses) > 1 and losses[-1] > losses[-2] + LATE_LOSS:
            texts["position"] = f"loss {losses[-1]:.2f} at the end of a block, {losses[-2]:.2f} before: context harms"
    return {kind: sentence for kind, sentence in texts.items() if sentence}


def _check_updates(ratios: dict[str, list], schedule: float | None) -> str:
    places = [(x, kind, i) for kind, layers in ratios.items() for i, x in enumerate(layers) if x is not None]
    if not places or not schedule:
        return ""
    (low, *lowest), (high, *highest) = min(places), max(places)
    if high > LARGE_UPDATE:
        return f"{_place(*highest)} changes by {10**high:.0%} of its size in one step: the learning rate is too high"
    peak, *highest = max((place for place in places if place[1] in KINDS), default=places[0])
    peak, low = peak - math.log10(schedule), low - math.log10(schedule)
    if peak > PEAK_UPDATE:
        change = f"would change by {10**peak:.0%} of its size in one step"
        return f"at the peak of the schedule {_place(*highest)} {change}: the learning rate is too high"
    if low < SMALL_UPDATE:
        return f"the updates of {_place(*lowest)} are {10 ** (USUAL_UPDATE - low):,.0f} times smaller than usual"
    return ""


def _check_gradients(stds: dict[str, list]) -> str:
    for kind, layers in stds.items():
        if 0 in layers and any(layers):  # none at all, in no layer: the first step under --zero-init
            return f"{_place(kind, layers.index(0))} gets no gradient at all"
        if layers and None not in layers and (most := max(layers)) > GRADIENT_SPREAD * (least := min(layers)):
            times = f"{most / least:,.0f} times larger than in layer {layers.index(least)}"
            return f"the gradient of {_place(kind, layers.index(most))} is {times}: gradients vanish or explode"
    return ""


def _check_fractions(fractions: list | None, limit: float, what: str) -> str:
    high = {layer: fraction for layer, fraction in enumerate(fractions or []) if (fraction or 0.0) > limit}
    worst = max(high, key=high.get, default=None)
    return f"{high[worst]:.0%} of layer {worst}'s {what} ({len(high)} of {len(fractions)} layers)" if high else ""


def _check_growth(residual: list, untrained: bool) -> str:
    growths = [after / before if before else 0.0 for before, after in zip(residual, residual[1:], strict=False)]
    worst = max(growths, default=0.0)
    if worst <= (UNTRAINED_GROWTH if untrained else GROWTH):
        return ""
    layer, second = divmod(growths.index(worst), 2)
    hint = "initialize c_proj smaller" if untrained else "what came before is drowned out"
    branch = "MLP" if second else "attention"
    return f"layer {layer}'s {branch} makes the residual stream {worst:.0f} times larger: {hint}"


def _place(kind: str, layer: int) -> str:
    return f"layer {layer}'s {kind}" if kind in KINDS else kind

"""
Diagnostics (train_gpt2.py --diagnose N): what happens inside a GPT while it trains, and what looks wrong.

A diagnosed step adds a dict "diagnostics" to its line in log.jsonl. Its lists have one entry per layer, h.0 first, null
for anything not finite; RMS is the root of the mean square:

    update_ratio         log10 of RMS(update) / RMS(weight) per kind of matrix; the update is the step's total change
    gradient_ratio       log10 of RMS(gradient) / RMS(weight); gradients as the optimizer sees them, clipped
    gradient_mean, _std  of the same gradients
    gelu_mean, _std      of the GELU's output; gelu_dead: fraction of its inputs below -3, whose slope is under 0.012;
                         gelu_dead_units: fraction of its units for which all inputs are
    attention_mean, _std of what attention adds to the residual stream
    attention_entropy    of the attention weights, as a fraction of the maximum ln(keys); mean over heads and queries
    attention_focused    fraction of (head, query) pairs with an entropy under 0.1 nats: all weight on one key
    residual             RMS of the residual stream before every ln_1 and ln_2 and before ln_f: the median over tokens
    logit_std, entropy   of the predictions: spread over the vocabulary, and nats; means over tokens
    loss                 nats per token, of the same predictions
    loss_by_position     the same at positions 0, 1, 2-3, 4-7, 8-15, ...
    histograms           see distributions.py
    schedule             the learning rate as a fraction of its peak
    ms                   what the diagnosis cost
    warnings             kind -> sentence, see alarms.py

Activations come from an extra forward pass before the step, over a few sequences of its batch, in the plain model;
gradients and updates from hooks around the optimizers' step. Steps that are not diagnosed run none of this code.
Source of the update-to-weight ratio and of such pictures: A. Karpathy, "Building makemore part 3", 2022.
"""

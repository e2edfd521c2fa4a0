"""Describe a run before its first step: what will happen, how long it takes, on which device."""

import torch

from data.corpora import dataset_dir
from data.files import as_flag
from kernels import FAMILIES, MODULES, Ops
from training import devices

REACHED = 0.9  # fraction of the speed of float32 products that a step reaches on a CPU; the laptop preset: 1.05
MFU = 0.4  # the same on a GPU, of the data sheet's: an assumption, as in plan.py


def describe(trainer, data, step: int, speed: float | None) -> str:
    """
    Return the lines that open a run, the first with what will happen and how long it should take.

    trainer, data: of train_gpt2.py
    step:  the steps that are done
    speed: FLOP/s of this process's matrix products on a CPU, from pace.matmul_speed
    """
    config, model, dist, device = trainer.config, trainer.raw_model, trainer.dist, trainer.device
    peak = devices.peak_flops(device)
    rate = REACHED * speed if speed else MFU * peak if peak else None
    left = config.max_steps - step
    flops = left * config.batch_tokens * model.flops_per_token() / dist.world_size
    time = f"about {rough_time(flops / rate)} of training" if rate else "the bar will tell how long"
    steps = f"steps {step + 1:,} to {config.max_steps:,}" if step else f"{left:,} steps"
    epochs = config.max_steps * config.batch_tokens / data.loader.split.n_tokens
    c, adamw = model.config, config.lr if config.adamw_lr is None else config.adamw_lr
    muon = f", of AdamW's parameters {adamw:g}" if config.optimizer == "muon" else ""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} threads"
    dtype = str(trainer.dtype).removeprefix("torch.")
    kernels = ",".join(in_triton(model.ops))
    return "\n".join(
        [
            f"{steps} of {config.batch_tokens:,} tokens from {dataset_dir(config.data)} into {config.out_dir}: {time}",
            f"{model.parameter_count() / 1e6:.2f}M parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} "
            "channels",
            f"{data.loader.split.n_tokens:,} training tokens of a vocabulary of {c.vocab_size:,}, "
            f"{c.block_size:,} per sequence, {epochs:.2g} epochs",
            f"{config.optimizer}, learning rate {config.lr:g}{muon}, {config.schedule}, {config.warmup_steps:,} steps "
            "of warmup",
            f"{dist.world_size} x {device.type} ({name}), {dtype}, {trainer.micro_batch} sequences per micro-step, "
            f"Triton's kernels: {kernels or 'none'}",
        ]
    )


def in_triton(ops: Ops) -> list[str]:
    """Return the families whose operations are the Triton versions."""
    first = {family: names[0] for family, names in FAMILIES.items()}
    return [family for family, name in first.items() if getattr(ops, name) is getattr(MODULES[family], name)]


def rough_time(seconds: float) -> str:
    """Return a duration as roughly as it is known: "40 s", "12 min", "2.4 h", "3.1 days"."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < most:
            return (
                f"{max(10, round(seconds, -1)):.0f} s" if unit == "s" else f"{seconds / size:.{unit == 'h':d}f} {unit}"
            )
    return f"{seconds / 86_400:.1f} days"


def resumed(config, checkpoint: dict) -> str:
    """Return one line: what a run resumes, and the options that have changed since."""
    then = checkpoint["run"]
    now = {name: getattr(config, name) for name in then if hasattr(config, name)}
    changed = [f"{as_flag(name)} {then[name]} (now {now[name]})" for name in now if now[name] != then[name]]
    changed = f", with other options: {', '.join(changed)}" if changed else ""
    return f"resuming {config.out_dir} after step {checkpoint['step']:,}{changed}"

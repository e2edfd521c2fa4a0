"""
The road to GPT-2 (train_gpt2.py --ladder, python -m training.ladder): each system before it, beside its published loss.

Two ladders: names (scalar.py, by_hand.py, names.py) and tiny Shakespeare (shakespeare.py). Rungs that are done are
kept in OUT/ladder.json, so that the same command resumes; OUT/ladder.md and OUT/ladder.png are written after every
rung. The last rung, six layers of 384 channels, is a run of its own, of the preset shakespeare-char: the table reads
its log.
"""

import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from data import shakespeare as tiny_shakespeare
from data.files import UserError, atomic_write, download, lock, run_script
from data.text import read_text
from training.ladder import names, scalar, shakespeare
from training.run import read_log

NAMES, SHAKESPEARE = "names", "shakespeare"
SOURCES = {  # address, sha256 and what it is
    NAMES: (names.URL, names.SHA256, "the list of names"),
    SHAKESPEARE: (tiny_shakespeare.URL, tiny_shakespeare.SHA256, "tiny Shakespeare"),
}
GPT_RUN = Path("runs/shakespeare-char")  # of train_gpt2.py shakespeare-char
GPT_WHAT, GPT_PUBLISHED = "GPT-2, 6 layers of 384 channels", {2000: 1.4968, 5000: 1.5707}  # step -> loss


@dataclasses.dataclass(frozen=True)
class Rung:
    """A system: its ladder, what is new, steps in full and under --quick, and the published figure, as published."""

    ladder: str
    what: str
    steps: int
    quick: int
    published: str
    train: Callable  # (the ladder's data, steps, progress) -> parameters, loss in nats per character


def network(name: str, what: str, published: str) -> Rung:
    return Rung(NAMES, what, 200_000, 8_000, published, functools.partial(names.network, name))


def parts(name: str, what: str, published: str, steps: int = 4_500) -> Rung:
    return Rung(SHAKESPEARE, what, steps, 2_000, published, functools.partial(shakespeare.train, name))


RUNGS = {
    "scalar": Rung(NAMES, "autograd on numbers: four points", 50, 50, "", lambda _, *how: scalar.train_mlp(*how)),
    "bigram-counted": Rung(NAMES, "bigrams counted", 0, 0, "2.45", names.counted_bigram),
    "bigram-learned": Rung(NAMES, "bigrams by gradient", 100, 100, "2.45 to 2.47", names.learned_bigram),
    "mlp": network("mlp", "MLP over 3 characters", "2.17"),
    "scaled-logits": network("scaled-logits", "logits small at first", "2.13"),
    "scaled-tanh": network("scaled-tanh", "tanh not saturated at first", "2.10"),
    "batch-norm": network("batch-norm", "batch normalization", "2.10"),
    "context-8": network("context-8", "8 characters of context", "2.02"),
    "wavenet-wrong": network("wavenet-wrong", "a tree, normalized over wrong axes", "2.029"),
    "wavenet": network("wavenet", "a tree, normalized right", "2.022"),
    "wavenet-wide": network("wavenet-wide", "a wider tree", "1.993"),
    "gpt": Rung(NAMES, "GPT-2, 4 layers of 64 channels", 20_000, 3_000, "", names.gpt),
    "bigram": parts("bigram", "bigrams by gradient", "2.4855", 8_000),
    "one-head": parts("one-head", "one head of attention", "2.4087"),
    "four-heads": parts("four-heads", "four heads", "2.2895"),
    "feed-forward": parts("feed-forward", "3 blocks with a feed-forward layer", "2.35"),
    "residual": parts("residual", "residual connections", "2.0934"),
    "layer-norm": parts("layer-norm", "layer norm", "2.07 to 2.08"),
}


def climb(
    rung: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    quick: bool = False,
    names_input: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    shakespeare_input: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    out_dir: Path | None = None,
) -> str:
    """Climb from a neuron to GPT-2 on names and on tiny Shakespeare, each system beside its published loss.

    Args:
        rung: Rungs to climb, all if none is given.
        quick: Take fewer steps per rung: two minutes instead of half an hour.
        names_input: A copy of names.txt instead of its download.
        shakespeare_input: A copy of tiny Shakespeare instead of its download.
        out_dir: Folder of the table and the picture; runs/ladder, or runs/ladder-quick, if not given.
    """
    if unknown := [name for name in rung if name not in RUNGS]:
        raise UserError(f"there is no rung {unknown[0]}: the rungs are {', '.join(RUNGS)}")
    chosen = {name: RUNGS[name] for name in rung or RUNGS}
    folder = out_dir or Path("runs", "ladder-quick" if quick else "ladder")
    done = _read(folder / "ladder.json")
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"another process is writing to {folder}: wait for it, or use --out-dir"):
        data = functools.cache(functools.partial(_open, {NAMES: names_input, SHAKESPEARE: shakespeare_input}))
        for i, (name, it) in enumerate(chosen.items(), start=1):
            steps = it.quick if quick else it.steps
            if done.get(name, {}).get("steps") == steps:
                continue
            bar = functools.partial(_progress, f"[{i}/{len(chosen)}] {name}")
            content = data(it.ladder)
            began = time.process_time()
            parameters, loss = it.train(content, steps, bar)
            seconds = round(time.process_time() - began, 1)
            done[name] = {"steps": steps, "parameters": parameters, "loss": loss, "seconds": seconds}
            text = json.dumps(done, indent=1).encode()
            atomic_write(folder / "ladder.json", lambda file, text=text: file.write(text))
            report(done, folder)
    return f"{report(done, folder)}\n\n{folder} holds ladder.md, ladder.png and ladder.json"


def _progress(what: str, steps: int) -> tqdm:
    return tqdm(range(steps), desc=what, unit="step", dynamic_ncols=True, leave=False, mininterval=0.5)


def _open(inputs: dict[str, Path | None], ladder: str) -> names.Names | str:
    """Return a ladder's data, from a copy or by download."""
    url, sha256, what = SOURCES[ladder]
    copy = inputs[ladder]
    text = read_text(copy) if copy else download(url, sha256, what, f"--{ladder}-input FILE").decode()
    if hashlib.sha256(text.encode()).hexdigest() != sha256:
        print(f"note: {copy} is not {what} of {url}: published losses do not belong to it", file=sys.stderr)
    if len(text.split()) < 100:
        raise UserError(f"{copy} has fewer than 100 words: give a copy of {url}")
    return names.Names(text) if ladder == NAMES else text


def _read(path: Path) -> dict[str, dict]:
    """Return the rungs that are done; raise UserError for a file that is not ours."""
    try:
        done = json.loads(path.read_text("utf-8"))
        keys = ("steps", "parameters", "loss", "seconds")
        return {name: {key: rung[key] + 0 for key in keys} for name, rung in done.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path} is corrupt: remove it, or use another --out-dir") from None


# ------------------------------------------------------------------------------------------------------------- results


def report(done: dict[str, dict], folder: Path) -> str:
    """Write the table and the picture. Return the table."""
    from matplotlib.figure import Figure

    text, figure = table(done), Figure(figsize=(12, 5), layout="constrained")
    draw(figure, done)
    atomic_write(folder / "ladder.md", lambda file: file.write(f"{text}\n".encode()))
    atomic_write(folder / "ladder.png", lambda file: figure.savefig(file, format="png", dpi=120))
    return text


def table(done: dict[str, dict]) -> str:
    """Return a Markdown table of the rungs that are done, then the large GPT's, if it has been trained."""
    rows = [["rung", "", "parameters", "steps", "published", "ours", "CPU seconds"]]
    for name, it in RUNGS.items():
        if name in done:
            found = done[name]
            figures = [f"{found['parameters']:,}", f"{found['steps']:,}", it.published, f"{found['loss']:.3f}"]
            rows.append([name, it.what, *figures, f"{found['seconds']:.0f}"])
    rows.append(["char-gpt", GPT_WHAT, "10,770,816", *_large_gpt()])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([*lines, "", "losses in nats per character: of validation text, but for the first three rungs"])


def _large_gpt() -> list[str]:
    """Return steps, published and our loss, and seconds of the preset shakespeare-char, a run of its own."""
    records, losses = read_log(GPT_RUN), _large_gpt_losses()
    if not losses:
        return ["", _at_steps(GPT_PUBLISHED), "python train_gpt2.py shakespeare-char", ""]
    last = max(losses)
    ours = _at_steps({step: losses[step] for step in sorted({2000, last} & losses.keys())})
    return [f"{last:,}", _at_steps(GPT_PUBLISHED), ours, f"{sum(record['ms'] for record in records) / 1000:.0f}"]


def _large_gpt_losses() -> dict[int, float]:
    return {record["step"]: record["val_loss"] for record in read_log(GPT_RUN) if "val_loss" in record}


def _at_steps(losses: dict[int, float]) -> str:
    return ", ".join(f"{loss:.4f} at {step:,}" for step, loss in losses.items())


def draw(figure, done: dict[str, dict]) -> None:
    """Draw our losses as dots and published ones as dashes, a panel per ladder."""
    for axes, ladder in zip(figure.subplots(1, 2), (NAMES, SHAKESPEARE), strict=True):
        rungs = [name for name in RUNGS if name in done and RUNGS[name].ladder == ladder and name != "scalar"]
        shown = [(RUNGS[name].what, done[name]["loss"], _bounds(RUNGS[name].published)) for name in rungs]
        if ladder == SHAKESPEARE and (losses := _large_gpt_losses()):
            shown.append((GPT_WHAT, losses[max(losses)], [*GPT_PUBLISHED.values()]))
        axes.plot([loss for _, loss, _ in shown], range(len(shown)), "o-", color="C0", label="ours")
        for place, (_, _, bounds) in enumerate(shown):
            if bounds:
                label = "published" if place == 0 else None
                axes.plot(bounds, [place] * len(bounds), "|-", color="C3", markersize=14, label=label)
        axes.set_yticks(range(len(shown)), [what for what, _, _ in shown])
        axes.invert_yaxis()
        axes.set(title=ladder, xlabel="loss, nats per character")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if shown:
            axes.legend()


def _bounds(published: str) -> list[float]:
    return [float(word) for word in published.split(" to ")] if published else []


def main(arguments: list[str] | None = None) -> None:
    run_script(climb, prog="python -m training.ladder", arguments=arguments)

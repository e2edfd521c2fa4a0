"""The ladder: from a bigram to a small GPT on tiny shakespeare's characters, one dimension at a time.

`--ladder` trains the rungs below one after another, each minutes at most on two cores, and ends with a table,
ladder.md, and a picture, ladder.png. See cells.py for what happens when one is interrupted or fails.

There is one model.py, and a rung is what GPT-2's own dimensions can express: a block always has its feed-forward
layer, its residual stream and its layer norms, and the head is always tied to the token embedding. Ladders in which
these come one by one are of another family of models. Reported of one, with 32 channels and 8 tokens of context:
a bigram as a free table of logits 2.49, one head 2.41, several 2.29, with feed-forward 2.35, with residual stream and
layer norm 2.09; and 1.50 with six layers of 384 channels. Its rungs and ours are not the same models.
"""

from pathlib import Path

from data.files import UserError, as_flag
from training import cells as runs
from training.cells import Cell, Parse

DIMENSIONS = ("n_layer", "n_head", "n_embd", "block_size")
RUNGS = {  # folder -> what is new, DIMENSIONS, learning rate
    "1-bigram": ("no layers: a bigram", (0, 1, 32, 8), 3e-2),
    "2-one-head": ("one layer, one head", (1, 1, 32, 8), 1e-2),
    "3-four-heads": ("four heads", (1, 4, 32, 8), 1e-2),
    "4-depth": ("four layers", (4, 4, 32, 8), 1e-2),
    "5-context": ("128 tokens of context", (4, 4, 32, 128), 1e-2),
    "6-width": ("128 channels", (4, 4, 128, 128), 3e-3),
}
COMMON = {  # of every rung; the command line's options win over them
    "data": "shakespeare-char",
    "optimizer": "adamw",  # Muon has nothing to train in a bigram
    "batch_tokens": 2048,
    "micro_batch": "auto",
    "max_steps": 2400,
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "dropout": 0.0,
    "eval_every": 200,
    "eval_tokens": 111_540,  # all there are
    "hellaswag_every": 0,
    "sample_every": 0,
    "checkpoint_every": 800,
    "keep": 1,
}


def climb(script: Path, arguments: list[str], parse: Parse) -> int:
    """
    Trains the rungs and prints their table. Returns 0, or 128 + the signal that ended it early.

    script, parse: as for sweep.run; arguments: the command line, whose options hold for every rung
    UserError when the command line has one of DIMENSIONS, or a rung failed. The folder is --out-dir, or where that was
    not given, the preset's with -ladder behind it.
    """
    arguments = [word for word in arguments if word != "--ladder"]
    if fixed := [as_flag(name) for name in DIMENSIONS if name in runs.given(arguments)]:
        raise UserError(f"--ladder sets {fixed[0]} itself, rung by rung: leave it out")
    folder = runs.chosen_folder(arguments, parse(arguments).out_dir, "ladder")
    return runs.run_cells(script, rungs(arguments, parse), folder, "ladder", draw)


def rungs(arguments: list[str], parse: Parse) -> list[Cell]:
    """The cells of the ladder, each parsed; UserError where the command line does not fit one of them."""
    cells = []
    for name, (title, sizes, lr) in RUNGS.items():
        shape = dict(zip(DIMENSIONS, sizes, strict=True))
        options = [f"{as_flag(option)}={value}" for option, value in (COMMON | shape | {"lr": lr}).items()]
        words = arguments[:1] + options + arguments[1:]  # behind the preset; the last of two equal options counts
        cells.append(Cell(name, {"rung": title} | shape, words, runs.parsed(parse, words, f"--ladder, rung {name}")))
    return cells


def draw(figure, cells: list[Cell]) -> None:
    """The validation loss of every rung against tokens, and beside it the last one as a bar."""
    figure.set_size_inches(15, 5)
    curves, bars = figure.subplots(1, 2)
    runs.draw_curves(curves, cells)
    done = [cell for cell in cells if cell.finished]
    for place, cell in enumerate(done):
        train, val = runs.last_loss(cell), cell.val_losses[-1]["val_loss"]
        bars.bar(place, val, width=0.6, color=f"C{cells.index(cell)}", alpha=0.8)
        bars.plot([place - 0.3, place + 0.3], [train, train], color="black", label="training" if place == 0 else None)
        bars.annotate(f"{val:.3f}", (place, val), xytext=(0, 3), textcoords="offset points", ha="center")
    if done:
        bars.set_ylim(0.0, max(cell.val_losses[-1]["val_loss"] for cell in done) + 0.3)
        bars.set_xticks(
            range(len(done)), [cell.columns["rung"].replace(": ", ":\n") for cell in done], fontsize="small"
        )
        runs.draw_landmarks(bars, runs.landmarks_of(cells))
        bars.legend(fontsize="small")
    bars.set(ylabel="validation loss at the end, nats per token")

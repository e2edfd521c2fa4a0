"""A grid of runs: `--sweep lr=1e-4,3e-4,1e-3 n_layer=4,6` trains every combination, one after another.

Each combination is a cell, its folder `lr=0.001,n_layer=4` inside --out-dir; see cells.py for how they run, and what
happens when one is interrupted or fails. All cells' command lines are parsed before the first one runs. It ends with a
table, sweep.md, and a picture, sweep.png: the validation loss of every cell, and beside it, where an option has
several numbers, against that option.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from data.files import UserError, as_flag
from training.cells import SET_BY_US, Cell, Parse, chosen_folder, draw_curves, parsed, run_cells


def take_grid(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """A command line without --sweep, and the grid that stood behind it, None where there is no --sweep.

    The grid goes up to the next option, but --lr=1e-4,3e-4, with a comma, belongs to it.
    """
    rest, grid, taking = [], None, False
    for word in arguments:
        if word == "--sweep" or word.startswith("--sweep="):
            taking = True
            grid = (grid or []) + ([word.removeprefix("--sweep=")] if "=" in word else [])
        elif taking and (not word.startswith("-") or re.fullmatch(r"--[\w-]+=.*,.*", word)):
            grid.append(word)
        else:
            taking = False
            rest.append(word)
    return rest, grid


def run(script: Path, arguments: list[str], grid: Sequence[str], parse: Parse) -> int:
    """
    Trains the grid and prints its table. Returns 0, or 128 + the signal that ended it early.

    script:    the training script, called as `python SCRIPT ARGUMENTS --NAME=VALUE ... --out-dir=...`
    arguments: its command line; --sweep and what stands behind it are passed over
    grid:      what stood behind --sweep, "lr=1e-4,3e-4", also "--lr=..." and hyphens for underscores
    parse:     arguments -> their options, with out_dir, max_steps, data and the shape of the model
    UserError, before anything runs, for an option or value that cannot be; at the end, when a cell failed. The folder
    is --out-dir, or where that was not given, the preset's with -sweep behind it.
    """
    arguments, _ = take_grid(arguments)
    cells = expand(arguments, grid, parse)
    folder = chosen_folder(arguments, parse(arguments).out_dir, "sweep")
    return run_cells(script, cells, folder, "sweep", draw)


def expand(arguments: list[str], grid: Sequence[str], parse: Parse) -> list[Cell]:
    """The cells of a grid, the last option varying fastest, each parsed; UserError names the option and the value."""
    base = dataclasses.asdict(parse(arguments))
    cells = {}
    for values in itertools.product(*_read_grid(grid, base)):
        typed = ",".join(f"{name}={value}" for name, value, _ in values)
        words = arguments + [word for _, _, word in values]
        config = parsed(parse, words, f"--sweep, cell {typed}")
        columns = {name: getattr(config, name) for name, _, _ in values}
        # Named by what the values mean, so that 1e-3 and 0.001 share a folder and 2e-3 typed later finds its own.
        cell_name = ",".join(f"{name}={_plain(value)}" for name, value in columns.items())
        if cell_name in cells:
            raise UserError(f"--sweep has the cell {cell_name} twice: give every value once")
        cells[cell_name] = Cell(cell_name, columns, words, config)
    return [*cells.values()]


def _read_grid(grid: Sequence[str], base: dict) -> list[list[tuple[str, str, str]]]:
    """For every option its values: (name, value as typed, the word for a command line)."""
    options = {}
    for item in grid:
        name, equals, values = item.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not equals or not all(values.split(",")):
            raise UserError(f"--sweep {item} has no value, or an empty one: write for example lr=1e-4,3e-4")
        if name in SET_BY_US:
            raise UserError(f"--sweep {item}: {as_flag(name)} is not for a sweep to vary")
        if name not in base:
            near = difflib.get_close_matches(name, base, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all there are"
            raise UserError(f"--sweep {item}: there is no option {as_flag(name)}; {hint}")
        if name in options:
            raise UserError(f"--sweep has {name} twice: give all its values at once, {name}=A,B,C")
        options[name] = [(name, value, _word(name, value, base[name], item)) for value in values.split(",")]
    if not options:
        raise UserError("--sweep needs an option and its values, for example --sweep lr=1e-4,3e-4 n_layer=4,6")
    return [*options.values()]


def _word(name: str, value: str, default: object, item: str) -> str:
    if not isinstance(default, bool):
        return f"{as_flag(name)}={value}"
    if value.lower() not in ("true", "false"):
        raise UserError(f"--sweep {item}: {value} must be true or false")
    return as_flag(name) if value.lower() == "true" else as_flag(f"no_{name}")


def _plain(value: object) -> str:
    return re.sub(r"[^\w.+-]", "_", str(value).lower() if isinstance(value, bool) else str(value))


def draw(figure, cells: list[Cell]) -> None:
    """Validation loss of every cell against tokens; beside it the last one against the option with most values."""
    varied = {name: {cell.columns[name] for cell in cells} for name in cells[0].columns}
    numeric = [n for n, values in varied.items() if len(values) > 1 and all(type(v) in (int, float) for v in values)]
    panels = figure.subplots(1, 2 if numeric else 1, squeeze=False)[0]
    figure.set_size_inches(7.5 * len(panels), 5)
    draw_curves(panels[0], cells)
    if numeric:
        _draw_against(panels[1], cells, max(numeric, key=lambda name: len(varied[name])))


def _draw_against(axes, cells: list[Cell], x: str) -> None:
    """The last validation loss against option x, a line for each combination of the others."""
    lines = {}
    for cell in cells:
        if cell.finished:
            others = ",".join(f"{name}={value}" for name, value in cell.columns.items() if name != x)
            lines.setdefault(others, []).append((cell.columns[x], cell.val_losses[-1]["val_loss"]))
    for others, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=others)
    values = sorted(cell.columns[x] for cell in cells)
    if values[0] > 0 and values[-1] >= 8 * values[0]:
        axes.set_xscale("log")
    axes.set(xlabel=x, ylabel="validation loss at the end, nats per token")
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend(fontsize="small")

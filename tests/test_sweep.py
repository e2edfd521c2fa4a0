"""training/sweep.py: the grid. How its cells run is in test_cells.py."""

import pytest
import tyro
from matplotlib.figure import Figure

import train_gpt2
from data.files import UserError
from training import cells, sweep


def parse(arguments):
    return tyro.extras.overridable_config_cli(train_gpt2.PRESETS, args=arguments)


def test_a_grid_is_every_combination_with_the_last_option_fastest():
    found = sweep.expand(["laptop", "--seed=1"], ["--lr=1e-4,0.0003", "n-layer=4,6"], parse)
    assert [cell.name for cell in found] == [
        "lr=0.0001,n_layer=4",
        "lr=0.0001,n_layer=6",
        "lr=0.0003,n_layer=4",
        "lr=0.0003,n_layer=6",
    ]
    assert found[1].columns == {"lr": 1e-4, "n_layer": 6}
    assert found[1].arguments == ["laptop", "--seed=1", "--lr=1e-4", "--n-layer=6"]
    for cell in found:
        assert cell.config == parse(cell.arguments)
        assert {name: getattr(cell.config, name) for name in cell.columns} == cell.columns


def test_the_grid_wins_over_the_command_line():
    (cell,) = sweep.expand(["laptop", "--lr=1"], ["lr=1e-3"], parse)
    assert cell.config.lr == 1e-3


def test_switches_take_true_and_false_and_paths_make_one_folder():
    on, off = sweep.expand(["laptop"], ["shuffle=true,False"], parse)
    assert (on.config.shuffle, off.config.shuffle) == (True, False)
    assert (on.name, off.name) == ("shuffle=true", "shuffle=false")
    (cell,) = sweep.expand(["laptop"], ["data=a/b"], parse)
    assert cell.name == "data=a_b" and cell.config.data == "a/b"


@pytest.mark.parametrize(
    "grid, complaint",
    [
        ([], "--sweep needs an option and its values"),
        (["lr"], "lr has no value, or an empty one: write for example lr=1e-4,3e-4"),
        (["lr="], "lr= has no value, or an empty one"),
        (["lr=1,,2"], "lr=1,,2 has no value, or an empty one"),
        (["learning_rate=1"], "there is no option --learning-rate"),
        (["n_layers=1,2"], "there is no option --n-layers; did you mean n_layer?"),
        (["lr=1e-3", "--lr=1e-4"], "has lr twice"),
        (["lr=1e-3,0.001"], "has the cell lr=0.001 twice"),
        (["lr=1e-3,fast"], "cell lr=fast: [^│]*--lr[^│]*'fast'[^│]*$"),
        (["n_layer=2", "n_embd=192,100"], "cell n_layer=2,n_embd=100: --n-embd 100 is not divisible by --n-head 6"),
        (["lr=-1"], "cell lr=-1: --lr is -1.0, but must be above 0"),
        (["compile=yes"], "yes must be true or false"),
        (["out_dir=a,b"], "--out-dir is not for a sweep to vary"),
        (["resume=never"], "--resume is not for a sweep to vary"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(tmp_path, grid, complaint):
    with pytest.raises(UserError, match=complaint):
        words = ["laptop", "--out-dir", str(tmp_path / "out"), "--sweep", *grid]
        sweep.run(tmp_path / "no_script.py", words, grid, parse)
    assert not (tmp_path / "out").exists()


def test_what_stands_behind_sweep_is_taken_out_of_the_command_line():
    grid = ["lr=1,2", "--n-layer=4,6"]
    line = ["laptop", "--seed", "3", "--sweep", *grid, "--n-head=2", "--out-dir", "x", "--no-compile"]
    assert sweep.take_grid(line) == (["laptop", "--seed", "3", "--n-head=2", "--out-dir", "x", "--no-compile"], grid)
    assert sweep.take_grid(["laptop", "--sweep=lr=1,2", "n_layer=3"]) == (["laptop"], ["lr=1,2", "n_layer=3"])
    assert sweep.take_grid(["laptop", "--out-dir", "x"]) == (["laptop", "--out-dir", "x"], None)
    assert sweep.take_grid(["laptop", "--sweep"]) == (["laptop"], [])


def test_the_folder_is_out_dir_or_one_beside_the_preset_s_run():
    assert str(cells.chosen_folder(["laptop", "--out_dir=x/y"], "x/y", "sweep")) == "x/y"
    assert str(cells.chosen_folder(["laptop", "--lr", "1"], "runs/laptop", "sweep").as_posix()) == "runs/laptop-sweep"


def drawn(*points):
    """The panels of a sweep whose cells end at (columns, last validation loss)."""
    config = train_gpt2.Config(data="no such dataset", max_steps=1)
    record = {"step": 1, "tokens": 1, "loss": 1.0, "ms": 1.0}
    made = [
        cells.Cell(str(columns), columns, [], config, [record | {"val_loss": loss}] * (loss is not None))
        for columns, loss in points
    ]
    sweep.draw(figure := Figure(), made)
    return figure.axes


def test_the_last_loss_is_drawn_against_the_option_with_most_values():
    rates, losses = [1e-4, 1e-3, 1e-2], {4: [3.0, 2.0, 2.5], 6: [2.9, 1.9, 2.4]}
    points = [({"lr": lr, "n_layer": n}, losses[n][i]) for i, lr in enumerate(rates) for n in losses]
    _, panel = drawn(*reversed(points))
    assert panel.get_xlabel() == "lr" and panel.get_xscale() == "log"
    lines = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert lines == {f"n_layer={n}": [[lr, loss] for lr, loss in zip(rates, losses[n], strict=True)] for n in losses}


def test_options_without_numbers_have_no_second_panel_and_unfinished_cells_no_point():
    assert len(drawn(({"optimizer": "adamw"}, 1.0), ({"optimizer": "muon"}, 2.0))) == 1
    assert len(drawn(({"lr": 0.1}, 1.0))) == 1
    _, panel = drawn(({"n_layer": 1}, 1.0), ({"n_layer": 2}, None), ({"n_layer": 3}, 2.0))
    assert panel.lines[0].get_xdata().tolist() == [1, 3] and panel.get_xscale() == "linear"

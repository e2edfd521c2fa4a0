"""training/recipe.py: which runs the ladder asks for, what it keeps, and the command on runs that are there already."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from matplotlib.figure import Figure
from runs import assert_same_run, command

import sample
import train_gpt2
from data.files import UserError
from training import recipe, weights
from training.checkpoint import newest_checkpoint
from training.sweep import SweepRun

BEST = {"lr": 0.02, "adamw_lr": 0.01, "weight_decay": 0.3}
GAINS = {"linear": 0.1, "muon": 0.5, "zero-init": 0.02, "ema": 0.05, "half": -0.3}


def loss_of(part, options, gains=GAINS) -> float:
    """A made-up final loss: least at BEST, lower by the gain of every part, and a little different per seed."""
    on = {
        "linear": options["schedule"] == "linear",
        "muon": options["optimizer"] == "muon",
        "ema": options["ema"] > 0,
        "half": part.name == "half",
    }
    on["zero-init"] = options["zero_init"]
    away = sum(abs(math.log(options[name] / best)) for name, best in BEST.items() if name in options)
    seed = 0.01 * (options["seed"] % 3)
    noise = seed * 3 if on["zero-init"] else seed  # a gain of 0.02 that is less than twice its spread
    return 4 + away - sum(gains[name] for name in on if on[name]) + noise


def maker(losses=loss_of):
    """Return make() for Climb, which trains nothing, and the runs that were asked for."""
    asked = {}

    def make(part, options):
        last, name = losses(part, options), f"{part.name} {options}"
        config = train_gpt2.Config(max_steps=options.get("max_steps", 100))
        points = [(config.max_steps * quarter // 4, last + 4 - quarter) for quarter in (1, 2, 3, 4)]
        records = [{"step": step, "tokens": 10 * step, "loss": loss, "val_loss": loss} for step, loss in points]
        asked[name] = options
        return SweepRun(name, {}, [], config, records)

    return make, asked


def test_rates_are_tuned_to_their_best_and_a_part_that_gains_less_than_twice_its_spread_is_refused():
    make, _ = maker()
    rungs = recipe.Climb(100, 1, make).rungs
    assert [rung.part.name for rung in rungs] == [part.name for part in recipe.parts(100)]
    assert [rung.part.name for rung in rungs if not rung.kept] == ["zero-init"]
    last = rungs[-1]
    assert last.options["max_steps"] == 50 and last.options["zero_init"] is False
    assert last.options["ema"] == 2 and last.options["min_lr"] == pytest.approx(0.3 * last.options["lr"], rel=0.05)
    for name, best in BEST.items():
        assert abs(math.log(last.options[name] / best)) <= math.log(recipe.FACTORS[name]) / 2 + 0.01
    assert rungs[2].gains == pytest.approx([rungs[1].losses[i] - rungs[2].losses[i] for i in range(3)])
    assert rungs[3].gains == pytest.approx([rungs[2].losses[i] - rungs[3].losses[i] for i in range(3)])


def test_it_asks_for_runs_until_none_is_missing_and_for_none_twice():
    make, asked = maker()
    done, waves = set(), 0

    def only_done(part, options):
        run = make(part, options)
        run.records = run.records if run.name in done else []
        return run

    while missing := recipe.Climb(100, 1, only_done).missing:
        assert not {run.name for run in missing} & done
        done.add(missing[0].name)
        waves += 1
    assert waves == len(done) == len(asked)
    assert len(recipe.Climb(100, 1, only_done).rungs) == len(recipe.parts(100))


def test_a_rate_that_diverges_is_passed_over_but_a_seed_that_fails_ends_the_ladder():
    make, _ = maker()

    def fails(condition):
        def wrapped(part, options):
            run = make(part, options)
            return SweepRun(run.name, {}, [], run.config, [], "error: it diverged") if condition(part, options) else run

        return wrapped

    rungs = recipe.Climb(100, 1, fails(lambda part, options: options["lr"] > 0.012)).rungs
    assert {rung.options["lr"] for rung in rungs if rung.options["optimizer"] == "adamw"} == {0.01}
    with pytest.raises(UserError, match="^muon .* failed: error: it diverged"):
        recipe.Climb(100, 1, fails(lambda part, options: part.name == "muon" and options["seed"] == 2))


def test_tokens_to_a_loss_are_interpolated():
    make, _ = maker(lambda part, options: 3.0)
    run = make(recipe.parts(100)[0], {"seed": 1})  # 6, 5, 4 and 3 after 250, 500, 750 and 1,000 tokens
    assert [recipe.tokens_to(loss, run) for loss in (7.0, 6.0, 5.5, 3.5, 3.0)] == [250, 250, 375, 875, 1000]
    assert recipe.tokens_to(2.9, run) == math.inf


def test_the_table_compares_with_the_tuned_adamw_and_the_picture_has_a_line_per_rung():
    rungs = recipe.Climb(100, 1, maker()[0]).rungs
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in recipe.table(rungs).splitlines()[2:8]]
    assert [row[0] for row in rows] == [part.title for part in recipe.parts(100)]
    assert [row[-1] for row in rows] == ["yes", "yes", "yes", "no", "yes", "yes"]
    assert (
        rows[0][5] == rows[-1][5] == "" and rows[0][6] == ""
    )  # nothing below the first; cosine never reaches linear's
    muon, goal = rungs[2], sum(rungs[1].losses) / 3
    assert rows[2][6].startswith(f"{sum(recipe.tokens_to(goal, run) / 1000 for run in muon.runs) / 3:.3f} ±")
    recipe.draw(axes := Figure().subplots(), rungs)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == len(rungs) and [label.endswith("refused") for label in labels] == [not r.kept for r in rungs]


def test_a_table_that_cannot_be_written_is_a_warning_and_wrong_data_and_torchrun_are_errors(
    dataset, tmp_path, capsys, monkeypatch
):
    rungs = recipe.Climb(100, 1, maker()[0]).rungs
    assert recipe.report(rungs, tmp_path / "none") == recipe.table(rungs)
    assert f"warning: {tmp_path / 'none'} lacks the newest recipe.md" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no dataset in nodata"):
        recipe.climb(Path("x"), [*command(dataset, tmp_path / "out"), "--data=nodata"], train_gpt2.parse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        recipe.climb(Path("x"), command(dataset, tmp_path / "out"), train_gpt2.parse)
    assert not (tmp_path / "out").exists()


def test_the_command_trains_the_run_that_is_missing_and_writes_the_table(dataset, tmp_path, capfd):
    small = {"n_layer": 1, "n_embd": 16, "block_size": 16, "batch_tokens": 128, "max_steps": 8, "eval_every": 1}
    words = command(dataset, tmp_path, **small, sample_every=0, checkpoint_every=100)
    missing = []

    def make(part, options):
        """Write the log of every run but one of the last rung's."""
        run = recipe.read_run(tmp_path, words, train_gpt2.parse, part, options)
        if part.name == recipe.HALF and options["seed"] == 1339:
            missing[:] = [tmp_path / run.name]
        elif not run.records:
            (tmp_path / run.name).mkdir()
            steps, last = run.config.max_steps, loss_of(part, options)
            rest = {"ms": 1.0, "tokens_per_s": 1.0}
            for step in range(1, steps + 1):
                loss = last + steps - step
                run.records.append({"step": step, "tokens": 128 * step, "loss": loss, "val_loss": loss} | rest)
            (tmp_path / run.name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in run.records), "utf-8")
        return run

    assert len(recipe.Climb(8, 1337, make).rungs) == 5
    with pytest.raises(SystemExit) as end:
        train_gpt2.main([*words, "--recipe"])
    shown = capfd.readouterr().out
    assert end.value.code == 0 and shown.startswith(missing[0].name)
    config = json.loads((missing[0] / "config.json").read_text("utf-8"))
    assert (config["max_steps"], config["optimizer"], config["seed"]) == (4, "muon", 1339)
    assert (tmp_path / "recipe.md").read_text("utf-8").strip() in shown
    assert "| all of it, half the tokens " in shown
    assert (tmp_path / "recipe.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as end:  # finished runs of another recipe do not count
        train_gpt2.main([*words, "--n-embd=32", "--recipe"])
    assert end.value.code == 2 and "holds a recipe made with --n-embd 16 (now 32)" in capfd.readouterr().err


def test_a_run_with_every_part_resumes_bit_for_bit_and_its_export_is_a_gpt2_for_transformers(dataset, tmp_path):
    full = {"optimizer": "muon", "schedule": "linear", "min_lr": 1e-3, "adamw_lr": 1e-2, "ema": 3}
    words = {"max_steps": 6, "checkpoint_every": 3, "eval_every": 2, "sample_every": 0} | full
    one, other = tmp_path / "one", tmp_path / "other"

    def finish(out):
        with pytest.raises(SystemExit, match="0"):
            train_gpt2.main([*command(dataset, out, **words), "--zero-init"])

    finish(one)
    shutil.copytree(one, other)
    (other / "checkpoints" / "step_000006.pt").unlink()
    finish(other)
    assert_same_run(one, other)
    ends = [newest_checkpoint(run)[1] for run in (one, other)]
    for name, trained in ends[0]["training"].items():
        assert torch.equal(trained, ends[1]["training"][name]) and not torch.equal(trained, ends[0]["model"][name])
    sample.main([str(one), "--export", str(tmp_path / "export")])
    judge = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "export").eval()
    model, _ = weights.load(str(one))
    tokens = torch.randint(model.config.vocab_size, (2, 32))
    torch.testing.assert_close(model(tokens), judge(tokens).logits, rtol=1e-5, atol=1e-5)
    fields = json.loads((tmp_path / "export" / "config.json").read_text("utf-8"))
    assert fields.keys() <= transformers.GPT2Config().to_dict().keys() | {"architectures", "dtype"}
    assert {name: fields[name] for name in weights.ONLY_GPT2} == {n: v[0] for n, v in weights.ONLY_GPT2.items()}

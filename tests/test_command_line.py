"""training/command_line.py: presets and options as people type them, the help, and what a wrong word is answered."""

import dataclasses

import pytest
from runs import random_model, save_run

import train_gpt2
from data.files import UserError, as_flag
from data.tokenizer import CharTokenizer
from training import command_line


def answer(*words) -> str:
    with pytest.raises(UserError) as refusal:
        train_gpt2.parse(list(words))
    return str(refusal.value)


def test_an_option_may_come_before_the_preset_and_be_spelled_as_elsewhere():
    one = train_gpt2.parse(["laptop", "--max-steps", "5", "--no-shuffle", "--out-dir=a"])
    for words in (
        ["--max-steps", "5", "--no-shuffle", "laptop", "--out-dir=a"],
        ["--max_steps=5", "--no_shuffle", "--out-dir", "a", "laptop"],
        ["laptop", "--max_steps=5", "--shuffle=False", "--out_dir", "a", "--compile=false"],
        ["laptop", "--no-shuffle=true", "--out-dir=a", "--max-steps=5", "--no-compile", "--no-compile=True"],
        ["laptop", "--no-shuffle", "--out-dir=a", "--max-steps=5", "--no-zero-init=False", "--zero-init"],
    ):
        assert train_gpt2.parse(words) == one
    assert train_gpt2.parse(["--out-dir", "laptop", "gpt2-124m"]).out_dir == "laptop"


def test_the_optimizer_typed_is_what_must_fit_the_shape_of_init_from(tmp_path):
    tokenizer = CharTokenizer("\nab", documents=False)
    save_run(tmp_path / "bigram", random_model(tokenizer.vocab_size, n_layer=0), tokenizer, data="pydocs")
    words = ["laptop", f"--init-from={tmp_path / 'bigram'}"]
    assert train_gpt2.parse([*words, "--optimizer", "adamw"]).n_layer == 0
    assert "--n-layer 0 has none: use adamw" in answer(*words)
    assert "--optimizer" in answer(*words, "--optimizer=sgd")


def test_the_micro_batch_of_a_preset_is_an_upper_bound_and_a_typed_one_is_kept(monkeypatch):
    assert train_gpt2.parse(["laptop"]).micro_batch == 16
    assert train_gpt2.parse(["laptop", "--batch-tokens", str(24 * 128)]).micro_batch == 12
    assert train_gpt2.parse(["laptop", "--micro-batch", "auto"]).micro_batch == "auto"
    assert "--micro-batch 16 " in answer("laptop", "--micro-batch", "16", "--batch-tokens", str(24 * 128))
    assert "--batch-tokens 2000 " in answer("laptop", "--batch-tokens", "2000")
    for processes in (2, 4, 8, 16):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        config = train_gpt2.parse(["laptop"])
        assert config.micro_batch == config.sequences_per_rank(processes) == 16 // processes


@pytest.mark.parametrize("name", train_gpt2.PRESETS)
def test_the_help_has_every_option_with_the_value_of_the_preset_in_100_columns(name):
    shown = command_line.show([name, "--help"], train_gpt2.PRESETS).splitlines()
    assert max(map(len, shown)) <= 100 and len(shown) < 90
    config = train_gpt2.PRESETS[name][1]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = as_flag(field.name) if not isinstance(value, bool) else f"--[no-]{as_flag(field.name)[2:]}"
        (line,) = [line for line in shown if line[2:].split()[:1] == [flag]]
        assert line.startswith("*") == (value != field.default)
        if not isinstance(value, bool) and value not in ("", None, ()):
            assert line.split()[1 + line.startswith("*")] == str(value)


def test_the_names_of_other_repositories_lead_to_options_and_presets_that_exist():
    fields = {as_flag(field.name) for field in dataclasses.fields(train_gpt2.Config)}
    for name, hint in command_line.OTHER_NAMES.items():
        assert as_flag(name) not in fields
        assert f"there is no option --{name}: use " in answer("laptop", f"--{name}", "1")
        assert not hint.startswith("--") or hint.split()[0].strip(",:") in fields, hint
    for name, preset in command_line.OTHER_PRESETS.items():
        assert f"did you mean {preset}?" in answer(name)


def test_without_a_preset_all_are_shown_with_an_example_each(capsys):
    for words in ([], ["--help"]):
        train_gpt2.main(words)
        shown = capsys.readouterr().out
        assert "    python train_gpt2.py laptop\n" in shown
        assert all(f"train_gpt2.py {name}\n" in shown for name in train_gpt2.PRESETS)

"""sample.py: what it writes, when a sample ends, which of several is printed, and what it says about mistakes."""

import subprocess
import sys

import pytest
import torch
from runs import ROOT, random_model, save_run

import model as gpt
import sample as sampling
from data import text
from data.shards import open_split
from data.tokenizer import CharTokenizer, from_spec

TOKENIZER = CharTokenizer("\n Tabcdefg", documents=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on documents with random weights: its samples have different lengths."""
    return save_run(tmp_path_factory.mktemp("runs") / "run", random_model(TOKENIZER.vocab_size), TOKENIZER)


@pytest.fixture
def write(capsys):
    """A function: call sample.py, return what it prints."""

    def call(*options):
        sampling.main([*map(str, options)])
        return capsys.readouterr().out

    return call


@pytest.fixture
def error_of(capsys):
    """A function: call sample.py, return the one error line that it ends with."""

    def call(*options):
        with pytest.raises(SystemExit) as end:
            sampling.main([*map(str, options)])
        out, error = capsys.readouterr()
        assert (end.value.code, out, error.count("\n")) == (2, "", 1) and error.startswith("error: ")
        return error

    return call


def model_that_writes(words, tokenizer=TOKENIZER):
    """A GPT that writes `words` from its first position on, with "|" for end-of-text, whatever it reads."""
    ids = [tokenizer.eot if c == "|" else int(tokenizer.encode(c)[0]) for c in words]
    V = tokenizer.vocab_size
    model = gpt.GPT(gpt.GPTConfig(n_layer=0, n_head=1, n_embd=V, block_size=len(ids), vocab_size=V)).eval()
    with torch.no_grad():
        model.transformer.wte.weight[:V] = torch.eye(V)
        model.transformer.wpe.weight.copy_(100 * torch.eye(V)[ids])
        model.transformer.ln_f.weight.fill_(30.0)
    return model


def test_a_sample_ends_where_its_document_ends(tmp_path, write):
    folder = save_run(tmp_path / "run", model_that_writes("ab|cd|" * 4), TOKENIZER)
    assert write(folder) == "ab\n"
    assert write(folder, "--num-samples", 2) == f"ab\n{'-' * 80}\n" * 2
    assert write(folder, "--no-stop", "--max-new-tokens", 8) == "ab\ncd\nab\n"  # end-of-text reads as a newline
    assert write(folder, "--prompt", "a") == "ab\n"


def test_samples_are_continuations_of_the_prompt_drawn_with_the_seed(run, write):
    options = ("--no-stop", "--prompt", "Tea ", "--max-new-tokens", 40)
    streamed = write(run, *options)
    assert streamed.startswith("Tea ") and len(streamed) == 4 + 40 + 1
    assert write(run, *options) == streamed != write(run, *options, "--seed", 2)
    assert write(run, *options, "--no-cache") == streamed
    several = write(run, *options, "--num-samples", 3).split(f"\n{'-' * 80}\n")
    assert several.pop() == "" and len(set(several)) == 3 and all(sample.startswith("Tea ") for sample in several)
    assert len(write(run, "--no-stop", "--max-new-tokens", 50, "--top-k", 5, "--top-p", "0.9")) == 51


def test_the_prompt_may_come_from_a_file_or_from_standard_input(run, write, tmp_path):
    (tmp_path / "prompt.txt").write_text("Tea\nbag\n", encoding="utf-8")
    typed = write(run, "--prompt", "Tea\nbag")
    assert write(run, "--prompt-file", tmp_path / "prompt.txt") == typed
    command = [sys.executable, ROOT / "sample.py", run, "--prompt-file", "-"]
    assert subprocess.run(command, input="Tea\nbag\n", capture_output=True, text=True).stdout == typed


def test_best_of_prints_the_sample_with_the_highest_mean_log_probability(run, write):
    model = random_model(TOKENIZER.vocab_size)
    several = write(run, "--num-samples", 9, "--max-new-tokens", 12).split(f"\n{'-' * 80}\n")[:-1]
    assert len({len(sample) for sample in several}) > 3  # some end early

    def mean_log_probability(sample):
        ids = [TOKENIZER.eot, *TOKENIZER.encode(sample).tolist()] + [TOKENIZER.eot] * (len(sample) < 12)
        log_probabilities = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
        return log_probabilities.gather(1, torch.tensor(ids[1:])[:, None]).mean().item()

    best = max(several, key=mean_log_probability)
    assert write(run, "--best-of", 9, "--max-new-tokens", 12) == best + "\n" != several[0] + "\n"


def test_new_only_leaves_out_what_the_training_text_holds(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("\n".join(f"{a}{b}" for a in "abcd" for b in "abcd"), encoding="utf-8")
    text.prepare([tmp_path / "words.txt"], tmp_path / "data", lines=True)
    tokenizer = from_spec(open_split(tmp_path / "data", "train").tokenizer_spec)
    folder = save_run(tmp_path / "run", random_model(tokenizer.vocab_size), tokenizer, data=str(tmp_path / "data"))
    capsys.readouterr()
    options = [folder, "--num-samples", "200", "--max-new-tokens", "4", "--seed", "3"]
    sampling.main(options)
    drawn = capsys.readouterr().out.split(f"\n{'-' * 80}\n")[:-1]
    sampling.main([*options, "--new-only", "--no-stop"])
    out, err = capsys.readouterr()
    known = text.training_documents(tmp_path / "data")
    assert out.split("\n")[:-1] == [word for word in drawn if word and word not in known]
    assert set(drawn) & known and f"{out.count(chr(10))} of 200 are not in the training text" in err


def test_a_tokenizer_without_newline_and_end_of_text_starts_with_its_first_token(tmp_path, write):
    tokenizer = CharTokenizer("abc", documents=False)
    assert [gpt.start_tokens(t) for t in (tokenizer, CharTokenizer("\tT\n", False), TOKENIZER)] == [[0], [2], [10]]
    folder = save_run(tmp_path / "run", random_model(3), tokenizer)
    assert len(write(folder, "--max-new-tokens", 5)) == 6


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--prompt", "caf\u00e9 \u2603"], "lacks"),
        (["--prompt", "a", "--prompt-file", "b"], "give --prompt or --prompt-file, not both"),
        (["--prompt-file", "no/such/file"], "cannot read no/such/file"),
        (["--best-of", 2, "--num-samples", 2], "give --num-samples or --best-of, not both"),
        (["--best-of", 2, "--new-only"], "give --new-only or --best-of, not both"),
        (["--best-of", 0], "--best-of is 0, but must be at least 1"),
        (["--temperature", -1], "--temperature is -1.0"),
        (["--top-k", 0], "--top-k is 0"),
        (["--top-p", 0], "--top-p is 0"),
        (["--seed", 10**30], "--seed is 10"),
        (["--device", "gpu"], "--device gpu"),
        (["--kernels", "flash"], "flash"),
        (["--kernels", "attention"], "heads of 16 to 128 channels, and a head has 4: leave attention"),
        (["--no-such"], "--no-such"),
    ],
)
def test_a_wrong_option_is_named(run, error_of, options, expected):
    assert expected in error_of(run, *options)


def test_new_only_is_checked_before_anything_is_loaded(error_of):
    assert "gpt9 is not a run of train_gpt2.py" in error_of("gpt9", "--new-only")


def test_a_folder_of_runs_lists_them_and_a_run_without_a_checkpoint_says_so(run, tmp_path, error_of):
    runs = run.removesuffix("/run")
    assert f"{runs} is a folder of runs: give one of {run}" in error_of(runs)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_x.pt").write_text("no checkpoint", encoding="utf-8")
    assert f"{tmp_path} has no checkpoint yet" in error_of(tmp_path)


def test_model_py_names_sample_py_and_runs_it(tmp_path):
    words = [sys.executable, ROOT / "model.py", tmp_path / "none"]
    done = subprocess.run(words, capture_output=True, text=True)
    note, error = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and note.startswith("note: python sample.py writes text")
    assert error.startswith("error: ") and "none" in error
    shown = subprocess.run([*words[:2], "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--prompt" in shown.stdout

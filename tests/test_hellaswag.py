"""HellaSwag: scores against transformers and by hand, over any number of ranks; the file; the command."""

import functools
import hashlib
import http.server
import json
import math
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hellaswag_questions import QUESTIONS, write_questions
from runs import random_model, save_run

import model as gpt
from data.files import UserError
from data.tokenizer import CharTokenizer, gpt2
from training import weights as model_weights
from training.hellaswag import (
    Question,
    ending_losses,
    evaluate,
    is_validation_set,
    left_out,
    main,
    prepare_if_missing,
    read_questions,
    render,
    summary,
)

BLOCK_SIZE = 28  # tokens: shorter than some of the twenty questions, longer than others


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return read_questions(write_questions(tmp_path_factory.mktemp("questions") / "twenty.jsonl"))


@pytest.fixture(scope="module")
def theirs():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    theirs.save_pretrained(folder := tmp_path_factory.mktemp("hugging_face"))
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return model_weights.load(str(folder))[0]


@pytest.fixture(scope="module")
def characters(questions):
    return CharTokenizer.train("".join(text for q in questions for text in (q.ctx, *q.endings)), documents=False)


@pytest.fixture(scope="module")
def rendered(questions, characters):
    return render(questions, characters, block_size=256)  # all of it: the lengths differ


@pytest.fixture(scope="module")
def small(characters):
    """A GPT of characters: quick, and with weights so large that its answers differ."""
    torch.manual_seed(0)
    network = gpt.GPT(gpt.GPTConfig(2, 2, 32, block_size=256, vocab_size=characters.vocab_size)).eval()
    for parameter in network.parameters():
        parameter.data *= 10 if parameter.dim() == 2 else 1
    return network


# ------------------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def losses_by_transformers(theirs, question):
    """One row at a time, nothing padded, through the loss of transformers itself: sums and means of four endings."""
    encode = gpt2().encode
    sums, means = [], []
    for ending in question.endings:
        n = len(encode(f" {ending}"))
        row = np.concatenate([encode(question.ctx), encode(f" {ending}")]).astype(np.int64)[-BLOCK_SIZE - 1 :]
        tokens = torch.from_numpy(row)[None]
        labels = tokens.clone()
        labels[:, :-n] = -100
        means.append(theirs(input_ids=tokens, labels=labels).loss.item())
        sums.append(means[-1] * n)
    return sums, means


def test_our_gpt_and_transformers_agree_on_every_loss_and_on_the_scores(questions, theirs, ours):
    rendered = render(questions, gpt2(), BLOCK_SIZE)
    assert any(len(row) == BLOCK_SIZE + 1 for question in rendered for row in question.rows)  # some are cut
    judged = [losses_by_transformers(theirs, question) for question in questions]
    expected = torch.tensor([sums for sums, _ in judged], dtype=torch.float64)
    for logits_of in (ours, lambda tokens: theirs(tokens).logits):
        torch.testing.assert_close(ending_losses(logits_of, rendered, "cpu"), expected, rtol=0, atol=1e-4)
        correct = sum(np.argmin(sums) == q.label for q, (sums, _) in zip(questions, judged, strict=True))
        correct_norm = sum(np.argmin(means) == q.label for q, (_, means) in zip(questions, judged, strict=True))
        assert evaluate(logits_of, rendered, 3, "cpu").tolist() == [correct, correct_norm, 20]
    assert 0 < correct_norm < 20 and correct != correct_norm  # so that counting all, none or the wrong one shows


def test_every_number_of_ranks_gives_the_same_counts_from_the_same_batches(rendered, small):
    alone = evaluate(small, rendered, 3, "cpu")
    for world_size in (1, 2, 3, 4, 9):  # seven batches: no number of ranks but the first shares them evenly
        total, seen = torch.zeros(3, dtype=torch.int64), []
        for rank in range(world_size):
            calls = []

            def logits_of(tokens, calls=calls):
                calls.append(tokens.tolist())
                return small(tokens)

            total += evaluate(logits_of, rendered, 3, "cpu", rank, world_size)
            assert len(calls) == math.ceil(7 / world_size)  # all ranks call equally often: a sharded model hangs else
            seen += calls
        assert total.tolist() == alone.tolist()
        assert len({str(batch) for batch in seen}) == 7


def test_the_batch_size_does_not_matter_and_similar_lengths_share_a_batch_the_longest_first(rendered, small):
    together = ending_losses(small, rendered, "cpu")
    one_by_one = torch.cat([ending_losses(small, [question], "cpu") for question in rendered])
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-4)
    assert len({tuple(evaluate(small, rendered, batch, "cpu").tolist()) for batch in (1, 7, 20, 50)}) == 1
    shapes = []
    evaluate(lambda tokens: shapes.append(tokens.shape) or small(tokens), rendered[::-1], 3, "cpu")
    lengths = sorted((max(map(len, question.rows)) - 1 for question in rendered), reverse=True)
    assert shapes == [(12, T) for T in lengths[:18:3]] + [(8, lengths[18])]


def test_a_model_that_knows_the_answers_is_always_right_and_its_opposite_never(rendered, characters):
    next_token = {}  # what was read so far -> the token with which the right ending goes on
    for question in rendered:
        row = question.rows[question.label].tolist()
        next_token |= {tuple(row[:n]): row[n] for n in range(1, len(row))}

    def knowing(tokens, certainty=20.0):
        logits = torch.zeros(*tokens.shape, characters.vocab_size)
        for b, row in enumerate(tokens.tolist()):
            for t in range(len(row)):
                if tuple(row[: t + 1]) in next_token:
                    logits[b, t, next_token[tuple(row[: t + 1])]] = certainty
        return logits

    assert evaluate(knowing, rendered, 4, "cpu").tolist() == [20, 20, 20]
    assert evaluate(lambda tokens: knowing(tokens, -20.0), rendered, 4, "cpu").tolist()[1:] == [0, 20]
    assert evaluate(lambda tokens: knowing(tokens, math.nan), rendered, 4, "cpu").tolist() == [0, 0, 20]


def constant_logits(tokens):
    """Whatever was read, " " has probability 1/2, "a" 1/4, "b" and "c" 1/8: losses of 1, 2, 3 and 3 times ln 2."""
    return torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(*tokens.shape, 4)


def test_an_example_worked_out_by_hand():
    tokenizer = CharTokenizer(" abc", documents=False)
    question = Question("cab", ("b", "a  ", "cc", "a  "), label=1)
    rendered = render([question], tokenizer, block_size=16)
    assert rendered[0].rows[1].tolist() == [3, 1, 2, 0, 1, 0, 0]
    assert rendered[0].scored == (2, 4, 3, 4)
    losses = ending_losses(constant_logits, rendered, "cpu") / math.log(2)
    assert losses.tolist()[0] == pytest.approx([1 + 3, 1 + 2 + 1 + 1, 1 + 3 + 3, 5], rel=1e-6)
    # The lowest sum is that of "b", 4. The lowest mean, 5/4, is that of "a  " twice: the first of them counts.
    assert evaluate(constant_logits, rendered, 1, "cpu").tolist() == [0, 1, 1]


def test_of_a_long_text_the_last_tokens_are_read():
    tokenizer = CharTokenizer(" abc", documents=False)
    rendered = render([Question("abc" * 9, ("a", "bbb", "c" * 9, ""), 0)], tokenizer, block_size=5)[0]
    assert tokenizer.decode(rendered.rows[0]) == "cabc a"
    assert tokenizer.decode(rendered.rows[1]) == "bc bbb"
    assert tokenizer.decode(rendered.rows[2]) == "cccccc"  # of which the first is read only
    assert rendered.scored == (2, 4, 5, 1)
    assert all(len(row) == 6 for row in rendered.rows)


def test_under_autocast_losses_are_still_summed_in_full_precision(rendered, small):
    with torch.autocast("cpu", torch.bfloat16):
        rough = ending_losses(small, rendered, "cpu")
        again = ending_losses(lambda tokens: small(tokens).float(), rendered, "cpu")
    assert rough.dtype == torch.float64
    assert rough.tolist() == again.tolist()
    assert rough.sub(ending_losses(small, rendered, "cpu")).abs().max() < 2.0


def test_a_character_tokenizer_leaves_out_what_it_lacks():
    tokenizer = CharTokenizer(" abc", documents=True)
    questions = [Question("a-b", ("c!", "a", "b", "c"), 0), Question("abc", ("a", "b", "c", "cc"), 0)]
    rendered = render(questions, tokenizer, 16)
    assert tokenizer.decode(rendered[0].rows[0]) == "ab c"
    assert tokenizer.decode(rendered[1].rows[3]) == "abc cc"
    assert left_out(questions, tokenizer) == "the char tokenizer lacks 2 characters, '!-': 1 of 2 are read without them"
    assert left_out(questions[1:], tokenizer) == ""
    assert left_out(questions, gpt2()) == ""
    foreign = Question("一二", ("a", "b", "a", "b"), 0)
    with pytest.raises(UserError, match="question 2 .*char tokenizer knows no character"):
        render([questions[1], foreign], tokenizer, 16)


# ------------------------------------------------------------------------------------------------------------ the file


def test_the_twenty_questions_are_read_with_labels_as_numbers_or_text(tmp_path, questions):
    assert len(questions) == 20
    assert questions[3] == Question(QUESTIONS[3]["ctx"], tuple(QUESTIONS[3]["endings"]), 1)
    assert Counter(question.label for question in questions) == {0: 5, 1: 5, 2: 5, 3: 5}
    as_text = [{**question, "label": str(question["label"])} for question in QUESTIONS]
    path = write_questions(tmp_path / "text.jsonl", as_text)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert read_questions(path) == questions


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda q: q.pop("ctx"), "missing ctx"),
        (lambda q: (q.pop("endings"), q.pop("label")), "missing endings, label"),
        (lambda q: q.update(ctx=""), "ctx must be a text that is not empty"),
        (lambda q: q.update(ctx=["a"]), "ctx must be a text"),
        (lambda q: q["endings"].pop(), "endings must be a list of 4 texts"),
        (lambda q: q.update(endings="abcd"), "endings must be a list of 4 texts"),
        (lambda q: q["endings"].__setitem__(2, None), "endings must be a list of 4 texts"),
        (lambda q: q.update(label=4), "label is '4', but must be 0 to 3"),
        (lambda q: q.update(label=-1), "label is '-1'"),
        (lambda q: q.update(label=""), "label is ''"),
        (lambda q: q.update(label=True), "label is 'True'"),
        (lambda q: q.update(label=1.5), "label is '1.5'"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, change, complaint):
    change(wrong := json.loads(json.dumps(QUESTIONS[1])))
    path = write_questions(tmp_path / "wrong.jsonl", [QUESTIONS[0], wrong])
    with pytest.raises(UserError, match=f"wrong.jsonl, line 2.*{complaint}"):
        read_questions(path)


def test_corrupt_and_other_files_are_refused(tmp_path):
    path = write_questions(tmp_path / "corrupt.jsonl")
    content = path.read_bytes()
    for line in (b'{"ctx": "A man', b"caf\xe9", b"[" * 100_000, b'{"label": 1' + b"1" * 5000 + b"}", b"\x00"):
        path.write_bytes(content + line)
        with pytest.raises(UserError, match="corrupt.jsonl, line 21 is corrupt"):
            read_questions(path)
    (tmp_path / "empty.jsonl").write_text("\n \n", encoding="utf-8")
    (tmp_path / "list.jsonl").write_text("[1, 2]\n", encoding="utf-8")
    for name, complaint in (
        ("empty.jsonl", "empty.jsonl is empty"),
        ("list.jsonl", "line 1: not a HellaSwag question: missing ctx, endings, label"),
        ("none.jsonl", "cannot read the questions in .*none.jsonl: No such file"),
        ("", "cannot read the questions in .*: Is a directory"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_questions(tmp_path / name)


# -------------------------------------------------------------------------------------------------------- the download


def test_several_processes_download_once_and_keep_what_has_the_checksum(tmp_path):
    content, requests = write_questions(tmp_path / "served.jsonl").read_bytes(), []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    folder, serve = tmp_path / "datasets" / "hellaswag", functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server, ThreadPoolExecutor(5) as pool:
        pool.submit(server.serve_forever)
        url, sha256 = f"http://127.0.0.1:{server.server_port}/served.jsonl", hashlib.sha256(content).hexdigest()
        found = list(pool.map(lambda _: prepare_if_missing("", folder, url, sha256), range(4)))
        server.shutdown()
    assert found == [folder / "hellaswag_val.jsonl"] * 4
    assert len(requests) == 1
    assert found[0].read_bytes() == content
    assert prepare_if_missing("", folder, "http://127.0.0.1:9/", sha256) == found[0]  # needs no network any more
    found[0].write_bytes(content[:-9])
    with pytest.raises(UserError, match="sha256 mismatch for .*hellaswag_val.jsonl, .*: delete it"):
        prepare_if_missing("", folder, url, sha256)


def test_another_file_is_not_kept_and_without_network_the_error_names_the_way_out(tmp_path):
    served = write_questions(tmp_path / "other.jsonl").as_uri()
    for url, complaint in [
        (served, "which is not HellaSwag's validation set .*--hellaswag-input FILE"),
        ("file:///no/such/file", "cannot download .*--input FILE"),
    ]:
        with pytest.raises(UserError, match=complaint):
            prepare_if_missing(folder=tmp_path / "out", url=url)
        assert not list((tmp_path / "out").glob("*.jsonl"))


# --------------------------------------------------------------------------------------------------------- the command


def command(monkeypatch, capsys, *words):
    """Runs the command. Return what it prints on stdout and on stderr, and its exit status."""
    monkeypatch.setattr(sys, "argv", ["training.hellaswag", *map(str, words)])
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return out, err, status


def test_the_command_scores_a_hugging_face_folder_and_a_run_with_its_own_tokenizer(
    tmp_path, monkeypatch, capsys, questions, ours, folder
):
    letters = CharTokenizer.train("abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ", documents=True)
    network = random_model(letters.vocab_size, block_size=32, dropout=0.9)  # which scoring must switch off
    run = save_run(tmp_path / "run", network, letters)
    path = write_questions(tmp_path / "twenty.jsonl")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    lacking = "warning: HellaSwag: the char tokenizer lacks 3 characters, '.[]': 20 of 20 are read without them"
    for name, model, tokenizer, note in ((folder, ours, gpt2(), ""), (run, network, letters, lacking)):
        words = ("--model", name, "--input", path, "--batch", 6, "--device", "cpu")
        out, err, status = command(monkeypatch, capsys, *words)
        rendered = render(questions, tokenizer, model.config.block_size)
        correct, correct_norm, _ = evaluate(model, rendered, 6, "cpu").tolist()
        scores = f"{name}: 20 questions, acc {correct / 20:.4f}, acc_norm {correct_norm / 20:.4f} (standard "
        assert status == 0 and out.startswith(scores) and note in err
        assert "OpenAI" not in out  # these are not the questions of the published scores
    assert {path.name for path in tmp_path.iterdir()} == {"run", "twenty.jsonl"}


def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, monkeypatch, capsys, folder):
    path = write_questions(tmp_path / "twenty.jsonl")
    for words, complaint in (
        (["--model", tmp_path / "none", "--input", path], "error: there is no model"),
        (["--model", folder, "--input", path, "--batch", "0"], "error: --batch is 0, but must be at least 1"),
        (["--model", folder, "--input", tmp_path / "none"], "error: cannot read the questions in"),
        (["--model", folder, "--input", path, "--device", "gpu"], "error: --device gpu cannot be used"),
        (["--input", path], "error: "),
    ):
        out, err, status = command(monkeypatch, capsys, *words)
        assert (out, status) == ("", 2)
        assert err.startswith(complaint) and err.count("\n") == 1, err


def test_only_the_validation_set_is_compared_with_published_scores(tmp_path):
    assert not is_validation_set(write_questions(tmp_path / "twenty.jsonl"))
    counts = torch.tensor([2859, 2967, 10042])
    assert summary("gpt2", counts, comparable=True) == (
        "gpt2: 10,042 questions, acc 0.2847, acc_norm 0.2955 (standard error 0.0046; guessing 0.25, "
        "OpenAI's GPT-2 (124M) 0.2955)"
    )

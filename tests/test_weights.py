"""Hugging Face's folders, in and out: transformers as the judge of what is written, and the writer of what is read."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import tiktoken
import torch
import transformers
from runs import limit_files, random_model, save_run
from safetensors.torch import load_file, save_file
from tiktoken_ext.openai_public import r50k_pat_str

import model as gpt
import sample as sampling
from data.files import UserError
from data.tokenizer import BytePairTokenizer, CharTokenizer, gpt2
from training import weights as model_weights

TEXT = "Hello, world! It's  twice\n\n   as long.  "
ABC = CharTokenizer("abc", documents=False)


def assert_transformers_agrees(folder, model, tokenizer):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokens = torch.randint(0, model.config.vocab_size, (3, 20))
    judged = theirs(tokens, labels=tokens)
    torch.testing.assert_close(model(tokens), judged.logits, rtol=1e-5, atol=1e-5)
    loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    torch.testing.assert_close(loss, judged.loss, rtol=1e-5, atol=1e-5)
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == tokenizer.eot
    assert theirs.config.vocab_size == tokenizer.vocab_size and theirs.config.n_positions == 24

    reader = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT).tolist()
    assert reader(TEXT)["input_ids"] == ids
    assert reader.decode(ids) == TEXT
    assert (len(reader), reader.eos_token_id) == (tokenizer.vocab_size, tokenizer.eot)
    assert reader.model_max_length == 24


def refusal(folder):
    with pytest.raises(UserError) as error:
        model_weights.load(str(folder))
    return str(error.value)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """transformers' GPT-2 with random weights, and the folder that it was saved in."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=24, n_embd=16, n_layer=2, n_head=4, vocab_size=150)
    judge = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("judge")
    judge.save_pretrained(folder)
    return judge, folder


@pytest.fixture
def copy(judge, tmp_path):
    """A copy of that folder, to be changed."""
    for path in judge[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(gpt2, id="gpt2"),
        pytest.param(lambda: CharTokenizer.train(TEXT + "x", documents=True), id="char with documents"),
        pytest.param(lambda: CharTokenizer.train(TEXT + "x", documents=False), id="char"),
    ],
)
def test_a_run_goes_to_transformers_and_back_without_a_changed_bit(tokenizer, tmp_path, capsys):
    tokenizer = tokenizer()
    model = random_model(tokenizer.vocab_size)
    run = save_run(tmp_path / "run", model, tokenizer)
    folder = str(tmp_path / "new" / "export")
    sampling.main([run, "--export", folder])
    assert folder in capsys.readouterr().out
    assert_transformers_agrees(folder, model, tokenizer)

    back, its_tokenizer = model_weights.load(folder)
    assert its_tokenizer == tokenizer and back.config == model.config and not back.training
    for name, tensor in model.state_dict().items():
        tokens = tokenizer.vocab_size if "wte" in name else len(tensor)
        assert torch.equal(back.state_dict()[name][:tokens], tensor[:tokens]), name
        assert not back.state_dict()[name][tokens:].any()

    sampling.main([run, "--prompt", "t", "--max-new-tokens", "8"])
    text = capsys.readouterr().out
    sampling.main([folder, "--prompt", "t", "--max-new-tokens", "8"])
    assert capsys.readouterr().out == text
    sampling.main([folder, "--export", str(tmp_path / "again")])
    for path in Path(folder).iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_trained_bpe_goes_to_transformers(tmp_path):
    ranks = {token: rank for token, rank in gpt2().encoding._mergeable_ranks.items() if rank < 1000}
    special = {"<|endoftext|>": 1000}
    encoding = tiktoken.Encoding("bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    tokenizer = BytePairTokenizer(encoding, {"type": "bpe"})
    model = random_model(1001)
    model_weights.export(tmp_path / "export", model, tokenizer)
    assert_transformers_agrees(str(tmp_path / "export"), model, tokenizer)


def test_the_tokenizer_files_of_gpt2_are_openais_byte_for_byte_and_no_others_pass_for_them(tmp_path):
    folder = tmp_path / "export"
    model_weights.export(folder, random_model(50257), gpt2())
    for name, sha256 in [
        ("vocab.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
        ("merges.txt", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    ]:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
    (folder / "tokenizer_spec.json").unlink()  # what transformers writes has none
    assert model_weights.load(str(folder))[1] == gpt2()
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["model"]["vocab"] |= {"Ġthe": 276, "ed": 262}  # of the same size, in another order
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert "has a tokenizer of its own in tokenizer.json, not gpt2's" in refusal(folder)


def test_dropout_and_a_model_without_blocks_are_exported_too(tmp_path):
    model = gpt.GPT(gpt.GPTConfig(0, 1, 8, 12, 3, dropout=0.25)).eval()
    model_weights.export(tmp_path / "export", model, ABC)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "export").eval()
    config = theirs.config
    assert config.attn_pdrop == config.embd_pdrop == config.resid_pdrop == 0.25
    tokens = torch.tensor([[0, 2, 1]])
    torch.testing.assert_close(theirs(tokens).logits, model(tokens))


def test_an_export_never_touches_what_is_there(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("work", encoding="utf-8")
    for there in (tmp_path / "full", tmp_path / "full" / "precious"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            model_weights.export(there, random_model(3), ABC)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "precious").read_text("utf-8") == "work"
    (tmp_path / "empty").mkdir()
    model_weights.export(tmp_path / "empty", random_model(3), ABC)
    assert model_weights.load(str(tmp_path / "empty"))[1] == ABC
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"):
        model_weights.export(tmp_path / "file" / "export", random_model(3), ABC)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path):
    run = save_run(tmp_path / "run", random_model(3), ABC)
    command = [sys.executable, sampling.__file__, run, "--export", str(tmp_path / "export")]
    done = subprocess.run(command, preexec_fn=limit_files(10_000), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}/export could not be written (")
    assert "File too large" in done.stderr and "make room on that disk" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model_weights.export(tmp_path / "export", random_model(3), ABC)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- reading


def test_all_that_transformers_may_write_is_read(judge, tmp_path):
    judge, folder = judge
    tokens = torch.randint(0, 150, (2, 24))
    expected = judge(tokens).logits
    shards = tmp_path / "sharded"
    judge.save_pretrained(shards, max_shard_size="10KB")
    assert not (shards / "model.safetensors").exists() and len(list(shards.glob("*.safetensors"))) > 2
    old = tmp_path / "old"  # as OpenAI's are published: no "transformer." in front, the masks stored, the head twice
    old.mkdir()
    weights = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    names = [f"h.{i}.attn.{name}" for i in (0, 1) for name in ("bias", "masked_bias")]
    masks = {name: torch.ones(24, 24).tril()[None, None] for name in names}
    save_file(weights | masks | {"lm_head.weight": weights["wte.weight"].clone()}, old / "model.safetensors")
    (old / "config.json").write_bytes((folder / "config.json").read_bytes())
    for path in (folder, shards, old):
        ours = model_weights.from_hugging_face(str(path)).eval()
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_half_the_size_become_float32_and_outlive_their_file(copy, dtype):
    weights = load_file(copy / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, copy / "model.safetensors")
    ours = model_weights.from_hugging_face(str(copy)).state_dict()
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    with (copy / "model.safetensors").open("r+b") as file:  # in place: a mapped file would change under the model
        file.seek(1000)
        file.write(b"\xff" * (Path(file.name).stat().st_size - 1000))
    half = weights["transformer.h.0.mlp.c_fc.weight"].to(dtype).float().t()
    assert torch.equal(ours["transformer.h.0.mlp.c_fc.weight"], half)
    wpe = weights["transformer.wpe.weight"].to(dtype).float()
    assert torch.equal(ours["transformer.wpe.weight"], wpe)  # copied, not only transposed


@pytest.mark.parametrize(
    "field, value",
    [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-3),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("n_inner", 32),
    ],
)
def test_variants_of_gpt2_that_this_model_is_not_are_refused(copy, field, value):
    edit(copy / "config.json", **{field: value})
    assert "variant of GPT-2" in refusal(copy) and field in refusal(copy)


def test_a_head_of_its_own_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"] + 1}, copy / "model.safetensors")
    assert "its head is not tied to its embedding" in refusal(copy)


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("n_layer", 3, "do not fit its shape: they have 2 blocks, its configuration says 3"),
        ("n_layer", 1, "do not fit its shape: they have 2 blocks, its configuration says 1"),
        ("n_embd", 32, "do not fit its shape: .* size mismatch for transformer.wte.weight"),
        ("n_positions", 48, "size mismatch for transformer.wpe.weight.*24, 16.*48, 16"),
        ("vocab_size", 151, "size mismatch for transformer.wte.weight"),
        ("n_head", 3, "--n-embd 16 is not divisible by --n-head 3"),
        ("n_layer", "2", "config.json: n_layer is '2', not a whole number"),
    ],
)
def test_weights_that_do_not_fit_the_shape_are_refused(copy, field, value, said):
    edit(copy / "config.json", **{field: value})
    assert re.search(said, refusal(copy))


def test_files_that_are_missing_or_corrupt_are_named(copy):
    weights, content = copy / "model.safetensors", (copy / "model.safetensors").read_bytes()
    weights.write_bytes(content[:-10])
    assert "no weights for" in refusal(copy) and "model.safetensors: Error while" in refusal(copy)
    weights.rename(copy / "model-00001-of-00002.safetensors").write_bytes(content[:-10])
    assert "model-00001-of-00002.safetensors: Error while" in refusal(copy)
    (copy / "model-00001-of-00002.safetensors").unlink()
    assert f"no weights for '{copy}': model.safetensors: no such file; give a run's folder" in refusal(copy)
    (copy / "pytorch_model.bin").touch()
    assert "no such file (transformers can convert pytorch_model.bin, a pickle" in refusal(copy)
    (copy / "config.json").write_text("[]", encoding="utf-8")
    assert "config.json: it is list, not an object" in refusal(copy)
    (copy / "config.json").write_text("{", encoding="utf-8")
    assert "config.json: Expecting property name" in refusal(copy)
    (copy / "config.json").unlink()
    assert "config.json: No such file" in refusal(copy)
    assert "there is no model gpt9: did you mean gpt2? use one of gpt2, gpt2-medium" in refusal("gpt9")


def test_another_tokenizers_tokens_are_refused(copy):
    assert "has 150 tokens, but its tokenizer, gpt2, has 50257" in refusal(copy)
    (copy / "tokenizer_spec.json").write_text(json.dumps(ABC.spec()), encoding="utf-8")
    assert "has 150 tokens, but its tokenizer, char, has 3" in refusal(copy)
    (copy / "tokenizer_spec.json").write_text('{"type": "elvish"}', encoding="utf-8")
    assert "elvish" in refusal(copy)


def test_init_from_takes_weights_of_the_same_shape_at_the_same_or_a_shorter_block_size(tmp_path):
    source = random_model(3)
    run = save_run(tmp_path / "run", source, ABC)
    model_weights.init_from(shorter := random_model(3, seed=1, block_size=9), run, ABC.spec())
    expected = source.state_dict() | {model_weights.WPE: source.transformer.wpe.weight[:9]}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in shorter.state_dict().items())
    for shape, said in (({"block_size": 25}, "--block-size 24 (now 25)"), ({"n_layer": 1}, "--n-layer 2 (now 1)")):
        with pytest.raises(UserError, match=re.escape(f"--init-from {run} has another shape: {said}")):
            model_weights.init_from(random_model(3, **shape), run, ABC.spec())
    with pytest.raises(UserError, match="has another tokenizer than --data"):
        model_weights.init_from(shorter, run, gpt2().spec())


# ----------------------------------------------------------------------------------------------------------- downloads


def test_a_download_is_read_only_when_its_content_is_openais(tmp_path, monkeypatch):
    judge = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=128, n_layer=1, n_head=2)).eval()
    revision, _ = model_weights.RELEASES["gpt2"]
    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / revision
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    url = f"https://huggingface.co/openai-community/gpt2/resolve/{revision}/model.safetensors"
    assert "cannot download gpt2" in refusal("gpt2") and f"put {url} into {snapshot}" in refusal("gpt2")

    judge.save_pretrained(snapshot)  # as that line says
    (snapshot / "config.json").unlink()
    assert "model.safetensors, which is not OpenAI's gpt2: delete it to download again" in refusal("gpt2")
    sha256 = hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(model_weights.RELEASES, "gpt2", (revision, sha256))
    ours, tokenizer = model_weights.load("gpt2")
    tokens = torch.randint(0, 50257, (2, 9))
    torch.testing.assert_close(ours(tokens), judge(tokens).logits, rtol=1e-5, atol=1e-5)
    assert tokenizer == gpt2() and ours.config == gpt.GPTConfig(n_layer=1, n_head=2, n_embd=128)

    sampling.main(["gpt2", "--export", "export"])
    again = transformers.GPT2LMHeadModel.from_pretrained("export").eval()
    assert torch.equal(again(tokens).logits, judge(tokens).logits)


def test_a_tied_matrix_may_have_the_heads_name_wrappers_in_its_name_and_rows_past_the_tokens(tmp_path, capsys):
    folder = tmp_path / "export"
    model_weights.export(folder, model := random_model(50257), gpt2())
    model.transformer.wte.weight.data[50257:] = 0.0  # padding is not exported
    (folder / "tokenizer_spec.json").unlink()
    held = load_file(folder / "model.safetensors")
    wte = torch.cat([held.pop("transformer.wte.weight"), torch.ones(7, 16)])
    held = {f"_orig_mod.{name}": tensor for name, tensor in held.items()} | {"lm_head.weight": wte}
    save_file(held, folder / "model.safetensors")
    edit(folder / "config.json", vocab_size=50264)
    again, tokenizer = model_weights.load(str(folder))
    assert tokenizer == gpt2() and capsys.readouterr().err.count("has 7 rows past gpt2's tokens: left out") == 1
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_weights_that_are_not_finite_and_mixtures_of_two_models_are_refused(copy):
    held = load_file(copy / "model.safetensors")
    save_file(held, copy / "model-00001-of-00002.safetensors")
    (copy / "model.safetensors").rename(copy / "model-00002-of-00002.safetensors")
    assert "is a mixture of two models" in refusal(copy)
    held["transformer.wpe.weight"][3, 2] = float("nan")
    save_file(held, copy / "model.safetensors")
    assert "not finite, first in transformer.wpe.weight" in refusal(copy)
    edit(copy / "config.json", model_type="gpt_neo")
    assert "model_type 'gpt_neo'" in refusal(copy)

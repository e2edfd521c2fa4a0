"""
Load a trained GPT with its tokenizer, start a new one from it, or export it for Hugging Face's transformers.

    model, tokenizer = load("runs/laptop")     a run's folder, a checkpoint file, gpt2, gpt2-xl ..., or

a Hugging Face folder:
    config.json                        the shape, and the choices that tell GPT-2's variants apart
    model.safetensors                  the weights, or in several files model-00001-of-00002.safetensors ...
    tokenizer.json, tokenizer_config.json, and for GPT-2's own tokenizer vocab.json and merges.txt
    tokenizer_spec.json                written by --export only: Tokenizer.spec(), which restores our tokenizer

Hugging Face's parameters have our names, with two differences: matrices are stored transposed (Conv1D), and
"transformer." may be missing.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

import kernels
from data.files import UserError, as_flag, as_user_error, meant, temporary
from data.outside import check_shape, parse_json
from data.tokenizer import END_OF_TEXT, Tokenizer, from_spec, gpt2
from data.tokenizer_json import tokenizer_json
from model import GPT, GPTConfig
from training.checkpoint import checkpoints, load_checkpoint, newest_checkpoint, one_line, plain_names

# fmt: off
RELEASES = {  # OpenAI's GPT-2s, huggingface.co/openai-community/NAME -> commit, sha256 of its model.safetensors
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519",
                   "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
# fmt: on
HEAD_SIZE = 64  # of all RELEASES

ONLY_GPT2 = {  # fields of config.json that change the arithmetic -> the values that GPT-2 has, the usual one first
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
SHAPE = {name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")} | {"block_size": "n_positions"}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # the matrices that are stored transposed
WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"
SPEC = "tokenizer_spec.json"
MOST_ADDED = 1024  # rows of an embedding past GPT-2's tokens: padding, or tokens that were added, such as [PAD]
ChooseOps = Callable[[GPTConfig], kernels.Ops]


def load(name: str, choose_ops: ChooseOps | None = None) -> tuple[GPT, Tokenizer]:
    """
    Return the model, in float32, on the CPU and in eval mode, and its tokenizer.

    name: a run's folder (its newest intact checkpoint is taken), a checkpoint file, one of RELEASES (downloaded once),
    or a Hugging Face folder. choose_ops: given the shape, returns the operations; PyTorch's by default.
    Raise UserError if there is no such model, or if it is corrupt or not a GPT-2.
    """
    path = Path(name)
    if not path.exists() and name not in RELEASES:
        known = [*RELEASES, *(str(folder.parent) for folder in sorted(Path("runs").glob("*/checkpoints")))]
        close = meant(name, known)
        hint = f"did you mean {close}? " if close else ""
        raise UserError(f"there is no model {name}: {hint}use one of {', '.join(known)}, or the folder of another")
    if path.is_file() or (path / "checkpoints").is_dir():
        checkpoint = load_checkpoint(path) if path.is_file() else newest_checkpoint(path)[1]
        if checkpoint is None:
            raise UserError(f"{path} has no checkpoint yet: train_gpt2.py writes one every --checkpoint-every steps")
        model = from_state_dict(checkpoint["config"], checkpoint["model"], name, choose_ops)
        return model, from_spec(checkpoint["tokenizer"])
    if runs := sorted(str(folder.parent) for folder in path.glob("*/checkpoints")):
        raise UserError(f"{path} is a folder of runs: give one of {', '.join(runs)}")
    model = from_hugging_face(name, choose_ops)
    tokenizer = _read_tokenizer(path, model.config.vocab_size)
    if added := model.config.vocab_size - tokenizer.vocab_size:
        print(f"note: {name} has {added} rows past {tokenizer.name}'s tokens: left out", file=sys.stderr)
        shape, state = dataclasses.asdict(model.config), model.state_dict()
        shape["vocab_size"] = tokenizer.vocab_size
        model = from_state_dict(shape, state | {WTE: state[WTE][: tokenizer.vocab_size]}, name, choose_ops)
    return model, tokenizer


def shape_of(name: str) -> dict[str, int]:
    """Return n_layer, n_head, n_embd and block_size of a run, a checkpoint or a Hugging Face folder that exists."""
    path = Path(name)
    run = checkpoints(path)[:1] or [path] * path.is_file()
    shape = load_checkpoint(run[0], verify=False)["config"] if run else _read_shape(path)
    return {field: shape[field] for field in SHAPE if field != "vocab_size"}


def init_from(model: GPT, name: str, tokenizer_spec: dict) -> None:
    """Copy the weights of the model called `name`, whose block size may be longer; UserError if the models differ."""
    source, tokenizer = load(name)
    if tokenizer.spec() != tokenizer_spec:
        raise UserError(f"--init-from {name} has another tokenizer than --data: prepare the text with its tokenizer")
    theirs, ours = dataclasses.asdict(source.config), dataclasses.asdict(model.config)
    differ = [field for field in SHAPE if theirs[field] != ours[field]]
    if differ and (differ != ["block_size"] or theirs["block_size"] < ours["block_size"]):
        pairs = ", ".join(f"{as_flag(field)} {theirs[field]} (now {ours[field]})" for field in differ)
        raise UserError(f"--init-from {name} has another shape: {pairs}")
    weights = source.state_dict()
    model.load_state_dict(weights | {WPE: weights[WPE][: ours["block_size"]]})


def from_state_dict(config: dict, weights: dict[str, Tensor], name: str, choose_ops: ChooseOps | None) -> GPT:
    """
    Return a GPT in eval mode that adopts these tensors, without initializing its own first.

    config: the fields of GPTConfig. weights: wte with or without its padding. UserError if the two do not match.
    """
    weights = plain_names(weights)
    blocks = sum(key.endswith(".ln_1.weight") for key in weights)
    with as_user_error(), torch.device("meta"):
        check_shape(config, {field: range(field != "n_layer", 2**31) for field in SHAPE} | {"dropout?": float})
        if config["n_layer"] != blocks:  # counted first: building a billion blocks would take hours
            sizes = f"they have {blocks} blocks, its configuration says {config['n_layer']}"
            raise ValueError(f"the weights of {name!r} do not fit its shape: {sizes}")
        shape = GPTConfig(**{field: config[field] for field in (*SHAPE, "dropout") if field in config})
        model = GPT(shape, choose_ops and choose_ops(shape))
    if WTE in weights and len(weights[WTE]) == model.config.vocab_size:
        padding = model.config.padded_vocab_size - model.config.vocab_size
        weights = weights | {WTE: F.pad(weights[WTE], (0, 0, 0, padding))}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"the weights of {name!r} do not fit its shape: {one_line(error)}") from error
    if bad := [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise UserError(f"the weights of {name!r} are not finite, first in {bad[0]}: nothing can be made of them")
    return model.eval()


def from_hugging_face(name: str, choose_ops: ChooseOps | None = None) -> GPT:
    """Return the model of one of RELEASES or of a Hugging Face folder; errors as in `load`."""
    folder = Path(name)
    if name in RELEASES and not folder.is_dir():
        weights = _read_tensors(_download(name))
        (V, C), T, L = weights[WTE].shape, len(weights[WPE]), sum("ln_1.weight" in key for key in weights)
        shape = dict(n_layer=L, n_head=C // HEAD_SIZE, n_embd=C, block_size=T, vocab_size=V)
    else:
        shape, single, weights = _read_shape(folder), folder / "model.safetensors", {}
        for path in [single] if single.exists() else sorted(folder.glob("model-*.safetensors")):
            tensors = _read_tensors(path)
            if twice := sorted(weights.keys() & tensors.keys()):
                raise UserError(f"{folder} is a mixture of two models: {path.name} holds {twice[0]} once more")
            weights |= tensors
        if not weights:
            pickled = list(folder.glob("pytorch_model*.bin"))
            hint = " (transformers can convert pytorch_model.bin, a pickle, which may run any code)" if pickled else ""
            raise _unreadable(single, f"no such file{hint}")
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights.setdefault(WTE, head)):  # tied, it may be stored once
        raise UserError(f"{name!r} is a variant of GPT-2 that is not supported: its head is not tied to its embedding")
    return from_state_dict(shape, weights, name, choose_ops)


def _download(name: str) -> Path:
    """
    Return the path of a release's weights in huggingface_hub's cache, downloading them if missing.

    huggingface_hub checks only the size of a download and trusts its cache, so the sha256 is checked at every load.
    """
    revision, sha256 = RELEASES[name]
    repository, file_name = f"openai-community/{name}", "model.safetensors"
    huggingface_hub.logging.set_verbosity_error()  # its warnings repeat the error below
    try:
        path = Path(huggingface_hub.hf_hub_download(repository, file_name, revision=revision))
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # whose text is a page about the hub's cache
        url = huggingface_hub.hf_hub_url(repository, file_name, revision=revision)
        folder = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--openai-community--{name}/snapshots/{revision}")
        raise UserError(f"cannot download {name} ({type(error).__name__}): put {url} into {folder}") from error
    if found != sha256:
        raise UserError(f"sha256 mismatch for {path}, which is not OpenAI's {name}: delete it to download again")
    return path


def _read_shape(folder: Path) -> dict[str, int]:
    """Return the shape in config.json; raise UserError if it is a variant of GPT-2 that computes something else."""
    shape = {theirs: range(theirs != "n_layer", 2**31) for theirs in SHAPE.values()}
    config = _read_json(folder / "config.json", shape | {"n_inner?": (int, None)})
    if (kind := config.get("model_type", "gpt2")) != "gpt2":
        raise UserError(f"{folder} is not a GPT-2: its config.json says model_type {kind!r}")
    other = {field: config[field] for field, good in ONLY_GPT2.items() if config.get(field, good[0]) not in good}
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        other["n_inner"] = config["n_inner"]
    if other:
        raise UserError(f"{folder} is a variant of GPT-2 that is not supported: {other}")
    return {ours: config[theirs] for ours, theirs in SHAPE.items()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file under our names and in our layout: copies, since the file is memory-mapped."""
    weights = {}
    try:
        for theirs, tensor in plain_names(safetensors.torch.load_file(path)).items():
            name = theirs if theirs.startswith(("transformer.", "lm_head.")) else f"transformer.{theirs}"
            if not tensor.is_floating_point():
                raise UserError(f"{path} holds {theirs} as {tensor.dtype}: only floating-point weights are read")
            if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, which old versions stored
                weights[name] = transpose_conv1d(name, tensor.to(torch.float32, copy=True))
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return weights


def transpose_conv1d(name: str, tensor: Tensor) -> Tensor:
    """Convert the tensor of that name from Hugging Face's layout to ours, or back."""
    return tensor.t().contiguous() if name.endswith(CONV1D) else tensor


def _read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder: the one that --export wrote, else GPT-2's."""
    exported = (folder / SPEC).is_file()
    tokenizer = from_spec(_read_json(folder / SPEC)) if exported else gpt2()
    size, eot = tokenizer.vocab_size, tokenizer.eot
    if vocab_size != size and (exported or not size < vocab_size <= size + MOST_ADDED):
        raise UserError(f"{str(folder)!r} has {vocab_size} tokens, but its tokenizer, {tokenizer.name}, has {size}")
    files = {"tokenizer.json": {"model": {"vocab": dict, "merges?": list}}, "vocab.json": dict}
    for file_name in [name for name in files if (folder / name).is_file()][:1]:
        content, ours = _read_json(folder / file_name, files[file_name]), tokenizer_json(tokenizer)["model"]
        theirs = content["model"] if file_name == "tokenizer.json" else {"vocab": content}
        known = {token: i for token, i in theirs["vocab"].items() if type(i) is not int or i < size}  # without [PAD]
        known |= {END_OF_TEXT: eot} if eot is not None else {}  # may be listed apart
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in theirs.get("merges", ())]
        if known != ours["vocab"] or (merges and merges != ours.get("merges")):
            other = f"{folder} has a tokenizer of its own in {file_name}, not {tokenizer.name}'s"
            raise UserError(f"{other}: only one that --export wrote is read")
    return tokenizer


def _read_json(path: Path, shape=dict) -> dict:
    try:
        return parse_json(path, shape)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, reason: Exception | str) -> UserError:
    reason = one_line(getattr(reason, "strerror", None) or reason)
    known = f"a run's folder, one of {', '.join(RELEASES)} (a download), or a folder"
    hint = f"give {known} with config.json and model.safetensors"
    return UserError(f"no weights for {str(path.parent)!r}: {path.name}: {reason}; {hint}")


# ----------------------------------------------------------------------------------------------------------- exporting


def export(folder: str | os.PathLike, model: GPT, tokenizer: Tokenizer) -> None:
    """
    Write a folder for transformers' GPT2LMHeadModel and AutoTokenizer, and for `load`: all of it or nothing.

    Raise UserError if the folder exists and is not empty, or if it cannot be written.
    """
    folder, config, weights = Path(folder).resolve(), model.config, model.state_dict()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: --export takes the name of a new one")
    weights |= {WTE: weights[WTE][: config.vocab_size]}
    texts = _json_files(config, tokenizer)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary(folder, folder=True) as new:
            for file_name, text in texts.items():
                (new / file_name).write_text(text, encoding="utf-8")
            theirs = {key: transpose_conv1d(key, tensor).contiguous() for key, tensor in weights.items()}
            safetensors.torch.save_file(theirs, new / "model.safetensors", metadata={"format": "pt"})
            for path in new.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            new.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be written ({one_line(error)}): make room on that disk") from error


def _json_files(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """Return file name -> text, for transformers and for `load`."""
    fields = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32"}
    fields |= {theirs: getattr(config, ours) for ours, theirs in SHAPE.items()}
    fields |= {field: values[0] for field, values in ONLY_GPT2.items()}
    fields |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot)
    content, is_gpt2 = tokenizer_json(tokenizer), tokenizer.spec() == {"type": "gpt2"}
    options = {"tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast"}
    options |= {"model_max_length": config.block_size, "clean_up_tokenization_spaces": False}
    for token in content["added_tokens"]:
        if token["id"] == tokenizer.eot:
            options |= dict.fromkeys(["bos_token", "eos_token"] + ["unk_token"] * is_gpt2, token["content"])
    files = {"config.json": fields, "tokenizer.json": content, "tokenizer_config.json": options, SPEC: tokenizer.spec()}
    texts = {name: json.dumps(value, ensure_ascii=False) + "\n" for name, value in files.items()}
    if is_gpt2:  # the files that OpenAI published, byte for byte, which other programs read
        model = content["model"]
        texts["vocab.json"] = json.dumps(model["vocab"])
        texts["merges.txt"] = "\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n"
    return texts

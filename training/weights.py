"""
Hugging Face's format of a GPT-2, read and written: a folder of

    config.json                        the shape, and the choices that set GPT-2's variants apart
    model.safetensors                  the weights; or several files that model.safetensors.index.json lists
    tokenizer.json, tokenizer_config.json, and for GPT-2's own tokenizer vocab.json and merges.txt
    tokenizer_spec.json                written here only: what data.tokenizer needs to make the same tokenizer again

Weights go by the names of the model here, which are theirs. Two things differ: their matrices are stored transposed
(Conv1D), and their names may lack "transformer." in front. OpenAI's four GPT-2s are downloaded by name.
"""

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from data import tokenizer
from data.files import UserError, as_user_error, atomic_write
from data.tokenizer import END_OF_TEXT, Tokenizer, from_spec, gpt2
from data.tokenizer_json import tokenizer_json, vocabulary
from model import GPT, GPTConfig
from training.run import load_checkpoint, newest_checkpoint


class Release(NamedTuple):
    """One of OpenAI's GPT-2s, in the repository openai-community/NAME of huggingface.co."""

    n_layer: int
    n_head: int
    n_embd: int
    revision: str  # the commit
    sha256: str  # of its model.safetensors


# fmt: off
RELEASES = {
    "gpt2": Release(
        12, 12, 768, "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": Release(
        24, 16, 1024, "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    ),
    "gpt2-large": Release(
        36, 20, 1280, "32b71b12589c2f8d625668d2335a01cac3249519",
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    ),
    "gpt2-xl": Release(
        48, 25, 1600, "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}
# fmt: on

ONLY_GPT2 = {  # fields of config.json that change the arithmetic -> the values that GPT-2 has, the usual one first
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
SHAPE = {  # what the shape is called here -> in config.json
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # the matrices that are stored transposed
SPEC = "tokenizer_spec.json"


# ------------------------------------------------------------------------------------------------------------- reading


def read(name_or_folder: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """
    The shape and the weights of one of RELEASES, downloaded, or of a folder.

    Returns n_layer, n_head, n_embd, block_size, vocab_size; and name -> tensor: float32, matrices (out, in), wte with
    vocab_size rows. UserError where they cannot be had, do not fit each other, or are of a variant of GPT-2.
    """
    folder = Path(name_or_folder)
    if name_or_folder in RELEASES and not folder.is_dir():
        release = RELEASES[name_or_folder]
        shape = {"n_layer": release.n_layer, "n_head": release.n_head, "n_embd": release.n_embd}
        shape, files = shape | {"block_size": 1024, "vocab_size": 50257}, [_download(name_or_folder, release)]
    else:
        shape, files = _read_shape(folder), _weight_files(folder)
    weights = {}
    for file in files:
        weights |= _read_tensors(file)
    _check_fit(name_or_folder, shape, weights)
    return shape, weights


def read_tokenizer_spec(name_or_folder: str, vocab_size: int) -> dict:
    """
    What makes the tokenizer of a model that `read` has read: its own where `write` left it, else GPT-2's.

    UserError where that is not the model's: other sizes, or a tokenizer in Hugging Face's files that is not GPT-2's.
    """
    folder, spec = Path(name_or_folder), {"type": "gpt2"}
    if (folder / SPEC).is_file():
        spec = _read_json(folder / SPEC)
    elif (folder / "tokenizer.json").is_file():
        model = _read_json(folder / "tokenizer.json").get("model")
        theirs = model.get("vocab") if isinstance(model, dict) else None
        openais = vocabulary(gpt2()._encoding)
        if theirs not in (openais, openais | {END_OF_TEXT: gpt2().eot}):
            raise UserError(f"'{folder}' has a tokenizer of its own, not GPT-2's: only one that --export wrote is read")
    tokens = from_spec(spec).vocab_size
    if tokens != vocab_size:
        raise UserError(f"{name_or_folder!r} has {vocab_size} tokens, but its tokenizer, {spec['type']}, has {tokens}")
    return spec


def _download(name: str, release: Release) -> Path:
    """
    The weights in huggingface_hub's cache, downloaded where they are not there yet.

    huggingface_hub compares a download's size with the announced one and nothing more, and trusts its cache: the
    content is checked here, every time. The shape is known, so config.json is not needed.
    """
    from huggingface_hub import hf_hub_download, logging

    logging.set_verbosity_error()  # it warns of what the error below says
    try:
        path = Path(hf_hub_download(f"openai-community/{name}", "model.safetensors", revision=release.revision))
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise _no_weights(name, _one_line(error)) from error
    if found != release.sha256:
        raise UserError(f"{path} is not OpenAI's {name}: its sha256 is {found}; delete that file and try again")
    return path


def _read_shape(folder: Path) -> dict[str, int]:
    """What config.json says of the shape; UserError where it is a variant that computes something else."""
    config = _read_json(folder / "config.json")
    missing = [name for name in SHAPE.values() if type(config.get(name)) is not int]
    if missing:
        raise UserError(f"'{folder}' is not a GPT-2: its config.json gives no whole number for {', '.join(missing)}")
    other = {name: config[name] for name, good in ONLY_GPT2.items() if config.get(name, good[0]) not in good}
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        other["n_inner"] = config["n_inner"]
    if other:
        raise UserError(f"'{folder}' is a variant of GPT-2 that this model is not: {other}")
    return {ours: config[theirs] for ours, theirs in SHAPE.items()}


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files it was cut into, which its index lists; UserError where they are missing."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise UserError(f"{index} is damaged: its weight_map must give a file of that folder for every tensor")
        return [folder / name for name in sorted(set(names.values()))]
    if list(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"'{folder}' holds its weights as pytorch_model.bin only, a pickle, which may run any code: "
            "load and save it with transformers' save_pretrained where you trust it, which writes model.safetensors"
        )
    raise _no_weights(folder, f"{whole} is missing")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, named and laid out as here: copies, for the file may be mapped into memory."""
    from safetensors import SafetensorError, safe_open

    weights = {}
    try:
        with safe_open(path, framework="pt") as file:
            for theirs in file.keys():  # noqa: SIM118 (it is no dict)
                name = theirs if theirs.startswith(("transformer.", "lm_head.")) else f"transformer.{theirs}"
                if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask of old versions
                    continue
                tensor = file.get_tensor(theirs)
                if not tensor.is_floating_point():
                    raise UserError(f"{path} holds {theirs} as {tensor.dtype}: only weights in floating point are read")
                weights[name] = other_layout(name, tensor.to(torch.float32, copy=True))
    except (OSError, SafetensorError) as error:
        raise _no_weights(path.parent, f"{path.name}: {_one_line(error)}") from error
    return weights


def other_layout(name: str, tensor: Tensor) -> Tensor:
    """The tensor of that name in our layout, or back in theirs: Conv1D keeps its matrix transposed."""
    return tensor.t().contiguous() if name.endswith(CONV1D) else tensor


def _check_fit(name: str, shape: dict[str, int], weights: dict[str, Tensor]) -> None:
    """UserError where the weights are of another shape; a head of its own goes where it repeats wte."""
    head = weights.pop("lm_head.weight", None)
    wte, wpe = (weights.get(f"transformer.{part}.weight", torch.empty(0)) for part in ("wte", "wpe"))
    if head is not None and not torch.equal(head, wte):
        raise UserError(f"{name!r} is a variant of GPT-2 that this model is not: its head is not its token embedding")
    layers = {int(n[1]) for n in map(re.compile(r"transformer\.h\.(\d+)\.").match, weights) if n}
    for what, said, found in [
        ("wte", (shape["vocab_size"], shape["n_embd"]), tuple(wte.shape)),
        ("wpe", (shape["block_size"], shape["n_embd"]), tuple(wpe.shape)),
        ("the number of layers", shape["n_layer"], len(layers)),
    ]:
        if said != found:
            raise UserError(
                f"{name!r} is not a GPT-2: {what} should be {said} by its shape, and is {found} in its weights"
            )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _no_weights(path.parent, f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it must hold an object")
    return content


def _no_weights(name: object, reason: str) -> UserError:
    return UserError(
        f"no weights for {str(name)!r}: {reason}; give one of {', '.join(RELEASES)} (a download), a run's folder, or a "
        "folder with config.json and model.safetensors"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# ------------------------------------------------------------------------------------------------------------- writing


def write(folder: str | os.PathLike, shape: dict[str, float], weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """
    Write a model where transformers' GPT2LMHeadModel and AutoTokenizer, and `read`, find it: all of the folder or none.

    shape, weights: as `read` returns them, on any device; shape may hold "dropout", too
    UserError where the folder holds something already, or cannot be written.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not an empty folder: --export takes the name of a new one")
    texts = _tokenizer_files(tokenizer, shape["block_size"]) | {"config.json": _config_json(shape, tokenizer)}
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, text in texts.items():
            atomic_write(temporary / name, lambda file, text=text: file.write(text.encode()))
        atomic_write(temporary / "model.safetensors", lambda file: _write_tensors(file, weights))
        temporary.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder} could not be written ({reason}): make room there, or export elsewhere") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only when something went wrong


def _config_json(shape: dict[str, float], tokenizer: Tokenizer) -> str:
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: shape[ours] for ours, theirs in SHAPE.items()},
        **{name: values[0] for name, values in ONLY_GPT2.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), shape.get("dropout", 0.0)),
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "dtype": "float32",
    }
    return json.dumps(config, indent=2) + "\n"


def _write_tensors(file: BinaryIO, weights: dict[str, Tensor]) -> None:
    """
    A safetensors file: the length of the header in 8 bytes, the header in JSON, the tensors one behind the other.

    (The package's own writer needs all transposed copies at once and hides the error of a full disk.)
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in weights.items():
        size = 4 * tensor.numel()
        dims = list(tensor.shape[::-1] if name.endswith(CONV1D) else tensor.shape)
        header[name] = {"dtype": "F32", "shape": dims, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in weights.items():
        file.write(other_layout(name, tensor.detach().cpu().float()).contiguous().numpy().astype("<f4", copy=False))


def _tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """File name -> text, for AutoTokenizer and for `read_tokenizer_spec`."""
    content, openais = tokenizer_json(tokenizer), tokenizer.spec() == {"type": "gpt2"}
    config = {"tokenizer_class": "GPT2Tokenizer" if openais else "PreTrainedTokenizerFast"}
    config |= {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    for token in content["added_tokens"]:
        if token["id"] == tokenizer.eot:
            config |= dict.fromkeys(["bos_token", "eos_token"] + ["unk_token"] * openais, token["content"])
    files = {"tokenizer.json": content, "tokenizer_config.json": config, SPEC: tokenizer.spec()}
    texts = {name: json.dumps(value, ensure_ascii=False) + "\n" for name, value in files.items()}
    if openais:  # byte for byte the files that were published, which other programs read
        model = content["model"]
        texts["vocab.json"] = json.dumps(model["vocab"])
        texts["merges.txt"] = "\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n"
    return texts


# --------------------------------------------------------------------------------------- released weights and our own


def from_pretrained(name_or_folder: str, ops: kernels.Ops | None = None) -> GPT:
    """
    A GPT with the weights of a Hugging Face GPT-2: gpt2, gpt2-medium, gpt2-large or gpt2-xl, or a folder.

    The folder holds config.json and model.safetensors. Raises files.UserError where they cannot be had or are not of a
    GPT-2, UserError where their shape cannot be.
    """
    shape, weights = read(name_or_folder)
    with as_user_error():
        config = GPTConfig(**shape)
    wte = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = F.pad(wte, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
    return from_state_dict(config, weights, name_or_folder, ops)


def load(name: str, ops: kernels.Ops | None = None) -> tuple[GPT, dict]:
    """A model and what describes its tokenizer, from a run's folder, a checkpoint file, or as from_pretrained."""
    path = Path(name)
    if path.is_file():
        checkpoint = load_checkpoint(path)
    elif (path / "checkpoints").is_dir():
        _, checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise UserError(f"{path} holds no whole checkpoint: train_gpt2.py writes one there")
    else:
        model = from_pretrained(name, ops)
        return model, read_tokenizer_spec(name, model.config.vocab_size)
    with as_user_error():
        config = GPTConfig(**checkpoint["config"])
    return from_state_dict(config, checkpoint["model"], name, ops), checkpoint["tokenizer"]


def from_state_dict(config: GPTConfig, weights: dict[str, Tensor], name: str, ops: kernels.Ops | None) -> GPT:
    """A GPT that takes these tensors as its own, without drawing random ones first."""
    with torch.device("meta"):
        model = GPT(config, ops)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{name!r} is not a GPT-2: {' '.join(str(error).split())[:300]}") from error
    return model


def export(name: str, folder: str) -> None:
    """Write the model of that name, as `load` takes it, and its tokenizer as a Hugging Face folder."""
    model, spec = load(name)
    shape, weights = dataclasses.asdict(model.config), model.state_dict()
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: model.config.vocab_size]
    write(folder, shape, weights, tokenizer.from_spec(spec))


def init_from(model: GPT, name: str, tokenizer_spec: dict) -> None:
    """Copy those of a model that `load` finds, which may have a longer block size; UserError where they differ."""
    source, spec = load(name)
    if spec != tokenizer_spec:
        raise UserError(f"--init-from {name} reads other tokens than --data: prepare the text with its tokenizer")
    same = {"block_size": model.config.block_size, "dropout": model.config.dropout}
    shorter = source.config.block_size < model.config.block_size
    if shorter or dataclasses.replace(source.config, **same) != model.config:
        raise UserError(f"--init-from {name} has another shape: {source.config} there, {model.config} here")
    weights = source.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: model.config.block_size]
    model.load_state_dict(weights)

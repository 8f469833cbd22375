"""The tokenizer in a GGUF file, as one of the `tokenizers` library; it encodes as llama.cpp does.

There are two kinds. "gpt2" merges bytes by a list of merges, within words that a named pattern cuts out of the text.
"llama" is SentencePiece's: it merges characters to the piece with the best score, and what has no piece becomes bytes.
"""

from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from jclt.errors import UserError, suggest_name
from jclt.models.chat import ChatTemplate
from jclt.models.formats.gguf_file import GgufFile
from jclt.models.tokenizer import Tokenizer, read_with_library

CONTROL, USER_DEFINED, UNKNOWN, BYTE = 3, 4, 2, 6
"""Types of tokens."""
ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT2_WORDS = rf"{ENDINGS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    rf"(?i:{ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2_WORDS,),
    "llama-bpe": (LLAMA3_WORDS,),
    "qwen2": (LLAMA3_WORDS.replace("{1,3}", ""),),
    "smollm": (r"\p{N}", GPT2_WORDS),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""What each pattern cuts out of the text, by the name in the file; each of several cuts the pieces of those before."""
SAME = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "phi-2": "gpt-2",
    "jina-es": "gpt-2",
    "jina-de": "gpt-2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
}
"""Names that stand for the pattern of another."""


def read_tokenizer(file: GgufFile) -> Tokenizer | None:
    """The file's tokenizer, or None where there is none."""
    kind, where = file.keys.get("tokenizer.ggml.model", "no_vocab"), str(file.path)
    if kind in ("no_vocab", "none"):
        return None
    readers: dict[str, Callable[[Fields], Backend]] = {"gpt2": _make_byte_level, "llama": _make_sentencepiece}
    if not isinstance(kind, str) or kind not in readers:
        raise UserError(f"{where}: tokenizer '{kind}' is unknown; {suggest_name(str(kind), readers)}")
    fields = Fields(file.path, file.keys)
    backend = read_with_library(lambda: readers[kind](fields), f"{where}: its tokenizer is damaged")
    vocabulary = file.header["token_embd.weight"].shape[0] if "token_embd.weight" in file.header else 0
    if len(fields.tokens) > vocabulary:
        raise UserError(f"{where}: {len(fields.tokens)} tokens, expected at most {vocabulary}, one for each embedding")
    source = file.keys.get("tokenizer.chat_template")
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {ours: fields.find_token(theirs) for ours, theirs in named.items()}
    texts = {f"{name}_token": fields.tokens[number] for name, number in numbers.items() if number is not None}
    return Tokenizer(backend, ChatTemplate(source, texts) if isinstance(source, str) else None)


class Fields:
    """What a file says about its tokenizer, checked."""

    def __init__(self, path: Path, keys: dict[str, Any]):
        self.path, self.keys = path, keys
        self.tokens: list[str] = self.read_list("tokens", str)
        if not self.tokens:
            raise UserError(f"{path}: 'tokenizer.ggml.tokens' is missing, expected the text of each token")
        self.types: list[int] = self.read_list("token_type", int) or [1] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise UserError(f"{path}: {len(self.types)} types of tokens, expected {len(self.tokens)}")

    def read_list(self, name: str, kind: type) -> list[Any]:
        value = self.keys.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise UserError(
                f"{self.path}: 'tokenizer.ggml.{name}' is {short(value)}, expected a list of {kind.__name__}"
            )
        return value

    def find_token(self, name: str, absent: int | None = None) -> int | None:
        """The number of a special token, if it is one of the tokens."""
        number = self.keys.get(f"tokenizer.ggml.{name}_token_id", absent)
        return number if type(number) is int and 0 <= number < len(self.tokens) else None

    def is_set(self, name: str, absent: bool) -> bool:
        return bool(self.keys.get(f"tokenizer.ggml.{name}", absent))

    def list_tokens(self, kind: int) -> list[str]:
        return [token for token, other in zip(self.tokens, self.types, strict=True) if other == kind and token]


def _make_byte_level(fields: Fields) -> Backend:
    named = fields.keys.get("tokenizer.ggml.pre", "default")
    name = SAME.get(named, named) if isinstance(named, str) else str(named)
    if name not in PATTERNS:
        raise UserError(
            f"{fields.path}: tokenizer.ggml.pre '{name}' is unknown; {suggest_name(name, [*PATTERNS, *SAME])}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields.read_list("merges", str)]
    if not all(len(merge) == 2 for merge in merges):
        raise UserError(f"{fields.path}: a merge in 'tokenizer.ggml.merges' is no pair, expected two tokens")
    vocabulary = {token: number for number, token in enumerate(fields.tokens)}
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))  # pyright: ignore[reportArgumentType]
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[name]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if name == "qwen2":  # as published; llama.cpp leaves the text as it is
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return _add_special(backend, fields, add_bos=name == "llama-bpe")


def _make_sentencepiece(fields: Fields) -> Backend:
    scores = fields.read_list("scores", float)
    if len(scores) != len(fields.tokens):
        raise UserError(f"{fields.path}: {len(scores)} scores of tokens, expected {len(fields.tokens)}")
    vocabulary = {token: number for number, token in enumerate(fields.tokens)}
    unknown = fields.find_token("unknown", 0)
    bpe: Any = models.BPE
    backend = Backend(
        bpe(
            vocabulary,
            _list_merges(fields, scores, vocabulary),
            unk_token=None if unknown is None else fields.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = fields.is_set("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return _add_special(backend, fields, add_bos=True)


def _list_merges(fields: Fields, scores: list[float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the one with the best score first."""
    pieces = [
        (-score, number, token)
        for number, (token, score, kind) in enumerate(zip(fields.tokens, scores, fields.types, strict=True))
        if kind not in (CONTROL, UNKNOWN, BYTE) and len(token) > 1 and vocabulary[token] == number
    ]
    return [
        (token[:cut], token[cut:])
        for _, _, token in sorted(pieces)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]


def _add_special(backend: Backend, fields: Fields, add_bos: bool) -> Backend:
    """Marks the tokens that are found whole in a text, and adds those that begin and end it."""
    backend.add_tokens([AddedToken(x, normalized=False) for x in fields.list_tokens(USER_DEFINED)])
    backend.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in fields.list_tokens(CONTROL)])
    bos = fields.find_token("bos", 1 if fields.keys["tokenizer.ggml.model"] == "llama" else None)
    ends = {
        "bos": bos if fields.is_set("add_bos_token", add_bos) else None,
        "eos": fields.find_token("eos") if fields.is_set("add_eos_token", False) else None,
    }
    special = [
        {"id": name, "ids": [number], "tokens": [fields.tokens[number]]}
        for name, number in ends.items()
        if number is not None
    ]
    if special:
        single = [name for name in ("bos", "$A", "eos") if name == "$A" or ends[name] is not None]
        template: Any = processors.TemplateProcessing
        backend.post_processor = template(single=single, special_tokens=special)
    return backend

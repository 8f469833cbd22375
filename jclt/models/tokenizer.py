"""Text to token ids and back, with the `tokenizers` library."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import TypeVar

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jclt.errors import UserError, first_line
from jclt.files import check_file, read_bytes, read_json, read_text, write_json, write_text
from jclt.models.chat import ChatTemplate
from jclt.models.config import ModelConfig

Read = TypeVar("Read")


@dataclass(frozen=True)
class Tokenizer:
    """Encodes with the special tokens that the model expects, such as a first <bos>, and decodes without them."""

    backend: Backend
    template: ChatTemplate | None = None
    """How chats are written as text."""

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(check_text(text)).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(i) for i in ids])

    def plain(self, text: str) -> list[int]:
        """The ids of the text alone, without special tokens."""
        return self.backend.encode(check_text(text), add_special_tokens=False).ids

    def text(self, token: int) -> str:
        """The text of one token within a longer text, with its leading space; for a special token its name."""
        once = self.backend.decode([token])  # decoding may drop the space of a first token
        return self.backend.decode([token, token])[len(once) :] or self.backend.id_to_token(token) or str(token)

    @property
    def size(self) -> int:
        return self.backend.get_vocab_size()

    def save(self, folder: Path, config: ModelConfig) -> None:
        """Writes `tokenizer.json`, and `tokenizer_config.json` for transformers."""
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        ends = {"bos_token": config.bos_token, "eos_token": next(iter(config.stop_tokens), None)}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.context,
            "clean_up_tokenization_spaces": False,
            **{name: self.backend.id_to_token(index) for name, index in ends.items() if index is not None},
        }
        if self.template is not None:
            settings |= {**self.template.tokens, "chat_template": self.template.source}
        write_json(folder / "tokenizer_config.json", settings)


def check_text(text: str) -> str:
    """The same text; an error if part of it is not text: a byte that could not be decoded, half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        sign = ascii(text[error.start])
        raise UserError(f"text {ascii(text[:80])}: {sign} is no character, expected UTF-8 text") from None
    return text


def read_tokenizer_folder(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, or None where there is none: such a model still runs on token ids."""
    path = folder / "tokenizer.json"
    if os.path.lexists(path):
        content = read_bytes(path)
        backend = read_with_library(
            lambda: Backend.from_buffer(content), f"{path}: not a tokenizer that the library reads"
        )
        # Truncation and padding are settings from the tokenizer's training. Prompts are neither cut nor padded.
        backend.no_truncation()
        backend.no_padding()
        return Tokenizer(backend, _load_template(folder))
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if os.path.lexists(vocabulary) and os.path.lexists(merges):
        check_file(merges)
        what = f"{vocabulary}: not a byte-pair vocabulary with {merges.name}"
        if not all(
            isinstance(number, int) for number in read_json(vocabulary).values()
        ):  # the library skips other entries
            raise UserError(f"{what} (a token without its number)")
        backend = Backend(read_with_library(lambda: models.BPE.from_file(str(vocabulary), str(merges)), what))
        backend.add_special_tokens([token for token in ("<|endoftext|>",) if backend.token_to_id(token) is not None])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return Tokenizer(backend, _load_template(folder))
    return None


NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that templates write by name."""


def _load_template(folder: Path) -> ChatTemplate | None:
    """The folder's chat template: a file of its own, or a setting of the tokenizer."""
    path, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = read_json(path) if os.path.lexists(path) else {}
    source = read_text(file, "a chat template") if os.path.lexists(file) else settings.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {str(x.get("name")): x.get("template") for x in source if isinstance(x, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise UserError(f"{path}: 'chat_template' is {short(source)}, expected text")
    values = {name: settings.get(name) for name in NAMED_TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return ChatTemplate(source, {name: text for name, text in texts.items() if isinstance(text, str)})


def read_with_library(read: Callable[[], Read], what: str) -> Read:
    """What the library reads, or one clear error. The library raises a bare Exception, or a panic of its Rust code,
    which is not an Exception."""
    try:
        return read()
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({first_line(error)})") from None

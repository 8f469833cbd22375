"""Text to token ids and back, by the `tokenizers` library."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jclt.errors import UserError


@dataclass(frozen=True)
class Tokenizer:
    """Encodes with the special tokens that the model expects (such as a first <bos>); decodes without them."""

    backend: Backend

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, index: int) -> str:
        """How a single token reads, spaces included."""
        return self.backend.decode([int(index)], skip_special_tokens=False) or str(self.backend.id_to_token(int(index)))

    @property
    def size(self) -> int:
        return self.backend.get_vocab_size()

    def save(self, folder: Path) -> None:
        self.backend.save(str(folder / "tokenizer.json"))


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, or None where it has none: a model without text can still be run on token ids."""
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            return Tokenizer(Backend.from_file(str(path)))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path}: not a tokenizer that the tokenizers library reads ({error})") from None
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.exists() and merges.exists():
        backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return Tokenizer(backend)
    return None

"""A tokenizer of whole words that is an ordinary `tokenizer.json`."""

import json
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from jclt.world import words
from jclt.world.corpus import draw_line
from jclt.world.example import PIECE, pieces

BOS, EOS, UNKNOWN = "<bos>", "<eos>", "<unk>"


def vocabulary(lines: int = 60_000) -> dict[str, int]:
    """Every token of the world. Rules with many words are listed; the few other words show up in any large sample."""
    random = Random(0)
    seen = {piece for _ in range(lines) for piece in pieces("".join(draw_line(random)))}
    numbers = [f"{n}" for n in range(199)] + [f" {n}" for n in range(100)]
    letters = words.ACRONYM_WORDS
    acronyms = [a + b + c for a in letters for b in letters for c in letters]
    rest = sorted(seen - set(numbers) - set(acronyms) - {"\n"})
    return {token: i for i, token in enumerate((BOS, EOS, UNKNOWN, "\n", *numbers, *acronyms, *rest))}


def build_tokenizer() -> Tokenizer:
    tokens = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([BOS, EOS, UNKNOWN])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokens[BOS])]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """`tokenizer.json` and the settings that transformers reads beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

"""A tokenizer of whole words that is an ordinary `tokenizer.json`."""

from functools import cache
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from jclt.world import words
from jclt.world.corpus import draw_line
from jclt.world.example import BOS, EOS, PIECE, UNKNOWN, pieces


@cache
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

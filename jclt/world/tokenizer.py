"""The tokenizer of the small world: one token for each word, saved as an ordinary `tokenizer.json`."""

from functools import cache
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from jclt.world import words
from jclt.world.corpus import draw_line
from jclt.world.example import BOS, EOS, TOKEN_PATTERN, UNKNOWN, split_tokens


@cache
def list_vocabulary(lines: int = 20_000) -> dict[str, int]:
    """Every token and its id.

    Numbers and acronyms are listed. All other words occur in a sample of lines, each of them within the first 10,000.
    """
    random = Random(0)
    sampled = {token for _ in range(lines) for token in split_tokens("".join(draw_line(random)))}
    numbers = [f"{n}" for n in range(199)] + [f" {n}" for n in range(100)]
    letters = words.ACRONYM_WORDS
    acronyms = [a + b + c for a in letters for b in letters for c in letters]
    others = sorted(sampled - set(numbers) - set(acronyms) - {"\n"})
    return {token: i for i, token in enumerate((BOS, EOS, UNKNOWN, "\n", *numbers, *acronyms, *others))}


def build_tokenizer() -> Tokenizer:
    tokens = list_vocabulary()
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([BOS, EOS, UNKNOWN])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokens[BOS])]
    )
    return tokenizer

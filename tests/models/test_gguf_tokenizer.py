"""Tokenizers in GGUF files encode like those that they were written from: byte-level ones with the words that their
models' publishers cut, SentencePiece's like its own algorithm."""

import json
import unicodedata

import numpy as np
import pytest
from gguf_files import random_folder, write_gguf
from golden_cases import FOLDER
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import jclt
from jclt.errors import UserError
from jclt.models import ModelConfig, load_tokenizer

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
PUBLISHED = {
    "gpt-2": WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(rf"{SHORT}|{LETTERS}|\p{{N}}{{1,3}}|{ENDS}"), "isolated"), BYTES]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(rf"{SHORT}|{LETTERS}|\p{{N}}|{ENDS}"), "isolated"), BYTES]
    ),
}
"""How the tokenizer.json of the models cuts words."""
TEXTS = [
    "The year 2024 wasn't 12345: it's  I'LL\n\n\nnew lines\t tabs   and  spaces  \n  end ",
    "naïve cafe\u0301 ½ ٣٤ 漢字 🙂🙂 ＡＢ $3.50+4=7.5 a_b-c (x) [y]!!",
    "\r\n\r\n  x= 'd'D don'T\u00a0\u2003wide",
]


def byte_level(name: str) -> Backend:
    """A tokenizer trained on the texts."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = PUBLISHED[name]
    backend.normalizer = normalizers.NFC() if name == "qwen2" else normalizers.Sequence([])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text.lower() for text in TEXTS] * 2 + TEXTS, trainer)
    return backend


def tokenizer_keys(backend: Backend, pre: str | None, **more) -> dict:
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(backend.to_str())["model"]["merges"]
    keys = {"model": "gpt2", "tokens": tokens, "merges": [" ".join(pair) for pair in merges]}
    keys |= {"token_type": [3, *[1] * (len(tokens) - 1)], "bos_token_id": 0} | ({} if pre is None else {"pre": pre})
    return {f"tokenizer.ggml.{name}": value for name, value in (keys | more).items()}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with a model of 1,000 tokens."""
    return random_folder(ModelConfig("llama", 1000, 8, 1, 2, 8, 16), tmp_path_factory.mktemp("wide") / "model")


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level_tokenizers(pre, wide, tmp_path):
    backend = byte_level(pre)
    tokenizer = jclt.load_model(write_gguf(wide, tmp_path / "m.gguf", tokenizer=tokenizer_keys(backend, pre))).tokenizer
    for text in TEXTS:
        want = backend.encode(text).ids
        assert tokenizer.plain(text) == want
        assert tokenizer.encode(text) == ([0] if pre == "llama-bpe" else []) + want
        assert tokenizer.decode(want) == (text if pre != "qwen2" else unicodedata.normalize("NFC", text))
    assert tokenizer.plain("<s>it's<s>") == [0, *backend.encode("it's").ids, 0]


def test_the_default_pattern_cuts_as_llama_cpp_does(wide, tmp_path):
    """Punctuation first, then words, then three digits at a time."""
    keys = tokenizer_keys(byte_level("gpt-2"), None)
    tokenizer = jclt.load_model(write_gguf(wide, tmp_path / "m.gguf", tokenizer=keys)).tokenizer
    pieces = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("It's 12345, a+b")]
    assert pieces == ["It", "'", "s", "Ġ", "123", "45", ",", "Ġa", "+", "b"]


@pytest.mark.parametrize(("pre", "add", "begins"), [("gpt-2", True, True), ("llama-bpe", False, False)])
def test_the_file_says_whether_prompts_begin_with_bos(pre, add, begins, wide, tmp_path):
    keys = tokenizer_keys(byte_level(pre), pre, add_bos_token=add)
    model = jclt.load_model(write_gguf(wide, tmp_path / "m.gguf", tokenizer=keys))
    assert (model.encode("it's")[0] == 0) == begins
    assert load_tokenizer(tmp_path / "m.gguf").encode("it's") == model.encode("it's")


# SentencePiece.

SPECIAL = ["<unk>", "<s>", "</s>"]
PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "▁▁", "cab", "aa", "▁b", "[x]"]


def sentencepiece_keys(prefix: bool) -> dict:
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    scores = [0.0] * (3 + 256) + np.random.default_rng(4).permutation(-np.arange(len(PIECES)) - 1.0).tolist()
    types = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 1), 4]
    keys = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "add_space_prefix": prefix}
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


def merge_pieces(text: str, keys: dict) -> list[int]:
    """The algorithm: merge the neighbours whose piece has the best score, the first of equal ones; at the end what is
    no piece becomes bytes."""
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    score = {token: scores[number] for number, token in enumerate(tokens) if token in PIECES[:-1]}
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [(score[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in score]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = [[tokens.index(part)] if part in score else [3 + byte for byte in part.encode()] for part in parts]
    return [number for part in ids for number in part]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, wide, tmp_path):
    keys = sentencepiece_keys(prefix)
    tokenizer = jclt.load_model(write_gguf(wide, tmp_path / "m.gguf", tokenizer=keys)).tokenizer
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("aabbcc  é"), 30)) for _ in range(100)]
    for text in texts:
        want = merge_pieces(" " * prefix + text, keys)
        assert tokenizer.encode(text) == [1, *want], text
        assert tokenizer.decode([1, *want]) == text
    assert tokenizer.plain("</s>[x]")[-1] == 3 + 256 + PIECES.index("[x]") and 2 in tokenizer.plain("a</s>")


def test_unknown_and_damaged_tokenizers(wide, tmp_path):
    keys = tokenizer_keys(byte_level("gpt-2"), "gpt-2")

    def get_refusal(**changes) -> str:
        changed = keys | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
        path = write_gguf(wide, tmp_path / "m.gguf", tokenizer=changed)
        with pytest.raises(UserError) as error:
            jclt.load_model(path)
        return str(error.value).removeprefix(f"{path}: ")

    assert get_refusal(pre="qwen3.5").startswith("tokenizer.ggml.pre 'qwen3.5' is unknown; ")
    assert get_refusal(tokens=[1, 2]) == "'tokenizer.ggml.tokens' is [1, 2], expected a list of str"
    assert get_refusal(token_type=[1, 2]).startswith("2 types of tokens, expected ")
    assert get_refusal(merges=["ab"]).startswith("a merge in 'tokenizer.ggml.merges' is no pair")
    assert get_refusal(merges=["no thing"]).startswith("its tokenizer is damaged (")
    assert get_refusal(tokens=[str(n) for n in range(1001)], token_type=[1] * 1001, merges=["1 2"]).startswith(
        "1001 tokens, expected at most 1000, one for each embedding"
    )


def test_a_model_without_a_tokenizer_runs_on_ids(tmp_path):
    model = jclt.load_model(write_gguf(FOLDER / "llama2", tmp_path / "m.gguf"))
    assert model.tokenizer is None
    with pytest.raises(UserError, match="has no tokenizer"):
        model.encode("text")

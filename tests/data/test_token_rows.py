"""Rows of tokens: which are for training, which are reserved, and the files of a run."""

import numpy as np
import pytest
from golden_cases import FOLDER

from jclt.data.load_tokens import pack_rows, read_text_rows, tokenize_file
from jclt.data.token_rows import (
    HELD_OUT,
    RESERVED_MOST,
    TokenRows,
    count_reserved,
    count_training_rows,
    cut_reserved_rows,
    load_rows,
    save_rows,
)
from jclt.errors import UserError
from jclt.models import load_tokenizer

TOKENIZER = FOLDER / "llama3"


@pytest.mark.parametrize("sizes", [[122, 124, 66], [2000, 1300, 30, 5], [6400], [40_000, 3], [16 * RESERVED_MOST, 9]])
def test_training_never_reads_reserved_tokens(sizes):
    """For rows of any length, on shards of these sizes with distinct tokens."""
    ends = np.cumsum(sizes)
    shards = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    reserved = [cut_reserved_rows(shards, length).ravel() for length in (2, 16, 64)]
    most = count_reserved(sum(sizes))
    assert most - 2 * len(sizes) <= len(reserved[0]) <= most <= RESERVED_MOST
    for length in (2, 7, 16, 33, 64, 100):
        rows = pack_rows(shards, length, "")
        count = count_training_rows(TokenRows(rows, np.zeros(rows.shape)), "a folder")
        assert count <= len(rows) - HELD_OUT
        if count > 0:
            assert rows[np.arange(count)].max() < min(part.min() for part in reserved if len(part))
        if 0 < count < len(rows) - HELD_OUT:
            unreserved = sum(sizes) - most
            assert rows[np.array([count])].max() >= unreserved, "no row is left out without need"


def test_the_small_world_has_no_reserved_rows():
    rows = TokenRows(np.zeros((1000, 16), np.uint16), np.zeros((1000, 16)))
    assert count_training_rows(rows, "world") == 1000 - HELD_OUT > count_training_rows(rows, "text.txt") == 937


def test_a_text_is_cut_at_the_same_place_for_training_and_evaluation(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"word{10 + n % 80}" for n in range(3000)))
    tokenizer = load_tokenizer(TOKENIZER)
    ids = tokenize_file(tmp_path / "a.txt", tokenizer, (2,))
    for length in (2, 16, 17, 64):
        rows = TokenRows(*read_text_rows(tmp_path / "a.txt", tokenizer, length, (2,)))
        unreserved = len(ids) - count_reserved(len(ids))
        assert count_training_rows(rows, "a.txt") * length <= unreserved
        np.testing.assert_array_equal(cut_reserved_rows([ids], length)[0], ids[unreserved:][:length])


def test_damaged_rows_of_a_run_are_refused_in_one_line(tmp_path):
    save_rows(tmp_path, np.zeros((4, 8), np.uint16), np.ones((4, 8), np.float16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.npy", "weights.npy"]
    (tmp_path / "tokens.npy").write_bytes((tmp_path / "tokens.npy").read_bytes()[:-3])
    with pytest.raises(UserError, match=r"tokens.npy: damaged \(.*\), expected a run's rows \[N, T\]"):
        load_rows(tmp_path)

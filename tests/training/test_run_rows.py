"""The rows of a run, from a folder of token shards."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from golden_cases import FOLDER

from jclt.data.load_tokens import load_tokens
from jclt.data.token_rows import TokenRows
from jclt.data.tokenize import tokenize
from jclt.errors import UserError
from jclt.models import ModelConfig
from jclt.training.config import LmConfig
from jclt.training.lm import find_tokenizer
from jclt.training.run_folder import Place
from jclt.training.run_rows import find_rows

TOKENIZER = FOLDER / "llama3"


def test_a_run_takes_its_rows_and_its_tokenizer_from_the_folder(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(7):
        (tmp_path / f"{n}.txt").write_text(" ".join(f"word{i}" for i in rng.integers(10, 90, 60)))
    config = LmConfig(ModelConfig("llama", 96, 16, 2, 2, 32, 32), data=str(tmp_path / "data"), length=16)
    tokenize([str(tmp_path / "*.txt")], TOKENIZER, config.data, shard_tokens=100)
    tokenizer = find_tokenizer(config)
    assert tokenizer.encode("word10") == [1, 10]

    place = Place(tmp_path / "run")

    def rows() -> TokenRows:
        return find_rows(place, config, 96, tokenizer, (2,), lambda: pytest.fail("no world is asked for"))

    assert rows().digest == rows().digest == load_tokens(config.data, 16, 96).digest
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "data.json"]
    shutil.rmtree(config.data)
    tokenize([str(tmp_path / "[0-5].txt")], TOKENIZER, config.data)
    with pytest.raises(UserError, match="other tokens than those that the run in .* began with"):
        rows()
    with pytest.raises(UserError, match="setting 'model.vocabulary': 50, expected at least 96"):
        find_tokenizer(replace(config, model=replace(config.model, vocabulary=50)))

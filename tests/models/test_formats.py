"""Models on disk: saved models load again, and wrong files are refused in one line."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from golden_cases import CASES, FOLDER, golden_model, reference
from more_cases import mark_others
from safetensors import SafetensorError

import jclt
from jclt.errors import UserError
from jclt.models import Model, ModelConfig, abstract_params, declare
from jclt.models.formats.weights import load_config


@pytest.fixture
def broken(tmp_path):
    """A copy of a checkpoint, for tests that damage it."""
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / "llama3", folder)
    return folder


def tensors_of(path: Path) -> dict[str, dict]:
    """Each tensor's type, shape and bytes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    return {
        name: {"dtype": entry["dtype"], "shape": entry["shape"], "data": data[slice(*entry["data_offsets"])]}
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write(path: Path, tensors: dict[str, dict]) -> None:
    """Writes the tensors one after another, as the format requires."""
    header, end = {}, 0
    for name, entry in tensors.items():
        data_offsets = [end, end + len(entry["data"])]
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": data_offsets}
        end += len(entry["data"])
    write_raw(path, header, b"".join(entry["data"] for entry in tensors.values()))


def write_raw(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("case", "shard_bytes"),
    mark_others(product(CASES, (10**9, 20_000)), [*product(CASES, (10**9,)), ("gemma3", 20_000), ("gpt2", 20_000)]),
)
def test_what_is_saved_loads_back_to_the_bit(case, shard_bytes, tmp_path):
    model = golden_model(case)
    jclt.save_model(model, tmp_path / "saved", shard_bytes=shard_bytes)
    again = jclt.load_model(tmp_path / "saved")
    assert again.config.explicit() == model.config.explicit()
    assert set(again.params) == set(model.params)
    for name, value in model.params.items():
        np.testing.assert_array_equal(again.params[name], value, err_msg=name)
    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 10**9)
    assert not list(tmp_path.glob("*.partial"))


def test_the_tokenizer_is_saved_too(tmp_path):
    model = golden_model("llama3")
    jclt.save_model(model, tmp_path / "saved")
    text = str(reference("llama3")["text"])
    assert jclt.load_model(tmp_path / "saved").encode(text) == model.encode(text)


def test_saving_over_something_is_refused(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("precious")
    with pytest.raises(UserError, match="exists already, expected a new folder"):
        jclt.save_model(golden_model("gpt2"), tmp_path / "here")
    assert (tmp_path / "here" / "file").read_text() == "precious"


def test_what_a_family_cannot_express_is_refused(tmp_path):
    model = golden_model("gpt2")
    with pytest.raises(
        UserError, match="family gpt2: logit_softcap=30.0 cannot be written in its layout, expected None"
    ):
        jclt.save_model(replace(model, config=replace(model.config, logit_softcap=30.0)), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_missing_tensor(broken):
    tensors = tensors_of(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write(broken / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"tensor 'model.layers.1.mlp.up_proj.weight' is missing, expected of a llama"):
        jclt.load_model(broken)


def test_unexpected_tensor(broken):
    tensors = tensors_of(broken / "model.safetensors")
    tensors["model.layers.1.mlp.side_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]
    write(broken / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"tensor 'model.layers.1.mlp.side_proj.weight' has no place in a llama model"):
        jclt.load_model(broken)


def test_wrong_shape(broken):
    tensors = tensors_of(broken / "model.safetensors")
    entry = tensors["model.layers.1.mlp.up_proj.weight"]
    entry["shape"] = entry["shape"][::-1]
    write(broken / "model.safetensors", tensors)
    with pytest.raises(
        UserError,
        match=r"'model.layers.1.mlp.up_proj.weight' gives weight 'up' the shape \[36, 24\], expected \[24, 36\]",
    ):
        jclt.load_model(broken)


def test_wrong_configuration(broken):
    raw = json.loads((broken / "config.json").read_text())

    def get_refusal(changes: dict) -> str:
        settings = {key: value for key, value in (raw | changes).items() if value is not ...}
        (broken / "config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError) as error:
            jclt.load_model(broken)
        return str(error.value).removeprefix(f"{broken}/config.json: ")

    assert get_refusal({"model_type": "lama"}) == "architecture 'lama' is unknown; did you mean 'llama'?"
    assert get_refusal({"hidden_size": ...}) == "'hidden_size' is missing, expected of every llama model"
    assert get_refusal({"hidden_size": "big"}) == "'hidden_size' is 'big', expected a positive whole number"
    assert get_refusal({"rms_norm_eps": "small"}) == "'rms_norm_eps' is 'small', expected a number"
    assert get_refusal({"hidden_act": "gelo"}) == "activation 'gelo' is unknown; did you mean 'gelu'?"
    assert get_refusal({"hidden_act": None}).startswith("the activation is None, expected one of: gelu, ")
    assert get_refusal({"num_attention_heads": 0}) == "'num_attention_heads' is 0, expected a positive whole number"
    assert get_refusal({"num_key_value_heads": 3}) == "model: kv_heads=3, expected a divisor of heads=4"
    yarn = {"rope_type": "yarn", "factor": 2.0}
    assert (
        get_refusal({"rope_scaling": yarn})
        == "rope scaling 'yarn' is unknown; expected one of: default, linear, llama3"
    )
    assert "q_proj.weight' has shape [32, 24], expected (H K) D with {'H': 8, 'K': 8}" in get_refusal(
        {"num_attention_heads": 8}
    )


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(broken, keep):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="cut off"):
        jclt.load_model(broken)


def test_missing_files(broken, tmp_path):
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
        jclt.load_model(broken)
    (broken / "tokenizer.json").unlink()
    model = jclt.load_model(broken)
    jclt.run(model, [1, 2, 3])
    with pytest.raises(UserError, match="has no tokenizer .tokenizer.json., expected token ids instead of text"):
        jclt.run(model, "text")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no .safetensors file found"):
        jclt.load_model(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        jclt.load_model(broken)
    (broken / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: not found"):
        jclt.load_model(broken)
    with pytest.raises(UserError, match="model '.*nowhere': no such folder"):
        jclt.load_model(tmp_path / "nowhere")


def test_missing_shard(tmp_path):
    shutil.copytree(FOLDER / "llama2", tmp_path / "model")
    next((tmp_path / "model").glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: not found, though model.safetensors.index"):
        jclt.load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ([], "prompt: empty, expected at least one token"),
        ([96], "prompt: token id 96, expected 0 to 95"),
        ([-1, 3], "prompt: token id -1, expected 0 to 95"),
        ([1] * 65, "prompt: 65 tokens, expected at most 64 (the model's context)"),
        (
            np.ones((1, 1, 1), np.int64),
            "prompt: got an array of int64 with 3 axes, expected text or token ids [T] or [B, T]",
        ),
        ([[1, 2], [3]], "prompt: rows of different lengths, expected token ids [T] or [B, T]"),
        (np.array([1.5]), "prompt: got an array of float64 with 1 axes, expected text or token ids [T] or [B, T]"),
    ],
)
def test_bad_prompts(prompt, line):
    with pytest.raises(UserError) as error:
        jclt.run(golden_model("llama3"), prompt)
    assert str(error.value) == line


def test_published_variants_of_configurations_read_alike(tmp_path):
    """Files on the hub differ: nested text models, today's `rope_parameters`, lists of stop tokens."""
    raw = json.loads((FOLDER / "gemma3" / "config.json").read_text())
    config = load_config(FOLDER / "gemma3")

    def read(variant: dict):
        (tmp_path / "config.json").write_text(json.dumps(variant))
        return load_config(tmp_path)

    assert read({"model_type": "gemma3", "text_config": raw, "vision_config": {}}) == config
    modern = {key: value for key, value in raw.items() if not key.startswith("rope")}
    modern["rope_parameters"] = {
        "full_attention": {"rope_theta": raw["rope_theta"], **(raw["rope_scaling"] or {"rope_type": "default"})},
        "sliding_attention": {"rope_theta": raw["rope_local_base_freq"], "rope_type": "default"},
    }
    assert read(modern) == config
    assert read({"model_type": "gemma3", "text_config": raw, "eos_token_id": [1, 106]}).stop_tokens == (1, 106)
    assert read(raw | {"eos_token_id": [1, 106]}).stop_tokens == (1, 106)


def test_prefixes_of_hub_files(tmp_path):
    """GPT-2's first files have no prefix and carry masks; Gemma 3's carry images' tensors beside the text model's."""
    shutil.copytree(FOLDER / "gpt2", tmp_path / "gpt2")
    tensors = tensors_of(tmp_path / "gpt2" / "model.safetensors")
    renamed = {name.removeprefix("transformer."): entry for name, entry in tensors.items()}
    renamed["h.0.attn.bias"] = renamed["h.0.ln_1.bias"]
    write(tmp_path / "gpt2" / "model.safetensors", renamed)
    shutil.copytree(FOLDER / "gemma3", tmp_path / "gemma3")
    tensors = tensors_of(tmp_path / "gemma3" / "model.safetensors")
    nested = {f"language_model.{name}": entry for name, entry in tensors.items()}
    nested["vision_tower.weight"] = nested["language_model.model.norm.weight"]
    write(tmp_path / "gemma3" / "model.safetensors", nested)
    for case in ("gpt2", "gemma3"):
        again = jclt.load_model(tmp_path / case)
        for name, value in golden_model(case).params.items():
            np.testing.assert_array_equal(again.params[name], value)


def test_weights_lie_where_the_rules_say():
    mesh = jclt.make_mesh(data=2, features=2)
    model = jclt.load_model(FOLDER / "llama3", mesh=mesh)
    for name, target in abstract_params(model.config, mesh).items():
        assert model.params[name].sharding == target.sharding
        split = target.sharding.spec != jax.P(*(None,) * len(target.shape))
        assert split == ("stored" in declare(model.config)[name].axes), name


LOAD = """
import sys, jax, jclt
from pathlib import Path
status = Path("/proc/self/status")
peak = lambda: int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else 0
jax.numpy.zeros(8).block_until_ready()
before = peak()
model = jclt.load_model(sys.argv[1])
print(peak() - before, sum(x.nbytes for x in jax.tree.leaves(model.params)))
print(jclt.load_model("me/tiny").config.family)
jclt.load_model("me/other")
"""


class Loaded(NamedTuple):
    peak: str
    family: str
    errors: str
    shards: list[int]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    """What a process without network prints that loads a checkpoint of 240 MB, then by name one in the layout of
    huggingface_hub's cache and one that is not there."""
    folder = tmp_path_factory.mktemp("loaded")
    config = ModelConfig("llama", 2048, 512, 18, 8, 1536, 64)
    params = {name: jax.device_put(np.ones(weight.shape, np.float32)) for name, weight in declare(config).items()}
    jclt.save_model(Model(config, params, None, "x"), folder / "m", shard_bytes=60 * 10**6)
    cached = folder / "hub" / "models--me--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(FOLDER / "llama3", cached / "snapshots" / "abc")
    process = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder / "m")],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
    )
    shards = [path.stat().st_size for path in (folder / "m").glob("*.safetensors")]
    shutil.rmtree(folder / "m")
    lines = process.stdout.splitlines()
    assert len(lines) == 2, process.stderr
    return Loaded(lines[0], lines[1], process.stderr, shards)


def test_a_hub_name_is_found_in_the_cache(loaded):
    assert loaded.family == "llama"
    assert (
        "jclt.errors.UserError: model 'me/other': no such folder, not in the local cache, and not reachable"
        in loaded.errors
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak where Linux keeps it")
def test_peak_host_memory_stays_below_the_weights_and_a_shard(loaded):
    """On a checkpoint of 240 MB in four shards; experiments/bench/loading.py does the same at 1 GB."""
    growth, size = map(int, loaded.peak.split())
    assert len(loaded.shards) >= 4
    assert growth < size + 1.3 * max(loaded.shards), (growth, size, max(loaded.shards))


# Damage of every kind: one line, at once.


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": ["llama"]}, r"architecture '\['llama'\]' is unknown"),
        ({"text_config": [1]}, r"'text_config' is \[1\], expected settings by name"),
        ({"rope_scaling": 5}, "'rope_scaling' is 5, expected settings by name"),
        ({"rope_parameters": "x"}, "'rope_parameters' is 'x', expected settings by name"),
        ({"rope_scaling": {"rope_type": 7}}, "rope scaling '7' is unknown"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "'factor' of rope scaling 'linear' is 1000"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "'factor' .* is 0, expected a number above 0"),
        ({"rope_theta": -1.0}, "'rope_theta' is -1.0, expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan, expected a number"),
        ({"rms_norm_eps": 10**400}, r"'rms_norm_eps' is 1000\S*\.\.\.\S*, expected a number"),
        ({"hidden_size": 10**400}, r"'hidden_size' is 1000\S*\.\.\.\S*, expected a positive whole number"),
        ({"num_hidden_layers": 4 * 10**12}, "'num_hidden_layers' is 4000000000000, expected a positive whole number"),
        ({"num_hidden_layers": 4 * 10**7}, "'num_hidden_layers' is 40000000, expected at most 10000"),
        ({"num_hidden_layers": 9999}, "tensor 'model.layers.3.input_layernorm.weight' is missing"),
        ({"num_attention_heads": [4]}, r"'num_attention_heads' is \[4\], expected a positive whole number"),
    ],
)
def test_a_damaged_configuration_gets_one_line_at_once(broken, changes, line):
    raw = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(UserError, match=line) as error:
        jclt.load_model(broken)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("case", "changes", "line"),
    [
        (
            "gemma3",
            {"layer_types": None, "sliding_window_pattern": "six"},
            "'sliding_window_pattern' is 'six', expected",
        ),
        ("gemma3", {"layer_types": 5}, "'layer_types' is 5, expected full_attention or sliding_attention for each"),
        (
            "gemma3",
            {"layer_types": [["full_attention"]]},
            "'layer_types' is .*, expected full_attention or",
        ),
        ("gemma3", {"query_pre_attn_scalar": "big"}, "'query_pre_attn_scalar' is 'big', expected a number"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' is 0, expected a number above 0"),
        ("gpt2", {"n_embd": "big", "n_inner": None}, "'n_embd' is 'big', expected a positive whole number"),
    ],
)
def test_damage_that_only_some_families_can_have(case, changes, line, tmp_path):
    raw = json.loads((FOLDER / case / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(UserError, match=line):
        load_config(tmp_path)


def test_an_index_names_files_beside_it_alone(tmp_path):
    shutil.copytree(FOLDER / "llama2", tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    shutil.copy(tmp_path / "model" / "model-00002-of-00002.safetensors", tmp_path / "x.safetensors")

    def get_refusal(weight_map: object) -> str:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError) as error:
            jclt.load_model(tmp_path / "model")
        return str(error.value).removeprefix(f"{index}: ")

    first = next(iter(raw["weight_map"]))
    for name in ("../x.safetensors", "/etc/x.safetensors", "..", 3, {"a": 1}, "a\0.safetensors"):
        assert get_refusal(raw["weight_map"] | {first: name}).startswith(f"tensor '{first}' is in ")
    assert get_refusal(list(raw["weight_map"])).startswith("'weight_map' is [")
    assert get_refusal({}) == "'weight_map' is {}, expected each tensor's file"


def test_a_tensor_in_two_files_is_refused(broken):
    (broken / "model.safetensors").rename(broken / "a.safetensors")
    shutil.copy(broken / "a.safetensors", broken / "b.safetensors")
    with pytest.raises(UserError, match="b.safetensors: tensor '.*' is in a.safetensors too, expected it once"):
        jclt.load_model(broken)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mesh", [False, True])
def test_weights_that_are_not_finite_are_refused(broken, number, mesh):
    tensors = tensors_of(broken / "model.safetensors")
    entry = tensors["model.layers.1.mlp.up_proj.weight"]
    values = np.frombuffer(entry["data"], jax.numpy.bfloat16).copy()
    values[-3] = number
    entry["data"] = values.tobytes()
    write(broken / "model.safetensors", tensors)
    with pytest.raises(UserError, match="model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight' holds NaN"):
        jclt.load_model(broken, mesh=jclt.make_mesh(data=2) if mesh else None)


def test_weights_of_whole_numbers_are_refused(broken):
    tensors = tensors_of(broken / "model.safetensors")
    tensors["model.norm.weight"]["dtype"] = "I16"
    write(broken / "model.safetensors", tensors)
    with pytest.raises(UserError, match="tensor 'model.norm.weight' is of type int16, expected floating-point numbers"):
        jclt.load_model(broken)


def test_what_is_no_plain_file_gets_one_line(broken):
    contents = {path.name: path.read_bytes() for path in broken.iterdir()}

    def get_refusal(name: str) -> str:
        with pytest.raises(UserError) as error:
            jclt.load_model(broken)
        path = broken / name
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        path.write_bytes(contents[name])
        return str(error.value)

    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (broken / name).unlink()
        (broken / name).mkdir()
        assert f"{name}: is a folder, expected a" in get_refusal(name)
        (broken / name).unlink()
        (broken / name).symlink_to(name)
        assert f"{name}: cannot be read (" in get_refusal(name)
        (broken / name).unlink()
        os.mkfifo(broken / name)
        assert f"{name}: is no plain file" in get_refusal(name)
    jclt.load_model(broken)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"model": {}}', b"null"])
def test_damaged_tokenizers(broken, content):
    (broken / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer that the library reads"):
        jclt.load_model(broken)
    (broken / "tokenizer.json").unlink()
    (broken / "vocab.json").write_bytes(content)
    (broken / "merges.txt").write_bytes(b"#version: 0.2\n")
    with pytest.raises(
        UserError, match="vocab.json: (not a byte-pair vocab|not UTF-8|not valid JSON|expected a JSON object)"
    ):
        jclt.load_model(broken)


def test_a_prompt_with_a_byte_that_is_no_text():
    tokenizer = jclt.load_model("demo").tokenizer
    for encode in (tokenizer.encode, tokenizer.plain):
        with pytest.raises(UserError, match=r"^text 'a\\udcff': '\\udcff' is no character, expected UTF-8 text$"):
            encode("a\udcff")


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_read(broken, monkeypatch):
    monkeypatch.setattr("jclt.memory.measure_free_host_memory", lambda: 1000)
    monkeypatch.setattr("jclt.models.formats.weights._read_pieces", None)
    with pytest.raises(UserError, match="needs .* kB of memory, expected at most 1 kB; dtype='bfloat16' takes half"):
        jclt.load_model(broken)


def test_a_model_is_shown_in_one_line():
    model = golden_model("llama3")
    count = sum(x.size for x in model.params.values())
    assert repr(model) == f"<Model '{model.name}': llama, 3 layers of width 24, {count:,} parameters>"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("IoError: No space left")])
def test_a_full_disk_gets_one_line_and_leaves_nothing(error, tmp_path, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("jclt.array_files.save_file", full)
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        jclt.save_model(golden_model("llama3"), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_the_working_folder_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^.: is the working folder, expected the name of a new one$"):
        jclt.save_model(golden_model("llama3"), ".")
    assert not list(tmp_path.iterdir())

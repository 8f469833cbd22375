"""A run's folder: the settings it was begun with, and the token rows it reads."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, sync_global_devices
from jax.sharding import Mesh

from jclt.config import cache_folder
from jclt.errors import UserError
from jclt.files import read_json, write_json
from jclt.models import Tokenizer
from jclt.training.config import LmConfig, TrainConfig
from jclt.training.data import TokenRows, holds_tokens, load_rows, load_tokens, save_rows, text_rows
from jclt.training.documents import file_system
from jclt.world.corpus import corpus


@dataclass(frozen=True)
class Place:
    """Where a run is kept: a folder, or for a URL a folder of this host that has the URL's small files and is copied
    back at every checkpoint; checkpoints themselves go to the URL directly."""

    folder: Path
    url: str | None = None

    @property
    def checkpoints(self) -> str:
        return f"{self.url}/checkpoints" if self.url else str((self.folder / "checkpoints").absolute())

    def publish(self) -> None:
        """The first host's files, all but what every host makes for itself."""
        if self.url is None or jax.process_index() > 0:
            return
        system, path = file_system(self.url)
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder)
            if file.is_file() and name.parts[0] != "data" and not file.name.endswith(".partial"):
                system.makedirs(f"{path}/{name.parent.as_posix()}", exist_ok=True)
                system.put_file(str(file), f"{path}/{name.as_posix()}")


FETCHED = ("config.json", "data.json", "metrics.jsonl")


def place_of(out: str | Path) -> Place:
    """The run's place; what a URL already holds of it is fetched."""
    if "://" not in str(out):
        return Place(Path(out))
    url = str(out).rstrip("/")
    system, path = file_system(url)
    folder = cache_folder() / "runs" / hashlib.sha256(url.encode()).hexdigest()[:16]
    for name in FETCHED:
        (folder / name).unlink(missing_ok=True)  # the URL's word counts
        if system.exists(f"{path}/{name}"):
            folder.mkdir(parents=True, exist_ok=True)
            system.get_file(f"{path}/{name}", str(folder / name))
    return Place(folder, url)


def agreed(said: bool) -> bool:
    """What the first host says, on all of them."""
    return bool(broadcast_one_to_all(np.asarray(said))) if jax.process_count() > 1 else said


def is_begun(folder: Path, config: LmConfig | TrainConfig) -> bool:
    """Whether the folder holds this run already; an error if it holds anything else."""
    path = folder / "config.json"
    if path.exists():
        settings = json.loads(json.dumps(asdict(config)))
        for name, value in read_json(path).items():
            if value != settings.get(name):
                raise UserError(f"{folder}: holds a run with {name}={value}, expected {name}={settings.get(name)}")
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a run of jclt, expected a new folder or one to resume")
    return False


def find_rows(
    folder: Path,
    config: LmConfig | TrainConfig,
    vocabulary: int,
    tokenizer: Tokenizer | None,
    end: Sequence[int],
    world: Callable[[], tuple[np.ndarray, np.ndarray]],
) -> TokenRows:
    """The run's token rows: those it began with, those of a folder of tokens, or rows made now and kept in its folder.

    `world` generates the small world's. Of several hosts the first makes them, the others read.
    """
    if is_begun(folder, config) and (folder / "data" / "tokens.npy").exists():
        return load_rows(folder / "data")
    if holds_tokens(config.data):
        rows, seen = load_tokens(config.data, config.length, vocabulary, tokenizer), folder / "data.json"
        if seen.exists() and read_json(seen) != {"digest": rows.digest}:
            raise UserError(f"data '{config.data}': other tokens than those that the run in {folder} began with")
        if jax.process_index() == 0:
            _begin(folder, config)
            write_json(seen, {"digest": rows.digest})
        return rows
    if jax.process_index() == 0:
        if config.data == "world":
            made = world()
        elif tokenizer is None:
            raise UserError(f"data '{config.data}': text, expected tokens (`jclt tokenize`): there is no tokenizer")
        else:
            made = text_rows(Path(config.data), tokenizer, config.length, end)
        _begin(folder, config)
        save_rows(folder / "data", *made)
    if jax.process_count() > 1:
        sync_global_devices("the run's rows are there")
    return load_rows(folder / "data")


def world_rows(
    tokenizer: Tokenizer, count: int, length: int, seed: int, **weights: float
) -> tuple[np.ndarray, np.ndarray]:
    """Token rows of the small world and what each token counts, as they are kept."""
    made = corpus(count, length, seed, tokenizer.backend.get_vocab(), **weights)
    return made.tokens.astype(np.uint16), made.weights.astype(np.float16)


def check_settings(config: LmConfig | TrainConfig, context: int, mesh: Mesh) -> None:
    """Refuses what no run can work with, before anything is written."""
    for name in ("steps", "batch", "length", "save_every", "log_every", "data_shards"):
        if getattr(config, name) < 1:
            raise UserError(f"setting '{name}': {getattr(config, name)}, expected at least 1")
    if config.length > context:
        raise UserError(f"setting 'length': {config.length}, expected at most {context}, the model's context")
    if config.warmup >= config.steps:
        raise UserError(f"setting 'warmup': {config.warmup}, expected less than steps={config.steps}")
    if config.batch % mesh.size:
        raise UserError(f"setting 'batch': {config.batch}, expected a multiple of {mesh.size}, the number of devices")


def _begin(folder: Path, config: LmConfig | TrainConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(config))

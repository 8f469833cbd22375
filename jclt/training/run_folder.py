"""A run's folder: the process that works in it, and the settings the run began with."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from fsspec.implementations.local import LocalFileSystem
from jax.sharding import Mesh

from jclt.config import cache_folder
from jclt.data.documents import open_file_system
from jclt.errors import UserError, first_line, reason_of
from jclt.files import read_json, write_bytes, write_json
from jclt.hosts import run_on_every_host, run_on_first_host
from jclt.training.config import REMOVED, LmConfig, TrainConfig, check_ranges
from jclt.training.extension import explain_why_not_longer

LOCK = ".lock"
"""A file in a run's folder, locked by the process that works there."""
ASIDE = (".new", ".old")
"""Endings of a folder's name while a new folder replaces it."""
FINGERPRINT = "coder.model_fingerprint"
"""The setting that names the model's weights."""
FETCHED = ("config.json", "data.json", "metrics.jsonl")
"""Files that are fetched from a run's URL."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks."""


@dataclass(frozen=True)
class Place:
    """Where a run is kept: a folder or a URL.

    For a URL, `folder` is a folder of this host. It holds the small files, which are copied to the URL at every
    checkpoint; checkpoints are written to the URL directly.
    """

    folder: Path
    url: str | None = None

    @property
    def name(self) -> str:
        """The name that tells this run from others."""
        return self.url or str(self.folder.absolute())

    @property
    def checkpoints(self) -> str:
        return f"{self.url}/checkpoints" if self.url else str((self.folder / "checkpoints").absolute())

    @property
    def holds_folder(self) -> bool:
        """Whether this process works in the folder: in a shared folder only the first process does."""
        return self.url is not None or jax.process_index() == 0

    def publish(self) -> None:
        """Copies the first host's files to the URL, without those that every host makes for itself."""
        if self.url is None or jax.process_index() > 0:
            return
        system, path = open_file_system(self.url)
        try:
            for file in sorted(self.folder.rglob("*")):
                name = file.relative_to(self.folder)
                is_local = name.parts[0] in ("data", LOCK) or name.parts[0].endswith(ASIDE)
                if file.is_file() and not is_local and not file.name.endswith(".partial"):
                    system.makedirs(f"{path}/{name.parent.as_posix()}", exist_ok=True)
                    system.put_file(str(file), f"{path}/{name.as_posix()}")
        except Exception as error:  # network errors, which differ between file systems
            raise UserError(f"{self.url}: cannot be written ({first_line(error)})") from None

    def find_newest_step(self) -> int:
        """The step of the newest checkpoint, complete or not; 0 if there is none."""
        system, path = open_file_system(self.checkpoints)
        if not system.isdir(path):
            return 0
        names = (str(entry).rstrip("/").rpartition("/")[2] for entry in system.ls(path, detail=False))
        return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


def find_place(out: str | Path) -> Place:
    """The run's place, after its small files are fetched if it is a URL."""
    place = _resolve_place(out)
    _fetch(place)
    return place


@contextmanager
def lock_place(out: str | Path) -> Iterator[Place]:
    """Gives the run's place while no other process works there. Every host must call it."""
    place = run_on_every_host(lambda: _resolve_place(out))
    release = run_on_every_host(lambda: _lock_folder(place.folder) if place.holds_folder else None)
    try:
        run_on_every_host(lambda: _fetch(place))
        yield place
    finally:
        if release is not None:
            release()


def _resolve_place(out: str | Path) -> Place:
    name = str(out)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"'{name}': not a UTF-8 name, expected one for the run's folder") from None
    if "://" not in name:
        return Place(Path(out))
    url = name.rstrip("/")
    system, path = open_file_system(url)
    if isinstance(system, LocalFileSystem):
        return Place(Path(path))
    # Several processes of a run may share a host, and each makes its rows.
    process = f"-{jax.process_index()}" if jax.process_index() else ""
    return Place(cache_folder() / "runs" / (hashlib.sha256(url.encode()).hexdigest()[:16] + process), url)


def _fetch(place: Place) -> None:
    """Fetches the URL's small files. If they are of another run, the files of this host are deleted first."""
    if place.url is None:
        return
    system, path = open_file_system(place.url)
    try:
        names = [name for name in FETCHED if system.exists(f"{path}/{name}")]
        contents: dict[str, Any] = {name: system.cat_file(f"{path}/{name}") for name in names}
    except Exception as error:  # network errors, which differ between file systems
        raise UserError(f"{place.url}: cannot be read ({first_line(error)})") from None
    config = place.folder / "config.json"
    if place.folder.exists() and (not config.exists() or config.read_bytes() != contents.get("config.json")):
        for item in place.folder.iterdir():
            if item.name != LOCK:
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    for name in FETCHED:
        (place.folder / name).unlink(missing_ok=True)
        if name in contents:
            write_bytes(place.folder / name, contents[name])


def _lock_folder(folder: Path) -> Callable[[], None]:
    """Locks the folder, and returns a function that releases the lock.

    The system also releases it when this process ends, for whatever reason. The function removes the folders that were
    created for the lock, unless they have other contents by then.
    """
    path, created = folder / LOCK, [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(lock, 100).decode(errors="replace").strip()
                os.close(lock)
                raise UserError(f"{folder}: in use by another run ({owner}), expected it to end first") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            with suppress(FileNotFoundError):
                if os.fstat(lock).st_ino == path.stat().st_ino:
                    break
            os.close(lock)  # the file was that of a run which has just ended
    except FileExistsError:
        raise UserError(f"{folder}: exists and is not a run of jclt, expected a new folder or one to resume") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason_of(error)})") from None
    with suppress(OSError):
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} of {socket.gethostname()}".encode())

    def release() -> None:
        with suppress(OSError):
            path.unlink()
        os.close(lock)
        with suppress(OSError):
            for parent in created:
                parent.rmdir()

    return release


def is_begun(folder: Path, config: LmConfig | TrainConfig, reached: Callable[[], int] = lambda: 0) -> bool:
    """Whether the folder holds this run already; an error if it holds anything else.

    A run may be given more steps than it began with, if that changes none of the steps up to the one `reached`.
    """
    path = folder / "config.json"
    if path.exists():
        _check_same(folder, read_json(path), config, reached)
        return True
    if folder.exists() and (not folder.is_dir() or any(item.name != LOCK for item in folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a run of jclt, expected a new folder or one to resume")
    return False


def _check_same(
    folder: Path, saved_settings: Mapping[str, Any], config: LmConfig | TrainConfig, reached: Callable[[], int]
) -> None:
    settings = flatten_settings(json.loads(json.dumps(asdict(config))))
    for name, value in flatten_settings(saved_settings).items():
        if name in REMOVED:
            if value != REMOVED[name]:
                raise UserError(
                    f"{folder}: holds a run with {name}={value}, expected {name}={REMOVED[name]}, a constant by now"
                )
            continue
        if value == settings.get(name) or (name == FINGERPRINT and not value):
            continue
        expected = f"expected {name}={settings.get(name)}"
        if name == FINGERPRINT:
            raise UserError(f"{folder}: the weights of model '{settings['model']}' are others than when the run began")
        reason = ""
        if name == "steps" and isinstance(value, int) and value < config.steps:
            obstacle = explain_why_not_longer(config, value, reached())
            if obstacle is None:
                continue
            reason = f" (it cannot be made longer, {obstacle})"
        raise UserError(f"{folder}: holds a run with {name}={value}, {expected}{reason}")


def flatten_settings(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten_settings(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return flat


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replaces the folder, if it exists, by the one that `write` makes. Every host must call it."""
    new, old = (folder.with_name(folder.name + ending) for ending in ASIDE)

    def clear() -> None:
        for leftover in (new, old):
            if leftover.exists():
                shutil.rmtree(leftover)

    def swap() -> None:
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
        clear()

    run_on_first_host(clear)
    write(new)
    run_on_first_host(swap)


def check_settings(config: LmConfig | TrainConfig, context: int, mesh: Mesh) -> None:
    """Refuses settings that no run can work with, before anything is written."""
    check_ranges(config)
    if config.length > context:
        raise UserError(f"setting 'length': {config.length}, expected at most {context}, the model's context")
    if config.batch % mesh.size:
        raise UserError(f"setting 'batch': {config.batch}, expected a multiple of {mesh.size}, the number of devices")


def write_settings(folder: Path, config: LmConfig | TrainConfig) -> None:
    """Writes the settings of a new run; of a run that exists, only its new number of steps."""
    path = folder / "config.json"
    saved_settings = read_json(path) if path.exists() else None
    if saved_settings is None or saved_settings.get("steps") != config.steps:
        write_json(path, asdict(config) if saved_settings is None else saved_settings | {"steps": config.steps})

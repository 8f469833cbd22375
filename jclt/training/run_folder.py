"""A run's folder: who works in it, the settings it was begun with, and the token rows it reads."""

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
from jclt.data.documents import file_system
from jclt.errors import UserError, first_line, reason_of
from jclt.files import read_json, write_bytes, write_json
from jclt.hosts import on_first_host, together
from jclt.training.config import LmConfig, TrainConfig, check_ranges
from jclt.training.extension import reason_against_more_steps

LOCK = ".lock"
"""In a run's folder, held by the process that works in it."""


ASIDE = (".new", ".old")
"""What a folder is called while another takes its place."""


@dataclass(frozen=True)
class Place:
    """Where a run is kept: a folder, or for a URL a folder of this host that has the URL's small files and is copied
    back at every checkpoint; checkpoints themselves go to the URL directly."""

    folder: Path
    url: str | None = None

    @property
    def name(self) -> str:
        """What tells this run from others."""
        return self.url or str(self.folder.absolute())

    @property
    def checkpoints(self) -> str:
        return f"{self.url}/checkpoints" if self.url else str((self.folder / "checkpoints").absolute())

    @property
    def holds_folder(self) -> bool:
        """Whether this process is the one that works in the folder: the first of all in a shared one."""
        return self.url is not None or jax.process_index() == 0

    def publish(self) -> None:
        """The first host's files, all but what every host makes for itself."""
        if self.url is None or jax.process_index() > 0:
            return
        system, path = file_system(self.url)
        try:
            for file in sorted(self.folder.rglob("*")):
                name = file.relative_to(self.folder)
                own = name.parts[0] in ("data", LOCK) or name.parts[0].endswith(ASIDE)
                if file.is_file() and not own and not file.name.endswith(".partial"):
                    system.makedirs(f"{path}/{name.parent.as_posix()}", exist_ok=True)
                    system.put_file(str(file), f"{path}/{name.as_posix()}")
        except Exception as error:  # of the network, in as many ways as there are file systems
            raise UserError(f"{self.url}: cannot be written ({first_line(error)})") from None

    def reached(self) -> int:
        """The step of the newest checkpoint, whole or not."""
        system, path = file_system(self.checkpoints)
        if not system.isdir(path):
            return 0
        names = (str(found).rstrip("/").rpartition("/")[2] for found in system.ls(path, detail=False))
        return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


FETCHED = ("config.json", "data.json", "metrics.jsonl")


def place_of(out: str | Path) -> Place:
    """The run's place; what a URL already holds of it is fetched."""
    place = _named_place(out)
    _fetch(place)
    return place


@contextmanager
def held_place(out: str | Path) -> Iterator[Place]:
    """The run's place, in which no other process works meanwhile; of several hosts all must ask."""
    place = together(lambda: _named_place(out))
    held = together(lambda: _hold(place.folder) if place.holds_folder else None)
    try:
        together(lambda: _fetch(place))
        yield place
    finally:
        if held is not None:
            held()


def _named_place(out: str | Path) -> Place:
    name = str(out)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"'{name}': not a UTF-8 name, expected one for the run's folder") from None
    if "://" not in name:
        return Place(Path(out))
    url = name.rstrip("/")
    system, path = file_system(url)
    if isinstance(system, LocalFileSystem):
        return Place(Path(path))
    # Several processes of a run may share a host, and each makes its own rows.
    own = f"-{jax.process_index()}" if jax.process_index() else ""
    return Place(cache_folder() / "runs" / (hashlib.sha256(url.encode()).hexdigest()[:16] + own), url)


def _fetch(place: Place) -> None:
    """The URL's word counts: of a run that is not the one there nothing is kept here."""
    if place.url is None:
        return
    system, path = file_system(place.url)
    try:
        found = [name for name in FETCHED if system.exists(f"{path}/{name}")]
        theirs: dict[str, Any] = {name: system.cat_file(f"{path}/{name}") for name in found}
    except Exception as error:  # of the network, in as many ways as there are file systems
        raise UserError(f"{place.url}: cannot be read ({first_line(error)})") from None
    own = place.folder / "config.json"
    if place.folder.exists() and (not own.exists() or own.read_bytes() != theirs.get("config.json")):
        for item in place.folder.iterdir():
            if item.name != LOCK:
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    for name in FETCHED:
        (place.folder / name).unlink(missing_ok=True)
        if name in theirs:
            write_bytes(place.folder / name, theirs[name])


def _hold(folder: Path) -> Callable[[], None]:
    """Takes the folder's lock, which the system lets go of when this process ends, however it does; what is returned
    gives it back, and leaves nothing of the folders that were made for it alone."""
    path, made = folder / LOCK, [own for own in (folder, *folder.parents) if not own.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = os.read(lock, 100).decode(errors="replace").strip()
                os.close(lock)
                raise UserError(f"{folder}: in use by another run ({who}), expected it to end first") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            with suppress(FileNotFoundError):
                if os.fstat(lock).st_ino == path.stat().st_ino:
                    break
            os.close(lock)  # of a run that has just ended
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
            for own in made:
                own.rmdir()

    return release


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Of file systems that cannot say who works where."""


def is_begun(folder: Path, config: LmConfig | TrainConfig, reached: Callable[[], int] = lambda: 0) -> bool:
    """Whether the folder holds this run already; an error if it holds anything else.

    More steps than it was begun with are the same run where none of the steps up to the one `reached` would have been
    another.
    """
    path = folder / "config.json"
    if path.exists():
        _check_same(folder, read_json(path), config, reached)
        return True
    if folder.exists() and (not folder.is_dir() or any(item.name != LOCK for item in folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a run of jclt, expected a new folder or one to resume")
    return False


def _check_same(
    folder: Path, held: Mapping[str, Any], config: LmConfig | TrainConfig, reached: Callable[[], int]
) -> None:
    settings = flat(json.loads(json.dumps(asdict(config))))
    for name, value in flat(held).items():
        if value == settings.get(name) or (name == FINGERPRINT and not value):
            continue
        expected = f"expected {name}={settings.get(name)}"
        if name == FINGERPRINT:
            raise UserError(f"{folder}: the weights of model '{settings['model']}' are others than when the run began")
        reason = ""
        if name == "steps" and isinstance(value, int) and value < config.steps:
            found = reason_against_more_steps(config, value, reached())
            if found is None:
                continue
            reason = f" (it cannot be made longer, {found})"
        raise UserError(f"{folder}: holds a run with {name}={value}, {expected}{reason}")


FINGERPRINT = "coder.model_fingerprint"


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def replaced_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """What `write` makes takes the folder's place, whatever was there; of several hosts all must ask."""
    new, old = (folder.with_name(folder.name + end) for end in ASIDE)

    def clear() -> None:
        for left in (new, old):
            if left.exists():
                shutil.rmtree(left)

    def swap() -> None:
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
        clear()

    on_first_host(clear)
    write(new)
    on_first_host(swap)


def check_settings(config: LmConfig | TrainConfig, context: int, mesh: Mesh) -> None:
    """Refuses what no run can work with, before anything is written."""
    check_ranges(config)
    if config.length > context:
        raise UserError(f"setting 'length': {config.length}, expected at most {context}, the model's context")
    if config.batch % mesh.size:
        raise UserError(f"setting 'batch': {config.batch}, expected a multiple of {mesh.size}, the number of devices")


def _begin(folder: Path, config: LmConfig | TrainConfig) -> None:
    """Writes the settings down, or how many steps they have become."""
    path = folder / "config.json"
    held = read_json(path) if path.exists() else None
    if held is None or held.get("steps") != config.steps:
        write_json(path, asdict(config) if held is None else held | {"steps": config.steps})

"""Files: one way to read each kind, and one way to write a file or folder atomically.

Reading returns the content or raises a `UserError` of one line, whatever the file contains. Text is UTF-8 in every
locale. JSON can be nested too deeply or have numbers that are too long. Pipes and devices are not opened.

Writing is atomic: a file or folder gets its name only when it is complete, and an incomplete one is removed.
"""

import glob
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from jclt.errors import UserError, first_line, reason_of
from jclt.interrupts import undo_on_interrupt


def check_file(path: Path, expected: str = "a file") -> int:
    """The size of a plain file. Anything else is an error: reading a pipe, for instance, could wait for ever."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: not found, expected {expected}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}), expected {expected}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no plain file"
        raise UserError(f"{path}: is {kind}, expected {expected}")
    return status.st_size


def read_bytes(path: Path, expected: str = "a file") -> bytes:
    check_file(path, expected)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}), expected {expected}") from None


def read_text(path: Path, expected: str = "a text file") -> str:
    """UTF-8 text, with or without a byte-order mark; line ends are kept."""
    return decode(read_bytes(path, expected), path)


def decode(data: bytes, where: object) -> str:
    """UTF-8 text; `where` names it in errors."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None


def parse_json(data: bytes | str, where: object) -> Any:
    """Any JSON value; `where` names it in errors."""
    text = decode(data, where) if isinstance(data, bytes) else data
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({first_line(error)})") from None


def parse_object(data: bytes | str, where: object) -> dict[str, Any]:
    """A JSON object; `where` names it in errors."""
    content = parse_json(data, where)
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a JSON object")
    return content


def read_json(path: Path, expected: str = "a JSON file") -> dict[str, Any]:
    """A JSON file with an object in it."""
    return parse_object(read_bytes(path, expected), path)


MAX_YAML_DEPTH = 100


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with `name: value` lines."""
    import yaml  # imported only where needed: most folders have no YAML

    text, depth = read_text(path, "a YAML file"), 0
    try:
        # Checked first: the loader's time grows with the square of the depth.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:
                raise UserError(f"{path}: not valid YAML (nested too deeply)")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `name: value` lines")
    return content


def read_lines(path: Path, expected: str = "a text file") -> list[str]:
    """The lines of a text file, without line ends.

    `str.splitlines` would also split at characters that a line can contain (form feed, U+2028 ...).
    """
    lines = read_text(path, expected).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


@contextmanager
def create_file(path: Path) -> Iterator[Path]:
    """A context that gives the path of a partial file to write, in the folder of `path`.

    If the block succeeds, the partial file is renamed to `path` and replaces an older file; otherwise it is removed.
    The folder is made if it does not exist.
    """
    partial = _partial_path(path)
    with _report_write_errors(path, partial), undo_on_interrupt():
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def create_folder(folder: Path) -> Iterator[Path]:
    """A context that gives a partial folder to write in.

    If the block succeeds, the partial folder is renamed to `folder`, which must not exist or be empty; otherwise it is
    removed.
    """
    check_new_folder(folder)
    folder = folder.absolute()
    partial = _partial_path(folder)
    with _report_write_errors(folder, partial), undo_on_interrupt():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        try:
            partial.mkdir()
            yield partial
            if folder.exists():
                folder.rmdir()
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(folder: Path) -> None:
    """An error unless the folder is absent or empty; the working folder cannot be replaced."""
    try:
        if not os.path.lexists(folder):
            return
        if not folder.is_dir() or any(folder.iterdir()):
            raise UserError(f"{folder}: exists already, expected a new folder")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason_of(error)}), expected a new folder") from None
    if folder.resolve() == Path.cwd().resolve():
        raise UserError(f"{folder}: is the working folder, expected the name of a new one")


def check_writable(folder: Path) -> None:
    """Makes the folder and checks that files can be written in it, before the work whose result will be saved there."""
    with _report_write_errors(folder, folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise UserError(f"{folder}: is a file, expected a folder to write in")
        probe = _partial_path(folder / "probe")
        try:
            probe.write_bytes(b"")
        finally:
            probe.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    with create_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, to_json(content, path, indent=2) + "\n")


def write_json_lines(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """One object per line."""
    with create_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for item in objects:
            file.write(to_json(item, path) + "\n")


def to_json(content: Any, where: object, indent: int | None = None) -> str:
    """Standard JSON, in which NaN and infinity do not exist: they are errors."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{where}: not written, a number is not finite ({first_line(error)})") from None


def _partial_path(path: Path) -> Path:
    """The name is different for each process and host, since several can write the same file."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


_cleaned_folders: set[Path] = set()


def _remove_leftovers(path: Path) -> None:
    """Removes partial files that killed processes of this host left in the folder of `path`.

    This is done once per folder, since a folder can have many files.
    """
    folder = path.parent.absolute()
    if folder in _cleaned_folders:
        return
    _cleaned_folders.add(folder)
    for leftover in folder.glob(f"*.{glob.escape(socket.gethostname())}-*.partial"):
        number = leftover.name.removesuffix(".partial").rpartition("-")[2]
        if number.isdigit() and not _is_alive(int(number)):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def _report_write_errors(path: Path, partial: Path) -> Iterator[None]:
    """Turns errors of writing this file into errors of one line; errors of other files pass through."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        inside = named is None or any(other in (named, *named.parents) for other in (path, partial, path.parent))
        if not inside and named not in path.parents:
            raise
        raise UserError(f"{path}: cannot be written ({reason_of(error)})") from None

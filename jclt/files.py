"""Files: one way to read each kind, and one way to write a file or a folder whole.

Whoever reads a file here gets its content or a `UserError` of one line, whatever the file holds: text is UTF-8 whatever
the locale, JSON may be nested too deeply or hold numbers too long, archives may claim to unpack to any size, what is no
plain file is not opened. Whoever writes one sees it under its name only when it is whole, and nothing of it otherwise.
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
from jclt.interrupts import undone


def check_file(path: Path, expected: str = "a file") -> int:
    """The size of a plain file; an error for anything else, a pipe among them, which would be waited for."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: not found, expected {expected}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}), expected {expected}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no plain file"
        raise UserError(f"{path}: is {kind}, expected {expected}")
    return found.st_size


def read_bytes(path: Path, expected: str = "a file") -> bytes:
    check_file(path, expected)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}), expected {expected}") from None


def read_text(path: Path, expected: str = "a text file") -> str:
    """UTF-8, with or without a byte-order mark; line ends as they are."""
    return decode(read_bytes(path, expected), path)


def decode(data: bytes, where: object) -> str:
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
    found = parse_json(data, where)
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object")
    return found


def read_json(path: Path, expected: str = "a JSON file") -> dict[str, Any]:
    """The object that a JSON file holds."""
    return parse_object(read_bytes(path, expected), path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The `name: value` lines of a YAML file."""
    import yaml  # imported where it is needed: most folders have no YAML

    text = read_text(path, "a YAML file")
    try:
        found = yaml.safe_load(text)
    except RecursionError:
        raise UserError(f"{path}: not valid YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected `name: value` lines")
    return found


def read_lines(path: Path, expected: str = "a text file") -> list[str]:
    """The lines of a text file, without their ends. Not `splitlines`, which also splits at signs that may stand within
    a line (form feed, U+2028 ...)."""
    lines = read_text(path, expected).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name to write under, in the folder of `path`, which is made: when the block ends well the file takes the place
    of an older one under its own name, else it vanishes."""
    beside = _beside(path)
    with _writing(path, beside), undone():
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget_dead(path)
        try:
            yield beside
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in that gets its name when the block ends well, and vanishes when something fails."""
    check_new_folder(folder)
    folder = folder.absolute()
    beside = _beside(folder)
    with _writing(folder, beside), undone():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _forget_dead(folder)
        try:
            beside.mkdir()
            yield beside
            if folder.exists():
                folder.rmdir()
            os.replace(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


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
    """Makes the folder and sees that files can be written in it: before the work whose result is to lie there."""
    with _writing(folder, folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise UserError(f"{folder}: is a file, expected a folder to write in")
        probe = _beside(folder / "probe")
        try:
            probe.write_bytes(b"")
        finally:
            probe.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    with new_file(path) as beside:
        beside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, to_json(content, path, indent=2) + "\n")


def write_json_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """One object a line."""
    with new_file(path) as beside, beside.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(to_json(entry, path) + "\n")


def to_json(content: Any, where: object, indent: int | None = None) -> str:
    """JSON as all read it: NaN and infinity are none."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{where}: not written, a number is not finite ({first_line(error)})") from None


def _beside(path: Path) -> Path:
    """Of several processes, on several hosts, each may write the same file."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


_cleared: set[Path] = set()


def _forget_dead(path: Path) -> None:
    """Removes what processes of this host that were killed left in the path's folder; looks once, for a folder may hold
    many files."""
    folder = path.parent.absolute()
    if folder in _cleared:
        return
    _cleared.add(folder)
    for other in folder.glob(f"*.{glob.escape(socket.gethostname())}-*.partial"):
        number = other.name.removesuffix(".partial").rpartition("-")[2]
        if number.isdigit() and not _is_alive(int(number)):
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def _writing(path: Path, beside: Path) -> Iterator[None]:
    """Says in one line that the file cannot be written; what has to do with other files passes."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        inside = named is None or any(other in (named, *named.parents) for other in (path, beside, path.parent))
        if not inside and named not in path.parents:
            raise
        raise UserError(f"{path}: cannot be written ({reason_of(error)})") from None

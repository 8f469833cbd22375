"""Arguments that several commands share, and parsers of arguments' values."""

import argparse
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from jclt.errors import UserError, escape_unprintable, shorten

if TYPE_CHECKING:
    from jclt.models import Model
    from jclt.models.chat import Messages

Config = TypeVar("Config")
log = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message in one line; escapes colours and line breaks that the user typed."""
        super().error(shorten(escape_unprintable(message)))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Refuses `--flag=--`, which older versions of Python read as a flag without a value."""
        if arg_strings == ["--"] and action.nargs is None and action.option_strings:
            raise argparse.ArgumentError(action, "expected one argument")
        return super()._get_values(action, arg_strings)


Subcommands = argparse._SubParsersAction


def parse_text(typed: str) -> str:
    """Decodes an argument as UTF-8, whatever the locale is."""
    try:
        return os.fsencode(typed).decode()
    except UnicodeError:
        pass
    try:
        typed.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not UTF-8 text") from None
    return typed


def make_int_parser(least: int) -> Callable[[str], int]:
    """Returns a parser of integers that are at least `least`."""

    def parse_int(typed: str) -> int:
        try:
            number = int(typed)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{typed[:40]!r}, expected a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number}, expected at least {least}")
        return number

    return parse_int


def parse_amount(typed: str) -> float:
    """A number that is at least 0."""
    try:
        number = float(typed)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{typed[:40]!r}, expected a number") from None
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{number}, expected a number from 0 on")
    return number


def parse_nodes(typed: str) -> int | float:
    """A number of nodes, or a share of the scores, which is written with a point."""
    try:
        return int(typed) if typed.strip("+-").isdigit() else float(typed)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{typed[:40]!r}, expected a number of features or a share of the scores"
        ) from None


def parse_cuts(typed: str) -> tuple[int, ...]:
    """Numbers of layers, separated by commas."""
    if not all(part.strip().isdecimal() for part in typed.split(",")):
        raise argparse.ArgumentTypeError(f"{typed[:40]!r}, expected numbers of layers, such as 6,12")
    return tuple(int(part) for part in typed.split(","))


def parse_target(typed: str) -> str | tuple[str, str]:
    """A token, or two tokens separated by ~."""
    parts = parse_text(typed).split("~") if typed.strip() != "~" else [typed]
    if len(parts) > 2 or not all(parts):
        raise argparse.ArgumentTypeError(f"{typed!r}, expected TOKEN, or FIRST~SECOND for their difference")
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def add_prompt_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", nargs="?", type=parse_text, metavar="PROMPT", help="text")
    command.add_argument(
        "--chat",
        type=parse_text,
        metavar="TEXT",
        help="instead of PROMPT: what a user says, in the form of the model's chat template",
    )


def find_prompt(arguments: argparse.Namespace) -> "str | Messages | None":
    """The prompt, or the chat with one message."""
    if arguments.chat is None:
        if arguments.prompt == "":
            raise UserError("prompt: empty, expected at least one token")
        return arguments.prompt
    if arguments.prompt is not None:
        raise UserError(f"{arguments.command}: both a prompt and --chat, expected one of them")
    return [{"role": "user", "content": arguments.chat}]


def add_model_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        help="demo, smollm2, a folder, a GGUF file or a hub name (default: the model that the coder's own files name)",
    )


def add_fit_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments that say how a coder fits its model."""
    command.add_argument(
        "--reads", metavar="SITE", help="where the coder reads, if its files do not say (such as mlp_in)"
    )
    command.add_argument(
        "--writes", metavar="SITE", help="where the coder writes, if its files do not say (such as mlp_out)"
    )
    command.add_argument(
        "--no-check",
        action="store_true",
        help="do not check on a short text that the coder fits the model",
    )


def add_coder_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of the commands about a coder."""
    command.add_argument(
        "coder",
        metavar="CODER",
        help="demo, demo-transcoders, neurons, or a folder in any layout that load_coder reads",
    )
    add_model_argument(command)
    add_fit_arguments(command)


def add_keep_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--keep",
        choices=("device", "host", "disk", "mesh"),
        help="where the coder's weights are kept: in a device's memory, in the host's, in the coder's files, or split "
        "over all devices (default: the first of device, host and disk that has room)",
    )
    command.add_argument(
        "--split-model",
        action="store_true",
        help="split the model over all devices, for models that do not fit on one; by default each has a copy",
    )


def add_run_arguments(command: argparse.ArgumentParser, presets: str, settings: str) -> None:
    """The arguments of the commands that train."""
    command.add_argument(
        "config",
        metavar="CONFIG",
        help=f"a preset ({presets}), or a .py file that defines `config`; the file is executed",
    )
    command.add_argument("--out", help="the run's folder, or a URL such as gs://bucket/run (default runs/NAME)")
    command.add_argument(
        "--set",
        action="append",
        type=parse_text,
        default=[],
        metavar="NAME=VALUE",
        help=f"overrides a setting, such as {settings}; can be repeated",
    )


def start_run(
    arguments: argparse.Namespace, kind: type[Config], presets: Mapping[str, Callable[[], Config]]
) -> tuple[Config, str]:
    """Joins the other hosts, and returns the run's settings and its folder from the `add_run_arguments`."""
    from jclt.config import load_settings, override
    from jclt.hosts import join_hosts
    from jclt.pods.flags import set_flags

    set_flags()  # before the first use of a TPU, which reads them
    join_hosts()
    config = override(load_settings(arguments.config, kind, presets), arguments.set)
    out = arguments.out or f"runs/{Path(arguments.config).stem}"
    if out.startswith("file:"):
        raise UserError(f"--out '{out}': expected the folder's path, or a URL of a bucket such as gs://bucket/run")
    try:
        out.encode()
    except UnicodeEncodeError:
        raise UserError(f"--out '{out}': not UTF-8, expected a name that checkpoints can have") from None
    return config, out


def load_coder_and_model(arguments: argparse.Namespace) -> "tuple[Model, Any]":
    """Loads the coder and its model; by default, the model that the coder's files name."""
    import jax

    from jclt.coders import load_coder
    from jclt.mesh import make_mesh
    from jclt.models import load_model

    name, coder = arguments.model, arguments.coder
    mesh = make_mesh(devices=jax.local_devices()) if getattr(arguments, "split_model", False) else None
    if coder is None and name not in (None, "demo"):
        raise UserError(f"model '{name}': expected --coder too, a coder of this model (demo is the demo model's)")
    coder = coder or "demo"
    if name is None and coder not in ("demo", "neurons"):
        name = _find_model_name(coder)
        log.info("model %s, as the coder's files say", name)
        try:
            model = load_model(name, mesh=mesh)
        except UserError as error:
            raise UserError(f"{error}; the files of coder '{coder}' name it, --model says another") from None
    else:
        model = load_model(name or "demo", mesh=mesh)
    keep = getattr(arguments, "keep", "device")  # commands without this argument need all weights on the device
    return model, load_coder(
        coder,
        keep=make_mesh() if keep == "mesh" else keep,
        model=model,
        reads=arguments.reads,
        writes=arguments.writes,
        check=not arguments.no_check,
    )


def _find_model_name(coder: str) -> str:
    """The name of the model on which the coder was trained, from the coder's files."""
    from jclt.coders import coder_model

    name = coder_model(coder)
    if not name:
        raise UserError(f"coder '{coder}': its files name no model, expected --model")
    return name


def check_new_file(path: Path | None) -> None:
    """Raises an error if the file cannot be written later. Called before long computations."""
    from jclt.files import check_writable

    if path is not None:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected a file to write to")
        check_writable(path.parent)

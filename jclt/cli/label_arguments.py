"""The arguments that name labels and described features, and what they name."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jclt.errors import UserError

if TYPE_CHECKING:
    from jclt.features import Features

log = logging.getLogger(__name__)


def add_labels_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="what features mean: a file of labels, or a folder with labels.json (default: beside the coder, if there)",
    )


def find_label_texts(arguments: argparse.Namespace, coder: Any) -> dict[tuple[int, int], str]:
    """The labels of --labels, or those beside the coder if they are of its weights; by layer and feature."""
    from jclt.coders import read_fingerprint
    from jclt.features.labels import find_labels, load_label_texts

    folder = find_coder_folder(arguments)
    path = arguments.labels or (find_labels(folder) if folder else None)
    if path is None or (arguments.labels is None and not path.exists()):
        return {}
    try:
        return load_label_texts(path, read_fingerprint(coder))
    except UserError as error:
        if arguments.labels is not None:
            raise
        log.warning("labels beside the coder are left out: %s", error)
        return {}


def find_described_features(arguments: argparse.Namespace, coder: Any) -> "Features | None":
    """The features of --features, or those in the folder `features` beside the coder if they are of its weights."""
    from jclt.coders import read_fingerprint
    from jclt.features import load_features
    from jclt.viewer.feature_files import check_described

    folder = find_coder_folder(arguments)
    path = arguments.features or (folder / "features" if folder else None)
    if path is None or (arguments.features is None and not path.exists()):
        return None
    try:
        features = load_features(path)
        check_described(features, read_fingerprint(coder))
    except UserError as error:
        if arguments.features is not None:
            raise
        log.warning("features beside the coder are left out: %s", error)
        return None
    return features


def find_coder_folder(arguments: argparse.Namespace) -> Path | None:
    """The folder with the coder's files; None for neurons."""
    from jclt.coders import find_coder

    name = arguments.coder or "demo"
    return None if name == "neurons" else find_coder(name)

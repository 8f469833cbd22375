"""How the model reacts to edits, and which edits that allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from jclt.coders import Coder, CoderConfig
from jclt.errors import UserError
from jclt.interventions.changes import Changes, make_changes
from jclt.interventions.feature_pass import Writing
from jclt.models import PATTERNS_AND_DENOMINATORS, Compose, Edit, Model, ModelConfig, SiteEdit
from jclt.models.edits import acts_in_layer, check_conflicts, check_edit, list_edited_sites, list_parts
from jclt.models.sites import list_absent_sites

Treatment = Literal["frozen", "free"]
Reference = Literal["original", "current"]
Errors = Literal["kept", "dropped"]

INSIDE_ATTENTION = ("query_denominator", "key_denominator", "queries", "keys", "attn_scores")
"""Sites that only affect the pattern."""
INSIDE_MLP = ("mlp_neurons", "mlp_raw_out", "mlp_post_denominator")
"""Sites between what MLPs read and what they write."""


@dataclass(frozen=True)
class Setting:
    """How the model reacts to edits."""

    layers: tuple[int, int] | None = None  # the first and the last clamped layer
    attention: Treatment = "frozen"
    norms: Treatment = "frozen"
    reference: Reference = "original"
    errors: Errors = "kept"

    def __post_init__(self) -> None:
        for name, kind in (
            ("attention", Treatment),
            ("norms", Treatment),
            ("reference", Reference),
            ("errors", Errors),
        ):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} '{getattr(self, name)}': expected {' or '.join(get_args(kind))}")
        if self.layers is not None and self.reference == "current":
            raise UserError("reference 'current' with layers: clamped layers are not recomputed, expected 'original'")
        if self.errors == "dropped" and self.reference == "current":
            raise UserError("errors 'dropped' with reference 'current': the model's own MLPs have none to drop")

    @property
    def writing(self) -> Writing:
        if self.layers is not None:
            return "clamped"
        return "replacement" if self.reference == "original" else "model"

    def list_frozen_sites(self, config: ModelConfig) -> tuple[str, ...]:
        """The sites that keep their original values."""
        treatment = {name: self.attention if name == "pattern" else self.norms for name in PATTERNS_AND_DENOMINATORS}
        absent = list_absent_sites(config)
        return tuple(name for name, value in treatment.items() if value == "frozen" and name not in absent)

    def describe(self) -> str:
        layers = "all layers react" if self.layers is None else f"layers {self.layers[0]} to {self.layers[1]} clamped"
        return (
            f"{layers}; attention {self.attention}, norms {self.norms}, reference {self.reference}, "
            f"errors {self.errors}"
        )


class EditParts(NamedTuple):
    """A user's edits by what they change."""

    changes: Changes  # of features
    errors: tuple[SiteEdit, ...]
    sites: tuple[Edit, ...]


def parse_layers(layers: tuple[int, int] | range | None) -> tuple[int, int] | None:
    if layers is None:
        return None
    if isinstance(layers, range):
        layers = (layers.start, layers.stop - 1)
    first, last = layers
    if not 0 <= first <= last:
        raise UserError(f"layers {first} to {last}: expected the first and the last layer of a range")
    return int(first), int(last)


def sort_edits(model: Model, coder: Coder, edits: Edit | Sequence[Edit], setting: Setting, length: int) -> EditParts:
    """The edits by what they change; an error for one that the setting makes meaningless."""
    edits = list(edits) if isinstance(edits, Sequence) else [edits]
    every = [part for edit in edits for part in list_parts(edit)]
    of_features = [e for e in every if isinstance(e, SiteEdit) and e.site == "features"]
    of_errors = tuple(e for e in every if isinstance(e, SiteEdit) and e.site == "errors")
    of_sites = tuple(e for e in every if not (isinstance(e, SiteEdit) and e.site in ("features", "errors")))
    check_conflicts((*of_errors, *of_sites))
    for edit in (*of_features, *of_errors):
        edit.ranges.check(edit.site, model.config, length)
    check_edit(Compose(of_sites), model.config, length)
    c = coder.config
    first, last = (0, model.config.layers - 1) if setting.layers is None else setting.layers
    if last >= model.config.layers:
        raise UserError(f"layers {first} to {last}: expected at most {model.config.layers - 1}")
    for edit in (*of_features, *of_errors):
        acting = edit.ranges.read("layer", model.config.layers)
        if setting.layers is not None and acting and (acting[0] < first or acting[-1] > last):
            which = f"layers {acting[0]} to {acting[-1]}" if len(acting) > 1 else f"layer {acting[0]}"
            raise UserError(f"edit of {edit.site} of {which}: expected within the clamped layers {first} to {last}")
    if of_errors and (setting.writing == "model" or setting.errors == "dropped"):
        raise UserError("edit of errors: there are none with reference 'current' or errors 'dropped'")
    own_mlps = list_own_mlps(setting, c, model.config.layers)
    for edit in of_sites:
        for name in list_edited_sites(edit):
            if setting.attention == "frozen" and name in INSIDE_ATTENTION:
                raise UserError(f"edit of site '{name}': changes nothing while attention is frozen, expected it free")
            if name in INSIDE_MLP and not any(acts_in_layer(edit, layer) for layer in own_mlps):
                reason = "while features stand in for MLPs, expected reference 'current'"
                if setting.writing == "clamped":
                    reason = "in clamped layers, expected another layer"
                raise UserError(f"edit of site '{name}': changes nothing {reason}")
    return EditParts(make_changes(of_features, c), of_errors, of_sites)


def list_own_mlps(setting: Setting, coder: CoderConfig, layers: int) -> list[int]:
    """The layers in which the model's own MLPs act."""
    if setting.layers is not None:
        first, last = setting.layers
        return [layer for layer in range(layers) if not first <= layer <= last]
    if setting.writing == "model":
        return list(range(layers))
    return [] if setting.errors == "kept" else [layer for layer in range(layers) if layer not in coder.covered]


def list_dropped_errors(setting: Setting, coder: CoderConfig) -> Sequence[int]:
    """The layers whose errors the setting leaves out."""
    if setting.errors == "kept":
        return ()
    return coder.covered if setting.layers is None else range(setting.layers[0], setting.layers[1] + 1)

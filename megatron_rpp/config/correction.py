"""The section `correction`: its rules, its line in `rpp check`, and the old names of its settings.

Files with the old names kind, level, low and high keep their meaning, to the bit:

    kind: tis      weight: LEVEL, weight_clip: [low, high]; with a veto also reject_mode: zero
    kind: icepop   as mis, and reject_mode: zero
    kind: mis      weight: token, weight_clip: null, reject: LEVEL, reject_outside: [low, high]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from megatron_rpp.config.problems import Problem
from megatron_rpp.config.schema import Correction, RatioLevel

Tree = dict[str, Any]

# The settings of each part. Bounds for one level mean nothing for another.
PARTS = {"weight": ("weight_clip", "weight_normalize"), "reject": ("reject_outside", "reject_mode")}
_NEW = tuple(name for part, settings in PARTS.items() for name in (part, *settings))
_OLD_DEFAULTS: Tree = {"kind": "none", "level": "token", "low": 0.0, "high": 2.0}
_KINDS = ("none", "tis", "icepop", "mis")


def correction_problems(correction: Correction) -> Iterator[Problem]:
    """Every broken rule."""
    clip, outside = correction.weight_clip, correction.reject_outside
    if clip is not None and not (math.isfinite(clip[1]) and 0 <= clip[0] < clip[1]):
        yield Problem("correction.weight_clip", f"must be [low, high] with 0 <= low < high, got {list(clip)}; TIS has [0, 2]")
    if outside is not None and not (math.isfinite(outside[1]) and 0 < outside[0] < outside[1]):
        message = f"must be [low, high] with 0 < low < high, got {list(outside)}"
        yield Problem("correction.reject_outside", f"{message}; IcePop has [0.5, 5]")
    if outside is None and correction.reject != "none":
        message = f"must be set with correction.reject {correction.reject}: [low, high] of the ratio old / rollout"
        yield Problem("correction.reject_outside", f"{message}, e.g. [0.5, 5] by token or [0.999, 1.001] for a geometric mean")
    if correction.veto is not None and not 0 < correction.veto < 1:
        yield Problem("correction.veto", f"must be in (0, 1), got {correction.veto}; set e.g. 1e-4")


def correction_effects(correction: Correction) -> Iterator[Problem]:
    """Settings that nothing would read."""
    plain = Correction()
    if correction.weight == "none":
        for name in PARTS["weight"]:
            if getattr(correction, name) != getattr(plain, name):
                message = "has no effect while correction.weight is none; set token, sequence or geometric"
                yield Problem(f"correction.{name}", message)
    if correction.reject == "none" and correction.reject_outside is not None:
        message = "has no effect while correction.reject is none; set token, sequence or geometric"
        yield Problem("correction.reject_outside", message)
    if correction.reject == "none" and correction.veto is None and correction.reject_mode != plain.reject_mode:
        yield Problem("correction.reject_mode", "has no effect without correction.reject or correction.veto")


def correction_warnings(correction: Correction) -> Iterator[str]:
    """What is allowed and worth a second look."""
    if correction.weight == "sequence" and correction.weight_clip is None and correction.reject != "sequence":
        message = "the product over a long response may reach e^20; TIS has [0, 2]"
        yield f"correction.weight sequence without correction.weight_clip: {message}"


def describe(correction: Correction) -> str:
    """The combination in force, in one line."""
    parts = []
    if correction.weight != "none":
        clip = "not truncated" if correction.weight_clip is None else f"truncated to {_range(correction.weight_clip)}"
        parts.append(f"{correction.weight} weight, {clip}" + (", divided by its mean" if correction.weight_normalize else ""))
    if correction.reject != "none" and correction.reject_outside is not None:
        parts.append(f"{correction.reject} ratio outside {_range(correction.reject_outside)} rejected")
    if correction.veto is not None:
        parts.append(f"response with a token below {correction.veto:g} rejected")
    if correction.reject != "none" or correction.veto is not None:
        is_mask = correction.reject_mode == "mask"
        parts.append("rejected tokens leave the loss mask" if is_mask else "rejected tokens get weight 0")
    return "; ".join(parts) or "none"


def _range(bounds: tuple[float, float]) -> str:
    return f"[{bounds[0]:g}, {bounds[1]:g}]"


def without_other_parts(preset: Tree, own: Mapping[str, Any]) -> Tree:
    """A preset's section without the settings of a part for which `own` names another level."""
    changed = [part for part in PARTS if part in own and own[part] != preset.get(part, "none")]
    dropped = {name for part in changed for name in PARTS[part]}
    return {name: value for name, value in preset.items() if name not in dropped}


def from_old_names(own: Tree, preset: Tree, lines: dict[tuple[str, ...], str]) -> tuple[Tree, list[Problem]]:
    """The section `correction` as a user wrote it, with old names replaced by the current ones, and what is wrong with them.

    preset: the preset's section, which old names change as they did when it was written in them. lines: where each setting was
    written; gets entries for the current names. A section with a problem is returned without its old names.
    """
    older = {name: own[name] for name in _OLD_DEFAULTS if name in own}
    if not older:
        return own, []
    where = {name: lines.get(("correction", name), "") for name in older}
    kept = {name: value for name, value in own.items() if name not in older}
    mixed = [name for name in _NEW if name in own]
    if mixed:
        first = next(iter(older))
        message = f"is an old name and cannot be combined with correction.{mixed[0]}; write instead {_instead(older.get('kind'))}"
        return kept, [Problem(f"correction.{first}", message, where[first])]
    wrong = []
    for name, value in older.items():
        if message := _expected(name, value):
            wrong.append(Problem(f"correction.{name}", message, where[name]))
    if wrong:
        return kept, wrong
    below = _in_old_names(preset)
    if below is None or older.get("kind", below["kind"]) != below["kind"]:
        below = _OLD_DEFAULTS
    section = below | older
    source = where[next(iter(older))]
    if section["kind"] == "none" and (section != _OLD_DEFAULTS or own.get("veto") is not None):
        message = "none leaves correction's other settings without effect; set tis, icepop or mis"
        return kept, [Problem("correction.kind", message, source)]
    if section["kind"] in ("icepop", "mis") and section["low"] == 0:
        message = f"0 drops no small weight, and {section['kind']} means to; set e.g. 0.5, or correction.kind: tis"
        return kept, [Problem("correction.low", message, source)]
    replaced = _in_current_names(section, has_veto=(preset | own).get("veto") is not None)
    lines |= {("correction", name): source for name in replaced}
    return kept | replaced, []


def _instead(kind: Any) -> str:
    """What stands for the old names, of one kind where that is known."""
    meant = {
        "none": "weight: none, reject: none",
        "tis": "weight: LEVEL, weight_clip: [low, high]",
        "icepop": "weight: token, weight_clip: null, reject: LEVEL, reject_outside: [low, high], reject_mode: zero",
        "mis": "weight: token, weight_clip: null, reject: LEVEL, reject_outside: [low, high]",
    }
    level = "level as weight: LEVEL or reject: LEVEL, low and high as weight_clip or reject_outside: [low, high]"
    return meant.get(kind, level) if isinstance(kind, str) else level


def _in_current_names(older: Tree, *, has_veto: bool) -> Tree:
    bounds = (older["low"], older["high"])
    if older["kind"] == "none":
        return {"weight": "none", "reject": "none"}
    if older["kind"] == "tis":
        section = {"weight": older["level"], "weight_clip": bounds, "reject": "none"}
        return section | {"reject_mode": "zero"} if has_veto else section
    mode = {"icepop": "zero", "mis": "mask"}[older["kind"]]
    return {"weight": "token", "weight_clip": None, "reject": older["level"], "reject_outside": bounds, "reject_mode": mode}


def _in_old_names(section: Tree) -> Tree | None:
    """The old names that mean this section; None where it is empty or they cannot say it."""
    given = Correction(**section)
    for kind in _KINDS[1:]:
        level, bounds = given.reject, given.reject_outside
        if kind == "tis":
            level, bounds = given.weight, given.weight_clip
        if level != "none" and bounds is not None:
            older = {"kind": kind, "level": level, "low": bounds[0], "high": bounds[1]}
            meant = _in_current_names(older, has_veto=given.veto is not None)
            if Correction(**meant, veto=given.veto) == given:
                return older
    return None


def _expected(name: str, value: Any) -> str:
    """What is wrong with the value of an old name; empty when nothing is."""
    words = {"kind": _KINDS, "level": get_args(RatioLevel)}.get(name)
    if words is not None:
        return "" if value in words else f"expected {', '.join(map(repr, words))}, got {value!r}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "" if is_number else f"expected a number, got {value!r}"

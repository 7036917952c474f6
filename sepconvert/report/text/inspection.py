"""What an inspection found in text: a verdict, and the layers that are nearest to an exact structure."""

from collections.abc import Sequence
from itertools import chain

from sepconvert.base.notes import Note, ReasonCode, info
from sepconvert.report.text.numbers import Document, fold, ratio_text, written_count
from sepconvert.report.text.tables import change_text, kernel_text, layer_table, structure_table, text_table

_NEAREST = 10  # layers in the short table


def verdict(layers: Sequence[Document]) -> Note:
    """Return how many convolutions separate exactly, what it saves, and what to do next."""
    found = [layer for layer in layers if layer["reason_code"] != ReasonCode.UNFOLLOWED]
    if not found:
        return info("The model runs no convolution on these inputs; pass one that does.")
    converted = [layer for layer in found if layer["decision"] == "converted"]
    before, after = (sum(layer["macs"][side] for layer in found) for side in (0, 1))
    count = f"{len(converted)} of {len(found)} convolution{'s' * (len(found) > 1)}"
    if converted:
        saved = ratio_text(before / after) if after else "infinitely"
        return info(
            f"{count} separate exactly, which leaves {saved} fewer MACs to all of them: convert the model in "
            "`mode` exact."
        )
    near = _by_nearness(found)
    if not near:
        return info(f"{count} separate: none can be replaced, for the reasons below.")
    best = _best(near[0])
    return info(
        f"{count} separate exactly. The nearest, {near[0]['name']}, is {best['best_relative_error']:.1%} off "
        f"a {best['scheme']} form of rank {max(best['paying_rank'], 1)}. `mode` auto, with `calib` and "
        "`data`, finds approximations that pay at a small loss of accuracy."
    )


def table(layers: Sequence[Document], *, all: bool = False) -> str:
    """Return the layers that separate or are nearest to it, and below them why others do not; or all."""
    if all:
        return "\n".join([layer_table(layers), "", structure_table(layers)])
    near = _by_nearness(layers)
    shown = near[:_NEAREST]
    rows = [_row(layer) for layer in shown]
    headers = ["layer", "kernel", "nearest structure", "rank", "error", "MACs"]
    lines = [text_table(rows, headers, [20, None, 23, None, None, None])] if rows else []
    if len(near) > len(shown):
        lines.append(f"{len(near) - len(shown)} others are further from any structure (`all` shows them).")
    others = [layer for layer in layers if not layer["structures"]]
    reasons: dict[str, list[str]] = {}
    for layer in others:
        reasons.setdefault(layer["reason"], []).append(layer["name"])
    lines += [fold(f"{_some(names)}: {text}.") for text, names in reasons.items()]
    return "\n".join(chain(lines[:1], [""] * bool(rows and lines[1:]), lines[1:]))


def _by_nearness(layers: Sequence[Document]) -> list[Document]:
    """Return the layers that have structures: those that separate, and then the others by their error."""
    with_structures = [layer for layer in layers if layer["structures"]]
    return sorted(
        with_structures,
        key=lambda layer: (
            layer["decision"] != "converted",
            0.0 if layer["decision"] == "converted" else _best(layer)["best_relative_error"],
            layer["macs"][1] - layer["macs"][0],
        ),
    )


def _best(layer: Document) -> Document:
    """Return the structure that a layer is converted to, or the one whose kernel is nearest to its own."""
    chosen = [each for each in layer["structures"] if each["scheme"] == layer["scheme"]]
    nearest: Document = min(chosen or layer["structures"], key=lambda each: each["best_relative_error"])
    return nearest


def _row(layer: Document) -> list[str]:
    best = _best(layer)
    rank = best["rank"] if layer["decision"] == "converted" else max(best["paying_rank"], 1)
    error = "exact" if layer["decision"] == "converted" else f"{best['best_relative_error']:.1e}"
    macs = (
        change_text(*layer["macs"]) if layer["decision"] == "converted" else written_count(layer["macs"][0])
    )
    return [layer["name"], kernel_text(layer), best["scheme"], f"{rank} of {best['full_rank']}", error, macs]


def _some(names: Sequence[str], most: int = 6) -> str:
    """Return names joined by commas, the first ones and a count where there are many."""
    rest = len(names) - most
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:most])} and {rest} others"

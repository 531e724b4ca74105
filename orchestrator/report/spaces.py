"""The section about spaces: what a search for spaces found, and the space that a search for networks stayed in."""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from orchestrator.report import binmap
from orchestrator.report.data import RunView
from orchestrator.report.distribution import budget_names
from orchestrator.report.edf import Sides, edf_figure, members, sides
from orchestrator.report.ranges import picture, states_of_bins, states_of_space
from orchestrator.report.views import views
from searchspaces.bins import checked_groups
from searchspaces.catalogue import ELITE
from searchspaces.elite.found import FoundSpace
from searchspaces.elite.space import EliteSpace
from searchspaces.errors import SpaceError
from searchspaces.space import SearchSpace

NSS = "nss"     # the controller that searches for spaces
ROW_PX = 17     # of the map of bins


@dataclass(frozen=True)
class Spaces:
    """Of elite.json: the groups' names and their bins' labels, and for each aim its goal's label and what was found."""

    names: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    found: tuple[tuple[str, FoundSpace], ...]


@dataclass(frozen=True)
class Section:
    """HTML with empty boxes, and the figures that belong into them by name."""

    html: str
    figures: dict[str, Any]


def searches_spaces(run: RunView) -> bool:
    controller = run.config.get("controller")
    return bool(run.elite) or (controller.get("name") if isinstance(controller, dict) else controller) == NSS


def spaces_section(run: RunView, space: SearchSpace | None, problems: list[str]) -> Section:
    """Empty for runs that neither searched for spaces nor inside one."""
    parts = [_inside(run, space)]
    if searches_spaces(run):
        parts.append(_searched(run, space, problems))
    return Section("".join(part.html for part in parts), {k: v for part in parts for k, v in part.figures.items()})


# --- a run inside a space ---------------------------------------------------------------------------------------------


def _inside(run: RunView, space: SearchSpace | None) -> Section:
    section = run.config.get("space")
    if not isinstance(section, dict) or section.get("name") != ELITE:
        return Section("", {})
    base = section.get("base")
    name = str(base.get("name", "its base")) if isinstance(base, dict) else str(base or "its base")
    by = " that a search for spaces had found" if section.get("run") else ""
    link = (' <a href="narrow/report.html">How that search went</a>' if run.narrowed else
            f" Found by the run <code>{escape(str(section['run']))}</code>." if section.get("run") else "")
    drawn = ""
    if isinstance(space, EliteSpace):
        try:
            groups = checked_groups(space.base)
            drawn = picture([g.name for g in groups], [g.labels for g in groups], states_of_space(groups, space))
        except SpaceError:
            drawn = ""      # a base without bins was given ranges by hand
    return Section(f'<section id="inside"><h2>The space that was searched</h2><p>This run stayed inside a part of '
                   f"{escape(name)}{by}: only the filled ranges.{link}</p>{drawn}</section>", {})


# --- a search for spaces ----------------------------------------------------------------------------------------------


def _searched(run: RunView, space: SearchSpace | None, problems: list[str]) -> Section:
    spaces = _read(run, problems)
    cards, drawn = _cards(run, space, spaces, problems) if spaces else ("", {})
    chances = _map(run, space, spaces)
    if chances is None and not cards:
        return Section('<section id="spaces"><h2>Spaces</h2><p class="empty">No spaces have been found yet.</p>'
                       "</section>", {})
    box = ""
    if chances is not None:
        height = 110 + ROW_PX * len(chances["data"][0]["z"])
        box = ('<figure><figcaption><b>How sure the search became.</b> Chance of every bin after each epoch.'
               f'</figcaption><div class="plot" id="figure-bins" style="height:{max(height, 260)}px"></div></figure>')
        drawn["bins"] = chances
    missing = "" if cards else '<p class="empty">No spaces have been found yet.</p>'
    return Section(f'<section id="spaces"><h2>Spaces that were found</h2>{missing}{cards}{box}</section>', drawn)


def _read(run: RunView, problems: list[str]) -> Spaces | None:
    if not run.elite:
        return None
    try:
        groups = run.elite["groups"]
        found = tuple((str(one["goal"]), FoundSpace.from_json({k: v for k, v in one.items() if k != "goal"}))
                      for one in run.elite["spaces"])
        spaces = Spaces(tuple(str(group["name"]) for group in groups),
                        tuple(tuple(map(str, group["labels"])) for group in groups), found)
        for _, one in found:
            _check(spaces, one)
        return spaces
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        problems.append(f"elite.json is not what this version writes ({type(error).__name__}: {error}); the spaces "
                        "are not shown.")
        return None


def _check(spaces: Spaces, found: FoundSpace) -> None:
    for draw in (found.kept, *found.draws):
        if len(draw.bins) != len(spaces.labels) or any(not 0 <= b < len(of) for b, of in zip(draw.bins, spaces.labels)):
            raise ValueError(f"bins {list(draw.bins)} are not of its groups")


def _map(run: RunView, space: SearchSpace | None, spaces: Spaces | None) -> dict[str, Any] | None:
    """The map of bins, as JSON; None where no logits are recorded, or not of these groups."""
    epochs = binmap.recorded_logits(run)
    if not epochs:
        return None
    first = epochs[min(epochs)]
    aims = binmap.aims_recorded(first)
    if spaces is not None:
        names, labels = spaces.names, spaces.labels
    elif space is not None:
        groups = checked_groups(space)
        names, labels = tuple(g.name for g in groups), tuple(g.labels for g in groups)
    else:
        count = len(first) // max(aims, 1)
        labels = tuple(tuple(map(str, range(len(first.get(f"0.{k}", []))))) for k in range(count))
        names = tuple(map(str, range(count)))
    wanted = {f"{a}.{k}": len(of_group) for a in range(aims) for k, of_group in enumerate(labels)}
    if any({key: len(row) for key, row in logits.items()} != wanted for logits in epochs.values()):
        return None
    return dict(json.loads(binmap.bin_map(run, _aim_names(run, spaces, aims), names, labels).to_json()))


def _aim_names(run: RunView, spaces: Spaces | None, aims: int) -> list[str]:
    if spaces is not None and len(spaces.found) == aims:
        return [_title(spaces, label, found) for label, found in spaces.found]
    named = budget_names(run)
    return named if len(named) == aims else [f"aim {a + 1}" for a in range(aims)]


def _cards(run: RunView, space: SearchSpace | None, spaces: Spaces, problems: list[str]) -> tuple[str, dict[str, Any]]:
    """One per aim, side by side."""
    seen, cards, drawn = dict(views(run)), [], {}
    for a, (label, found) in enumerate(spaces.found):
        compared = _compared(seen.get(label, run), space, spaces, found, problems)
        figure = edf_figure(compared)
        box = ""
        if figure is not None:
            drawn[f"edf-{a}"] = json.loads(figure.to_json())
            box = f'<div class="plot edf" id="figure-edf-{a}"></div>'
        words = "".join(f"<li>{escape(one.words())}</li>" for one in compared)
        chances = binmap.last_chances(run, a, [len(of_group) for of_group in spaces.labels])
        names, labels = spaces.names, spaces.labels
        states = states_of_bins(labels, found.bins)
        cards.append(f'<article class="space"><h3>Space for {escape(_title(spaces, label, found))}</h3>'
                     f"<p>{escape(_sentence(found))}</p>{picture(names, labels, states, chances)}"
                     f"{_draws(spaces, found)}{_errors(box, words)}</article>")
    return (f'<p class="note">Rows: what can be narrowed. Filled: the range that was kept; the bluer another, the '
            f'likelier it was at the end.</p><div class="grid">{"".join(cards)}</div>'), drawn


def _errors(box: str, words: str) -> str:
    return f'<h4>Errors of trials inside and outside</h4>{box}<ul class="words">{words}</ul>' if words else ""


def _compared(run: RunView, space: SearchSpace | None, spaces: Spaces, found: FoundSpace,
              problems: list[str]) -> tuple[Sides, ...]:
    if space is None or not run.trials.num_rows:
        return ()
    try:
        inside_N = members(run, space, checked_groups(space), found.bins)
    except (SpaceError, ValueError, TypeError, IndexError) as error:
        problems.append(f"Trials inside and outside the space for {amount(found.target, found.unit)} are not compared "
                        f"({error}).")
        return ()
    return sides(run, inside_N, found, amount(found.target, found.unit))


# --- words ------------------------------------------------------------------------------------------------------------


def amount(cost: float, unit: str) -> str:
    return f"{cost:.4g} ms" if unit == "ms" else f"{cost / 1e6:.4g} M multiply-adds"


def _title(spaces: Spaces, label: str, found: FoundSpace) -> str:
    several = len({label for label, _ in spaces.found}) > 1
    return (f"{label}, " if several else "") + amount(found.target, found.unit)


def _sentence(found: FoundSpace) -> str:
    kept = found.kept
    reach = "" if found.aim == found.target else (f" No space's mean is nearer than {amount(found.aim, found.unit)}, "
                                                  "so that was aimed at.")
    return (f"Its networks cost {amount(kept.mean, found.unit)} on average, {kept.deviation:+.1%} of the target."
            f"{reach}")


def _draws(spaces: Spaces, found: FoundSpace) -> str:
    """Equal draws in one row, the kept one marked."""
    rows: dict[tuple[int, ...], int] = {}
    for draw in found.draws:
        rows[draw.bins] = rows.get(draw.bins, 0) + 1
    by_bins = {draw.bins: draw for draw in found.draws}
    body = "".join(
        f'<tr{" class=chosen" if bins == found.bins else ""}><td>{count}</td>'
        f"<td>{amount(by_bins[bins].mean, found.unit)}</td><td>{by_bins[bins].deviation:+.1%}</td>"
        f"<td>{_chance(by_bins[bins].log_p)}</td><td>{escape(_differences(spaces, bins, found.bins))}</td></tr>"
        for bins, count in rows.items())
    head = "".join(f"<th>{name}</th>" for name in ("Draws", "Mean cost", "Off target", "Chance", "Ranges"))
    return (f'<div class="scroll"><table class="draws"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            "</div>")


def _chance(log_p: float) -> str:
    p = math.exp(log_p)
    return f"{p:.0%}" if p >= 0.1 else f"{p:.1g}" if p < 0.001 else f"{p:.1%}"


def _differences(spaces: Spaces, bins: Sequence[int], kept: Sequence[int]) -> str:
    """What is not as in the kept one."""
    if tuple(bins) == tuple(kept):
        return "kept"
    return ", ".join(f"{name} {of_group[b]}" for name, of_group, b, other
                     in zip(spaces.names, spaces.labels, bins, kept) if b != other)

"""The section about spaces: what a search for spaces found, and the space that a search for networks stayed in."""
from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from typing import Any

from orchestrator.report import binmap
from orchestrator.report.data import RunView
from orchestrator.report.distribution import budget_names
from orchestrator.report.edf import Sides, edf_figure, members, sides
from orchestrator.report.found import Spaces, amount, draws_table, read_spaces, sentence, title
from orchestrator.report.ranges import picture, states_of_bins, states_of_space
from orchestrator.report.views import views
from searchspaces.bins import BinGroup, checked_groups
from searchspaces.catalogue import ELITE
from searchspaces.elite.found import FoundSpace
from searchspaces.elite.space import EliteSpace
from searchspaces.errors import SpaceError
from searchspaces.space import SearchSpace

NSS = "nss"     # the controller that searches for spaces
ROW_PX = 17     # of the map of bins
NOTE = ("A row is what can be narrowed. Filled: the range that was kept; percentages: how likely each was at the end. "
        "Trials outside a space may lie in another one. Costly networks err less in any space, so the fair comparison "
        "is the one at about the same cost.")


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
    if isinstance(space, EliteSpace) and (groups := _groups(space.base)):
        drawn = picture([g.name for g in groups], [g.labels for g in groups], states_of_space(groups, space))
    return Section(f'<section id="inside"><h2>The space that was searched</h2><p>This run stayed inside a part of '
                   f"{escape(name)}{by}: the filled ranges.{link}</p>{drawn}</section>", {})


def _groups(space: SearchSpace | None) -> tuple[BinGroup, ...]:
    """() where they cannot be known, and for spaces without bins, which ranges by hand may narrow too."""
    try:
        return () if space is None else checked_groups(space)
    except SpaceError:
        return ()


# --- a search for spaces ----------------------------------------------------------------------------------------------


def _searched(run: RunView, space: SearchSpace | None, problems: list[str]) -> Section:
    spaces = read_spaces(run, problems)
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


def _map(run: RunView, space: SearchSpace | None, spaces: Spaces | None) -> dict[str, Any] | None:
    """The map of bins, as JSON; None where no logits are recorded, or not of these groups."""
    epochs = binmap.recorded_logits(run)
    if not epochs:
        return None
    first = epochs[min(epochs)]
    aims = binmap.aims_recorded(first)
    if spaces is not None:
        names, labels = spaces.names, spaces.labels
    elif groups := _groups(space):
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
        return [escape(title(spaces, label, found)) for label, found in spaces.found]
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
        cards.append(f'<article class="space"><h3>Space for {escape(title(spaces, label, found))}</h3>'
                     f"<p>{escape(sentence(found))}</p>{picture(names, labels, states, chances)}"
                     f"{draws_table(spaces, found)}{_errors(box, words)}</article>")
    return f'<p class="note">{NOTE}</p><div class="grid">{"".join(cards)}</div>', drawn


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
    return sides(run, inside_N, found, amount(found.aim, found.unit))

"""One HTML file with everything in it: words, a table, and Plotly's charts with Plotly itself; it asks no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go

from nestling.tuning.comparison.arms import Arm, Metric
from nestling.tuning.comparison.drawing import colour
from nestling.tuning.comparison.gather import AXES
from nestling.tuning.comparison.table import cells, headings

_NOTE = (
    "Means over the seeds ± half of the 95 % interval (Student’s t); one seed has no interval. Seconds are those of "
    "optimizer steps. FLOPs are what nestling levels counts: reading, and every component’s own rule; the backward "
    "pass is not in them."
)
_FONT = "system-ui, sans-serif"
_SCALE = {"light": ["#eef3fc", "#3b7de0"], "dark": ["#1f232b", "#5b94ec"]}
#: Text, soft text, grid and ground; those of page.html.
_INKS = {
    "light": ("#1f2430", "#667085", "#e3e6ec", "#ffffff"),
    "dark": ("#e6e8ee", "#98a1b3", "#2b303b", "#14161b"),
}


@dataclass(frozen=True)
class Chart:
    """A chart with its heading and, if it needs one, a line below that says how to read it."""

    name: str
    heading: str
    figure: go.Figure
    note: str = ""


@dataclass(frozen=True)
class Page:
    """What stands on a page, from its top to its bottom.

    Attributes:
        title: its heading.
        lead: paragraphs below it.
        arms: rows of the table, and whose curves can be hidden.
        metrics: what the table shows of them.
        charts: in their order.
        command: what makes this page again.
        axis: what curves are drawn over first: a key of `AXES`.
        table: whether there is one.
    """

    title: str
    lead: Sequence[str]
    arms: Sequence[Arm]
    metrics: Sequence[Metric]
    charts: Sequence[Chart]
    command: str
    axis: str = "tokens"
    table: bool = True

    def write(self, path: Path) -> None:
        """Write the page, as a whole."""
        from plotly.offline import get_plotlyjs

        data = {
            "figures": {chart.name: json.loads(chart.figure.to_json()) for chart in self.charts},
            "themes": {name: _theme(name) for name in _INKS},
            "axes": AXES,
            "axis": self.axis,
        }
        template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(
            template.substitute(
                title=escape(self.title),
                lead="\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in self.lead),
                table=_table(self.arms, self.metrics) if self.table else "",
                controls=_controls(self.arms),
                charts="\n".join(map(_section, self.charts)),
                command=escape(self.command),
                plotly=get_plotlyjs(),
                figures=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
            ),
            encoding="utf-8",
        )
        draft.replace(path)


def _table(arms: Sequence[Arm], metrics: Sequence[Metric]) -> str:
    first = 1 + len(arms[0].differs)  # of the columns that hold numbers
    heads = headings(arms, metrics)
    lines = ['<div class="scroll"><table><thead><tr>']
    lines += [f"<th{_right(place >= first)}>{escape(text)}</th>" for place, text in enumerate(heads)]
    lines += ["</tr></thead><tbody>"]
    for number, arm in enumerate(arms):
        label, *others = cells(arm, metrics)
        lines += [f"<tr><th>{_dot(number)}{escape(label.text)}</th>"]
        for place, cell in enumerate(others, 1):
            text = escape(cell.text)
            shown = text if cell.value is None else f'<data value="{cell.value!r}">{text}</data>'
            lines += [f"<td{_right(place >= first)}>{shown}</td>"]
        lines += ["</tr>"]
    return "\n".join([*lines, f'</tbody></table></div><p class="note">{_NOTE}</p>'])


def _dot(place: int) -> str:
    return f'<i style="background:{colour(place)}"></i>'


def _right(number: bool) -> str:
    return ' class="number"' if number else ""


def _controls(arms: Sequence[Arm]) -> str:
    axes = (f'<button class="axis" value="{key}">{name}</button>' for key, name in AXES.items())
    names = (
        f'<button class="arm" aria-pressed="true" value="{label}">{_dot(place)}{label}</button>'
        for place, label in enumerate(escape(arm.label) for arm in arms)
    )
    return f"<nav><div>{''.join(axes)}</div><div>{''.join(names)}</div></nav>"


def _section(chart: Chart) -> str:
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    heading = f"<h2>{escape(chart.heading)}</h2>" if chart.heading else ""
    return f'<section>{heading}{note}<div class="chart" id="{chart.name}"></div></section>'


def _theme(name: str) -> dict[str, Any]:
    """Plotly's template of a colour scheme."""
    ink, soft, line, ground = _INKS[name]
    axis = {
        "gridcolor": line,
        "linecolor": line,
        "zeroline": False,
        "ticks": "",
        "tickfont": {"color": soft},
        "title": {"font": {"color": soft, "size": 12}},
        "automargin": True,
        "exponentformat": "SI",
    }
    scale = {"colorscale": _SCALE[name], "colorbar": {"outlinewidth": 0, "tickfont": {"color": soft}}}
    layout = go.Layout(
        font={"family": _FONT, "size": 12, "color": ink},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 48, "r": 12, "t": 16, "b": 44},
        xaxis={**axis, "showgrid": False, "showline": True},
        yaxis=axis,
        coloraxis=scale,
        hoverlabel={"bgcolor": ground, "bordercolor": line, "font": {"color": ink, "family": _FONT}},
    )
    return {"layout": layout.to_plotly_json()}

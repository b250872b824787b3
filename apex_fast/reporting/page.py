"""The page of a run: one HTML file that needs no other and no network.

Curves are SVG, pictures are inside as data URLs, there is no script, and the page forbids itself to load anything. So
it can be mailed, kept beside the weights, and opened in ten years.
"""

from __future__ import annotations

import base64
import html
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from apex_fast.command import command_name
from apex_fast.data.tar_shards import shown as without_secrets
from apex_fast.reporting.curves import Chart, Curve, draw
from apex_fast.reporting.run_files import RunFiles
from apex_fast.shipped import typed
from apex_fast.training.phases import CLIPPED, DV, HEALTHY_DV, duration, size
from apex_fast.training.timing import ROLES
from apex_fast.version import __version__

GRIDS = 12
"""Pictures of validations that a page holds; more are thinned out evenly."""

_STYLE = """
body { background: #eeece5; color: #1c2030; font: 16px/1.5 system-ui, sans-serif }
body { margin: 0 auto; max-width: 1120px; padding: 2rem 1rem 4rem }
h1 { font-size: 2rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem } h3 { font-size: 1rem }
p.state { margin: .2rem 0 1.2rem; color: #6e707a }
p.state b.done { color: #2c6e36 } p.state b.open { color: #b0421c }
table { border-collapse: collapse; background: #fcfbf7; width: 100% }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #d9d6cb }
th, td { text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
table.words td, table.words th { text-align: left; vertical-align: top }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem }
.chart { background: #fcfbf7; border-radius: 8px; padding: .6rem .8rem }
.chart h3 { margin: 0 0 .2rem; font-weight: 600 }
svg { width: 100%; height: auto; display: block } svg polyline { fill: none; stroke-linejoin: round }
svg .grid { stroke: #161e3e; stroke-opacity: .1 } svg .tick, svg .label { font-size: 11px; fill: #6e707a }
svg .label { fill: #1c2030 } svg .band { fill: #3c7d3f; fill-opacity: .12 }
svg .alarm { stroke: #b0421c; stroke-dasharray: 3 2 }
svg .phase0 { fill: #161e3e; fill-opacity: .09 } svg .phase1 { fill: #161e3e; fill-opacity: .045 }
svg .phase2 { fill: none }
figure { margin: 0 0 1.2rem } figcaption { color: #6e707a; font-size: .92rem }
img { max-width: 100%; border-radius: 8px }
pre { background: #161e3e; color: #f3f1ea; padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: .85rem }
summary { cursor: pointer } .quiet { color: #6e707a; font-size: .92rem }
@media (max-width: 520px) { .charts { grid-template-columns: 1fr } }
"""


def render(run: RunFiles, *, grids: int = GRIDS, now: float | None = None) -> str:
    """The page of ``run`` as text.

    Args:
        grids: pictures at most.
        now: seconds since 1970, for how long ago the run last wrote something.
    """
    title = run.folder.resolve().name
    sections = [
        f"<h1>{_text(title)}</h1>{_state(run, time.time() if now is None else now)}",
        _section("Where it stands", _standing(run)),
        _section("Alarms", _alarms(run)),
        _section("Curves", _curves(run)),
        _section("Pictures over time", _pictures(run, grids)),
        _section("Scores", _scores(run)),
        _section("Checkpoints", _checkpoints(run)),
        _section("Config", _config(run)),
        _section("Environment", _environment(run)),
        _section("Next", f"<pre>{_text(chr(10).join(_next(run)))}</pre>"),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever a prompt or a path may hold: nothing is run, and nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}: apex_fast run</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(section for section in sections if section)
        + f'\n<p class="quiet">written by apex_fast {__version__}, {_date(time.time() if now is None else now)}</p>'
        "</body></html>\n"
    )


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{_text(heading)}</h2>{body}</section>" if body else ""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    def line(values: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(v)}</{tag}>" for v in values) + "</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    return f'<table class="{kind}">{head}<tbody>{"".join(line(row, "td") for row in rows)}</tbody></table>'


# ---- what it came to


def _state(run: RunFiles, now: float) -> str:
    of = f" of {run.total:,}" if run.total else ""
    if run.finished:
        return f'<p class="state"><b class="done">finished</b> at step {run.step:,}{of}</p>'
    since = "" if run.updated is None else f"; last written {duration(now - run.updated)} ago"
    return f'<p class="state"><b class="open">not finished</b>: step {run.step:,}{of}{since}</p>'


_STANDING = (
    (DV, f"dv, the difference of the branches against the real one (healthy {HEALTHY_DV[0]:g} to {HEALTHY_DV[1]:g})"),
    (CLIPPED, "share of it that is clipped"),
    ("loss_fake", "L_fake"),
    ("loss_correction", "correction"),
    ("loss_supervised", "L_sup"),
    ("loss_total", "loss"),
    ("grad_norm", "gradient norm"),
    ("learning_rate", "learning rate"),
    ("images_per_second", "images a second"),
    ("seconds/step", "seconds a step"),
    ("peak_bytes", "memory at the peak"),
)


def _standing(run: RunFiles) -> str:
    """First, middle and last values of what tells most, each a mean over its twentieth of the run."""
    if not run.records:
        return '<p class="quiet">No step has been written to metrics.jsonl yet.</p>'
    rows = []
    for key, name in _STANDING:
        points = run.series(key)
        if not points:
            continue
        share = max(1, len(points) // 20)
        middle = (len(points) - share) // 2
        parts = [points[:share], points[middle : middle + share], points[-share:]]
        rows.append([name, *(_value(key, sum(v for _, v in part) / len(part)) for part in parts)])
    scored = run.validations[-1] if run.validations else {}
    rows += [
        [f"{name} (validation, step {scored['step']:,})", "", "", f"{value:.4g}"]
        for name, value in scored.items()
        if name != "step" and isinstance(value, (int, float))
    ]
    return _table(["", "at first", "half way", "at last"], rows)


def _value(key: str, value: float) -> str:
    if key == "peak_bytes":
        return size(value)
    if key == CLIPPED:
        return f"{100 * value:.1f} %"
    return f"{value:.3g}"


def _alarms(run: RunFiles) -> str:
    if not run.alarms:
        return '<p class="quiet">None.</p>' if run.records else ""
    rows = [[a["step"], a.get("name", ""), a.get("saw", ""), a.get("did", ""), a.get("see", "")] for a in run.alarms]
    return _table(["step", "alarm", "saw", "did", "read"], rows, "words")


def _scores(run: RunFiles) -> str:
    if run.scores is None:
        return ""
    found: dict[str, Mapping[str, Any]] = {
        f"{n} sampling step{'' if n == '1' else 's'}": values for n, values in run.scores["scores"].items()
    }
    if isinstance(run.scores.get("floor"), dict):
        found["real data (the floor)"] = run.scores["floor"]
    columns = list(dict.fromkeys(key for values in found.values() for key in values))
    rows = [[name, *(f"{v[c]:,.4g}" if c in v else "" for c in columns)] for name, v in found.items()]
    return _table(["", *(c.replace("_", " ") for c in columns)], rows)


# ---- curves


def _charts(run: RunFiles) -> list[Chart]:
    def curve(key: str, label: str, factor: float = 1.0, exact: bool = False) -> Curve:
        return Curve(label, [(s, v * factor) for s, v in run.series(key)], exact=exact)

    scored = dict.fromkeys(k for v in run.validations for k in v if k != "step")
    unit = 1000.0 if max([v for _, v in run.series("seconds/step")], default=1.0) < 1 else 1.0
    return [
        Chart(
            "losses",
            [
                curve("loss_fake", "L_fake"),
                curve("loss_supervised", "L_sup"),
                curve("loss_mix", "L_mix"),
                *([] if run.series("loss_fake") else [curve("loss_total", "loss")]),
            ],
            log=True,
        ),
        Chart(f"dv, healthy {HEALTHY_DV[0]:g} to {HEALTHY_DV[1]:g}", [curve(DV, "dv")], log=True, band=HEALTHY_DV),
        Chart("clipped, per cent of dv", [curve(CLIPPED, "clipped", 100.0)], from_zero=True),
        *(
            Chart(
                f"validation: {name}",
                [Curve(name, [(v["step"], float(v[name])) for v in run.validations if name in v], dots=True)],
                from_zero=True,
            )
            for name in scored
        ),
        Chart("cosine of shifted and real velocity", [curve("shift_real_cosine", "cosine")]),
        Chart("correction weight", [curve("correction_weight", "weight", exact=True)], from_zero=True),
        Chart("gradient norm", [curve("grad_norm", "gradient norm")], log=True),
        Chart("learning rate", [curve("learning_rate", "learning rate", exact=True)], from_zero=True),
        Chart(
            f"{'milli' if unit > 1 else ''}seconds of a step, by role",
            [curve(f"seconds/{role}", role, unit) for role in ROLES],
            from_zero=True,
        ),
        Chart("images a second", [curve("images_per_second", "images a second")], from_zero=True),
        Chart("memory at the peak, GB", [curve("peak_bytes", "peak", 1e-9, exact=True)], from_zero=True),
    ]


def _curves(run: RunFiles) -> str:
    last = float(run.step if run.finished or run.total is None else run.total)
    marks = [(float(a["step"]), str(a.get("name", "alarm"))) for a in run.alarms]
    phases = run.phases()
    drawn = []
    for chart in _charts(run):
        picture = draw(chart, last=last, phases=phases, marks=marks)
        if picture:
            drawn.append(f'<div class="chart"><h3>{_text(chart.title)}</h3>{picture}</div>')
    if not drawn:
        return ""
    named = ", then ".join(f"{name} from step {first}" for first, name in phases)
    told = f'<p class="quiet">Shaded: {_text(named)}.{" Dashed: alarms." if marks else ""}</p>' if phases else ""
    return f'{told}<div class="charts">{"".join(drawn)}</div>'


# ---- pictures


def _pictures(run: RunFiles, most: int) -> str:
    shown = evenly(run.grids, most)
    figures = [_figure(step, path) for step, path in shown]
    figures = [figure for figure in figures if figure]
    if not figures:
        return ""
    note = ""
    if len(shown) < len(run.grids):
        note = f'<p class="quiet">{len(shown)} of {len(run.grids)}, the first and the last among them.</p>'
    return note + "".join(figures)


def _figure(step: int, path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    # One that is being written at this moment has no end yet.
    if not data.startswith(b"\x89PNG") or b"IEND" not in data[-16:]:
        return ""
    encoded = base64.b64encode(data).decode()
    return (
        f'<figure><img alt="pictures of the validation at step {step}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>step {step:,}</figcaption></figure>"
    )


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of ``items``, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return list(items[-1:]) if most == 1 else []
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


# ---- what it was made with


def _checkpoints(run: RunFiles) -> str:
    if not run.saved:
        return ""
    best = run.best or {}
    told = f"best {best.get('metric')}: {best.get('value')}"
    rows = [
        [name, f"{step:,}", size(count), told if best.get("checkpoint") == name else ""]
        for name, step, count in ((f"checkpoint-{step}", step, count) for step, count in run.saved)
    ]
    return _table(["", "step", "size", ""], rows)


def _config(run: RunFiles) -> str:
    if not run.config:
        return ""
    # The page is made to be sent around, and a URL may hold a password.
    config = {key: without_secrets(str(value)) if key == "dataset_name" else value for key, value in run.config.items()}
    lines = "\n".join(
        f"{key}: {json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value}"
        for key, value in config.items()
    )
    return f"<details open><summary>all keys, as the run used them</summary><pre>{_text(lines)}</pre></details>"


def _environment(run: RunFiles) -> str:
    tables = []
    for part in run.parts:
        versions = part.get("versions")
        facts = {
            "began": part.get("started"),
            "from step": part.get("from_step"),
            "device": f"{part.get('device_name', '')} ({part.get('device', '')})",
            "processes": part.get("processes"),
            "threads": part.get("threads"),
            "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None,
        }
        visibility = part.get("visibility")
        if isinstance(visibility, (int, float)):
            facts["visibility of the shift, as probed"] = f"{visibility:.3g}"
        tables.append(_table([], [[k, v] for k, v in facts.items() if v is not None], "words"))
    return "<br>".join(tables)


def _next(run: RunFiles) -> list[str]:
    place = typed(run.folder)
    if not run.finished:
        config = shlex.quote(str(run.folder / "config.yaml"))
        return (
            [f"{command_name()} train {config} --resume_from_checkpoint latest"]
            if run.saved
            else [f"{command_name()} doctor {config}"]
        )
    return [
        f'{command_name()} generate {place} --prompt "..."',
        f"{command_name()} export {place}",
        f"{command_name()} export {place} --format comfyui",
    ]

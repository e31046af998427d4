"""A report as a web page: one file, with its plots drawn as SVG, that needs nothing from anywhere."""

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import BenchError
from .report import LATENCY_COLUMNS, Round, counts_of, decode, facts, latency_rows, warnings_of

Points = list[tuple[float, float]]
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 28, 44
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
.note { border-left: 4px solid #d97706; padding-left: .7rem; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; }
"""


def save_page(file: Path, made: Round) -> None:
    """Write a round as a page.

    Raises:
        BenchError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(made), "utf-8")
    except OSError as error:
        raise BenchError(f"--html: {file}: {error.strerror}") from None


def page(made: Round) -> str:
    """The page."""
    title = html.escape(f"{made['target']['model']} by {made['target']['protocol']}, {made['at']}")
    told = "".join(f"<dt>{html.escape(name)}<dd>{html.escape(text)}" for name, text in facts(made))
    notes = "".join(f'<p class="note">{html.escape(line)}' for line in warnings_of(made))
    head = "".join(f"<th>{html.escape(name)}" for name in LATENCY_COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in latency_rows(made))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>fewstep bench</h1><dl>{told}</dl>{notes}"
        f"<h2>Latency in ms</h2><p>From the time a request was meant to be sent.</p>"
        f"<table><thead><tr>{head}<tbody>{body}</table>"
        f"<h2>Latency by percentile</h2>{_by_percentile(made)}"
        f"<h2>Latency over time</h2>{_over_time(made)}"
        f"<h2>Images a second over time</h2>{_throughput(made)}</html>\n"
    )


def _by_percentile(made: Round) -> str:
    parts = {**(made["kinds"] if len(made["kinds"]) > 1 else {}), "all": made["total"]}
    lines = {name: _spectrum(part["histogram"]) for name, part in parts.items()}
    return _plot(lines, "percentile", "ms", x_scale=lambda p: -math.log10(1 - p / 100), x_marks=_NINES, is_log=True)


_NINES = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999)


def _spectrum(text: str) -> Points:
    counts = counts_of(decode(text))
    total = sum(count for _, count in counts)
    points, seen = [], 0
    for value, count in counts:
        points.append((100 * seen / total, value / 1000))
        seen += count
        points.append((min(100 * seen / total, 100 * (1 - 0.5 / total)), value / 1000))
    return points


def _over_time(made: Round) -> str:
    lines: dict[str, Points] = {}
    width = made["load"]["seconds"] / len(made["slices"])
    for name in made["kinds"]:
        for percentile in (50, 99):
            points = []
            for i, one in enumerate(made["slices"]):
                latencies = decode(one["histograms"][name])
                if latencies.get_total_count():
                    points.append(((i + 0.5) * width, latencies.get_value_at_percentile(percentile) / 1000))
            lines[f"{name} p{percentile}"] = points
    return _plot(lines, "seconds", "ms", is_log=True)


def _throughput(made: Round) -> str:
    width = made["load"]["seconds"] / len(made["slices"])
    points = [((i + 0.5) * width, one["images"] / width) for i, one in enumerate(made["slices"])]
    return _plot({"images/s": points}, "seconds", "images/s")


def _plot(
    lines: dict[str, Points],
    x_name: str,
    y_name: str,
    *,
    x_scale: Callable[[float], float] = lambda x: x,
    x_marks: Sequence[float] = (),
    is_log: bool = False,
) -> str:
    """Lines over common axes, with their names below."""
    legend = [
        f'<span style="color:{_COLOURS[i % len(_COLOURS)]}">&#9632;</span> {html.escape(name)} &nbsp; '
        for i, name in enumerate(lines)
    ]
    drawn = draw(lines, x_name, y_name, x_scale=x_scale, x_marks=x_marks, is_log=is_log)
    return f"<figure>{drawn}<figcaption>{''.join(legend)}</figcaption></figure>"


def draw(
    lines: dict[str, Points],
    x_name: str,
    y_name: str,
    *,
    x_scale: Callable[[float], float] = lambda x: x,
    x_marks: Sequence[float] = (),
    is_log: bool = False,
) -> str:
    """Lines over common axes, as SVG that may also stand alone.

    Args:
        lines: points by name.
        x_name: below the axis.
        y_name: beside it.
        x_scale: what is drawn of an x; with it, the places of ``x_marks`` are named.
        x_marks: see there.
        is_log: whether y is.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        return "<p>Nothing was answered.</p>"
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if is_log:
        low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)) + 1e-9)
        y_marks = [m * 10.0**e for e in range(round(math.log10(low)), round(math.log10(high)) + 1) for m in (1, 2, 5)]
        y_marks = [mark for mark in y_marks if low <= mark <= high]
    else:
        low, high = 0.0, max(max(ys) * 1.05, 1e-9)
        y_marks = _steps(high)
    x_low, x_high = (x_scale(min(xs)), x_scale(max(xs))) if x_marks else (0.0, max(xs))
    marks = [mark for mark in x_marks if x_scale(mark) <= x_high] or _steps(x_high)

    def across(x: float) -> float:
        return _LEFT + (x_scale(x) - x_low) / max(x_high - x_low, 1e-12) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if is_log else y / high
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for mark in y_marks:
        parts.append(f'<path d="M{_LEFT} {up(mark):.1f}H{_WIDTH - _RIGHT}" stroke="#8884"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for mark in marks:
        if across(mark) <= _WIDTH:
            place = f'x="{across(mark):.1f}" y="{_HEIGHT - _BOTTOM + 16}"'
            parts.append(f'<text {place} text-anchor="middle">{mark:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{x_name}</text>')
    parts.append(f'<text x="8" y="14">{y_name}</text>')
    for i, line in enumerate(lines.values()):
        colour = _COLOURS[i % len(_COLOURS)]
        path = "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in line) if line else ""
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>'


def _steps(high: float) -> list[float]:
    """From 0 to at most ``high``, in four to ten round steps."""
    unit = 10.0 ** math.floor(math.log10(max(high, 1e-9) / 4))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if high / (m * unit) < 10)
    return [i * step for i in range(int(high / step + 1e-9) + 1)]

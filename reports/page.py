"""A run's page: one HTML file with everything that it shows, for light and dark, without a network or a server."""

import base64
import html
import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.intervals import interval_labels, scale_of
from reports.plots import SERIES, TITLES, VARIABLES, chart_of_coefficients, chart_of_noise_levels, chart_of_series
from reports.runs import EXPERTS, RATES, RunRecord
from reports.table import compare_runs, format_number, table_cells
from runtime.command_line import counted
from runtime.files import atomic_write

TEMPLATE = Path(__file__).with_name("page.html")
# The slider has at most this many positions, and pictures are scaled down to this width, so that a page of a long run
# stays small enough to open and to send.
MAX_POSITIONS = 60
MAX_WIDTH = 1200
# Metrics of the table below the slider, if the runs have them, after the losses.
NUMBERS = ("held_out_loss", "fid", *EXPERTS, *RATES, "images_per_s")


def write_page(out: Path, runs: list[RunRecord]):
    """Write the page of one or more runs.

    Args:
        out: the HTML file.
        runs: the runs, whose numbers share the charts.
    """
    steps = slider_steps(runs)
    columns = number_names(runs)
    # A tag or a comment within the data could end the script.
    data = json.dumps(page_data(runs, steps, columns), separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(" and ".join(run.name for run in runs) if len(runs) < 4 else counted(len(runs), "run")),
        "subtitle": subtitle(runs),
        "body": "\n".join([summary(runs), slider(runs, steps, columns), charts(runs), configs(runs)]),
        "data": data,
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text())
    with atomic_write(out) as temporary:
        temporary.write_text(page)


def subtitle(runs: list[RunRecord]) -> str:
    """Return what the first line of the page says of each run: its model and how far it is."""
    lines = []
    for number, run in enumerate(runs):
        max_steps = run.config["training"]["max_steps"]
        text = f"{run.config['model']['name']}, {run.last_step:,} of {counted(max_steps, 'step')}"
        lines.append(f"{name_of(run, number)}: {html.escape(text)}")
    return "<br>".join(lines)


def name_of(run: RunRecord, number: int) -> str:
    """Return the name of a run behind the colour of its lines."""
    color = VARIABLES[SERIES[number % len(SERIES)]]
    return f'<span class="key" style="background: var({color})"></span>{html.escape(run.name)}'


def summary(runs: list[RunRecord]) -> str:
    """Return the table of `visualize.py compare`: the runs, and below them the scores of their samples."""
    titles, cells = table_cells(*compare_runs(runs))
    numbers = {run.name: number for number, run in enumerate(runs)}
    n_own = titles.index("samples") if "samples" in titles else len(titles)

    def rows(columns: range, cells: list) -> list[list[str]]:
        texts = [
            [f"<b>{html.escape(row[i][0])}</b>" if row[i][1] else html.escape(row[i][0]) for i in columns]
            for row in cells
        ]
        names = [row[0][0] for row in cells]
        return [[name_of(runs[numbers[name]], numbers[name]), *row] for name, row in zip(names, texts, strict=True)]

    note = "Of losses, the last value" + ("; the best of each column in bold." if len(runs) > 1 else ".")
    own = rows(range(1, n_own), list({row[0][0]: row for row in cells}.values()))
    parts = [
        f"<h2>Summary</h2>\n<p class='soft'>{note}</p>",
        table([*map(html.escape, titles[:n_own])], own, "summary"),
    ]
    if n_own < len(titles):
        scored = rows(range(n_own, len(titles)), [row for row in cells if row[n_own][0] != format_number(None)])
        parts.append("<p class='soft'>Scores of samples, from evaluator.py:</p>")
        parts.append(table(["run", *map(html.escape, titles[n_own:])], scored, "scores"))
    return "\n".join(parts)


def table(titles: list[str], rows: list[list[str]], kind: str, attributes: list[str] | None = None) -> str:
    """Return a table of cells that are HTML, with the attributes of its rows."""
    attributes = attributes or [""] * len(rows)
    head = "".join(f"<th>{title}</th>" for title in titles)
    lines = [
        f"<tr{' ' + extra if extra else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for row, extra in zip(rows, attributes, strict=True)
    ]
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{"".join(lines)}</table></div>'


def slider_steps(runs: list[RunRecord]) -> list[int]:
    """Return the steps of the slider: those of the pictures, or of the reports if there are no pictures."""
    steps = sorted({step for run in runs for step in run.samples()})
    # The last step is shown, even if it has no picture.
    steps = steps or [line["step"] for run in runs for line in run.reports]
    steps = sorted({*steps, max(run.last_step for run in runs)})
    places = np.linspace(0, len(steps) - 1, min(len(steps), MAX_POSITIONS)).round().astype(int)
    return [steps[i] for i in sorted(set(places.tolist()))]


def number_names(runs: list[RunRecord]) -> list[str]:
    """Return the names of the numbers below the slider: those that a run has."""
    names = dict.fromkeys([*(name for run in runs for name in run.losses()), *NUMBERS])
    return [name for name in names if any(run.series(name)[0] for run in runs)]


def slider(runs: list[RunRecord], steps: list[int], columns: list[str]) -> str:
    """Return the slider over the steps with the numbers, the samples and the coefficients of each run."""
    parts = [
        "<h2>Over the steps</h2>",
        f'<div class="bar"><input type="range" id="slider" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" '
        'step="1" aria-label="step of the run"><output id="step" for="slider"></output></div>',
        "<p class='soft'>Each number is the latest up to this step; pointing at it shows its step and all its digits. "
        "The lines in the charts mark the step.</p>",
        table(
            ["run", *map(html.escape, columns)],
            [[name_of(run, i), *["-"] * len(columns)] for i, run in enumerate(runs)],
            "numbers",
            [f'id="numbers-{i}"' for i in range(len(runs))],
        ),
    ]
    for i, run in enumerate(runs):
        figures = []
        if run.samples():
            figures.append('<figure><img alt="samples"><figcaption class="samples"></figcaption></figure>')
        if any("coefficients" in line for line in run.reports):
            figures.append('<figure><svg class="heat"></svg><figcaption class="alpha"></figcaption></figure>')
        content = "".join(figures) or "<p class='soft'>This run has drawn no pictures (--sample-every 0).</p>"
        parts.append(
            f'<div class="panel run" id="run-{i}"><h3>{name_of(run, i)}</h3><div class="both">{content}</div></div>'
        )
    return "\n".join(parts)


def charts(runs: list[RunRecord]) -> str:
    """Return the charts over the steps, and those of the experts."""
    last_step = max(run.last_step for run in runs)

    def section(title: str, names: list[str]) -> str:
        present = [name for name in names if any(run.series(name)[0] for run in runs)]
        drawn = "".join(panel(name, chart_of_series(name, runs, last_step)) for name in present)
        return f'<h2>{title}</h2>\n<div class="charts">{drawn}</div>' if drawn else ""

    losses = list(dict.fromkeys(name for run in runs for name in run.losses()))
    bad = ["bad_steps"] if any(any(run.series("bad_steps")[1]) for run in runs) else []
    weights = sorted({name for run in runs for line in run.reports for name in line if name.endswith("_weight")})
    parts = [section("Losses and errors", [*losses, *bad]), section("Scores", ["fid", "held_out_loss"])]
    # Timesteps and the noise levels of flows have an axis each.
    scales = sorted({run.boundaries[-1] for run in runs if run.boundaries}, reverse=True)
    levels = [drawn for highest in scales if (drawn := chart_of_noise_levels(runs, highest))]
    if levels:
        which = "several scored steps" if len(runs) == 1 else "the last scored step of each run"
        parts.append(
            "<h2>Error over the noise levels</h2>\n<p class='soft'>The held-out loss of the EMA weights, each expert "
            f"over its own interval, at {which}.</p>"
        )
        parts += [f"<figure class='panel wide'>{drawn}</figure>" for drawn in levels]
    over_steps = [
        panel(f"{run.name}: coefficients over the steps", drawn, wide=True)
        for number, run in enumerate(runs)
        if (drawn := chart_of_coefficients(run, number, last_step))
    ]
    parts += [section("Experts", list(EXPERTS)), *over_steps]
    parts += [
        section("Learning rates and weights of the losses", [*RATES, *weights]),
        section("Speed", ["images_per_s"]),
    ]
    return "\n".join(filter(None, parts))


def panel(name: str, svg: str, wide: bool = False) -> str:
    """Return a chart below its title."""
    title = html.escape(TITLES.get(name, name))
    return f'<figure class="panel{" wide" if wide else ""}"><h3>{title}</h3>{svg}</figure>'


def configs(runs: list[RunRecord]) -> str:
    """Return the configs as a table, with the rows that differ between the runs marked and first."""
    flat = [dict(flatten(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    texts = {key: [json.dumps(config[key]) if key in config else "-" for config in flat] for key in keys}
    differing = [key for key in keys if len(set(texts[key])) > 1]
    equal = [key for key in keys if key not in differing]
    titles = ["", *(name_of(run, i) for i, run in enumerate(runs))]

    def rows(keys: list[str], kind: str) -> str:
        cells = [[html.escape(key), *map(html.escape, texts[key])] for key in keys]
        return table(titles, cells, "config", [kind] * len(keys))

    parts = ["<h2>Config</h2>"]
    if len(runs) > 1:
        parts.append("<p class='soft'>What differs between the runs, from their config.json:</p>")
        parts.append(rows(differing, 'class="differs"') if differing else "<p>Nothing differs.</p>")
        parts.append(f"<details><summary>{counted(len(equal), 'equal setting')}</summary>{rows(equal, '')}</details>")
    else:
        parts.append(rows(equal, ""))
    return "\n".join(parts)


def flatten(config: dict, prefix: str = "") -> list[tuple[str, object]]:
    """Return the values of nested dicts under names such as "training.lr"."""
    items = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        items += flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return items


def page_data(runs: list[RunRecord], steps: list[int], columns: list[str]) -> dict:
    """Return what the page's script shows at the steps of the slider."""
    return {"steps": steps, "columns": columns, "runs": [run_data(run, steps, columns) for run in runs]}


def run_data(run: RunRecord, steps: list[int], columns: list[str]) -> dict:
    """Return the numbers, the pictures and the coefficients of a run, each as a list of [step, value]."""
    pictures = latest_of(run.samples(), steps)
    lines = {line["step"]: line["coefficients"] for line in run.reports if "coefficients" in line}
    alpha = latest_of(lines, steps)
    numbers = {name: list(zip(*run.series(name), strict=True)) for name in columns}
    labels = interval_labels(run.boundaries) if run.boundaries else []
    return {
        "numbers": {name: list(map(list, latest_of(dict(pairs), steps).items())) for name, pairs in numbers.items()},
        "pictures": [[step, embed(path)] for step, path in pictures.items()],
        # A global scope has one set of coefficients for all blocks.
        "coefficients": [[step, value if np.ndim(value) == 3 else [value]] for step, value in alpha.items()],
        "intervals": [label.replace("\n", " ") for label in labels],
        "unit": scale_of(run.boundaries).unit if run.boundaries else "",
    }


def latest_of(values: dict[int, object], steps: list[int]) -> dict[int, object]:
    """Return the values that are the latest ones up to one of the steps."""
    known = sorted(values)
    chosen = {i for i in np.searchsorted(known, steps, side="right") - 1 if i >= 0} if known else set()
    return {known[i]: values[known[i]] for i in sorted(chosen)}


def embed(path: Path) -> str:
    """Return a picture as a data URL: as it is, or as a smaller one if it is wider than MAX_WIDTH."""
    content, kind = path.read_bytes(), "png"
    with Image.open(path) as image:
        if image.width > MAX_WIDTH:
            small = image.convert("RGB").resize(
                (MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.LANCZOS
            )
            buffer, kind = io.BytesIO(), "webp"
            small.save(buffer, "WEBP", quality=88)
            content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

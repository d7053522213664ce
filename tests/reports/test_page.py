"""The page of runs: every number that it shows is the one in the run's files, and a browser shows it."""

import base64
import html
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import run, write_run
from PIL import Image

from reports.page import MAX_POSITIONS, embed, slider_steps
from reports.plots import chart_of_coefficients
from reports.runs import read_runs
from reports.table import format_number


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def cells_of(page: str, kind: str) -> list[list[str]]:
    """The texts of the cells of the rows of a table."""
    [table] = re.findall(rf'<table class="{kind}">(.*?)</table>', page, re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in cells]


def curves_of(page: str, title: str) -> list[np.ndarray]:
    """The points [n, 2] of the lines of the runs in a chart, in the order of the runs."""
    svg = re.search(rf"<h3>{re.escape(title)}</h3>(<svg.*?</svg>)", page, re.DOTALL)[1]
    paths = re.findall(r'<path d="([^"]*)"[^>]*?stroke: var\(--series-(\d)\)', svg)
    # The markers of short lines are paths of curves.
    lines = {int(number): path for path, number in paths if "C" not in path}
    points = [re.findall(r"[ML] (\S+) (\S+)", lines[number]) for number in sorted(lines)]
    return [np.array(found, dtype=float) for found in points]


def assert_affine(positions: np.ndarray, values: np.ndarray):
    """Check that positions on a page are a linear function of values."""
    slope, offset = np.polyfit(values, positions, 1)
    assert abs(slope) > 0
    np.testing.assert_allclose(positions, slope * values + offset, atol=0.02)


def test_every_number_of_the_page_is_that_of_the_files(runs):
    remix, plain = runs
    done = run("visualize.py", "run", remix, plain, "--out", remix / "both.html")
    assert done.stdout == f"wrote {remix / 'both.html'}\n"
    page = (remix / "both.html").read_text()
    assert "http://" not in re.sub(r"http://www\.w3\.org/\S+", "", page) and "https://" not in page

    # The slider: numbers, pictures and coefficients at its steps.
    data = data_of(page)
    assert data["steps"] == list(range(50, 1001, 50))
    for folder, shown in zip(runs, data["runs"], strict=True):
        lines = lines_of(folder)
        for name, pairs in shown["numbers"].items():
            expected = {line["step"]: np.mean(line[name]) for line in lines if name in line}
            assert dict(pairs) == pytest.approx(expected), name
        files = sorted((folder / "samples").glob("*.png"))
        assert [step for step, _ in shown["pictures"]] == [int(path.stem) for path in files]
        assert base64.b64decode(shown["pictures"][0][1].partition(",")[2]) == files[0].read_bytes()
        expected = [[line["step"], [line["coefficients"]]] for line in lines if "coefficients" in line]
        assert shown["coefficients"] == expected
    assert data["runs"][0]["intervals"][:2] == ["0-165", "166-332"]

    # The summary, and the charts.
    header, *rows = cells_of(page, "summary")
    for folder, row in zip(runs, rows, strict=True):
        shown = dict(zip(header, row, strict=True))
        reports = [line for line in lines_of(folder) if "loss" in line]
        scores = [line for line in lines_of(folder) if "fid" in line]
        assert shown["loss"] == format_number(reports[-1]["loss"])
        assert shown["images/s"] == format_number(float(np.median([line["images_per_s"] for line in reports])))
        assert shown["FID while training"] == format_number(scores[-1]["fid"])
        best = min(scores, key=lambda line: line["held_out_loss"])
        assert shown["lowest held-out loss"] == format_number(best["held_out_loss"])
        assert shown["held-out loss: lowest at step"] == f"{best['step']:,}"
    for name, title, scale in (
        ("loss", "training loss", np.log),
        ("fid", "FID of the EMA weights (fid)", np.log),
        ("lr", "learning rate of the weights (lr)", np.log),
    ):
        curves = curves_of(page, title)
        for folder, points in zip(runs, curves, strict=False):
            lines = [line for line in lines_of(folder) if name in line]
            if len(lines) > 2:
                assert_affine(points[:, 0], np.array([line["step"] for line in lines]))
                assert_affine(points[:, 1], scale([line[name] for line in lines]))

    # The configs: what differs is marked.
    tables = re.findall(r'<table class="config">.*?</table>', page, re.DOTALL)
    assert len(tables) == 2
    assert 'class="differs"' in tables[0] and 'class="differs"' not in tables[1]
    for key, values in {"model.name": ['"RemixDiT-T/2"', '"DiT-T/2"'], "training.max_steps": ["1000", "300"]}.items():
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (key, *values))
        assert cells in tables[0]
    assert "<td>training.lr</td>" in tables[1]


def test_the_errors_of_the_experts_are_those_of_the_scored_steps(runs):
    """A stair for each scored step, whose heights are the logarithms of the losses."""
    # The page of a run in its own folder is written again.
    (runs[0] / "page.html").write_text("an older page")
    run("visualize.py", "run", runs[0])
    page = (runs[0] / "page.html").read_text()
    svg = re.search(r"<h2>Error over the noise levels</h2>.*?(<svg.*?</svg>)", page, re.DOTALL)[1]
    scores = [line for line in lines_of(runs[0]) if "fid" in line]
    chosen = [scores[i] for i in (0, 3, 6, 9)]
    stairs = [np.array(re.findall(r"[ML] (\S+) (\S+)", path), float) for path in re.findall(r'd="([^"]*)"', svg)]
    stairs = [points[1::2][:6] for points in stairs if len(points) == 2 * 6 + 2]
    heights = np.array([[line[f"held_out_loss/expert_{i:02d}"] for i in range(6)] for line in chosen])
    assert_affine(np.concatenate([points[:, 1] for points in stairs]), np.log(heights.ravel()))
    assert [f"step {line['step']:,}" in svg for line in chosen] == [True] * 4
    refused = run("visualize.py", "run", runs[0], "--out", runs[0] / "page.html", expect=2).stderr
    assert "exists: choose another name" in refused


def test_long_runs_and_large_pictures_are_thinned_out(trained, tmp_path):
    """The slider has at most MAX_POSITIONS steps, with the first and the last; a wide picture is scaled down."""
    config = json.loads((trained / "config.json").read_text())
    steps = list(range(10, 1510, 10))
    write_run(tmp_path / "long", config, steps, [])
    for step in steps:
        (tmp_path / f"long/samples/{step:07d}.png").touch()
    chosen = slider_steps(read_runs([tmp_path / "long"]))
    assert len(chosen) == MAX_POSITIONS and chosen[0] == 10 and chosen[-1] == 1500
    Image.new("RGB", (2048, 500)).save(tmp_path / "wide.png")
    kind, _, content = embed(tmp_path / "wide.png").partition(",")
    assert "webp" in kind and len(content) < 10_000


def test_names_of_runs_are_text(runs):
    """A name with characters of HTML does not change the page, nor does one of a placeholder."""
    odd = runs[0].rename(runs[0].with_name("<b>{{data}}<!--$x$"))
    shutil.copytree(odd, odd / "copy")
    run("visualize.py", "run", odd, odd / "copy", "--out", odd / "page.html")
    page = (odd / "page.html").read_text()
    assert page.count("<h1>&lt;b&gt;{{data}}&lt;!--$x$ and copy</h1>") == 1 and "<b>{{" not in page
    # In the legend, too.
    assert re.search(r"<text[^>]*>&lt;b&gt;{{data}}&lt;!--\$x\$</text>", page)


def test_the_coefficients_of_a_shorter_run_end_with_it(trained, tmp_path, monkeypatch):
    """On an axis of 1,000 steps, the heat maps of a run of 300 steps end at step 300."""
    write_run(tmp_path / "short", json.loads((trained / "config.json").read_text()), [100, 200, 300], [])
    [record] = read_runs([tmp_path / "short"])
    svg = chart_of_coefficients(record, 0, 1000)
    # The last step moves the cursor to the right end of the axis.
    [right] = re.search(r'id="coefficients-0-patch_2">\s*<path d="M \S+ \S+\s+L (\S+)', svg).groups()
    first, move, left = re.search(r'data-first="(\S+)" data-move="(\S+)">\s*<path d="M (\S+)', svg).groups()
    assert float(left) + float(move) * (1000 - int(first)) == pytest.approx(float(right), abs=0.01)
    monkeypatch.setattr("reports.plots.to_svg", lambda figure, *names: figure)
    axis = chart_of_coefficients(record, 0, 1000).axes[0]
    assert axis.get_xlim() == (100, 1000) and axis.images[0].get_extent()[:2] == [100, 300]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is not the folder of a run"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), "has not logged yet"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1}\nx\n'), "line 2 is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not the config of a run"),
    ],
)
def test_folders_that_are_not_of_a_run(runs, break_it, message):
    break_it(runs[0])
    stderr = run("visualize.py", "run", runs[0], expect=2).stderr
    assert message in stderr and stderr.count("\n") == 1
    assert not (runs[0] / "page.html").exists()


class Browser:
    """A page in headless Chromium, controlled by chromedriver's protocol (WebDriver)."""

    def __init__(self, port: int, page: Path, dark: bool):
        self.port = port
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1400"]
        options = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.session = f"/session/{session['sessionId']}"
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [scheme]}}
        self.call("POST", f"{self.session}/goog/cdp/execute", command)
        self.call("POST", f"{self.session}/url", {"url": page.as_uri()})

    def call(self, method: str, path: str, content: dict | None = None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(content).encode() if content is not None else None,
            headers={"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())["value"]

    def script(self, code: str):
        return self.call("POST", f"{self.session}/execute/sync", {"script": code, "args": []})

    def press(self, key: str):
        """Press a key in the slider."""
        [slider] = self.call("POST", f"{self.session}/element", {"using": "css selector", "value": "#slider"}).values()
        self.call("POST", f"{self.session}/element/{slider}/value", {"text": key})

    def log(self) -> list[dict]:
        return self.call("POST", f"{self.session}/se/log", {"type": "browser"})


@contextmanager
def browser(page: Path, dark: bool = False):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        opened = Browser(port, page, dark)
        yield opened
        opened.call("DELETE", opened.session)
    finally:
        driver.terminate()
        driver.wait()


STATE = """
const cells = [...document.querySelectorAll(".numbers td")].map((cell) => cell.textContent);
const rects = [...document.querySelectorAll(".heat rect")].map((rect) => rect.getAttribute("fill"));
const images = [...document.querySelectorAll(".run img")].map((image) => [image.src, image.hidden, image.naturalWidth]);
const cursor = document.querySelector(".charts .cursor").getBoundingClientRect().x;
return {cells, rects, images, cursor, step: document.getElementById("step").textContent};
"""


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="there is no Chromium")
def test_the_page_in_a_browser(runs):
    """Nothing is reported to the console, the slider changes pictures, cells and cursors, and dark is dark."""
    run("visualize.py", "run", *runs, "--out", runs[0] / "both.html")
    data = data_of((runs[0] / "both.html").read_text())
    with browser(runs[0] / "both.html") as page:
        assert page.script("return document.title") == "remix and plain"
        last = page.script(STATE)
        assert last["step"] == "step 1,000"
        page.press("\ue012")  # the left arrow
        before = page.script(STATE)
        page.press("\ue011")  # Home
        first = page.script(STATE)
        assert (before["step"], first["step"]) == ("step 950", "step 50")
        assert len({state["images"][0][0] for state in (first, before, last)}) == 3
        assert first["rects"] != before["rects"] != last["rects"]
        assert first["cursor"] < before["cursor"] < last["cursor"]
        # The pictures are those of their steps; the plain run has none at step 50.
        assert first["images"][0][0] == data["runs"][0]["pictures"][0][1]
        assert last["images"][0][0] == data["runs"][0]["pictures"][-1][1]
        assert [hidden for _, hidden, _ in first["images"]] == [False, True]
        assert first["images"][0][2] > 100
        # The cells under the slider are those of the files.
        for state, place in ((first, 0), (last, -1)):
            shown = dict(zip(data["columns"], state["cells"][1 : 1 + len(data["columns"])], strict=True))
            lines = [line for line in lines_of(runs[0]) if "loss" in line]
            assert float(shown["loss"]) == pytest.approx(lines[place]["loss"], rel=1e-4)
            assert float(shown["entropy"]) == pytest.approx(np.mean(lines[place]["entropy"]), rel=1e-4)
        texts = page.script("return [...document.querySelectorAll('.heat text')].map((text) => text.textContent)")
        cells = [float(text) for text in texts if re.fullmatch(r"\d\.\d\d", text)]
        alpha = next(line for line in lines_of(runs[0]) if "coefficients" in line)["coefficients"]
        assert cells == pytest.approx(np.array(alpha).T.ravel().tolist(), abs=0.00501)
        light = page.script("return getComputedStyle(document.body).backgroundColor")
        wide = page.script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert page.log() == []
    with browser(runs[0] / "both.html", dark=True) as page:
        assert page.script("return getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 24)"
        ink = page.script("return getComputedStyle(document.querySelector('.panel svg text')).fill")
        assert ink == "rgb(228, 232, 236)"
        assert page.log() == []
    assert light == "rgb(255, 255, 255)" and wide

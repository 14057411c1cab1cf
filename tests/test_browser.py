"""What people see, in a real browser: the report at two widths, and two runs compared in the MLflow UI."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import sync_playwright

from folora.report import write_report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Pipeline
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120_000  # milliseconds; a busy machine is slow to draw

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test when a script on it fails."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    mistakes: list[str] = []
    page.on("pageerror", lambda error: mistakes.append(str(error)))
    yield page
    page.close()
    assert not mistakes


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where pictures go: FOLORA_SCREENSHOTS, which CI keeps."""
    folder = Path(os.environ.get("FOLORA_SCREENSHOTS", tmp_path)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def report(pipeline: Pipeline, runs: Path, evaluations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seen") / "report"
    write_report(pipeline.params, evaluations, folder, runs=runs, spectra=pipeline.spectra.parent.parent)
    return folder / "index.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_draws_itself(width: int, scheme: str, page: Page, report: Path, screenshots: Path) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(report.as_uri())
    figures = page.locator("[data-chart]")
    for number in range(figures.count()):
        figures.nth(number).locator(".marks").first.wait_for()
    assert figures.count() >= 4
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    page.screenshot(path=screenshots / f"report-{width}-{scheme}.png", full_page=True)
    assert not said


def test_colours_follow_the_scheme(page: Page, report: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.goto(report.as_uri())
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


@pytest.fixture(scope="module")
def server(pipeline: Pipeline, evaluations: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The MLflow UI on the store of both runs, as the README starts it."""
    assert evaluations.exists()  # makes the store whole
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("mlflow") / "log"
    command = [
        "mlflow",
        "ui",
        "--backend-store-uri",
        pipeline.params.tracking.uri,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=pipeline.folder, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE / 1000
        while not answers(address) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        assert answers(address), log.read_text()
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait()


def answers(address: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(urllib.request.urlopen(f"{address}/health", timeout=5).status == 200)
    return False


def experiment_id(pipeline: Pipeline) -> str:
    from mlflow import MlflowClient

    tracking = pipeline.logged.tracking
    experiment = MlflowClient(tracking.uri).get_experiment_by_name(tracking.experiment)
    assert experiment is not None
    return str(experiment.experiment_id)


def test_two_runs_are_compared_in_mlflow(page: Page, server: str, pipeline: Pipeline, screenshots: Path) -> None:
    page.set_viewport_size({"width": 1600, "height": 1000})
    page.goto(f"{server}/#/experiments/{experiment_id(pipeline)}/runs")
    boxes = page.locator(".ag-row .ag-selection-checkbox input")
    boxes.nth(2).wait_for(state="attached")
    assert boxes.count() == 1 + len(pipeline.params.runs)  # the base model, measured last, stands first
    for number in (1, 2):
        boxes.nth(number).click(force=True)
    page.screenshot(path=screenshots / "mlflow-runs.png")
    page.get_by_role("button", name="Compare").first.click()
    page.wait_for_url("**/compare-runs**")
    page.locator(".js-plotly-plot").first.wait_for()
    page.get_by_text("kept", exact=True).wait_for()  # in the table of metrics
    page.get_by_role("tab", name="Scatter Plot").click()
    page.get_by_role("tabpanel", name="Scatter Plot").locator(".js-plotly-plot").wait_for()
    page.screenshot(path=screenshots / "mlflow-compare.png", full_page=True)

"""The page of a comparison in a real browser: what it shows is what is stored, whatever is clicked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.debian import chromium
from tests.mlflow_server import wait_for
from tests.tuning.finished import DOMAINS, make_run, make_sweep

from nestling.tuning.comparison import Comparison, SweepReport, compare, sweep_report

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LOSSES = {("quick", 0): (6.0, 5.0, 4.0), ("quick", 1): (6.2, 5.1, 4.4), ("slow", 0): (6.1, 5.2, 4.2)}
CURVE = "heldout-bits_per_byte"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    runs = tmp_path_factory.mktemp("runs")
    period = {"quick": 4, "slow": 16}
    folders = [
        make_run(runs, name, [f"levels.1.period={period[name]}", f"seed={seed}"], losses, probes=True)
        for (name, seed), losses in LOSSES.items()
    ]
    comparison = compare(folders)
    comparison.write(runs / "page.html", "nestling compare a b")
    return comparison, runs / "page.html"


def plotted(browser: Chrome, name: str) -> list[dict[str, Any]]:
    """What Plotly draws in a chart now."""
    keep = "({ name, x, y, z, mode, visible }) => ({ name, x, y, z, mode, visible })"
    return browser.execute_script(f"return document.getElementById('{name}').data.map({keep})")


def click(browser: Chrome, kind: str, value: str) -> None:
    (button,) = browser.find_elements("css selector", f"button.{kind}[value='{value}']")
    button.click()
    pressed = "return document.querySelector(arguments[0]).ariaPressed"
    assert browser.execute_script(pressed, f"button.{kind}[value='{value}']") in ("true", "false")


def test_the_page_shows_what_is_stored(browser: Chrome, compared: tuple[Comparison, Path]) -> None:
    comparison, page = compared
    browser.get(page.as_uri())
    quick, slow = comparison.rows
    cells = [float(each.get_attribute("value") or "nan") for each in browser.find_elements("css selector", "td data")]
    each = slow["metrics"]["heldout_bits_per_byte"]["mean"], slow["parameters"], *slow["cost"].values()
    assert quick["metrics"]["heldout_bits_per_byte"]["mean"] in cells and set(each) <= set(cells)
    texts = [row.text for row in browser.find_elements("css selector", "tbody tr")]
    assert "4.2 ± 2.5" in texts[0] and "4.2000" in texts[1] and " 16 " in texts[1]

    def lines() -> dict[str, dict[str, Any]]:
        return {trace["name"]: trace for trace in plotted(browser, CURVE) if trace["mode"] == "lines"}

    tokens = [512, 1024, 1536]
    for axis in ("tokens", "seconds", "flops", "tokens"):
        click(browser, "axis", axis)
        assert lines()["slow"]["y"] == list(LOSSES["slow", 0])
        assert lines()["quick"]["y"] == pytest.approx([6.1, 5.05, 4.2])
        for row in comparison.rows:
            assert lines()[row["arm"]]["x"] == pytest.approx([each / 1536 * row["cost"][axis] for each in tokens])
        title = browser.find_element("css selector", f"#{CURVE} .xtitle").get_attribute("textContent")
        assert title == {"flops": "FLOPs"}.get(axis, axis)

    found = {trace["name"]: trace["z"] for trace in plotted(browser, "retention")}
    assert found["slow"] == [[6.1, 5.2, 4.2], [None, 6.2, 5.2], [None, None, 6.2]] and len(DOMAINS) == 3
    (point,) = [trace for trace in plotted(browser, "frontier") if trace["name"] == "slow"]
    assert (point["x"][0], point["y"][0]) == pytest.approx(((4.2 + 5.2 + 6.2) / 3, 0.0))
    assert [trace["y"] for trace in plotted(browser, "by-position") if trace["name"] == "slow"] == [
        pytest.approx([4.3 - 0.01 * place for place in range(8)])
    ]
    norms = [trace for trace in plotted(browser, "update-norms") if trace["name"] == "slow"]
    assert [trace["y"] for trace in norms] == [pytest.approx([0.5, 0.25, 0.5 / 3]), [0.25]]

    browser.execute_script(f"Plotly.Fx.hover('{CURVE}', [{{curveNumber: 2, pointNumber: 1}}])")
    shown = browser.find_element("css selector", f"#{CURVE} .hoverlayer").get_attribute("textContent")
    assert shown is not None and "5.2000" in shown and "1,024" in shown and "slow" in shown


def test_the_page_follows_its_reader(browser: Chrome, compared: tuple[Comparison, Path]) -> None:
    _, page = compared
    browser.get(page.as_uri())
    click(browser, "arm", "slow")
    for name in (CURVE, "frontier", "by-position"):
        assert {trace["name"] for trace in plotted(browser, name) if trace["visible"] is False} == {"slow"}
    click(browser, "arm", "slow")
    assert not any(trace["visible"] is False for trace in plotted(browser, CURVE))

    def inks() -> tuple[str, str]:
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return ground, browser.execute_script(f"return document.getElementById('{CURVE}')._fullLayout.font.color")

    for scheme, wanted in (("dark", ("rgb(20, 22, 27)", "#e6e8ee")), ("light", ("rgb(255, 255, 255)", "#1f2430"))):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        assert wait_for(lambda wanted=wanted: inks() == wanted, 10), inks()

    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert browser.execute_script(f"return document.getElementById('{CURVE}').querySelector('svg').clientWidth") <= 390
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0  # all of it is inside
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> SweepReport:
    runs = tmp_path_factory.mktemp("sweep")
    return sweep_report(make_sweep(runs), runs)


def test_the_report_of_a_sweep_shows_its_trials(browser: Chrome, report: SweepReport) -> None:
    browser.get(report.page.as_uri())
    assert report.answer in browser.find_element("tag name", "main").text
    rows = {row["arm"]: row for row in report.rows}
    best = rows[report.best or ""]
    mean = best["metrics"]["heldout_bits_per_byte"]["mean"]
    (point,) = [trace for trace in plotted(browser, "by-cost") if trace["name"] == report.best]
    assert (point["x"], point["y"]) == ([best["cost"]["flops"]], [mean])  # the budget is in tokens, so FLOPs come first
    click(browser, "axis", "tokens")
    (point,) = [trace for trace in plotted(browser, "by-cost") if trace["name"] == report.best]
    assert point["x"] == [2048]
    (front,) = [trace for trace in plotted(browser, "by-cost") if trace["name"] == "Pareto front"]
    assert front["x"] == [1024, 2048] and front["y"][-1] == mean
    points = [trace for trace in plotted(browser, "by-parameter") if trace["name"] == report.best]
    assert {(trace["x"][0], trace["y"][0]) for trace in points} == {(16, mean), (0.001, mean)}
    (frequencies,) = plotted(browser, "level-frequencies")
    assert frequencies["x"] == ["1", "4", "16"]
    second = report.arms[0].runs[0].anatomy.periods[16]
    assert frequencies["z"][0] == pytest.approx(
        [100 * (1 - second / best["parameters"]), None, 100 * second / best["parameters"]]
    )
    browser.get(report.figures["parallel"].as_uri())
    drawn = "document.getElementById('parallel').data[0].dimensions.map((each) => each.values)"
    *_, means = browser.execute_script(f"return {drawn}")
    assert means[0] == mean and len(means) == 3  # of the arms that finished
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]

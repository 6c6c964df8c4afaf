"""A run's page (out/index.html) in a real browser: opened from disk, on a phone, by keyboard. Needs Debian's chromium and chromium-driver."""

import io
import json
import shutil

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from files.clips import write_sheets  # noqa: E402
from files.run import page  # noqa: E402

webdriver = pytest.importorskip("selenium.webdriver")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
Wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
RED, GREEN, BLUE, GREY = (200, 0, 0), (0, 160, 0), (0, 0, 200), (90, 90, 90)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What train.py leaves behind, in plain colours: red sources; grey edits at step 0, green ones at step 100; blue undone."""
    out = tmp_path_factory.mktemp("run") / "with spaces & <b>"
    (out / "samples").mkdir(parents=True)
    flat = lambda colour: [np.full((64, 64, 3), colour, np.uint8)] * 2  # noqa: E731
    for step, edit in ((0, GREY), (100, GREEN)):
        write_sheets(out / "samples" / f"{step:06d}.png", [flat(RED), flat(edit), flat(BLUE)], 1)
    held = [
        {
            "path": "a.png",
            "src": "a house </script><b>",
            "tgt": "b",
            "instr": "make it <i>winter</i>",
            "undo": "make it summer",
        }
    ] * 2
    config = {
        "instr": held[0]["instr"],
        "steps": 100,
        "base": "tiny",
        "seed": 0,
        "size": [64, 64],
        "held": held,
        "made": {"command": "python train.py"},
    }
    (out / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": i, "lr": 0.01, "norm": 1.0, "cycle": 1 / i, "prior": 2 / i, "cos": 1 - 1 / i}
        | ({} if i % 4 else {"identity": 0.5})
        for i in range(1, 101)
    ]
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page(out)
    return out


@pytest.fixture(scope="module")
def browser(run, tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip(
            "no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "hide-scrollbars",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 1000, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    driver.get((run / "index.html").as_uri())
    Wait(driver, 20).until(lambda d: d.find_element("id", "at").text == "100")
    yield driver
    driver.quit()


def colours(element):
    """What is seen at the left, at the right of an element's middle line."""
    shot = np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"))
    return [tuple(shot[len(shot) // 2, int(shot.shape[1] * x)].tolist()) for x in (0.1, 0.9)]


def test_it_shows_source_edit_and_undone_edit_and_fetches_nothing(browser):
    main, back = browser.find_elements("css selector", "canvas")[:2]
    assert colours(main) == [RED, GREEN] and colours(back) == [BLUE, BLUE]
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert all(name.startswith(("file:", "data:")) for name in fetched)
    assert browser.get_log("browser") == []  # no error, no warning


def test_the_bars_work_by_keyboard(browser):
    main = browser.find_element("css selector", "canvas")
    bar, step = (
        browser.find_element("css selector", "figure input"),
        browser.find_element("id", "step"),
    )
    bar.send_keys(Keys.END)
    assert colours(main) == [RED, RED]
    bar.send_keys(Keys.HOME)
    assert colours(main) == [GREEN, GREEN]
    step.send_keys(Keys.ARROW_LEFT)
    Wait(browser, 20).until(lambda d: colours(main) == [GREY, GREY])
    assert (
        browser.find_element("id", "at").text == "0"
        and step.get_attribute("aria-valuetext") == "step 0"
    )
    step.send_keys(Keys.ARROW_RIGHT)
    Wait(browser, 20).until(lambda d: colours(main) == [GREEN, GREEN])
    unnamed = [
        e
        for e in browser.find_elements("css selector", "input, canvas, svg")
        if not e.accessible_name
    ]
    assert unnamed == []  # what a screen reader says


def test_prompts_and_curves_are_whole_and_nothing_in_them_is_read_as_html(browser):
    assert "make it <i>winter</i>" in browser.find_element("id", "title").text
    cells = [e.text for e in browser.find_elements("css selector", "#prompts td")]
    assert cells[:5] == [
        "1",
        "a house </script><b>",
        "make it <i>winter</i>",
        "b",
        "make it summer",
    ]
    titles = [e.text for e in browser.find_elements("css selector", "#charts figcaption")]
    assert [t.split(":")[0] for t in titles] == [
        "identity",
        "cycle",
        "prior",
        "cos",
        "norm",
        "lr",
    ] and titles[0] == "identity: now 0.500"
    assert "python train.py" in browser.find_element("id", "made").text


def test_it_fits_a_phone(browser):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    low = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('input')].map(e => e.getBoundingClientRect().height))"
    )
    assert low >= 24  # WCAG 2.2's smallest target, in CSS pixels


def test_what_was_measured_is_a_page_too(browser):
    browser.get((ROOT / "bench" / "results" / "index.html").as_uri())
    blocks = [
        block
        for p in sorted((ROOT / "bench" / "results").rglob("*.md"))
        for block in p.read_text().split("\n\n")
    ]
    tables = [
        block.strip().count("\n") for block in blocks if block.startswith("|")
    ]  # rows, without the rule
    assert (
        len(browser.find_elements("css selector", "h3"))
        == sum(block.startswith("## ") for block in blocks)
        > 0
    )
    assert [
        len(t.find_elements("css selector", "tr"))
        for t in browser.find_elements("css selector", "table")
    ] == tables
    pictures = browser.find_elements("css selector", "img")
    assert len(pictures) == len(list((ROOT / "bench" / "results").rglob("*.png"))) > 0
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")

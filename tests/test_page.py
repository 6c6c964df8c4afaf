"""A run's page (out/index.html) in a real browser: opened from disk, on a phone, by keyboard. Needs
Debian's chromium and chromium-driver."""

import io
import json
import shutil

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from files.clips import write_sheets
from files.disk import write
from files.run import page

webdriver = pytest.importorskip("selenium.webdriver")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
Wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait

RED, GREEN, BLUE, GREY = (200, 0, 0), (0, 160, 0), (0, 0, 200), (90, 90, 90)
PROMPTS = {
    "src": "a house </script><b>",
    "tgt": "b",
    "instr": "make it <i>winter</i>",
    "undo": "make it summer",
}
BROWSER = """headless=new no-sandbox disable-gpu no-first-run disable-background-networking
    disable-component-update disable-sync hide-scrollbars""".split()
SCREEN = {"width": 1000, "height": 900, "deviceScaleFactor": 1, "mobile": False}
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}


def flat(colour):
    return [np.full((64, 64, 3), colour, np.uint8)] * 2


def log_line(step):
    line = {"step": step, "lr": 0.01, "norm": 1.0}
    line |= {"cycle": 1 / step, "prior": 2 / step, "cos": 1 - 1 / step}
    return line if step % 4 else line | {"identity": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What train.py leaves behind, in plain colours: red sources; grey edits at step 0, green ones
    at step 100; blue undone."""
    out = tmp_path_factory.mktemp("run") / "with spaces & <b>"
    for step, colour in ((0, GREY), (100, GREEN)):
        columns = [flat(RED), flat(colour), flat(BLUE)]
        write_sheets(out / "samples" / f"{step:06d}.png", columns, 1)
    config = {"instr": PROMPTS["instr"], "steps": 100, "base": "tiny", "seed": 0, "size": [64, 64]}
    config |= {"held": [{"path": "a.png"} | PROMPTS] * 2, "made": {"command": "python train.py"}}
    write(out / "config.json", config)
    write(out / "log.jsonl", "".join(json.dumps(log_line(i)) + "\n" for i in range(1, 101)))
    page(out)
    return out


@pytest.fixture(scope="module")
def browser(run, tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no Chromium here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in [*BROWSER, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SCREEN)
    driver.get((run / "index.html").as_uri())
    Wait(driver, 20).until(lambda d: d.find_element("id", "at").text == "100")
    yield driver
    driver.quit()


def ends(element):
    """The colours at the left and at the right of an element's middle line."""
    shot = Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")
    places = [(int(shot.width * x), shot.height // 2) for x in (0.1, 0.9)]
    return [shot.getpixel(place) for place in places]


def test_it_shows_source_edit_and_undone_edit_and_fetches_nothing(browser):
    main, back = browser.find_elements("css selector", "canvas")[:2]
    assert ends(main) == [RED, GREEN] and ends(back) == [BLUE, BLUE]
    names = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert all(name.startswith(("file:", "data:")) for name in browser.execute_script(names))
    assert browser.get_log("browser") == []  # no error, no warning


def test_the_bars_work_by_keyboard(browser):
    main = browser.find_element("css selector", "canvas")
    bar = browser.find_element("css selector", "figure input")
    step = browser.find_element("id", "step")
    bar.send_keys(Keys.END)
    assert ends(main) == [RED, RED]
    bar.send_keys(Keys.HOME)
    assert ends(main) == [GREEN, GREEN]
    step.send_keys(Keys.ARROW_LEFT)
    Wait(browser, 20).until(lambda d: ends(main) == [GREY, GREY])
    assert browser.find_element("id", "at").text == "0"
    assert step.get_attribute("aria-valuetext") == "step 0"
    step.send_keys(Keys.ARROW_RIGHT)
    Wait(browser, 20).until(lambda d: ends(main) == [GREEN, GREEN])
    for element in browser.find_elements("css selector", "input, canvas, svg"):
        assert element.accessible_name  # what a screen reader says


def test_prompts_and_curves_are_whole_and_nothing_in_them_is_read_as_html(browser):
    assert PROMPTS["instr"] in browser.find_element("id", "title").text
    cells = [e.text for e in browser.find_elements("css selector", "#prompts td")]
    assert cells[:5] == ["1", *(PROMPTS[kind] for kind in ("src", "instr", "tgt", "undo"))]
    titles = [e.text for e in browser.find_elements("css selector", "#charts figcaption")]
    curves = [title.split(":")[0] for title in titles]
    assert curves == ["identity", "cycle", "prior", "cos", "norm", "lr"]
    assert titles[0] == "identity: now 0.500"
    assert "python train.py" in browser.find_element("id", "made").text


def test_it_fits_a_phone(browser):
    """WCAG 2.2 asks for targets of 24 CSS pixels."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    inputs = browser.find_elements("css selector", "input")
    assert width <= 360 and min(element.size["height"] for element in inputs) >= 24


def test_what_was_measured_is_a_page_too(browser):
    """Every heading, table and picture of bench/results is on it."""
    results = ROOT / "bench" / "results"
    browser.get((results / "index.html").as_uri())
    pages = [path.read_text("utf-8") for path in sorted(results.rglob("*.md"))]
    blocks = [block.strip() for text in pages for block in text.split("\n\n")]
    tables = [block.count("\n") for block in blocks if block.startswith("|")]  # without the rule
    headings = [block for block in blocks if block.startswith("## ")]
    assert len(browser.find_elements("css selector", "h3")) == len(headings) > 0
    shown = browser.find_elements("css selector", "table")
    assert [len(table.find_elements("css selector", "tr")) for table in shown] == tables
    pictures = browser.find_elements("css selector", "img")
    assert len(pictures) == len(list(results.rglob("*.png"))) > 0
    overflow = "return document.documentElement.scrollWidth - innerWidth"
    assert browser.execute_script(overflow) <= 0

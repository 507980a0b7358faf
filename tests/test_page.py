"""The endpoint's page in a real browser: an item, a table, a token, a phone, a keyboard; without Serve."""

import csv
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from pydantic import SecretStr
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_endpoint import encoded

from mmray.serve.api import build_api
from mmray.serve.scorer import ItemScorer
from mmray.serve.settings import ServeConfig

pytestmark = pytest.mark.slow


def running(scorer: ItemScorer, settings: ServeConfig) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(build_api(lambda: scorer, settings), port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def site(bundle: str) -> Iterator[str]:
    settings = ServeConfig(max_items=8)
    yield from running(ItemScorer(bundle, settings), settings)


@pytest.fixture(scope="module")
def closed_site(bundle: str) -> Iterator[str]:
    settings = ServeConfig(token=SecretStr("hush"))
    yield from running(ItemScorer(bundle, settings), settings)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def wait_for(browser: webdriver.Chrome, condition: Any) -> Any:
    return WebDriverWait(browser, 30, 0.05).until(condition)


def find(browser: webdriver.Chrome, selector: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, selector)


def score(browser: webdriver.Chrome, text: str) -> None:
    find(browser, "#text").send_keys(text)
    find(browser, "#item button[type=submit]").click()
    wait_for(browser, lambda b: "ms" in find(b, "#status").text or "wrong" in find(b, "#status").get_attribute("class"))


def complaints(browser: webdriver.Chrome) -> list[str]:
    found = [entry["message"] for entry in browser.get_log("browser")]
    return [message for message in found if "favicon" not in message]


def test_an_item_is_scored_and_shown_with_and_without_each_modality(
    site: str, browser: webdriver.Chrome, rows: Path
) -> None:
    browser.get(site)
    wait_for(browser, lambda b: "multiclass model of image and text" in find(b, "#model").text)
    image = rows / "images" / "0.jpg"
    find(browser, "#image").send_keys(str(image))
    wait_for(browser, lambda b: b.execute_script("return document.getElementById('preview').naturalWidth") == 32)
    score(browser, "the red square")
    asked = {"text": "the red square", "image": encoded(image)}
    want = httpx.post(f"{site}/v1/score", json=asked).json()["results"][0]
    assert find(browser, "#label").text == want["predicted_label"]
    assert find(browser, "#score").text == f"score {want['score']:.4f}"
    bars = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#bars tbody tr")]
    ordered = sorted(want["probabilities"].items(), key=lambda item: -item[1])
    assert [bar.split()[0] for bar in bars] == [name for name, _ in ordered]
    assert f"image {100 * want['image_weight']:.1f} %" in find(browser, "#weights-text").text
    views = [row.text.split()[0:2] for row in browser.find_elements(By.CSS_SELECTOR, "#views tbody tr")]
    assert views == [["image", "and"], ["image", "only"], ["text", "only"]]
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert json.loads(find(browser, "#json").text)["results"][0]["score"] == want["score"]
    assert find(browser, "#curl").text.startswith("curl \\\n  -F image='@0.jpg'")
    assert complaints(browser) == []


def test_what_is_no_image_is_answered_in_words(site: str, browser: webdriver.Chrome, tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    browser.get(site)
    find(browser, "#image").send_keys(str(tmp_path / "page.jpg"))
    score(browser, "red")
    assert "degraded (image: BAD_FORMAT" in find(browser, "#status").text


def test_a_table_is_scored_in_parts_and_downloaded(
    site: str, browser: webdriver.Chrome, rows: Path, downloads: Path, tmp_path: Path
) -> None:
    table = tmp_path / "rows.csv"
    lines = [{"id": k, "text": f'the "red", square {k}', "image": f"{k}.jpg" if k % 2 else ""} for k in range(20)]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text", "image"])
        writer.writeheader()
        writer.writerows(lines)
    browser.get(site)
    find(browser, "#csv").send_keys(str(table))
    find(browser, "#images").send_keys("\n".join(str(rows / "images" / f"{k}.jpg") for k in range(1, 20, 2)))
    find(browser, "#table button").click()
    wait_for(browser, lambda b: find(b, "#download").is_displayed())
    assert find(browser, "#count").text == "20 of 20"
    find(browser, "#download").click()
    wait_for(browser, lambda _: (downloads / "scored.csv").exists())
    with (downloads / "scored.csv").open(newline="") as file:
        scored = list(csv.DictReader(file))
    assert [row["text"] for row in scored] == [row["text"] for row in lines]
    assert [row["modalities_used"] for row in scored] == ["text", "image+text"] * 10
    assert all(float(row["score"]) > 0 for row in scored)
    assert complaints(browser) == []


def test_a_token_is_asked_for_and_used(closed_site: str, browser: webdriver.Chrome) -> None:
    browser.get(closed_site)
    wait_for(browser, lambda b: "bearer token is needed" in find(b, "#model").text)
    find(browser, "#token").send_keys("hush", Keys.TAB)
    wait_for(browser, lambda b: "multiclass model" in find(b, "#model").text)
    score(browser, "red")
    assert find(browser, "#label").text in ("blue", "green", "red")
    complaints(browser)  # the browser notes the 401


def test_the_page_needs_no_mouse_and_fits_a_phone(site: str, browser: webdriver.Chrome) -> None:
    browser.set_window_size(500, 900)  # the narrowest window that this browser opens
    browser.get(site)
    browser.execute_script("document.body.style.width = '360px'")
    assert browser.execute_script("return document.body.scrollWidth") <= 360
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('input, textarea, progress')].filter(e => !e.labels.length).length"
    )
    assert unnamed == 0
    seen = set()
    for _ in range(12):
        webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
        seen.add(browser.switch_to.active_element.get_attribute("id"))
    assert {"image", "text", "clear", "csv", "images"} <= seen
    find(browser, "#text").send_keys("red")
    find(browser, "#item button[type=submit]").send_keys(Keys.ENTER)
    wait_for(browser, lambda b: find(b, "#result").is_displayed())

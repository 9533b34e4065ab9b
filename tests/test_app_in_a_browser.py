"""The page in a real browser: every tab, by mouse, finger and keys; it shows what `generate` gives for the seed."""

import base64
import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, seeded
from PIL import Image
from test_app import hostile_files

from hf_pixelcnn import image_grid
from hf_pixelcnn.app import actions

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["Chromium (Debian: apt-get install chromium)"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; see `make test-app`"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.xdist_group("browser"),
]
GATED, SMALL, COLOUR = "gated-pixelcnn-mnist-binary", "pixelcnn-mnist-binary", "pixelcnn-pp-cifar10-small"
PATIENCE = 600_000  # milliseconds: no test waits for a time, only for what is to happen, also on a busy machine
# Seconds from a click to the first picture on the screen, and to the files of the finished one.
SECONDS = """([start, pictures]) => new Promise((done) => {
  const shown = document.querySelector(pictures), begin = performance.now();
  let first = null;
  const observer = new MutationObserver(() => requestAnimationFrame(() => {
    const seconds = (performance.now() - begin) / 1000;
    if (shown.querySelector("img")) first ??= seconds;
    if (shown.querySelector("a[download]")) { observer.disconnect(); done([first, seconds]); }
  }));
  observer.observe(shown, { childList: true, subtree: true, attributes: true });
  document.querySelector(start).click();
})"""


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The page as `make app` starts it, in an empty folder and an empty home: address, folders, times of the start."""
    folder = tmp_path_factory.mktemp("app")
    for name in ("cwd", "home", "tmp"):
        (folder / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "2"}
    begin = time.monotonic()
    with open(folder / "log", "w") as log:
        command = [sys.executable, ROOT / "training" / "app.py"]
        process = subprocess.Popen(command, cwd=folder / "cwd", env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(url)
            break
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() - begin < PATIENCE / 1000, "the page did not start"
            time.sleep(0.1)
    used = psutil.Process(process.pid).cpu_times()
    yield url, folder, (time.monotonic() - begin, used.user + used.system)
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def visit(app, chromium):
    """A function that opens the page; afterwards nothing has been asked of other servers and no script has failed."""
    contexts, problems, asked = [], [], []

    def open_page(**options):
        context = chromium.new_context(**{"viewport": {"width": 1000, "height": 800}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(app[0])
        page.wait_for_selector("#start-draw")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems
    assert not [url for url in asked if not url.startswith((app[0], "data:", "blob:"))]


@pytest.fixture(scope="module")
def shown():
    return {name: actions.load_shown_model(ROOT / "model_cards" / name) for name in (GATED, SMALL, COLOUR)}


def choose(page, label, option):
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def set_number(page, selector, number):
    page.fill(f"{selector} input[type=number]", str(number))
    page.keyboard.press("Tab")


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


def pictures(page, selector):
    """The pictures that an element shows."""
    urls = page.eval_on_selector_all(f"{selector} img", "images => images.map(image => image.src)")
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def draw(page, seed, count):
    set_number(page, "#seed-draw", seed)
    set_number(page, "#count-draw", count)
    page.click("#start-draw")


def wait_until_drawn(page):
    page.wait_for_selector("#pictures-draw a[download$=gif]")


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.click("#upload-complete")
    chooser.value.set_files(path)


def grid_of(shown, count, seed, **request):
    levels = shown.model.generate(num_images=count, generator=seeded(seed), **request)
    return np.asarray(image_grid(shown.processor.post_process(levels), least_width=320))


def keep_screenshot(page, name):
    """For the README, where `make screenshots` asks for them."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        data = page.screenshot(full_page=True)
        picture = Image.open(io.BytesIO(data)).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
        picture.save(Path(folder) / f"{name}.png", optimize=True)


def test_images_grow_and_are_those_of_generate(visit, shown):
    page = visit()
    draw(page, seed=5, count=4)
    wait_until_drawn(page)
    (picture,) = pictures(page, "#pictures-draw")
    assert np.array_equal(np.asarray(picture), grid_of(shown[GATED], 4, 5, class_ids=[0, 1, 2, 3]))
    with page.expect_download() as download:
        page.click("#pictures-draw a[download$=gif]")
    with Image.open(download.value.path()) as moving:
        assert moving.n_frames > 10
        moving.seek(moving.n_frames - 1)
        assert np.array_equal(np.asarray(moving.convert("L")), np.asarray(picture))
    keep_screenshot(page, "draw")
    choose(page, "Class", "7")
    draw(page, seed=1, count=1)
    page.wait_for_selector("#pictures-draw a[download*=seed-1]")
    assert np.array_equal(np.asarray(pictures(page, "#pictures-draw")[0]), grid_of(shown[GATED], 1, 1, class_ids=7))


def test_how_long_people_wait(app, visit, record_property):
    _, _, (seconds, used) = app
    record_property("from the start to the first answer (10 s)", f"{seconds:.1f} s, {used:.1f} s of processor time")
    loads, firsts, wholes = [], [], []
    for _ in range(3):
        page = visit()
        loads.append(page.evaluate("performance.now() / 1000"))
        for count, times in ((1, firsts), (16, wholes)):
            page = visit()
            set_number(page, "#count-draw", count)
            times.append(page.evaluate(SECONDS, ["#start-draw", "#pictures-draw"]))
    record_property("the page is loaded, best of 3 (3 s)", f"{min(loads):.2f} s")
    first = min(first for first, _ in firsts)
    record_property("first picture of one binary digit after the click, best of 3 (0.5 s)", f"{first:.2f} s")
    whole = min(whole for _, whole in wholes)
    record_property("16 digits, with their files, after the click, best of 3 (2 s)", f"{whole:.2f} s")
    assert all(first < whole for first, whole in firsts + wholes)  # they grow


def test_stop_stops_and_the_next_one_need_not_wait(visit):
    page = visit()
    choose(page, "Model", COLOUR)  # seconds for 36
    page.wait_for_selector("#class", state="hidden")
    draw(page, seed=0, count=36)
    page.wait_for_selector("#pictures-draw img")
    page.click("#stop-draw")
    page.get_by_text("Stopped.").wait_for()
    assert (np.asarray(pictures(page, "#pictures-draw")[0])[-1] == 128).all()  # the last row was never drawn
    choose(page, "Model", SMALL)
    draw(page, seed=0, count=1)
    wait_until_drawn(page)
    assert page.locator("#status-draw").inner_text().startswith("1 image in")


def test_a_digit_is_completed_as_generate_completes_it(visit, shown):
    page, model = visit(), shown[GATED]
    open_tab(page, "Complete")
    page.click("#canvas-complete [data-pick='4']")
    page.get_by_text("A test digit of MNIST, class 4.").wait_for()
    page.click("#canvas-complete [data-hide=right]")
    page.check("#canvas-complete input[value=keep]")
    box = page.locator("#canvas-complete canvas").bounding_box()
    side = box["width"] / 28
    page.mouse.move(
        box["x"] + 20.5 * side, box["y"] + 0.5 * side
    )  # a stroke that keeps three columns of the right half
    page.mouse.down()
    page.mouse.move(box["x"] + 20.5 * side, box["y"] + 27.5 * side, steps=3)
    page.mouse.up()
    page.focus("#canvas-complete canvas")
    page.check("#canvas-complete input[value=hide]")
    page.focus("#canvas-complete canvas")
    page.keyboard.press("ArrowUp")  # from row 27 to row 26
    page.keyboard.press("Space")
    known = torch.zeros(28, 28, dtype=torch.bool)
    known[:, :14] = known[:, 19:22] = True
    known[25:28, 19:22] = False
    page.get_by_role("radio", name="4", exact=True).check()
    set_number(page, "#seed-complete", 3)
    set_number(page, "#count-complete", 2)
    page.click("#start-complete")
    page.get_by_text("Done,").wait_for()
    digit = model.levels_of(Image.open(ROOT / "hf_pixelcnn" / "app" / "digits.png").crop((112, 0, 140, 28)))
    original, given, *completions = pictures(page, "#pictures-complete")
    assert np.array_equal(np.asarray(original), np.asarray(model.picture_of(digit)))
    assert np.array_equal(np.asarray(given) == 128, ~known.numpy())
    class_id = actions.class_or_guess(model, actions.ANY, digit)
    expected = model.model.generate(digit, known, class_id, num_images=2, num_resamples=4, generator=seeded(3))
    for picture, levels in zip(completions, expected, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(model.picture_of(levels[None])))
    assert re.search(r"1: \d\.\d of 4", page.inner_text("#pictures-complete"))
    keep_screenshot(page, "complete")
    page.click("#canvas-complete [data-hide=none]")
    page.click("#start-complete")
    page.get_by_text("Nothing is brushed out").wait_for()


def test_a_score_is_that_of_the_picture_on_all_tabs(visit, shown):
    page, model = visit(viewport={"width": 390, "height": 800}, color_scheme="dark", has_touch=True), shown[SMALL]
    choose(page, "Model", SMALL)
    page.wait_for_selector("#class", state="hidden")
    open_tab(page, "Score")
    page.click("#canvas-score [data-clear]")
    page.locator("#canvas-score canvas").tap(position={"x": 100, "y": 100})  # a dab of paint
    page.click("#start-score")
    row = page.locator("#result-score tr", has_text="nats")
    row.wait_for()
    box = page.locator("#canvas-score canvas").bounding_box()
    levels = torch.zeros(1, 1, 28, 28, dtype=torch.long)
    at = int(100 / box["width"] * 28)
    levels[:, :, at - 1 : at + 2, at - 1 : at + 2] = 1
    with torch.no_grad():
        nats = -model.model.log_prob(levels).sum().item()
    assert float(row.locator("td").inner_text()) == pytest.approx(nats, abs=0.02)
    assert "no level differs" in page.inner_text("#result-score")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # fits the width of a phone
    assert page.evaluate("document.body.classList.contains('dark')")
    open_tab(page, "Complete")
    page.click("#canvas-complete [data-hide=lower]")
    page.click("#start-complete")
    page.get_by_text("Done,").wait_for()
    assert np.array_equal(np.asarray(pictures(page, "#pictures-complete")[0]), np.asarray(model.picture_of(levels)))


def test_a_look_inside_shows_field_and_prediction(visit, shown):
    page = visit()
    open_tab(page, "Score")
    page.click("#start-score")
    page.locator("#result-score tr", has_text="nats").wait_for()
    keep_screenshot(page, "score")
    choose(page, "Model", SMALL)
    page.wait_for_selector("#class", state="hidden")
    open_tab(page, "Look inside")
    canvas = page.locator("#canvas-look canvas")
    side = canvas.bounding_box()["width"] / 28
    canvas.click(position={"x": 12.5 * side, "y": 8.5 * side})
    page.get_by_text("pixel at row 8, column 12").wait_for()
    canvas.press("ArrowDown")
    page.get_by_text("pixel at row 9, column 12").wait_for()
    levels = shown[SMALL].levels_of(Image.open(ROOT / "hf_pixelcnn" / "app" / "digits.png").crop((84, 0, 112, 28)))
    found = actions.look_inside(shown[SMALL], levels, 9, 12, 0, actions.ANY)
    text = page.inner_text("#result-look")
    assert found.counts["blind spot"] > 0
    for name in ("receptive field", "blind spot"):
        assert f"{name}: {found.counts[name]}" in text
    assert f"true level is {found.level}, with probability {found.probabilities[found.level]:.4f}" in text
    keep_screenshot(page, "look")


def test_any_upload_is_a_picture_or_a_sentence(app, visit, tmp_path, record_property):
    page = visit()
    open_tab(page, "Complete")
    Image.effect_noise((60, 30), 80).convert("RGB").save(tmp_path / "noise.jpg")
    upload(page, tmp_path / "noise.jpg")
    page.get_by_text("60 × 30 pixels became 28 × 28; pixels above 127 of 255 became light").first.wait_for()
    (tmp_path / "text.png").write_text("no picture")
    upload(page, tmp_path / "text.png")
    page.get_by_text("This is no picture that can be read").first.wait_for()
    (tmp_path / "large.png").write_bytes(b"\0" * 6 * 2**20)
    upload(page, tmp_path / "large.png")
    page.get_by_text("exceed the maximum allowed size of 5.0 Mb").first.wait_for()

    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client, answers = Client(app[0], verbose=False, httpx_kwargs={"timeout": PATIENCE / 1000}), []
    for index, data in enumerate(hostile_files()):
        (tmp_path / str(index)).write_bytes(data)
        try:
            answers.append(client.predict(GATED, handle_file(tmp_path / str(index)), api_name="/upload")[-1])
        except (AppError, ValueError, OSError) as error:
            answers.append(str(error))
    assert len(answers) == 50
    tracebacks = [answer for answer in answers if "Traceback" in answer or 'File "' in answer]
    assert not tracebacks
    record_property("hostile uploads", f"{len(answers)}, {len(tracebacks)} tracebacks")
    with pytest.raises(AppError, match="not of the model's size"):
        client.predict(GATED, actions.ANY, {"pixels": "AAAA", "hidden": 3}, api_name="/score")
    with pytest.raises(AppError, match="whole number"):
        client.predict(GATED, actions.ANY, -1, 1, 1, 1, 1, api_name="/draw")


def test_people_wait_in_a_queue_and_each_gets_the_right_picture(visit, shown, record_property):
    pages = [visit() for _ in range(3)]
    choose(pages[0], "Model", COLOUR)
    pages[0].wait_for_selector("#class", state="hidden")
    open_tab(pages[0], "Complete")
    pages[0].click("#canvas-complete [data-hide=right]")
    pages[0].get_by_role("radio", name="16", exact=True).check()
    set_number(pages[0], "#count-complete", 8)
    pages[0].click("#start-complete")  # a minute's work, until it is stopped
    pages[0].wait_for_selector("#pictures-complete img")
    for seed, page in enumerate(pages[1:], 1):
        draw(page, seed=seed, count=2)
    pages[2].get_by_text(re.compile(r"queue: 2/2")).wait_for()
    pages[0].click("#stop-complete")
    open_tab(pages[0], "Draw")
    draw(pages[0], seed=0, count=2)
    requests = [(COLOUR, {}), *[(GATED, {"class_ids": [0, 1]})] * 2]
    for seed, (page, (name, request)) in enumerate(zip(pages, requests, strict=True)):
        wait_until_drawn(page)
        assert np.array_equal(np.asarray(pictures(page, "#pictures-draw")[0]), grid_of(shown[name], 2, seed, **request))
    assert not pages[0].locator("#status-complete", has_text="Done,").count()
    record_property("people at the same time, each with the right pictures", len(pages))


def test_keys_alone_are_enough(visit):
    page = visit()
    page.focus("#seed-draw input")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "start-draw":
            break
    page.keyboard.press("Enter")
    wait_until_drawn(page)


def test_nothing_is_written_outside_a_temporary_folder_and_nothing_failed(app):  # the last one
    _, folder, _ = app
    assert not [path for name in ("cwd", "home") for path in (folder / name).rglob("*") if path.is_file()]
    (scratch,) = (folder / "tmp").glob("hf_pixelcnn-*")
    assert not [path for path in scratch.rglob("*") if path.suffix == ".jpg"]  # uploads are gone when they are read
    assert "Traceback" not in (folder / "log").read_text()

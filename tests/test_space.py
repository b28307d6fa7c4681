"""The demo page in a browser: `examples/space` is started, a ratio and a method are picked, and what it shows is read.

Needs gradio and playwright, and Chromium by Debian's name, none of which the other tests need: `make test-recipes`
makes an environment of its own. With `SPACE_SCREENSHOT=FILE.png` the picture of the docs is taken.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "examples" / "space"
CHROMIUM = shutil.which("chromium")
HAS_ALL = CHROMIUM is not None and all(find_spec(name) for name in ("gradio", "playwright"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def address(tmp_path):
    """Where the page is served until the test ends."""
    port = free_port()
    environment = {
        **os.environ,
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(SPACE / "app.py")], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_the_front_matter_names_the_app_and_the_version_that_is_required():
    front = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    entries = dict(line.split(": ", 1) for line in front.splitlines())
    assert entries["sdk"] == "gradio"
    assert (SPACE / entries["app_file"]).is_file()
    assert f"gradio=={entries['sdk_version']}\n" in (SPACE / "requirements.txt").read_text(encoding="utf-8")
    assert len(entries["short_description"]) <= 60  # the Hub refuses longer ones


@pytest.mark.slow
@pytest.mark.skipif(not HAS_ALL, reason="gradio, playwright or Chromium is missing")
@pytest.mark.filterwarnings("default")  # of libraries that are not this package's
def test_a_visitor_prunes_the_model_and_reads_what_was_lost_and_rescued(address):
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_label("number input for FFN channels to remove, %").fill("30")
        page.get_by_role("button", name="Prune").click()
        pruned = page.get_by_label("The pruned model writes")
        expect(pruned).to_have_value(re.compile("^Return a new"), timeout=240_000)
        summary = page.locator("#summary").inner_text()
        perplexities = re.search(r"lower is better\s+([\d.]+)\s+([\d.]+)", summary)
        assert perplexities, summary
        dense, after = map(float, perplexities.groups())
        assert dense < after < 2 * dense
        assert re.search(r"parameters\s+1,246,336\s+", summary)
        assert re.search(
            r"0\s+352\s+\d", page.locator("#layers").inner_text()
        )  # at most 70 % of 512, a multiple of 16
        assert page.get_by_label("The dense model writes").input_value().startswith("Return a new")
        expect(page.locator("#plot canvas, #plot svg.marks").first).to_be_visible()
        if picture := os.environ.get("SPACE_SCREENSHOT"):
            page.wait_for_timeout(1500)  # the plot grows into place
            page.screenshot(path=picture, full_page=True)
        page.get_by_label("Both models go on with").fill(" ")
        page.get_by_role("button", name="Prune").click()
        expect(page.get_by_text("Give a few words that both models go on with.")).to_be_visible(timeout=60_000)
        assert not errors
        browser.close()

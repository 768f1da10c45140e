"""The report in headless Chromium: width, light and dark mode."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featkd.diagnostics import DiagnoseConfig, diagnose
from tests.diagnostics.maps import QUICK, feature_maps

_CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(_CHROMIUM is None, reason="chromium is not installed")
# Chromium's windows have a minimum width, frames have none
_FRAME = """<!doctype html><body style="margin:0"><iframe id=f src="report.html"
style="width:{width}px;height:900px;border:0"></iframe><script>
f.onload = () => {{
  const page = f.contentDocument;
  const wide = [...page.querySelectorAll("body *")].filter(
    element => element.getBoundingClientRect().right > {width} + 1);
  document.title = page.documentElement.scrollWidth + " " + wide.map(e => e.tagName).join(",");
}};</script>"""


def chromium(*words: str) -> subprocess.CompletedProcess[str]:
    assert _CHROMIUM is not None
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
    quiet = ("--virtual-time-budget=3000", "--enable-logging=stderr", "--v=0")
    return subprocess.run(
        [_CHROMIUM, *flags, *quiet, *words], check=True, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "features").mkdir()
    for number, maps in enumerate(feature_maps(12, 20, 16).numpy()):
        np.save(folder / "features" / f"image_{number}_with_a_name_that_is_long.npy", maps)
    features, out = str(folder / "features"), str(folder / "out")
    diagnose(DiagnoseConfig(features=features, out=out, settings=QUICK))
    return folder / "out" / "report.html"


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(report, width):
    frame = report.with_name(f"frame{width}.html")
    frame.write_text(_FRAME.format(width=width))
    done = chromium("--dump-dom", f"--window-size={max(width, 800)},900", frame.as_uri())
    title = re.search("<title>(.*?)</title>", html.unescape(done.stdout))
    assert title is not None, done.stdout[:500]
    scroll_width, _, wide = title[1].partition(" ")
    assert int(scroll_width) <= width + 1, wide
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(report, dark):
    picture = report.with_name(f"{dark}.png")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = "--window-size=900,3000"
    chromium(scheme, size, f"--screenshot={picture}", report.as_uri())
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    background = pixels[-5:, :5].mean()
    assert background < 60 if dark else background > 200
    text = np.abs(pixels.astype(int).mean(2) - background) > 100
    assert 0.005 < text.mean() < 0.5  # text is drawn and readable

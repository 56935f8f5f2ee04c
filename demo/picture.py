"""Make docs/images/conversation.png, the README's picture: the page of a conversation of the demo, a token open.

make demo && PYTHONPATH=. .venv/bin/python demo/picture.py    # in the clone's folder; needs Chromium
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from explore_logits import execute_analysis

PICTURE = Path("docs", "images", "conversation.png")
WINDOW = {"width": 1280, "height": 740}  # pixels
ROW, STEPS = 2, 6  # of the dataset, and to which of the tokens above the threshold
COLOURS = 128


def picture_of(html: str) -> Image.Image:
    """A page as Chromium draws it, at one of the tokens above the threshold."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder, "page.html")
        file.write_text(html, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport=WINDOW, color_scheme="light", reduced_motion="reduce")
        page.goto(file.as_uri())
        for _ in range(STEPS):
            page.keyboard.press("n")
        page.evaluate("scrollTo(0, 0)")
        return Image.open(io.BytesIO(page.screenshot()))


def main() -> None:
    """Draw it and write it."""
    picture = picture_of(execute_analysis("outputs/demo", ROW, quiet=True).to_html())
    picture.convert("RGB").quantize(COLOURS).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()

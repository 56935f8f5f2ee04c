"""Make docs/images/demo.png, the README's picture: the token table of the demo's first conversation, and its page.

make demo && PYTHONPATH=. .venv/bin/python demo/picture.py    # in the clone's folder; needs Chromium
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI

from explore_logits import execute_analysis

PICTURE = Path("docs", "images", "demo.png")
WIDTH, TABLE_HEIGHT, PAGE_HEIGHT = 1000, 430, 480  # pixels
LINES = slice(0, 26)  # of the table
COLOURS = 128
FRAME = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: white }}
pre {{ margin: 0; padding: 12px 16px; height: {height}px; box-sizing: border-box; overflow: hidden;
       background: #1e1e1e; color: #ddd; font: 13px/15px monospace }}
</style><pre>$ explore-logits outputs/demo --html demo.html\n{table}</pre>"""


def table_html(analysis) -> str:
    """The table as it stands in a terminal, with its colours."""
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    analysis.print(console)
    whole = console.export_html(theme=MONOKAI, inline_styles=True, code_format="{code}")
    return "\n".join(whole.splitlines()[LINES])


def shoot(page: Page, html: str, height: int, click: str | None = None) -> Image.Image:
    """A document as Chromium draws it, with one of its elements clicked."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(html, encoding="utf-8")
        page.set_viewport_size({"width": WIDTH, "height": height})
        page.goto(file.as_uri())
        if click:
            page.locator(click).click()
        return Image.open(io.BytesIO(page.screenshot()))


def main() -> None:
    """Draw both, one above the other."""
    analysis = execute_analysis("outputs/demo", quiet=True)
    position = analysis.showing(only=1).shown[0].position
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(color_scheme="light")
        table = shoot(page, FRAME.format(height=TABLE_HEIGHT, table=table_html(analysis)), TABLE_HEIGHT)
        tokens = shoot(page, analysis.to_html(), PAGE_HEIGHT, f'[data-i="{position}"]')
        browser.close()
    picture = Image.new("RGB", (WIDTH, TABLE_HEIGHT + PAGE_HEIGHT))
    picture.paste(table, (0, 0))
    picture.paste(tokens, (0, TABLE_HEIGHT))
    picture.quantize(COLOURS).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()

"""All tables and pictures of bench/results on one page, in the style of a run's page.

    python bench/report.py

Writes bench/results/index.html, which opens from disk.
"""

import html
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from files.disk import write  # noqa: E402

RESULTS = ROOT / "bench" / "results"
HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nanoByG: what was measured</title>"""


def inline(text):
    """**bold** and `code` within a line."""
    text = html.escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def row(line, tag):
    """A line of a Markdown table, its cells as <th> or <td>."""
    cells = [inline(cell.strip()) for cell in line.strip("|").split("|")]
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def table(block):
    head, _, *lines = block.splitlines()
    rows = [row(head, "th")] + [row(line, "td") for line in lines]
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def to_html(text):
    """The little Markdown that bench writes: paragraphs, ## headings, tables, `code`, **bold**."""
    out = []
    for block in re.split(r"\n\s*\n", text.strip()):
        if block.startswith("|"):
            out.append(table(block))
        elif block.startswith("## "):
            out.append(f"<h3>{inline(block[3:])}</h3>")
        else:
            out.append(f"<p>{inline(block)}</p>")
    return "\n".join(out)


def main():
    template = (ROOT / "files" / "page.html").read_text("utf-8")
    style = re.search(r"<style>.*?</style>", template, re.S).group()
    parts = [HEAD, style, "<h1>What was measured</h1>"]
    pages = sorted(RESULTS.rglob("*.md"))
    for page in pages:
        name = page.with_suffix("").relative_to(RESULTS).as_posix()
        parts.append(f"<h2>{name.capitalize()}</h2>")
        parts.append(to_html(page.read_text("utf-8")))
        if page.with_suffix(".png").exists():
            src = f"{name}.png"
            img = f'<img src="{src}" alt="pictures: {name}" loading="lazy">'
            parts.append(f'<a href="{src}">{img}</a>')
    write(RESULTS / "index.html", "\n".join([*parts, "</html>\n"]))
    print(f"{RESULTS / 'index.html'}: {len(pages)} tables")


if __name__ == "__main__":
    main()

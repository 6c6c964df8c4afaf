"""All tables and pictures of bench/results on one page, in the style of a run's page.

python bench/report.py                                  # writes bench/results/index.html, which opens from disk
"""

import html
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from files.disk import write  # noqa: E402

RESULTS = ROOT / "bench" / "results"


def to_html(text):
    """The little Markdown that bench writes: paragraphs, ## headings, tables, `code` and **bold**."""
    inline = lambda s: re.sub(
        r"`([^`]+)`",
        r"<code>\1</code>",
        re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(s, quote=False)),
    )  # noqa: E731
    out = []
    for block in re.split(r"\n\s*\n", text.strip()):
        rows = [
            [inline(cell.strip()) for cell in line.strip("|").split("|")]
            for line in block.splitlines()
        ]
        if block.startswith("|"):
            row = lambda cells, tag: (
                "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
            )  # noqa: E731
            out.append(
                '<div class="scroll"><table>'
                + row(rows[0], "th")
                + "".join(row(cells, "td") for cells in rows[2:])
                + "</table></div>"
            )
        elif block.startswith("## "):
            out.append(f"<h3>{inline(block[3:])}</h3>")
        else:
            out.append(f"<p>{inline(block)}</p>")
    return "\n".join(out)


def main():
    style = re.search(
        r"<style>.*?</style>", (ROOT / "files" / "page.html").read_text("utf-8"), re.S
    ).group()
    parts = []
    for page in sorted(RESULTS.rglob("*.md")):
        name, picture = (
            page.with_suffix(end).relative_to(RESULTS).as_posix() for end in ("", ".png")
        )
        parts += [
            f"<h2>{name.capitalize()}</h2>",
            to_html(page.read_text("utf-8")),
            f'<a href="{picture}"><img src="{picture}" alt="pictures: {name}" loading="lazy"></a>'
            * (RESULTS / picture).exists(),
        ]
    head = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    write(
        RESULTS / "index.html",
        "\n".join(
            [
                head,
                "<title>nanoByG: what was measured</title>",
                style,
                "<h1>What was measured</h1>",
                *filter(None, parts),
                "</html>\n",
            ]
        ),
    )
    print(f"{RESULTS / 'index.html'}: {len(parts) // 3} tables")


if __name__ == "__main__":
    main()

"""Does what the README says, as a newcomer would: in a fresh clone, in one shell, every command marked with <!-- runs -->, in order.

    python bench/readme.py                                  # half an hour on two cores; the Python that has pip is enough
    python bench/readme.py --only-links                     # a second: that every file and heading it links to is there

Writes bench/work/readme.log. Exit code 1 where a command fails or a link leads nowhere.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def commands(text):
    """The lines of every marked block: <!-- runs -->, then indented lines."""
    return [
        line.strip()
        for block in re.findall(r"<!-- runs -->\n((?:    .+\n)+)", text)
        for line in block.splitlines()
    ]


def headings(page):
    """What a link can name behind its #."""
    return {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    }


def broken_links(page):
    """Relative links and pictures of a Markdown page that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        if not link.startswith("http") and (
            not target.exists() or heading and heading not in headings(target)
        ):
            broken.append(link)
    return broken


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--only-links", action="store_true")
    p.add_argument(
        "--clone",
        help="folder to clone to, which stays, for a look at the pictures (default: a temporary one)",
    )
    o = p.parse_args()
    pages = [
        ROOT / name
        for name in subprocess.check_output(
            ["git", "ls-files", "*.md"], cwd=ROOT, text=True
        ).splitlines()
    ]
    broken = [f"{page.relative_to(ROOT)}: {link}" for page in pages for link in broken_links(page)]
    print(
        "\n".join(
            ["links that lead nowhere:", *broken]
            if broken
            else [f"every link in {len(pages)} pages leads somewhere"]
        )
    )
    if o.only_links:
        return bool(broken)
    lines, log = (
        commands((ROOT / "README.md").read_text("utf-8")),
        ROOT / "bench" / "work" / "readme.log",
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(log, "wb") as out:
        clone = pathlib.Path(o.clone or folder) / "nanobyg"
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        shell = subprocess.Popen(
            ["bash", "-e"],
            cwd=clone,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
        )
        for line in lines:  # the shell stays the same: an activated environment stays active
            begun = time.time()
            shell.stdin.write(f"{{ {line}\n}} >&2 </dev/null\necho done\n")
            shell.stdin.flush()
            good = shell.stdout.readline() == "done\n"
            print(f"{'ok' if good else 'FAILED'}  {time.time() - begun:5.0f} s  {line}", flush=True)
            if not good:
                print(f"see {log}", file=sys.stderr)
                return 1
        shell.stdin.close()
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())

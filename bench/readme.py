"""Does what the README says, as a newcomer would: in a fresh clone, in one shell, every command
that is marked with <!-- runs -->, in order.

    python bench/readme.py                  # half an hour on two cores; any Python that has pip
    python bench/readme.py --only-links     # a second: every file and heading it links to is there

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
LOG = ROOT / "bench" / "work" / "readme.log"
INDENTED = r"((?:    [^\n]+\n)+)"
FENCED = r"```\w*\n(.*?)^```"
MARKED = re.compile(rf"<!-- runs -->\n+(?:{INDENTED}|{FENCED})", re.M | re.S)


def commands(text):
    """The lines of every marked block: <!-- runs -->, then lines indented or between fences."""
    found = []
    for indented, fenced in MARKED.findall(text):
        lines = [line.strip() for line in (indented or fenced).splitlines()]
        found += [line for line in lines if line and not line.startswith("#")]
    return found


def headings(page):
    """What a link can name behind its #."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M):
        found.add(re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-"))
    return found


def broken_links(page):
    """Relative links and pictures of a Markdown page that lead to no file, or no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith("http"):
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or heading and heading not in headings(target):
            broken.append(link)
    return broken


def check_links():
    """-> whether a link of any page leads nowhere; says which"""
    listed = subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True)
    pages = [ROOT / name for name in listed.splitlines()]
    broken = [f"{page.relative_to(ROOT)}: {link}" for page in pages for link in broken_links(page)]
    if broken:
        print("links that lead nowhere:", *broken, sep="\n")
    else:
        print(f"every link in {len(pages)} pages leads somewhere")
    return bool(broken)


def follow(lines, clone, log):
    """Runs the lines in one shell, so that an activated environment stays active. -> whether all
    went well"""
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
    shell = subprocess.Popen(["bash", "-e"], cwd=clone, text=True, **pipes)
    for line in lines:
        begun = time.time()
        shell.stdin.write(f"{{ {line}\n}} >&2 </dev/null\necho done\n")
        shell.stdin.flush()
        good = shell.stdout.readline() == "done\n"
        print(f"{'ok' if good else 'FAILED'}  {time.time() - begun:5.0f} s  {line}", flush=True)
        if not good:
            print(f"see {LOG}", file=sys.stderr)
            return False
    shell.stdin.close()
    return True


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--only-links", action="store_true")
    stays = "folder to clone to, which stays, for a look at the pictures (a temporary one)"
    p.add_argument("--clone", help=stays)
    o = p.parse_args()
    broken = check_links()
    if o.only_links:
        return broken
    lines = commands((ROOT / "README.md").read_text("utf-8"))
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(LOG, "wb") as log:
        good = follow(lines, pathlib.Path(o.clone or folder) / "nanobyg", log)
    return broken or not good


if __name__ == "__main__":
    sys.exit(main())

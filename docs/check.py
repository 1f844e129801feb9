"""Checks the built site: its links, and each page in a browser.

    python docs/check.py --links-only
    python docs/check.py

The first needs no browser. The second loads every page in headless Chromium, narrow and
wide, light and dark, and saves screenshots of some pages. It exits with status 1 if it
finds a fault. Nothing is fetched from outside of the site.
"""

import argparse
import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

BUILD = Path(__file__).parent / "_build"
SITE = BUILD / "html"
WIDTHS = (360, 1440)
SCHEMES = ("light", "dark")
LOADED = ("stylesheet", "preload", "icon")
PICTURED = (
    "index.html",
    "choosing.html",
    "results.html",
    "notebooks/quickstart.html",
    "api/generated/apollo_optax.scale_by_apollo.html",
)
# An element of a scrolling box may be wider than the page, but the box may not. What is
# fixed outside of the page, as a closed menu is, does not widen it.
TOO_WIDE = """
() => {
  const width = document.documentElement.clientWidth;
  const scrolls = (element) => {
    for (let box = element.parentElement; box; box = box.parentElement) {
      const style = getComputedStyle(box);
      if (style.position === "fixed" || style.position === "sticky") return true;
      if (box !== document.body && style.overflowX !== "visible") return true;
    }
    return getComputedStyle(element).position === "fixed";
  };
  const wide = [...document.querySelectorAll("body *")].filter(
    (element) => element.getBoundingClientRect().right > width + 1 && !scrolls(element)
  );
  const names = wide.map((e) => `${e.tagName.toLowerCase()}.${e.className}`);
  const page = document.scrollingElement.scrollWidth;
  return page > width ? [...names, `the page (${page} px)`] : names;
}
"""


class Page(HTMLParser):
    """The anchors, links and loaded files of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values["rel"].split()[-1] in LOADED:
            self.loaded.append(values["href"])
        if "src" in values:
            self.loaded.append(values["src"])


def read_pages() -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in sorted(SITE.rglob("*.html"))}


def link_faults(pages: dict[Path, Page]) -> Iterator[str]:
    """Yields a line for each link or file of the site that leads nowhere."""
    for path, page in pages.items():
        where = path.relative_to(SITE)
        for link in page.links:
            if (reason := broken(path, link, pages)) is not None:
                yield f"{where}: the link {link} {reason}"
        for link in page.loaded:
            if urlsplit(link).scheme in ("http", "https") or link.startswith("//"):
                yield f"{where}: loads {link} from another site"
            elif (reason := broken(path, link, pages)) is not None:
                yield f"{where}: loads {link}, which {reason}"


def broken(page: Path, link: str, pages: dict[Path, Page]) -> str | None:
    """Returns what is wrong with a link, or None. Other sites are not visited."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_file():
        return "leads to no file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "leads to no anchor of its page"
    return None


def find_chromium() -> str | None:
    """Returns the path of a Chromium, or None for the one that Playwright installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = (shutil.which(name) for name in names)
    return os.environ.get("CHROMIUM") or next(filter(None, found), None)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def browser_faults(pages: dict[Path, Page]) -> list[str]:
    """Loads each page in Chromium; returns a line for each fault."""
    from playwright.sync_api import Error, sync_playwright

    handler = functools.partial(QuietHandler, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    shutil.rmtree(BUILD / "screenshots", ignore_errors=True)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=find_chromium(), args=["--no-sandbox"]
            )
        except Error as error:
            sys.exit(
                f"error: no Chromium to check the pages with: {error}\n"
                "Install one with `playwright install --with-deps chromium` or the "
                "system's packages, or name its file in CHROMIUM; --links-only checks "
                "without one."
            )
        tab = browser.new_page()
        names = [path.relative_to(SITE).as_posix() for path in pages]
        faults = [fault for name in names for fault in page_faults(tab, root, name)]
        faults += search_faults(tab, root)
        browser.close()
    server.shutdown()
    return faults


def page_faults(tab: Any, root: str, name: str) -> list[str]:
    """Loads one page and looks at it in every width and scheme."""
    faults: list[str] = []
    listeners = {
        "console": lambda message: (
            message.type == "error"
            and faults.append(
                f"{name}: the console says {message.text} ({message.location['url']})"
            )
        ),
        "pageerror": lambda error: faults.append(f"{name}: a script fails: {error}"),
        "requestfailed": lambda request: faults.append(f"{name}: no {request.url}"),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.goto(f"{root}/{name}", wait_until="load")
    for width in WIDTHS:
        for scheme in SCHEMES:
            tab.set_viewport_size({"width": width, "height": 900})
            tab.emulate_media(color_scheme=scheme)
            for element in tab.evaluate(TOO_WIDE):
                faults.append(f"{name}: {element} is wider than {width} px")
            if name in PICTURED:
                picture = f"{Path(name).stem}-{width}-{scheme}.png"
                tab.screenshot(path=BUILD / "screenshots" / picture)
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    return faults


def search_faults(tab: Any, root: str) -> list[str]:
    """Searches for a public name, whose page has to be among the results."""
    tab.goto(f"{root}/search.html?q=apollo_mini")
    result = tab.locator("#search-results a[href*='apollo_optax.apollo_mini']")
    try:
        result.first.wait_for(timeout=20_000)
    except Exception:
        return ["search.html: a search for apollo_mini does not find its page"]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links-only", action="store_true", help="use no browser")
    options = parser.parse_args()
    pages = read_pages()
    if not pages:
        sys.exit(f"error: there is no site in {SITE}; build it with `make docs`")
    faults = list(link_faults(pages))
    links = sum(len(page.links) + len(page.loaded) for page in pages.values())
    print(f"{len(pages)} pages, {links:,} links and files")
    if not options.links_only:
        faults += browser_faults(pages)
        print(f"screenshots in {BUILD / 'screenshots'}")
    print("\n".join(dict.fromkeys(faults)) or "no faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

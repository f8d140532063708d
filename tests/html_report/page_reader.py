"""Reading a page back: by the parser of the standard library, and by a browser."""

import shutil
import subprocess
from html.parser import HTMLParser

SECTIONS = [
    "accuracy", "size", "layers", "exclude", "tensors",
    "activations", "weights", "placement", "prediction", "lint",
]  # fmt: skip
VOID = {"meta", "wbr", "br", "link", "img", "input", "hr"}


class Node:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent = tag, dict(attributes), parent
        self.children = []

    def find(self, tag=None, **attributes):
        return [
            node
            for child in self.children
            if isinstance(child, Node)
            for node in [child, *child.find()]
            if (tag is None or node.tag == tag)
            and all(node.attributes.get(k.strip("_")) == v for k, v in attributes.items())
        ]

    @property
    def text(self):
        return "".join(c if isinstance(c, str) else c.text for c in self.children)


class _Tree(HTMLParser):
    def __init__(self):
        super().__init__()
        self.root = self.here = Node("root", [], None)

    def handle_starttag(self, tag, attributes):
        node = Node(tag, attributes, self.here)
        self.here.children.append(node)
        if tag not in VOID:
            self.here = node

    def handle_endtag(self, tag):
        assert self.here.tag == tag, f"<{self.here.tag}> is closed by </{tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def read_page(path):
    """The document as a tree; fails where an element is not closed."""
    tree = _Tree()
    tree.feed(path.read_text(encoding="utf-8"))
    tree.close()
    assert tree.here is tree.root, f"<{tree.here.tag}> is not closed"
    return tree.root


def section(page, name):
    (found,) = page.find("section", id=name)
    return found


def rows(table_holder):
    """The rows of the first table: texts and figures by the title of their column."""
    table = table_holder.find("table")[0]
    found = []
    for row in table.find("tbody")[0].find("tr"):
        cells = row.find("td")
        texts = {cell.attributes["data-label"]: cell.text.strip() for cell in cells}
        figures = {
            cell.attributes["data-label"]: float(cell.attributes["data-value"])
            for cell in cells
            if "data-value" in cell.attributes
        }
        found.append((texts, figures))
    return found


def browser():
    return shutil.which("chromium") or shutil.which("chromium-browser")


def browse(page, folder, *options, width=1200, height=900):
    """Open a page; returns the document after layout and what the browser logged."""
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage", "--enable-logging=stderr", "--no-first-run",
        f"--user-data-dir={folder}/profile", f"--window-size={width},{height}", *options,
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]

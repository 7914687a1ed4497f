"""What the site needs beside Markdown: files of the repository that a page links to, and docstrings' roles.

A page says ``../bench/results/x.png``, as it has to where the repository itself is read. In the site that file lies at
``repository/bench/results/x.png``.
"""

from __future__ import annotations

import re
from pathlib import Path

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
ROLE = re.compile(r":(?:class|meth|func|mod|attr|data|exc):`~?\.?([^`<]+)`")


def on_files(files, config):
    for page in files.documentation_pages():
        for name in OUTSIDE.findall(page.content_string):
            path = ROOT / name
            if not path.is_file():
                raise PluginError(f"{page.src_uri}: ../{name} is not a file of the repository")
            uri = _uri(name)
            if uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    return OUTSIDE.sub(lambda link: _uri(link[1]), markdown)


def _uri(name: str) -> str:
    return f"repository/{name}.txt" if name.endswith(".md") else f"repository/{name}"  # a page's own links would lead nowhere


class Roles(griffe.Extension):
    """``:class:`~a.b.Name``` in a docstring is shown as ``Name``."""

    def on_instance(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", obj.docstring.value)

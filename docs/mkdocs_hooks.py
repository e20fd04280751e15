"""What the site needs beyond mkdocs and mkdocstrings: links from names written as code, and docstrings
with sections of our own.

On pages and in docstrings `docs/method.md` and `ttt.adapt` (or `fast_weight_scan`) are plain code, which
is also how GitHub and a terminal show them; here both become links. Other files stay names.
"""

from __future__ import annotations

import ast
import re
from inspect import cleandoc
from pathlib import Path
from textwrap import indent

from griffe import Alias, Extension, GriffeLoader, Module, Object
from mkdocs.plugins import get_plugin_logger

log = get_plugin_logger(__name__)  # a warning ends a strict build


def public_names() -> dict[str, str]:
    """Name -> module of what `ttt_kernels` imports when it is first used."""
    source = Path(__file__).parents[1] / "ttt_kernels" / "__init__.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    assigned = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    return ast.literal_eval(assigned["_PUBLIC"])


# --- mkdocs: links --------------------------------------------------------------------------------
_PAGE = re.compile(r"<code>docs/([\w/]+\.md)</code>")
_NAME = re.compile(r"<code>(ttt\.|ttt_kernels\.)?(\w+)(?:\([^<]*\))?</code>")
_ESCAPED = re.compile(r"<code>[^<]*\\\|[^<]*</code>")  # a pipe, escaped for the table it stands in
# Alone, these are also subcommands, words, or methods of transformers.
_AMBIGUOUS = ("adapt", "diagnostics", "disabled", "info", "from_pretrained", "save_pretrained")


def on_page_content(html: str, page, config, files) -> str:
    def to_page(match: re.Match) -> str:
        file = files.get_file_from_path(match[1])
        if file is None:
            log.warning(f"'{page.file.src_uri}' names docs/{match[1]}, which is not a page")
            return match[0]
        return f'<a href="{file.url_relative_to(page.file)}">{match[0]}</a>'

    def to_name(match: re.Match) -> str:
        prefix, name = match.groups()
        if name not in names or (name in _AMBIGUOUS and not prefix):
            return match[0]
        return f'<autoref identifier="ttt_kernels.{name}">{match[0]}</autoref>'

    names = public_names()
    html = _ESCAPED.sub(lambda match: match[0].replace(r"\|", "|"), html)
    return _NAME.sub(to_name, _PAGE.sub(to_page, html))


# --- griffe: docstrings ---------------------------------------------------------------------------
_TABLES = ("Args", "Attributes", "Raises")
_SECTION = re.compile(r"^([A-Z][a-z]+):(?: +(.*))?\n((?:(?: .*)?\n)*)", re.M)
_SHARED = re.compile(r"^    (\w+(?:,\s+\w+)+)(:.*\n(?:(?: {5}.*)?\n)*)", re.M)


def readable(docstring: str) -> str:
    """A docstring of ours as griffe and Markdown read them.

    Sections that become tables need a blank line before them, and an entry for each name where several
    share one (`lam, eta: as in ridge_write`). All others (`Precision: ...`) become definition lists.
    """

    def section(match: re.Match) -> str:
        title, first, rest = match.groups(default="")
        if title in _TABLES:
            return f"\n{title}:\n{_SHARED.sub(entries, rest)}"
        text = indent(cleandoc(f"{first}\n{rest}"), "    ")
        return f"\n{title}\n:{text[1:]}\n\n"

    def entries(match: re.Match) -> str:
        return "".join(f"    {name}{match[2]}" for name in re.split(r",\s+", match[1]))

    return _SECTION.sub(section, docstring + "\n").strip()


class Docstrings(Extension):
    def on_object(self, *, obj: Object, loader: GriffeLoader, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_) -> None:
        """The names that are imported lazily: reading the source does not find them."""
        for name, module in public_names().items():
            pkg.set_member(name, Alias(name, f"{module}.{name}"))

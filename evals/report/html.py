"""report.md as one HTML file: images and style inside, nothing is asked of the network, and there is no script.

The page is report.md itself, rendered, so that both say the same. HTML in it is text, but for the few bare tags that
the report writes (TAGS); links are text too, and images are files of the run's folder report/ or nothing. A policy in
the page forbids the browser the rest.
"""

import base64
import html
import re
from pathlib import Path

from markdown_it import MarkdownIt

TAGS = re.compile(r"(</?(?:details|summary|sup)>)")
IMAGE = re.compile(r"report/[\w-]+\.png")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<nav aria-label="Contents">{contents}</nav>
<main>
{body}</main>
</body>
</html>
"""


def to_html(markdown: str, run_dir: Path, title: str) -> str:
    """The whole file; images are read from run_dir."""
    md = MarkdownIt("commonmark").enable("table").disable(["link", "autolink", "reference"])
    for rule in ("html_block", "html_inline"):
        md.add_render_rule(rule, lambda _, tokens, i, *rest: _few_tags(tokens[i].content))
    md.add_render_rule("image", lambda _, tokens, i, *rest: _image(run_dir, tokens[i]))
    md.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    md.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens, links = md.parse(markdown), []
    for opening, inside in zip(tokens, tokens[1:]):
        if opening.type == "heading_open" and opening.tag == "h2":
            name = re.sub(r"\W+", "-", inside.content.lower())
            opening.attrSet("id", name)
            links.append(f'<a href="#{name}">{html.escape(inside.content)}</a>')
    return PAGE.format(
        policy=html.escape(POLICY),
        title=html.escape(title),
        style=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        contents=" ".join(links),
        body=md.renderer.render(tokens, md.options, {}),
    )


def _few_tags(text: str) -> str:
    """The tags that the report writes as they are, everything else as text."""
    return "".join(part if TAGS.fullmatch(part) else html.escape(part) for part in TAGS.split(text))


def _image(run_dir: Path, token) -> str:
    source, name = str(token.attrs.get("src", "")), html.escape(token.content)
    path = run_dir / source
    if not IMAGE.fullmatch(source) or not path.is_file():
        return name
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<span class="wide" tabindex="0"><img alt="{name}" src="data:image/png;base64,{data}"></span>'

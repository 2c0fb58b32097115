"""report.md as one HTML file: images and style inside, nothing is asked of the network, and there is no script.

HTML in report.md is text, but for the few bare tags that the report writes (TAGS); links are text too, and images are
files of the run's folder report/ or nothing. A policy in the page (page.html) forbids the browser the rest.
"""

import base64
import html
import re
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt

TAGS = re.compile(r"(</?(?:details|summary|sup)>)")
IMAGE = re.compile(r"report/[\w-]+\.png")


def to_html(markdown: str, run_dir: Path, title: str) -> str:
    """The whole file; images are read from run_dir."""
    md = MarkdownIt("commonmark").enable("table").disable(["link", "autolink", "reference"])
    for rule in ("html_block", "html_inline"):
        md.add_render_rule(rule, lambda _, tokens, i, *rest: _few_tags(tokens[i].content))
    md.add_render_rule("image", lambda _, tokens, i, *rest: _image(run_dir, tokens[i]))
    md.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    md.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens, sections = md.parse(markdown), []
    for opening, inside in zip(tokens, tokens[1:]):
        if opening.type == "heading_open" and opening.tag == "h2":
            name = re.sub(r"\W+", "-", inside.content.lower())
            opening.attrSet("id", name)
            sections.append((name, inside.content))
    page, style = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.html", "page.css"))
    template = jinja2.Template(page, autoescape=True, keep_trailing_newline=True)
    body = md.renderer.render(tokens, md.options, {})
    return template.render(title=title, style=style, sections=sections, body=body)


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

"""The page in a real browser, against a stand-in for the API that says what each test wants, when it wants it."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from server_fakes import TOK, Scripted, scripted_app, serving

from conftest import ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)
expect = sync_api.expect
expect.set_options(timeout=30_000)  # a busy machine may take long

STATIC = ROOT / "server" / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
BROKEN_OFF = object()  # in a reply: the connection ends here
CUT_OFF = object()  # in a reply: the limit of tokens is reached


class Refusal:
    def __init__(self, status, message, **headers):
        self.status, self.message, self.headers = status, message, headers


class StandIn(ThreadingHTTPServer):
    """`reply(body)` is what is answered: text, chunks (dicts), Events to wait for, BROKEN_OFF; or a Refusal."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.reset()

    def handle_error(self, request, client_address):
        """A browser that leaves in the middle is nothing to report."""

    def reset(self):
        self.bodies, self.keys, self.left = [], [], threading.Event()
        self.reply = lambda body: [f"You said: {body['messages'][-1]['content']}"]

    def says(self, *reply):
        self.reply = lambda body: reply[0] if isinstance(reply[0], Refusal) else reply

    @property
    def asked(self):
        """The messages of the last request, as role and content."""
        return [(m["role"], m["content"]) for m in self.bodies[-1]["messages"]]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, kind, data, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        name = "index.html" if self.path == "/" else self.path.removeprefix("/static/")
        file = STATIC / name
        if self.path == "/health":
            state = {"status": "ok", "run": "demo", "stage": "sft", "slots": 2, "active": 0, "queued": 0}
            state["suggestions"] = [{"kind": "sums", "text": "What is 2 + 3?"}]
            self.send(200, "application/json", json.dumps(state).encode())
        elif (self.path == "/" or self.path.startswith("/static/")) and file.is_file():
            self.send(200, TYPES[file.suffix], file.read_bytes(), Content_Security_Policy=POLICY)
        else:
            self.send(404, "text/plain", b"")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        reply = self.server.reply(body)
        if isinstance(reply, Refusal):
            error = json.dumps({"error": {"message": reply.message}}).encode()
            self.send(reply.status, "application/json", error, **reply.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream(reply)
        except OSError:
            self.server.left.set()

    def stream(self, reply):
        tokens, finish = 0, "stop"
        for piece in reply:
            if piece is BROKEN_OFF:
                return
            if isinstance(piece, threading.Event):
                self.wait(piece)
                continue
            if piece is CUT_OFF:
                finish = "length"
                continue
            tokens += 1
            self.event(piece if isinstance(piece, dict) else delta(content=piece))
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        self.event({"choices": [], "usage": {"completion_tokens": tokens}})
        self.wfile.write(b"data: [DONE]\n\n")

    def wait(self, event):
        """Until it is set; finds out when the client leaves, as a server does."""
        for _ in range(500):
            if event.wait(0.02):
                return
            self.wfile.write(b": still there\n\n")

    def event(self, chunk):
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())


def delta(**parts):
    return {"choices": [{"index": 0, "delta": parts, "finish_reason": None}]}


def call(index, arguments="", *begins):
    """A piece of a call of a function; of the first one, `begins` are its id and name."""
    first = dict(zip(("id", "name"), begins, strict=False))
    function = {"arguments": arguments} | ({"name": first.pop("name")} if begins else {})
    return delta(tool_calls=[{"index": index, "type": "function", "function": function, **first}])


def tool(index, **part):
    return delta(tool=[{"index": index, "name": "calculator", **part}])


@pytest.fixture(scope="module")
def served():
    with StandIn() as server:
        yield server
        server.shutdown()


@pytest.fixture
def api(served):
    served.reset()
    return served


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opens(browser, api):
    """Opens the page in a browser of its own, or in `context`. Whatever a test does, nothing may reach for another
    host, and nothing may be an error in the console that the test does not expect."""
    contexts, foreign, problems, expected = [], [], [], []

    def log(message):
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def request(r):
        if not r.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            foreign.append(r.url)

    def open(path="", context=None, url=api.url, **options):
        if context is None:
            context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}, **options})
            context.set_default_timeout(10_000)
            context.on("request", request)
            contexts.append(context)
        page = context.new_page()
        page.on("console", log)
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.goto(url + path)
        return page

    open.expected = expected
    yield open
    for context in contexts:
        context.close()
    assert not foreign
    assert not [p for p in problems if not any(re.search(e, p) for e in expected)]


@pytest.fixture
def page(opens):
    return opens()


def box(page):
    return page.get_by_label("Your message", exact=True)


def ask(page, text):
    box(page).fill(text)
    if page.evaluate("matchMedia('(pointer: fine)').matches"):
        page.keyboard.press("Enter")
    else:
        button(page, "Send").tap()


def replies(page):
    return page.locator(".assistant .prose")


def ask_and_wait(page, text):
    """Until the reply is whole."""
    before = page.locator(".user").count()
    ask(page, text)
    expect(page.locator(".user")).to_have_count(before + 1)
    whole(page)


def whole(page):
    expect(page.locator("#stop")).to_be_hidden()


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def chats(page):
    return page.locator("#chats a")


def said(page):
    return page.locator(".message :is(.bubble, .prose)")


def test_text_appears_piece_by_piece(page, api):
    second, third = threading.Event(), threading.Event()
    api.says("Once upon ", second, "a time, ", third, "the end.")
    ask(page, "Tell me a story")
    expect(page.locator(".user")).to_contain_text("Tell me a story")
    expect(replies(page)).to_have_text("Once upon")
    second.set()
    expect(replies(page)).to_have_text("Once upon a time,")
    expect(page.locator(".speed")).to_have_text(re.compile(r"^≈ [\d.]+ tokens/s$"))
    assert page.locator("#announce").inner_text() == ""  # not token by token
    third.set()
    expect(replies(page)).to_have_text("Once upon a time, the end.")
    expect(page.locator(".speed")).to_have_text(re.compile(r"^3 tokens · [\d.]+ tokens/s$"))
    expect(page.locator("#announce")).to_have_text("Reply: Once upon a time, the end.")
    sent = api.bodies[-1]
    assert sent.pop("messages") == [{"role": "user", "content": "Tell me a story"}]
    assert sent.pop("stream_options") == {"include_usage": True} and sent.pop("stream") is True
    assert sent == {"temperature": 0.6, "top_k": 50, "top_p": 1, "max_tokens": 512}


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_was_said_and_leaves_the_server(page, api, how):
    api.says("So far", threading.Event())
    ask(page, "Count")
    expect(replies(page)).to_have_text("So far")
    button(page, "Stop").click() if how == "button" else page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    assert api.left.wait(10)
    expect(box(page)).to_be_focused()
    api.says("Then more")
    ask_and_wait(page, "Go on")
    assert api.asked == [("user", "Count"), ("assistant", "So far"), ("user", "Go on")]
    expect(said(page)).to_have_text(["Count", "So far", "Go on", "Then more"])


def test_stopped_before_the_first_token_the_question_is_not_sent_again(page, api):
    api.says(threading.Event())
    ask(page, "Nobody answers this")
    button(page, "Stop").click()
    api.says("Yes")
    ask_and_wait(page, "And this?")
    assert api.asked == [("user", "And this?")]


def test_edit_and_resend_drops_what_follows(page, api):
    ask_and_wait(page, "one")
    ask_and_wait(page, "two")
    ask_and_wait(page, "three")
    edit = button(page, "Edit message").nth(1)
    edit.click()
    field = page.get_by_label("Edit your message")
    expect(field).to_have_value("two")
    page.keyboard.press("Escape")
    expect(field).to_have_count(0)
    expect(edit).to_be_focused()
    expect(said(page)).to_have_count(6)
    edit.click()
    field.fill("zwei")
    page.keyboard.press("Enter")
    expect(said(page)).to_have_text(["one", "You said: one", "zwei", "You said: zwei"])
    whole(page)
    assert api.asked == [("user", "one"), ("assistant", "You said: one"), ("user", "zwei")]
    page.reload()
    expect(said(page)).to_have_text(["one", "You said: one", "zwei", "You said: zwei"])


def test_regenerate(page, api):
    api.says("First try")
    ask_and_wait(page, "hello")
    api.says("Second try")
    button(page, "Regenerate reply").click()
    expect(said(page)).to_have_text(["hello", "Second try"])
    assert len(api.bodies) == 2 and api.bodies[0] == api.bodies[1]


def test_copy(opens, api):
    page = opens(permissions=["clipboard-read", "clipboard-write"])
    code = "def f():\n    return '<b>'"
    api.says(f"Use **this**:\n\n```python\n{code}\n```\n")
    ask_and_wait(page, "How?")

    def copied(name):
        button(page, name).click()
        expect(page.locator("#announce")).to_have_text("Copied")
        return page.evaluate("navigator.clipboard.readText()")

    assert copied("Copy code") == code
    assert copied("Copy reply") == f"Use **this**:\n\n```python\n{code}\n```\n"
    page.locator(".user").hover()
    assert copied("Copy message") == "How?"
    # without the clipboard API, as on plain http
    page.evaluate("delete Object.getPrototypeOf(navigator).clipboard")
    button(page, "Copy code").click()
    box(page).press("Control+v")
    expect(box(page)).to_have_value(code)


def test_conversations_are_kept_renamed_and_deleted(page, api):
    expect(page.get_by_text("Conversations are kept in this browser only.")).to_be_visible()
    ask_and_wait(page, "about cats")
    button(page, "New chat").click()
    expect(said(page)).to_have_count(0)
    ask_and_wait(page, "about dogs")
    page.reload()
    expect(chats(page)).to_have_text(["about dogs", "about cats"])
    expect(said(page)).to_have_text(["about dogs", "You said: about dogs"])
    chats(page).nth(1).click()
    expect(said(page)).to_have_text(["about cats", "You said: about cats"])
    expect(page).to_have_title("about cats · nanochat")
    ask_and_wait(page, "more about cats")
    expect(chats(page)).to_have_text(["about cats", "about dogs"])  # the newest first
    assert api.asked[0] == ("user", "about cats") and len(api.asked) == 3
    button(page, "Rename “about cats”").click()
    title = page.get_by_label("Title of the conversation")
    title.fill("felines")
    page.keyboard.press("Enter")
    expect(chats(page)).to_have_text(["felines", "about dogs"])
    expect(page.get_by_role("heading", level=1)).to_have_text("felines")
    button(page, "Rename “felines”").click()
    title.fill("nothing")
    page.keyboard.press("Escape")
    expect(chats(page)).to_have_text(["felines", "about dogs"])
    button(page, "Delete “felines”").click()
    expect(chats(page)).to_have_text(["about dogs"])
    expect(said(page)).to_have_count(0)
    button(page, "Undo").click()
    expect(said(page)).to_have_count(4)
    button(page, "Delete “felines”").click()
    page.reload()
    expect(chats(page)).to_have_text(["about dogs"])
    page.go_back()
    page.go_back()


def test_a_reload_in_the_middle_keeps_what_was_there(page, api):
    more = threading.Event()
    api.says("Half of", more, " it")
    ask(page, "Say it")
    expect(replies(page)).to_have_text("Half of")
    page.reload()
    expect(replies(page)).to_have_text("Half of")
    expect(page.locator(".note")).to_contain_text("Interrupted")
    api.says("All of it")
    button(page, "Try again").click()
    expect(said(page)).to_have_text(["Say it", "All of it"])
    assert api.asked == [("user", "Say it")]


def test_a_reply_goes_on_while_another_conversation_is_shown(page, api):
    more = threading.Event()
    api.says("slow", more, " answer")
    ask(page, "slow question")
    expect(replies(page)).to_have_text("slow")
    button(page, "New chat").click()
    api.says("quick answer")
    ask_and_wait(page, "quick question")
    more.set()
    expect(page.locator("#announce")).to_have_text("Reply: slow answer")
    expect(said(page)).to_have_text(["quick question", "quick answer"])
    chats(page).get_by_text("slow question").click()
    expect(said(page)).to_have_text(["slow question", "slow answer"])


def test_two_tabs_do_not_overwrite_each_other(opens, api):
    one = opens()
    two = opens(context=one.context)
    ask_and_wait(one, "from one")
    ask_and_wait(two, "from two")
    for page in (one, two):
        expect(chats(page)).to_have_text(["from two", "from one"])
    # both in one conversation: what one says the other shows, also while it is being written
    chats(two).get_by_text("from one").click()
    more = threading.Event()
    api.says("Wait ", more, "for it")
    ask(one, "again")
    expect(two.locator(".note")).to_have_text("Being written in another tab …")
    ask(two, "at the same time")  # not now; the text stays
    expect(box(two)).to_have_value("at the same time")
    more.set()
    for page in (one, two):
        expect(said(page)).to_have_text(["from one", "You said: from one", "again", "Wait for it"])
    api.reply = lambda body: ["Both"]
    two.keyboard.press("Enter")
    expect(said(one)).to_have_count(6)
    button(one, "Delete “from one”").click()
    expect(chats(two)).to_have_text(["from two"])
    expect(two.locator("#notice")).to_contain_text("deleted in another tab")
    expect(said(two)).to_have_count(0)


def test_a_tab_that_crashed_leaves_an_interrupted_reply(opens, api):
    page = opens()
    chat = {"id": "x1", "title": "old", "updated": 1, "saved": 1, "messages": [{"role": "user", "text": "hi"}]}
    chat["messages"].append({"role": "assistant", "parts": [{"type": "text", "text": "Hal"}], "status": "writing"})
    page.evaluate("chat => localStorage.setItem('nanochat.chat.x1', JSON.stringify(chat))", chat)
    page.evaluate("localStorage.setItem('nanochat.chat.x2', '{broken')")
    page.goto(api.url + "#x1")
    page.reload()
    expect(replies(page)).to_have_text("Hal")
    expect(page.locator(".note")).to_contain_text("Interrupted")
    expect(chats(page)).to_have_text(["old"])
    more = threading.Event()
    api.says("Gone", more, " on")
    ask(page, "go on")
    expect(replies(page)).to_have_text(["Hal", "Gone"])
    expect(page.locator(".note")).to_contain_text("Interrupted")
    more.set()
    expect(replies(page)).to_have_text(["Hal", "Gone on"])


@pytest.mark.parametrize(("turns", "length"), [(300, 10), (40, 9000)])
def test_of_a_very_long_conversation_the_newest_part_is_sent(opens, api, turns, length):
    page = opens()
    said = [
        [{"role": "user", "text": f"q{i}"}, {"role": "assistant", "parts": [{"type": "text", "text": "x" * length}]}]
        for i in range(turns)
    ]
    chat = {"id": "long", "title": "long", "updated": 1, "saved": 1, "messages": sum(said, [])}
    page.evaluate("chat => localStorage.setItem('nanochat.chat.long', JSON.stringify(chat))", chat)
    page.goto(api.url + "#long")
    page.reload()
    ask_and_wait(page, "the last")
    sent = api.asked
    assert len(sent) < 400 and sum(len(content) for _, content in sent) < 200_000  # what the server takes
    assert len(sent) > 20 and sent[-1] == ("user", "the last") and sent[0][0] == "user"
    assert sent[-3:-1] == [("user", f"q{turns - 1}"), ("assistant", "x" * length)]


def test_full_storage_is_said_and_the_conversation_goes_on(page, api):
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    ask_and_wait(page, "one")
    expect(page.locator("#notice")).to_contain_text("storage is full")
    ask_and_wait(page, "two")
    expect(said(page)).to_have_count(4)
    expect(chats(page)).to_have_text(["one"])


RICH = """Intro with **bold**, *italic*, `code`, ~~struck~~ and [a link](https://example.org/a_(b)).

## Heading

1. first
   - inner
   - *other*

2. second

> quoted
> **twice**

| Name | Size |
|:-----|-----:|
| a\\|b | 1 |
| `c` | 2 |

```js
if (a < b) alert("x");
```
---
Then 2*3*4 and snake_case_name, 5 * 3 * 2, \\*no\\*, https://example.org/x?y=1. End
"""


def test_markdown(page, api):
    api.says(*(RICH[i : i + 7] for i in range(0, len(RICH), 7)))
    ask_and_wait(page, "All of it")
    reply = replies(page)
    for tag, texts in {
        "strong": ["bold", "twice"],
        "em": ["italic", "other"],
        "del": ["struck"],
        "h4": ["Heading"],
        ":scope > ol > li": [re.compile("first"), "second"],
        "ol ul li": ["inner", "other"],
        "blockquote": [re.compile(r"quoted\s*twice")],
        "th": ["Name", "Size"],
        "td": ["a|b", "1", "c", "2"],
        "pre code": ['if (a < b) alert("x");'],
        ".code-bar span": ["js"],
        "p code, td code": ["code", "c"],
    }.items():
        expect(reply.locator(tag)).to_have_text(texts)
    assert reply.locator("hr").count() == 1
    last = reply.locator(":scope > p").last
    expect(last).to_have_text("Then 2*3*4 and snake_case_name, 5 * 3 * 2, *no*, https://example.org/x?y=1. End")
    links = reply.locator("a")
    assert links.evaluate_all("all => all.map(a => a.href)") == [
        "https://example.org/a_(b)",
        "https://example.org/x?y=1",
    ]
    assert all("noopener" in rel for rel in links.evaluate_all("all => all.map(a => a.rel)"))
    assert reply.locator("td").nth(1).evaluate("cell => getComputedStyle(cell).textAlign") == "right"


def test_markdown_piece_by_piece_is_the_same_and_does_not_redo_what_is_settled(page):
    nasty = (
        RICH
        + "so\n\\[\n- a\n# b\n\\]\n- i\n  $$\n  x\n$$\n> q\n\\[x\n> y\n\\] z\n\n"
        + "\\[\n- a\n\n- b\n\\]\n\n$$ 1\n\n- \\[\n- c\n\n"
        + "- a\n\n- b\n\nnot | a table\n\n> q\n```\nopen\n\n``\n`````\n1. x\n2. y\n- z\n***both** one*\n\n"
    )
    got = page.evaluate(
        """async source => {
          const { Markdown, chipMark } = await import("/static/markdown.js");
          const chip = i => document.createTextNode(`<${i}>`);
          source = source.replace("inner", "in" + chipMark(0) + "ner");
          const grown = document.createElement("div"), whole = document.createElement("div");
          const growing = new Markdown(grown, chip), first = [];
          for (let n = 1; n <= source.length; n++) {
            growing.update(source.slice(0, n));
            if (n === 300) first.push(...[...grown.children].slice(0, 3));
          }
          new Markdown(whole, chip).update(source);
          return { grown: grown.innerHTML, whole: whole.innerHTML, kept: first.every(node => grown.contains(node)) };
        }""",
        nasty,
    )
    assert got["grown"] == got["whole"] and got["kept"] and "in&lt;0&gt;ner" in got["whole"]


def test_no_text_makes_markdown_slow(page):
    """A step that is quadratic in the length would take minutes."""
    texts = ["*a " * 30_000, "**a" * 30_000, "[" * 60_000, "`a ``b " * 15_000, "> " * 30_000, "| " * 40_000]
    texts += ["# " + " " * 90_000, "- " * 30_000, "\\" * 60_000, "[a](" * 20_000, "a|b\n" * 20_000, "_a*" * 30_000]
    texts += [
        "\\[\n" * 20_000 + "\n",
        "$$\n" * 30_000,
        r"*a \(b " * 15_000,
        r"\(a_1\) " * 2_000,
        "\\(" + "{" * 90_000 + "\\)",
    ]
    texts += ["\\(x" + "'" * 1_900 + "\\)", "- \\[\n" * 15_000, r"\begin{align} " * 8_000, r"\text{" * 15_000 + r"\(\)"]
    texts += [" -" * 40_000 + "x", "1. a\n\n" * 10_000, "> a\n\n" * 10_000, "(http://a" * 10_000, "![](" * 20_000]
    took = page.evaluate(
        """async texts => {
          const { Markdown } = await import("/static/markdown.js");
          return texts.map(text => {
            const began = performance.now();
            const root = document.createElement("div");
            new Markdown(root, () => "").update(text);
            if (text.includes("\\\\(")) document.getElementById("log").replaceChildren(root);
            root.getBoundingClientRect();  // is laid out as well, where it has formulas
            return performance.now() - began;
          });
        }""",
        texts,
    )
    assert max(took) < 3000


HOSTILE = """<script>window.ran = 1</script>

<img src=x onerror="window.ran = 2"> **<svg onload=window.ran=3>**

![pixel](https://evil.example/pixel.png)

| <iframe src=https://evil.example> | b |
|---|---|
| `<script>` | <a href="javascript:1">x</a> |

```html
</code></pre><script>window.ran = 4</script>
```
"""


def test_html_in_a_reply_is_text(page, api):
    api.says(HOSTILE)
    ask_and_wait(page, "<img src=y onerror='window.ran = 5'>")
    page.reload()  # from the storage as well
    reply = replies(page)
    expect(reply).to_contain_text("<script>window.ran = 1</script>")
    expect(reply).to_contain_text('<img src=x onerror="window.ran = 2">')
    expect(reply.locator("pre")).to_have_text("</code></pre><script>window.ran = 4</script>")
    expect(page.locator(".bubble")).to_have_text("<img src=y onerror='window.ran = 5'>")
    assert page.locator("#log :is(script, img, iframe, svg:not(.icon))").count() == 0
    assert (
        page.locator("#log *")
        .evaluate_all("all => all.flatMap(e => [...e.attributes].map(a => a.name))")
        .count("onerror")
        == 0
    )
    assert page.evaluate("window.ran") is None
    link = reply.get_by_role("link", name="pixel")  # an image is a link: nothing is loaded (the fixture checks that)
    assert link.get_attribute("href") == "https://evil.example/pixel.png"


def test_only_safe_addresses_are_links(page, api):
    bad = [
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "java\tscript:alert(1)",
        "data:text/html,x",
        "vbscript:x",
        "file:///etc",
        "/x",
        "//x",
    ]
    bad += ["\u0001javascript:alert(1)", "&#106;avascript:alert(1)"]
    good = ["https://example.org/", "http://example.org/", "mailto:a@example.org"]
    api.says(
        "\n\n".join(
            f"[link {i}]({address}) [link {i}](<{address}>) <{address}>" for i, address in enumerate(bad + good)
        )
    )
    ask_and_wait(page, "Links")
    found = replies(page).locator("a").evaluate_all("all => all.map(a => a.href)")
    assert found == [address for address in good for _ in range(3)]
    expect(replies(page)).to_contain_text("[link 0](javascript:alert(1))")


def test_thoughts_are_folded_and_not_sent_back(page, api):
    more = threading.Event()
    api.says(delta(reasoning_content="It is "), delta(reasoning_content="<b>simple</b>."), more, "Four.")
    ask(page, "/think on")
    expect(page.locator("#notice")).to_contain_text("Thinking first is on.")
    ask(page, "2 and 2?")
    folded = page.locator("details.thoughts")
    expect(folded.locator("summary")).to_have_text(re.compile(r"Thinking … \d+\.\d s"))
    expect(folded.locator("p")).to_be_hidden()
    more.set()
    expect(replies(page)).to_have_text("Four.")
    expect(folded.locator("summary")).to_have_text(re.compile(r"Thought for \d+\.\d s"))
    folded.locator("summary").click()
    expect(folded.locator("p")).to_have_text("It is <b>simple</b>.")
    assert api.bodies[-1]["enable_thinking"] is True
    page.reload()
    expect(page.locator("details.thoughts summary")).to_have_text(re.compile(r"Thought for \d+\.\d s"))
    api.says("Yes.")
    ask(page, "/think off")
    ask(page, "Sure?")
    expect(replies(page).last).to_have_text("Yes.")
    assert "enable_thinking" not in api.bodies[-1]
    assert api.bodies[-1]["messages"][1] == {"role": "assistant", "content": "Four."}


def test_calculator_chips_and_what_is_sent_back(page, api):
    more = threading.Event()
    api.says(
        "So **",
        tool(0, input="12"),
        tool(0, input="*3"),
        more,
        tool(0, output="3"),
        tool(0, output="6"),
        "36** and ",
        tool(1, input="1/2"),
        tool(1, output="0.5"),
        "0.5.",
    )
    ask(page, "Work it out")
    chip = page.locator(".chip")
    expect(chip).to_have_text("calculator: 12*3 = …")
    more.set()
    expect(chip).to_have_text(["calculator: 12*3 = 36", "calculator: 1/2 = 0.5"])
    whole(page)
    expect(page.locator("strong > .chip")).to_have_count(1)  # within the text that it is said in
    page.reload()
    expect(chip).to_have_text(["calculator: 12*3 = 36", "calculator: 1/2 = 0.5"])
    ask_and_wait(page, "And then?")
    parts = [("text", "So **"), ("python", "12*3"), ("python_output", "36"), ("text", "36** and "), ("python", "1/2")]
    parts += [("python_output", "0.5"), ("text", "0.5.")]
    assert api.asked[1] == ("assistant", [{"type": kind, "text": text} for kind, text in parts])


def test_notes_on_length_and_context(page, api):
    api.says({**delta(content="Cut"), "context": {"dropped_messages": 2, "truncated": True}}, CUT_OFF)
    ask_and_wait(page, "Long")
    expect(page.locator(".note")).to_have_text(
        [
            re.compile("did not see the first 2 messages"),
            re.compile("saw only a part"),
            re.compile("Cut off at the length"),
        ]
    )


def test_settings_and_system_prompt_are_sent_and_kept(opens, api):
    page = opens()
    other = opens(context=page.context)
    page.bring_to_front()
    button(page, "Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("1.25")
    page.get_by_label("Top-k").fill("7")
    page.get_by_label("Top-p").fill("0.5")
    page.get_by_label("Length").fill("64")
    expect(page.locator("#sliders output")).to_have_text(["1.25", "7", "0.5", "64"])
    page.keyboard.press("Escape")
    want = {"temperature": 1.25, "top_k": 7, "top_p": 0.5, "max_tokens": 64}

    def check(page):
        ask_and_wait(page, "hi")
        assert api.asked[0] == ("system", "Be brief.") and want.items() <= api.bodies[-1].items()

    check(page)
    other.bring_to_front()  # a page behind another one is drawn once a second only
    check(other)
    page.bring_to_front()
    page.reload()
    check(page)
    button(page, "Settings").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    expect(page.get_by_label("Temperature")).to_have_value("1.25")
    button(page, "Back to the defaults").click()
    button(page, "Close settings").click()
    ask_and_wait(page, "hi")
    assert api.asked[0] == ("user", "hi") and api.bodies[-1]["temperature"] == 0.6


def test_commands(page, api):
    notice = page.locator("#notice")
    ask(page, "/temperature 0.7")
    expect(notice).to_have_text("Temperature is 0.7 now.")
    expect(box(page)).to_have_value("")
    ask(page, "/topk 5")
    ask(page, "/system Be kind.")
    ask(page, "/help")
    expect(notice).to_contain_text("/topk 50")
    for text, says in {
        "/temperature": "Temperature is 0.7.",
        "/temperature 9": "from 0 to 2",
        "/temperature warm": "takes a number",
        "/topk 1.5": "takes a whole number",
        "/dance": "There is no command /dance. Try /help.",
    }.items():
        ask(page, text)
        expect(notice).to_contain_text(says)
    expect(box(page)).to_have_value("/dance")  # to be put right
    assert not api.bodies and page.locator(".message").count() == 0
    ask_and_wait(page, "/etc/passwd is what?")
    assert api.asked == [("system", "Be kind."), ("user", "/etc/passwd is what?")]
    assert api.bodies[-1]["temperature"] == 0.7 and api.bodies[-1]["top_k"] == 5
    ask(page, "/clear")
    expect(said(page)).to_have_count(0)
    button(page, "Undo").click()
    expect(said(page)).to_have_count(2)
    ask(page, "/clear")
    page.reload()
    expect(said(page)).to_have_count(0)
    ask(page, "/new")
    expect(page.get_by_role("heading", level=1)).to_have_text("New chat")


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (Refusal(500, "the engine is down: out of memory"), "There is no reply: the engine is down: out of memory"),
        (
            Refusal(429, "too many requests", Retry_After=3),
            "There is no reply: too many requests; about 3\u00a0s to wait",
        ),
        ({"error": {"message": "the engine broke"}}, "There is no reply: the engine broke"),
        (BROKEN_OFF, "There is no reply: the connection was lost"),
    ],
)
def test_errors_offer_another_try(opens, api, fails, says):
    opens.expected.append("Failed to load resource")
    page = opens()
    api.says(fails)
    ask(page, "hello")
    expect(page.locator(".error p")).to_have_text(says)
    expect(page.locator("#announce")).to_have_text(says)
    page.reload()
    expect(page.locator(".error p")).to_have_text(says)
    api.says("There you are")
    button(page, "Try again").click()
    expect(said(page)).to_have_text(["hello", "There you are"])
    expect(page.locator(".error")).to_have_count(0)
    assert api.asked == [("user", "hello")]


def test_after_a_failure_another_question_may_be_asked(opens, api):
    opens.expected.append("Failed to load resource")
    page = opens()
    api.says("Half", BROKEN_OFF)
    ask(page, "one")
    expect(page.locator(".error p")).to_have_text("The reply broke off: the connection was lost")
    api.says(Refusal(500, "down"))
    ask(page, "two")
    expect(page.locator(".error")).to_have_count(2)
    expect(button(page, "Try again")).to_have_count(1)  # of the last one
    api.says("Fine")
    ask_and_wait(page, "three")
    assert api.asked == [("user", "one"), ("assistant", "Half"), ("user", "three")]


def test_the_key_is_asked_for_and_stays_in_the_tab(opens, api):
    opens.expected.append("401")
    page = opens()
    api.says(Refusal(401, "an API key is needed"))
    ask(page, "hello")
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    assert key.get_attribute("type") == "password"
    page.keyboard.type("s3cret")
    api.says("Welcome")
    page.keyboard.press("Enter")  # closes the settings and tries again
    expect(said(page)).to_have_text(["hello", "Welcome"])
    assert api.keys == [None, "Bearer s3cret"]
    page.reload()
    ask_and_wait(page, "again")
    assert api.keys[-1] == "Bearer s3cret"
    assert "s3cret" not in page.evaluate("JSON.stringify(localStorage)")
    assert opens(context=page.context).get_by_label("API key").input_value() == ""


def test_keyboard_only(page, api):
    """Everything without a mouse, where the focus can always be seen."""

    def name():
        return page.evaluate(
            """(e => e === document.body ? "page" : e.getAttribute("aria-label") || e.id || e.textContent.trim())(
              document.activeElement)"""
        )

    def tab_to(wanted, back=False):
        for _ in range(40):
            page.keyboard.press("Shift+Tab" if back else "Tab")
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            if name() not in ("Your message", "Edit your message", "page"):  # where the frame around shows it
                assert outline == "solid", name()
            if name() == wanted:
                return
        raise AssertionError(f"{wanted} cannot be reached")

    expect(box(page)).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    whole(page)
    expect(page.locator(".bubble")).to_have_text("first line\nsecond line")
    expect(box(page)).to_be_focused()
    tab_to("Edit message", back=True)
    page.keyboard.press("Enter")
    page.keyboard.press("Control+a")
    page.keyboard.type("better")
    page.keyboard.press("Enter")
    expect(said(page)).to_have_text(["better", "You said: better"])
    whole(page)
    box(page).focus()
    tab_to("Settings", back=True)
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_focused()
    tab_to("temperature")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#sliders output").first).to_have_text("0.65")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    tab_to("Rename “first line second line”", back=True)
    page.keyboard.press("Enter")
    page.keyboard.type("short")
    page.keyboard.press("Enter")
    expect(button(page, "Rename “short”")).to_be_focused()
    tab_to("new", back=True)
    page.keyboard.press("Enter")
    expect(box(page)).to_be_focused()
    expect(said(page)).to_have_count(0)
    tab_to("short", back=True)
    page.keyboard.press("Enter")
    expect(said(page)).to_have_text(["better", "You said: better"])
    page.evaluate("document.activeElement.blur()")
    tab_to("skip")
    page.keyboard.press("Enter")
    expect(box(page)).to_be_focused()
    page.keyboard.press("Enter")  # nothing to send
    expect(said(page)).to_have_count(2)


LONG = "\n\n".join(f"Paragraph {i}" for i in range(60))


def test_scrolling_follows_only_at_the_end(page, api):
    more, end = threading.Event(), threading.Event()
    api.says(LONG, more, "\n\n" + LONG, end, "\n\nThe end")
    ask(page, "Much")
    scroll = page.locator("#scroll")
    away = "e => e.scrollHeight - e.scrollTop - e.clientHeight"
    expect(replies(page)).to_contain_text("Paragraph 59")
    page.wait_for_function(f"({away})(document.getElementById('scroll')) < 2")
    scroll.hover()
    page.mouse.wheel(0, -900)
    expect(button(page, "To the latest message")).to_be_visible()
    before = scroll.evaluate("e => e.scrollTop")
    more.set()
    expect(replies(page).locator("p")).to_have_count(120)
    assert scroll.evaluate("e => e.scrollTop") == before
    button(page, "To the latest message").click()
    end.set()
    expect(replies(page).locator("p")).to_have_count(121)
    page.wait_for_function(f"({away})(document.getElementById('scroll')) < 2")
    expect(button(page, "To the latest message")).to_be_hidden()


WIDE = (
    RICH
    + f"\n{'w' * 300} `{'c' * 200}`\n\n```\n{'x ' * 200}\n```\n\n|{' head |' * 12}\n|{'---|' * 12}\n|{' cell |' * 12}\n"
    rf"\[ {' + '.join('a' * 90)} \] and in a line \({' + '.join('a' * 90)}\)" + "\n"
)


def test_a_narrow_phone(opens, api):
    page = opens(viewport={"width": 320, "height": 600}, is_mobile=True, has_touch=True)

    def fits():
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        for part in page.locator("#page, #scroll, header, footer, #sidebar, #settings").all():
            assert part.evaluate("e => e.scrollWidth <= e.clientWidth"), part

    fits()
    api.says(WIDE, tool(0, input="1+" * 80 + "1"), tool(0, output="81"))
    ask_and_wait(page, "W" * 100)
    fits()
    for wide in ("pre", ".table", ".formula.block", ".formula:not(.block)"):  # scrolls by itself
        assert replies(page).locator(wide).last.evaluate("e => e.scrollWidth > e.clientWidth")
    page.get_by_role("button", name="Conversations").click()
    expect(button(page, "New chat")).to_be_focused()
    assert page.locator("#page").evaluate("e => e.inert")
    fits()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator("#menu")).to_be_focused()
    page.locator("#menu").click()
    button(page, "New chat").click()
    expect(page.locator("#sidebar")).to_be_hidden()
    assert not page.locator("#page").evaluate("e => e.inert") and page.locator("#sidebar").evaluate("e => e.inert")
    page.locator("#menu").click()
    chats(page).click()
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(said(page)).to_have_count(2)
    button(page, "Settings").click()
    fits()
    button(page, "Close settings").click()
    page.set_viewport_size({"width": 1000, "height": 600})
    expect(page.locator("#sidebar")).to_be_visible()
    assert not page.locator("#sidebar").evaluate("e => e.inert")


def ground(page):
    return page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")


def key(page, name, **more):
    """A key as an input method sends it."""
    event = {"key": name, "bubbles": True, "cancelable": True, **more}
    page.evaluate("e => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', e))", event)


@pytest.mark.parametrize("composes", [{"keyCode": 229}, {"isComposing": True}], ids=lambda c: next(iter(c)))
def test_keys_that_an_input_method_composes_with_do_nothing_else(page, api, composes):
    box(page).fill("\u3053\u3093")
    key(page, "Enter", **composes)
    assert box(page).input_value() == "\u3053\u3093" and not api.bodies
    page.keyboard.press("Enter")
    whole(page)
    button(page, "Rename \u201c\u3053\u3093\u201d").click()
    page.get_by_label("Title of the conversation").fill("\u65e5")
    for name in ("Enter", "Escape"):
        key(page, name, **composes)
    page.keyboard.press("Enter")
    expect(chats(page)).to_have_text(["\u65e5"])
    page.locator(".user").hover()
    button(page, "Edit message").click()
    page.get_by_label("Edit your message").fill("\u65e5\u672c")
    key(page, "Escape", **composes)
    assert page.get_by_label("Edit your message").input_value() == "\u65e5\u672c"
    page.keyboard.press("Escape")
    api.says("So far", gate := threading.Event(), "and on")
    ask(page, "Count")
    expect(replies(page).last).to_have_text("So far")
    key(page, "Escape", **composes)  # which else would stop it
    gate.set()
    expect(replies(page).last).to_have_text("So farand on")


def test_text_stands_where_its_script_begins(page, api):
    api.says("\u05e9\u05dc\u05d5\u05dd\n\n- \u0645\u0631\u062d\u0628\u0627\n\nHello")
    ask_and_wait(page, "\u05e9\u05dc\u05d5\u05dd")
    ways = "es => es.map(e => getComputedStyle(e).direction)"
    assert replies(page).locator("> p").evaluate_all(ways) == ["rtl", "ltr"]
    assert replies(page).locator("li").evaluate_all(ways) == ["rtl"]
    assert page.locator(".user .bubble").evaluate_all(ways) == ["rtl"]
    box(page).fill("\u05e9")
    assert box(page).evaluate("e => getComputedStyle(e).direction") == "rtl"


def test_enter_breaks_a_line_on_a_touch_screen(opens, api):
    page = opens(viewport={"width": 360, "height": 700}, is_mobile=True, has_touch=True)
    box(page).fill("one")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    assert box(page).input_value() == "one\ntwo" and not api.bodies
    button(page, "Send").tap()
    whole(page)
    assert api.bodies[-1]["messages"] == [{"role": "user", "content": "one\ntwo"}]


# A node as its name without the m, and what is in it. Letters and numbers alone are their text; ~ stands at what is
# upright, / at a sign, ! at a delimiter that grows.
SERIALISED = """async formulas => {
  const { formula } = await import("/static/formula.js");
  const told = node => {
    const name = node.localName.slice(1), text = node.textContent;
    if (name === "i") return (node.getAttribute("mathvariant") ? "~" : "") + text;
    if (name === "n") return text;
    if (name === "o") {
      const form = node.getAttribute("form") ? "/" : node.getAttribute("stretchy") === "true" ? "!" : "";
      return form + text;
    }
    if (name === "text") return `'${text.replaceAll("\\u00a0", " ")}'`;
    if (name === "space") return "_";
    return `${name}(${[...node.childNodes].map(told).join(" ")})`;
  };
  return formulas.map(tex => {
    const math = formula(tex, true);
    if (!math) return null;
    const [shown, annotation] = math.firstChild.childNodes;
    return [told(shown), annotation.textContent, math.namespaceURI];
  });
}"""

FORMULAS = {
    "x": "x",
    "3.14": "3.14",
    "a + b = 1,000": "row(a + b = 1,000)",
    "-x": "row(/− x)",
    "x = -1": "row(x = /− 1)",
    "f(x), g": "row(f ( x ) , g)",
    "x^2": "sup(x 2)",
    "x^23": "row(sup(x 2) 3)",
    "x_i^2": "subsup(x i 2)",
    "x^2_i": "subsup(x i 2)",
    "x_{i,j}": "sub(x row(i , j))",
    "{}^{14}C": "row(sup(row() 14) C)",
    "f''(x)": "row(row(f ′′) ( x ))",
    "f'^2": "sup(row(f ′) 2)",
    r"\frac{a}{b} + \tfrac12": "row(frac(a b) + frac(1 2))",
    r"\binom{n}{k}": "row(!( frac(n k) !))",
    r"\sqrt{x} + \sqrt[3]{x}": "row(sqrt(x) + root(x 3))",
    r"\alpha \Gamma \partial": "row(α ~Γ ∂)",
    r"\sum_{i=1}^{n} i": "row(underover(∑ row(i = 1) n) i)",
    r"\int_0^1 x\,dx": "row(subsup(∫ 0 1) x _ d x)",
    r"\int\limits_0^1": "underover(∫ 0 1)",
    r"\lim_{x \to \infty} f": "row(under(lim row(x → ∞)) f)",
    r"\sin^2 x \log(x)": "row(sup(sin 2) x log ( x ))",
    r"\operatorname*{argmax}_x f": "row(under(argmax x) f)",
    r"\left( \frac{a}{b} \right]": "row(!( frac(a b) !])",
    r"\left. x \middle| y \right\}": "row(x !| y !})",
    r"\bigl\langle x \Big| y": "row(!⟨ x !| y)",
    r"\lfloor x \rfloor \{a\} |b| \|c\|": "row(⌊ x ⌋ { a } | b | ‖ c ‖)",
    r"\hat{x} \bar y \vec{v} \dot{q}": "row(over(x ^) over(y ¯) over(v →) over(q ˙))",
    r"\overline{AB} \underline{x}": "row(row(row(A B)) row(x))",
    r"\underbrace{a+b}_{n} \overbrace{c}^2": "row(under(under(row(a + b) !⏟) n) over(over(c !⏞) 2))",
    r"\text{if } x \textbf{ is}": "row('if ' x ' 𝐢𝐬')",
    r"\mathrm{Var}(X) \mathrm{d}x": "row(Var ( X ) ~d x)",
    r"\mathbb{R}^n \mathbf{A1} \mathcal L": "row(sup(ℝ n) row(𝐀 𝟏) ℒ)",
    r"\boldsymbol{\theta} \mathfrak{g} \mathbb{1}": "row(𝜽 𝔤 𝟙)",
    r"a \le b \ne c \approx d \in \emptyset": "row(a ≤ b ≠ c ≈ d ∈ ∅)",
    r"\forall x \; \exists y \quad p \implies q": "row(∀ x _ ∃ y _ p ⟹ q)",
    r"A \not\subset B \not= C \mid D": "row(A ⊄ B ≠ C ∣ D)",
    r"1, \ldots, n \cdots \pm 50\% \$": "row(1 , … , n ⋯ ± 50 % $)",
    r"7 \equiv 1 \pmod{3} \bmod 2": "row(7 ≡ 1 row(_ ( mod _ 3 )) mod 2)",
    r"\boxed{x = 1}": "row(row(x = 1))",
    r"\overset{!}{=} \xrightarrow{f}": "row(over(= !) over(!→ row(_ f _)))",
    r"1{,}000": "row(1 , 000)",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}": "row(!( table(tr(td(1) td(2)) tr(td(3) td(4))) !))",
    r"\begin{vmatrix} a \end{vmatrix}": "row(!| table(tr(td(a))) !|)",
    r"\begin{cases} 1 & x > 0 \\[2pt] 0 \end{cases}": "row(!{ table(tr(td(1) td(x > 0)) tr(td(0))))",
    r"\begin{aligned} a &= b \\ &= c \\ \end{aligned}": "table(tr(td(a) td(= b)) tr(td() td(= c)))",
    r"\begin{array}{l|c} \hline a & b \end{array}": "table(tr(td(a) td(b)))",
    r"\begin{equation} a = b \tag{1} \end{equation}": "row(a = b row(_ '(1)'))",
    r"a \\ b": "table(tr(td(a)) tr(td(b)))",
    r"\sum_{\substack{i < n \\ j}} x": "row(under(∑ table(tr(td(i < n)) tr(td(j)))) x)",
    r"{\displaystyle \sum x} \textstyle y": "row(style(∑ x) style(y))",
    "π ≤ ½ × ∞": "row(π ≤ ½ × ∞)",
}


def test_formulas_are_mathml(page):
    """Of the common TeX, what each becomes; the TeX is kept in it."""
    got = page.evaluate(SERIALISED, list(FORMULAS))
    shown = dict(zip(FORMULAS, (one and one[0] for one in got), strict=True))
    assert shown == FORMULAS
    assert all(one[1:] == [tex, "http://www.w3.org/1998/Math/MathML"] for tex, one in zip(FORMULAS, got, strict=True))


UNKNOWN = [
    r"\unknown{x}",
    r"\ce{H2O}",
    r"\frac{1}",
    r"x^1^2",
    r"\left( x",
    r"x \right)",
    "{x",
    "x}",
    "a & b",
    "#",
    r"\\",
    "",
    " ",
]
UNKNOWN += [
    r"\begin{pmatrix} 1 \end{matrix}",
    r"\begin{constructor} x \end{constructor}",
    r"\constructor",
    r"\__proto__",
]
UNKNOWN += [
    r"\text{$x$}",
    r"\text{a\b}",
    r"\sqrt[3",
    "^",
    "x_",
    "see below",
    "x\uffff",
    r"\href{javascript:alert(1)}{x}",
]
UNKNOWN += [
    "x" * 2001,
    "{" * 900 + "}" * 900,
    r"\sqrt" * 300 + "x",
    r"\left(" * 150 + r"\right)" * 150,
    r"\displaystyle" * 150,
]
UNKNOWN += [r"\begin{matrix}" * 62 + r"\end{matrix}" * 62, r"\hline", r"\limits", "\\", "x_\\"]


def test_formulas_that_are_not_known_stay_as_they_were_written(page):
    assert page.evaluate(SERIALISED, UNKNOWN) == [None] * len(UNKNOWN)
    texts = [rf"so \({tex}\) it is" for tex in UNKNOWN if tex[-1:] != "\\"]
    texts += [
        r"\[ *a* \foo_b_ `c` <img src=x> \]",
        "$$ and *$$*",
        "$$$ to $$, $5 to $6",
        r"\(a \text{<b>} \foo \)",
        "($$) **($$)**",
    ]
    got = page.evaluate(
        """async texts => {
          const { Markdown } = await import("/static/markdown.js");
          return texts.map(text => {
            const root = document.createElement("div");
            new Markdown(root, () => "").update(text);
            return [root.textContent, root.querySelectorAll("math, img, b").length];
          });
        }""",
        texts,
    )
    assert got[:-4] == [[text, 0] for text in texts[:-4]]
    assert got[-4:] == [["$$ and $$", 0], [texts[-3], 0], [texts[-2], 0], ["($$) ($$)", 0]]


def test_formulas_in_a_reply(page, api):
    """In display over lines that look like Markdown, in the text, in lists and tables; not in code."""
    text = r"""It is **\(a_b * c\)** and \[
- x_1
+ y_1
\ne 0
1. = z
\] and so `\(x\)` on:
$$
= 2
- 3
$$

1. Step \(a*b*c\): \[
- 0
\] and
\[
- 1
\]
2. Last:

   \[
   - 2
   \]

| a | b |
|---|---|
| \(x\) | $$y$$ |

\begin{align*}
- a &= 1 \\
> b &= 2
\end{align*}
```
\[ code \]
```
"""
    api.says(*(text[i : i + 7] for i in range(0, len(text), 7)))
    ask_and_wait(page, "Formulas")
    reply = replies(page)
    got = reply.locator("math").evaluate_all(
        "all => all.map(e => [e.getAttribute('display'), e.querySelector('annotation').textContent])"
    )
    block = "block"
    align = "\\begin{align*}\n- a &= 1 \\\\\n> b &= 2\n\\end{align*}"
    want = [
        [None, "a_b * c"],
        [block, "- x_1\n+ y_1\n\\ne 0\n1. = z"],
        [block, "= 2\n- 3"],
        [None, "a*b*c"],
        [block, "- 0"],
        [block, "- 1"],
    ]
    assert got == [*want, [block, "- 2"], [None, "x"], [block, "y"], [block, align]]
    expect(reply.locator(":scope > ol > li")).to_have_count(2)
    expect(reply.locator("ul, h3, blockquote, em")).to_have_count(0)
    expect(reply.locator("strong > .formula > math")).to_have_count(1)
    expect(reply.locator("code")).to_have_text([r"\(x\)", r"\[ code \]"])
    assert reply.locator("annotation").first.is_hidden()


def test_an_unfinished_formula_is_text_until_its_end(page, api):
    more, end = threading.Event(), threading.Event()
    api.says("So\n\\[\n- x_1\n", more, "- y_1 ", end, "\\]\n- item")
    ask(page, "A formula")
    expect(replies(page)).to_have_text(re.compile(r"So\s*\[\s*- x_1"))
    more.set()
    expect(replies(page)).to_contain_text("- y_1")
    expect(replies(page).locator("math, ul")).to_have_count(0)
    end.set()
    expect(replies(page).locator("math")).to_have_count(1)
    expect(replies(page).locator("li")).to_have_text("item")
    api.says(r"but \*not\* *this*; \( open")
    ask_and_wait(page, "Never ended")
    expect(replies(page).last).to_have_text("but *not* this; ( open")


def test_calls_of_functions(opens, api):
    page = opens(permissions=["clipboard-read", "clipboard-write"])
    more, end = threading.Event(), threading.Event()
    weather = [call(0, "", "c1", "get_weather"), call(0, '{"city": "Pa'), more]
    weather += [call(0, 'ris", "days": [1.0, 12345678901234567890]}'), end]
    api.says("I look.", *weather, call(1, "{}", "c2", "now"), call(2, '{"cut', "c3", "f"))
    ask(page, "Weather")
    box = page.locator(".calls pre code")
    expect(box).to_have_text('{"city": "Pa')
    expect(page.locator(".calls .code-bar span")).to_have_text("get_weather()")
    more.set()
    whole_arguments = '{\n  "city": "Paris",\n  "days": [\n    1.0,\n    12345678901234567890\n  ]\n}'
    expect(box).to_have_text(whole_arguments)
    assert box.inner_text() == whole_arguments
    end.set()
    whole(page)
    page.reload()
    expect(page.locator(".calls .code-bar span")).to_have_text(["get_weather()", "now()", "f()"])
    expect(box).to_have_text([whole_arguments, "{}", '{"cut'])
    expect(replies(page)).to_have_text("I look.")
    button(page, "Copy reply").click()
    expect(page.locator("#announce")).to_have_text("Copied")
    text, calls = page.evaluate("navigator.clipboard.readText()").split("\n\n", 1)
    calls = json.loads(calls)
    arguments = '{"city": "Paris", "days": [1.0, 12345678901234567890]}'
    assert text == "I look." and [one["id"] for one in calls] == ["c1", "c2", "c3"]
    first = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    assert calls[0] == first
    api.says("Sunny")
    ask_and_wait(page, "And?")
    sent = api.bodies[-1]["messages"][1]
    assert sent == {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": calls[:2],
    }  # what broke off would be refused


def test_a_reply_of_calls_alone_is_sent_back(page, api):
    api.says(call(0, "", "c1", "a b\n# c"))
    ask_and_wait(page, "Call")
    expect(page.locator(".calls .code-bar span")).to_have_text("a_b___c()")
    ask_and_wait(page, "And?")
    sent = api.bodies[-1]["messages"][1]
    assert sent["content"] is None and sent["tool_calls"][0]["function"]["arguments"] == "{}"


def test_a_reply_that_is_json_is_code(page, api):
    more, end = threading.Event(), threading.Event()
    api.says('{"a": [1.0,\n', more, ' {}, "~~~ `x`"], ', end, '"b": 12345678901234567890}\n')
    ask(page, "JSON")
    code = replies(page).locator("pre")
    expect(code).to_have_text('{"a": [1.0,')
    more.set()
    expect(code).to_contain_text('"~~~ `x`"],')
    end.set()
    whole(page)
    want = '{\n  "a": [\n    1.0,\n    {},\n    "~~~ `x`"\n  ],\n  "b": 12345678901234567890\n}'
    assert code.inner_text() == want
    expect(replies(page).locator(".code-bar span")).to_have_text("json")
    page.reload()
    assert code.inner_text() == want
    ask_and_wait(page, "And?")
    assert api.asked[1] == ("assistant", '{"a": [1.0,\n {}, "~~~ `x`"], "b": 12345678901234567890}\n')


def test_what_only_begins_like_json_is_markdown(page, api):
    gate = threading.Event()
    for start, rest, shown in [
        ("[", "1] foo *x*", "[1] foo x"),
        ("[a](https://example.org", ") is *x*", "a is x"),
        ("{name", "} is *x*", "{name} is x"),
        ('{"', 'a"} is *x*\n\n- one\n\n- two\n\nthree', re.compile(r'{"a"} is x\s*one\s*two\s*three')),
    ]:
        gate.clear()
        api.says(start, gate, rest)
        ask(page, "Say")
        if start == '{"':
            expect(replies(page).last.locator("pre")).to_have_text(start)
        else:
            expect(replies(page).last).to_contain_text(start)
            expect(replies(page).last.locator("pre")).to_have_count(0)
        gate.set()
        expect(replies(page).last).to_have_text(shown)
        whole(page)
        expect(replies(page).last.locator("em")).to_have_text("x")
        expect(replies(page).last.locator("pre")).to_have_count(0)
    api.says('[{"a": 1},', ' "', 'b"]')
    ask_and_wait(page, "A list")
    expect(replies(page).last.locator("pre")).to_have_text('[\n  {\n    "a": 1\n  },\n  "b"\n]')


def test_deep_json_is_shown(page, api):
    """With a step to the right for each level it would be gigabytes."""
    api.says("[" * 100_000 + "1" + "]" * 100_000)
    ask_and_wait(page, "Deep")
    assert replies(page).locator("pre code").evaluate("e => e.textContent.length") > 200_000


def test_a_message_beyond_the_servers_limit_is_not_sent(page, api):
    box(page).fill("x" * 200_001)
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("200,001 characters; 200,000 are the limit")
    assert not api.bodies and len(box(page).input_value()) == 200_001


def test_light_and_dark(opens):
    light, dark = "rgb(255, 255, 255)", "rgb(26, 27, 28)"
    page = opens(color_scheme="dark")
    assert ground(page) == dark
    page.emulate_media(color_scheme="light")
    assert ground(page) == light
    button(page, "Dark theme").click()
    assert ground(page) == dark
    page.reload()
    assert ground(page) == dark
    button(page, "Light theme").click()
    assert ground(page) == light
    page.emulate_media(color_scheme="dark")
    page.reload()
    assert ground(page) == light


CONTRASTS = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const linear = c => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const out = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim())) continue;
    if (!e.checkVisibility({ visibilityProperty: true }) || e.closest(".visually-hidden, svg, :disabled")) continue;
    let behind = e;
    while ((channels(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const [a, b] = [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor].map(channels).map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    out.push([ratio, `${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}`]);
  }
  return out;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_all_text(opens, api, scheme):
    page = opens(color_scheme=scheme, reduced_motion="reduce")
    found = page.evaluate(CONTRASTS)
    formula = "\n$$x = \\begin{pmatrix} 1 \\end{pmatrix}$$\n"
    api.says(RICH + formula, tool(0, input="1+1"), tool(0, output="2"), call(0, "{}", "c", "f"), BROKEN_OFF)
    ask_and_wait(page, "Everything")
    ask(page, "/help")
    found += page.evaluate(CONTRASTS)
    ask(page, "/nothing")
    button(page, "Settings").click()
    found += page.evaluate(CONTRASTS)
    assert len(found) > 90 and not [what for ratio, what in found if ratio < 4.5]


def test_names_and_landmarks_for_screen_readers(page, api):
    api.says(RICH, BROKEN_OFF)
    ask_and_wait(page, "Everything")
    ask(page, "/clear")
    button(page, "Undo").click()
    ask(page, "/help")
    button(page, "Edit message").click()
    names = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, a, [tabindex='0']")].map(e => [
          e.outerHTML.slice(0, 100),
          (e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent).trim(),
        ])"""
    )
    assert len(names) > 25 and not [html for html, name in names if not name]
    for role in ("navigation", "main", "banner", "contentinfo", "log"):
        expect(page.get_by_role(role)).to_have_count(1)
    assert page.get_by_role("log").get_attribute("aria-live") == "off"
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    expect(page.get_by_role("heading", level=2)).to_have_text(["You said", "Reply"])
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_attribute("aria-current", "page")


def test_an_example_starts_a_conversation(page, api):
    page.get_by_role("button", name="What is 2 + 3?").click()
    expect(said(page)).to_have_text(["What is 2 + 3?", "You said: What is 2 + 3?"])
    assert api.bodies[-1]["temperature"] == 0  # as it was answered rightly
    expect(page.locator("#model")).to_have_text("demo · sft")


def test_nothing_in_the_page_parses_html():
    for file in STATIC.iterdir():
        text = file.read_text()
        for bad in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser", "srcdoc"):
            assert bad not in text, (file.name, bad)
        assert not re.search(r"https?://(?!www\.w3\.org/)\w", text), file.name
        assert file.suffix != ".html" or not re.search(r" style=| on\w+=|<script>|<style>", text)


def test_the_page_on_the_server_itself(opens):
    """A conversation with a calculator call, over the real API, under its own headers, with a key."""
    script = [*b"It is ", TOK.python_start, *b"1+2", TOK.python_end, TOK.output_start, *b"3", TOK.output_end, *b"**3**"]
    app, engine = scripted_app(script, engine=Scripted(script, max_len=1200), api_key="s3cret")
    opens.expected.append("401")
    with serving(app) as url:
        page = opens(url=f"{url}/")
        ask(page, "What is 1+2?")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("s3cret")
        page.keyboard.press("Enter")
        expect(replies(page)).to_have_text("It is calculator: 1+2 = 33")
        expect(replies(page).locator("strong").last).to_have_text("3")
        expect(page.locator(".speed")).to_have_text(re.compile(rf"^{len(script)} tokens · [\d.]+ tokens/s$"))
        ask(page, "Again")
        expect(replies(page)).to_have_count(2)
        whole(page)
        turn = [TOK.user_end, TOK.assistant_start, *script, TOK.assistant_end]
        assert engine.seen[-1].ids == [
            *[TOK.bos, TOK.user_start, *b"What is 1+2?"],
            *[*turn, TOK.user_start, *b"Again", TOK.user_end, TOK.assistant_start],
        ]
        expect(page.locator("#model")).to_have_text("demo · sft")

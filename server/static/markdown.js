// Markdown as DOM nodes, built with createElement and text nodes only: whatever a model says cannot become HTML.
// Known: paragraphs, headings, bold, italic, struck, code, fenced code, lists, quotes, tables, rules, links, formulas.

import { copyButton, el } from "./dom.js";
import { formula, isProse, LONGEST } from "./formula.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const INTERRUPTING_ITEM = /^ {0,3}(?:[-*+]|1[.)])[ \t]+\S/;
const DEPTH = 12;  // of quotes, lists and emphasis in each other; what is deeper is shown as it was written
const SAFE = new Set(["http:", "https:", "mailto:"]);

/** Stands for chip `index` in the source of update(). */
export const chipMark = index => `\uFFFC${index}\uFFFC`;

/** Text of a model that goes into a source: without characters that could be taken for a chip. */
export const plainSource = text => text.replaceAll("\uFFFC", "\uFFFD").replaceAll("\r\n", "\n");

/** A growing text as nodes in `root`. makeChip(index) builds the node for a chipMark. */
export class Markdown {
  constructor(root, makeChip) {
    this.root = root;
    this.makeChip = makeChip;
    this.blocks = [];
  }

  /** The source, which is the last one and more. All but the last two blocks stay as they are, so that the work for
   * one more token does not grow with the reply; two, as a line that is not whole yet may still join the one before. */
  update(source) {
    const kept = Math.max(0, this.blocks.length - 2);
    const from = this.blocks[kept]?.start ?? 0;
    const lines = source.slice(from).split("\n");
    const starts = [from];
    for (const line of lines) starts.push(starts.at(-1) + line.length + 1);
    const old = this.blocks.splice(kept);
    for (const block of parseBlocks(lines)) {
      block.start = starts[block.first];
      block.source = lines.slice(block.first, block.last).join("\n");
      if (block.last >= lines.length - 1) block.source += "\n";  // a formula in it may not have ended yet
      this.blocks.push(block);
      const before = old.shift();
      if (before?.source === block.source && !block.source.includes("\uFFFC")) block.node = before.node;
      else if (before && extendCode(before, block)) block.node = before.node;
      else {
        block.node = render(block, this.makeChip, 0);
        if (before) before.node.replaceWith(block.node);
        else this.root.append(block.node);
      }
    }
    for (const block of old) block.node.remove();
  }
}

/** Appends to a code block that grew, which keeps its scroll position and its button's focus. */
function extendCode(before, block) {
  if (before.type !== "code" || block.type !== "code" || before.language !== block.language) return false;
  if (!block.text.startsWith(before.text) || block.text.includes("\uFFFC")) return false;
  before.node.querySelector("code").append(block.text.slice(before.text.length));
  before.node.codeText = block.text;
  return true;
}

/** [{type, first, last, ...}] of lines; `last` is the line after the block. */
function parseBlocks(lines) {
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const block = fence(lines, i) || heading(lines, i) || rule(lines, i) || quote(lines, i) || list(lines, i) ||
      table(lines, i) || paragraph(lines, i);
    block.first = i;
    i = block.last;
    blocks.push(block);
  }
  return blocks;
}

function fence(lines, i) {
  const open = FENCE.exec(lines[i]);
  if (!open) return null;
  const close = new RegExp(`^ {0,3}${open[1][0]}{${open[1].length},}[ \\t]*$`);
  let last = i + 1;
  while (last < lines.length && !close.test(lines[last])) last++;
  const text = lines.slice(i + 1, last).join("\n");
  return { type: "code", language: open[2].trim().split(/\s/)[0], text, last: Math.min(last + 1, lines.length) };
}

function heading(lines, i) {
  const open = HEADING.exec(lines[i]);
  if (!open) return null;
  const text = lines[i].slice(open[0].length).trim();
  const bare = text.replace(/#+$/, "");
  return { type: "heading", level: open[1].length, text: /(^|\s)$/.test(bare) ? bare.trim() : text, last: i + 1 };
}

function rule(lines, i) {
  return RULE.test(lines[i]) ? { type: "rule", last: i + 1 } : null;
}

function quote(lines, i) {
  if (!QUOTE.test(lines[i])) return null;
  const inner = [];
  let last = i;
  while (last < lines.length && (QUOTE.test(lines[last]) || (lines[last].trim() && !interrupts(lines, last)))) {
    for (const past = pastFormula(lines, last); last < past; last++) inner.push(lines[last].replace(QUOTE, ""));
  }
  return { type: "quote", inner, last };
}

const indent = line => line.length - line.trimStart().length;
const isNumber = marker => /\d/.test(marker);

function list(lines, i) {
  const first = ITEM.exec(lines[i]);
  if (!first) return null;
  const ordered = isNumber(first[2]);
  const items = [];
  let last = i;
  for (let at = i; at < lines.length; ) {
    const open = ITEM.exec(lines[at]);
    if (!open || isNumber(open[2]) !== ordered || RULE.test(lines[at])) break;
    const inner = [lines[at].slice(open[0].length)];
    const past = pastFormula(lines, at);
    while (++at < past) inner.push(lines[at].trimStart());
    last = at;
    while (at < lines.length) {
      if (!lines[at].trim()) {
        at++;
      } else if (indent(lines[at]) >= open[1].length + 2) {  // more of this item, blank lines before it too
        for (; last < at; last++) inner.push("");
        for (const past = pastFormula(lines, at); at < past; last = ++at) {
          inner.push(lines[at].slice(Math.min(indent(lines[at]), open[0].length)));
        }
      } else if (last === at && !ITEM.test(lines[at]) && !interrupts(lines, at)) {
        for (const past = pastFormula(lines, at); at < past; last = ++at) inner.push(lines[at].trimStart());
      } else break;
    }
    items.push(inner);
  }
  return { type: "list", ordered, number: ordered ? parseInt(first[2], 10) : 1, items, last };
}

function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return row.split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));
}

function isTable(lines, i) {
  if (!lines[i].includes("|") || !lines[i + 1]?.includes("-")) return false;
  const marks = cells(lines[i + 1]);
  return marks.every(mark => /^:?-+:?$/.test(mark)) && marks.length === cells(lines[i]).length;
}

function table(lines, i) {
  if (!isTable(lines, i)) return null;
  const align = cells(lines[i + 1]).map(m => (m.endsWith(":") ? (m.startsWith(":") ? "center" : "right") : "left"));
  const rows = [];
  let last = i + 2;
  while (last < lines.length && lines[last].includes("|")) rows.push(cells(lines[last++]));
  return { type: "table", head: cells(lines[i]), align, rows, last };
}

function interrupts(lines, i) {
  const line = lines[i];
  return [FENCE, HEADING, RULE, QUOTE, INTERRUPTING_ITEM].some(start => start.test(line)) || isTable(lines, i);
}

/** Past the lines of a display formula that begins line i, or that its last mark opens: whatever they look like, they
 * are one. While its end has not come, all lines are its own. i + 1 where there is none. */
function pastFormula(lines, i) {
  const found = OPENING.exec(lines[i]);
  if (!found) return i + 1;
  const close = closerOf(found[1] ?? "\\[", found[2]);
  let from = found.index + found[0].length;
  if (isProse(lines[i].slice(from))) return i + 1;
  let at = i;
  for (let length = 0; at < lines.length && length < LONGEST; from = 0) {
    if (lines[at].includes(close, from)) return at + 1;
    if (!lines[at].trim()) return at === lines.length - 1 ? at : i + 1;
    length += lines[at++].length + 1;
  }
  return at === lines.length ? at : i + 1;
}

function paragraph(lines, i) {
  let last = pastFormula(lines, i);
  while (last < lines.length && lines[last].trim() && !interrupts(lines, last)) last = pastFormula(lines, last);
  return { type: "paragraph", text: lines.slice(i, last).map(line => line.trim()).join("\n"), last };
}

function render(block, makeChip, depth) {
  const text = source => inline(source, makeChip);
  const nested = inner =>
    depth < DEPTH ? parseBlocks(inner).map(b => render(b, makeChip, depth + 1)) : [text(inner.join("\n"))];
  switch (block.type) {
    case "code":
      return codeBlock(block, makeChip);
    case "heading":
      return el("h" + Math.min(6, block.level + 2), { dir: sideOf(block.text) }, text(block.text));  // h1 and h2 are the page's
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", { dir: sideOf(block.inner.join("\n")) }, ...nested(block.inner));
    case "list": {
      const items = block.items.map(inner => el("li", {}, ...nested(inner)));
      const dir = sideOf(block.items[0].join("\n"));
      return block.ordered ? el("ol", { start: block.number, dir }, ...items) : el("ul", { dir }, ...items);
    }
    case "table": {
      const row = (tag, values) =>
        el("tr", {}, ...block.align.map((side, c) => el(tag, { className: side, dir: sideOf(values[c] ?? "") }, text(values[c] ?? ""))));
      const body = el("tbody", {}, ...block.rows.map(values => row("td", values)));
      const whole = el("table", {}, el("thead", {}, row("th", block.head)), body);
      return el("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" }, whole);
    }
    default:
      return el("p", { dir: sideOf(block.text) }, text(block.text));
  }
}

function codeBlock(block, makeChip) {
  const code = el("code", {}, withChips(block.text, makeChip));
  const node = el("div", { className: "code" });
  node.codeText = block.text.replace(/\uFFFC\d+\uFFFC/g, "");
  const bar = el("div", { className: "code-bar" }, el("span", {}, block.language || "text"));
  bar.append(copyButton("Copy code", () => node.codeText));
  node.append(bar, el("pre", { tabIndex: 0, role: "region", "aria-label": "Code" }, code));
  return node;
}

function withChips(text, makeChip) {
  const out = document.createDocumentFragment();
  text.split(/\uFFFC(\d+)\uFFFC/).forEach((part, i) => out.append(i % 2 ? makeChip(Number(part)) : part));
  return out;
}

/** The address where it is one that may be followed, or null. */
export function safeAddress(address) {
  try {
    const url = new URL(address);
    return SAFE.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function link(href, ...children) {
  return el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>\uFFFC]+)>/y;
const BARE = /https?:\/\/[^\s<>"'`|*\uFFFC]+/y;
const TARGET = /\(\s*(?:<([^<>\n]*)>|([^\s()]*(?:\([^\s()]*\)[^\s()]*)*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const OPENING = /^\s*(\\\[|\$\$|\\begin\{((?:equation|align|gather|multline)\*?)\})|\\\[\s*$/;
const FORMULA = /\\[([]|\$\$|\\begin\{((?:equation|align|gather|multline)\*?)\}/y;
const closerOf = (open, name) => (name ? `\\end{${name}}` : { "\\(": "\\)", "\\[": "\\]", "$$": "$$" }[open]);
const RIGHT_TO_LEFT = /^[^\p{L}]*[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;
const wordAt = (text, i) => i >= 0 && i < text.length && /[\p{L}\p{N}]/u.test(text[i]);
const spaceAt = (text, i) => i < 0 || i >= text.length || /\s/.test(text[i]);

function matchAt(pattern, text, i) {
  pattern.lastIndex = i;
  return pattern.exec(text);
}

function inline(text, makeChip, depth = 0) {
  const out = document.createDocumentFragment();
  const hopeless = new Set();  // openers without a closer further on: looked for once only
  let plain = "";
  const add = node => {
    out.append(withChips(plain, makeChip), node);
    plain = "";
  };
  let i = 0;
  while (i < text.length) {
    const span = depth < DEPTH && special(text, i, hopeless);
    if (!span) {
      plain += text[i++];
      continue;
    }
    if (span.plain !== undefined) plain += span.plain;
    else if (span.code !== undefined) add(el("code", {}, withChips(span.code, makeChip)));
    else add(span.node ?? span.wrap(inline(span.inner, makeChip, depth + 1)));
    i = span.end;
  }
  out.append(withChips(plain, makeChip));
  return out;
}

/** What begins at i, as {end} and plain (text), code, node, or wrap and inner; null: a character as any other. */
function special(text, i, hopeless) {
  switch (text[i]) {
    case "\n":
      return { node: el("br"), end: i + 1 };
    case "$":
    case "\\": {
      const found = formulaAt(text, i, hopeless);
      if (found) return shownFormula(text, i, found);
      if (text[i] === "$") return null;
      return /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "") ? { plain: text[i + 1], end: i + 2 } : null;
    }
    case "`":
      return codeSpan(text, i);
    case "*":
    case "_":
    case "~":
      return emphasis(text, i, hopeless);
    case "!":  // an image is a link to it: nothing is loaded from elsewhere
      return text[i + 1] === "[" ? namedLink(text, i + 1) : null;
    case "[":
      return namedLink(text, i);
    case "<": {
      const found = matchAt(AUTOLINK, text, i);
      const href = found && safeAddress(found[1]);
      return href ? { node: link(href, found[1]), end: i + found[0].length } : null;
    }
    case "h":
      return wordAt(text, i - 1) ? null : bareLink(text, i);
    default:
      return null;
  }
}

/** The formula that begins at i, as {tex, display, end}; null where none does. $$ and $$$ may be prices as well. */
function formulaAt(text, i, hopeless) {
  const [open, name] = matchAt(FORMULA, text, i) ?? [];
  if (!open || hopeless.has(open)) return null;
  const close = closerOf(open, name);
  const at = text.indexOf(close, i + open.length);
  if (at < 0) hopeless.add(open);
  if (at < 0) return null;
  const end = at + close.length;
  const tex = name ? text.slice(i, end) : text.slice(i + open.length, at);
  const prices = [text[i - 1], text[i + 2], text[end]].includes("$") || tex.includes("**") || isProse(tex);
  if (open === "$$" && prices) return null;
  return { tex, display: open !== "\\(", end };
}

/** A formula as a node; as text where it cannot be set: just as it was written, for its marks are no emphasis. */
function shownFormula(text, i, { tex, display, end }) {
  const math = formula(tex, display);
  if (!math) return { plain: text.slice(i, end), end };
  const node = el("span", { className: display ? "formula block" : "formula" }, math);
  return { node, end: display && text[end] === "\n" ? end + 1 : end };
}

/** On which side a text begins. (With dir="auto" the browser would look again for each node that is put in.) */
function sideOf(text) {
  return RIGHT_TO_LEFT.test(text) ? "rtl" : "ltr";
}

function runLength(text, i) {
  let end = i + 1;
  while (text[end] === text[i]) end++;
  return end - i;
}

/** Where the code span that begins at i ends, as [start of the closing run, end]; null where it does not. */
function codeEnd(text, i) {
  const ticks = runLength(text, i);
  for (let at = text.indexOf("`", i + ticks); at >= 0; ) {
    const run = runLength(text, at);
    if (run === ticks) return [at, at + run];
    at = text.indexOf("`", at + run);
  }
  return null;
}

function codeSpan(text, i) {
  const ticks = runLength(text, i);
  const end = codeEnd(text, i);
  if (!end) return { plain: "`".repeat(ticks), end: i + ticks };
  const said = text.slice(i + ticks, end[0]).replaceAll("\n", " ");
  const padded = said.startsWith(" ") && said.endsWith(" ") && said.trim();
  return { code: padded ? said.slice(1, -1) : said, end: end[1] };
}

function emphasis(text, i, hopeless) {
  const mark = text[i];
  const size = runLength(text, i);
  const literal = { plain: mark.repeat(size), end: i + size };
  if (size > 3 || (mark === "~" && size !== 2) || spaceAt(text, i + size) || hopeless.has(mark + size)) return literal;
  // inside a word these are something else: snake_case, and 2*3*4
  if ((mark === "_" || size === 1) && wordAt(text, i - 1)) return literal;
  for (let at = i + size; at < text.length; ) {
    if (text[at] === "\\" || text[at] === "$") {
      at = formulaAt(text, at, hopeless)?.end ?? at + (text[at] === "$" ? 1 : 2);
    } else if (text[at] === "`") at = codeEnd(text, at)?.[1] ?? at + runLength(text, at);
    else if (text[at] !== mark) at++;
    else {
      const run = runLength(text, at);
      const fits = run === size || run > Math.max(2, size);
      if (fits && !spaceAt(text, at - 1) && !(mark === "_" && wordAt(text, at + run))) {
        const end = at + run;
        return { wrap: inner => emphasized(mark, size, inner), inner: text.slice(i + size, end - size), end };
      }
      at += run;
    }
  }
  hopeless.add(mark + size);
  return literal;
}

function emphasized(mark, size, inner) {
  if (mark === "~") return el("del", {}, inner);
  if (size === 1) return el("em", {}, inner);
  return el("strong", {}, size === 3 ? el("em", {}, inner) : inner);
}

function namedLink(text, i) {
  let open = 0;
  for (let at = i; at < Math.min(text.length, i + 1000); at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "[") open++;
    else if (text[at] === "]" && --open === 0) {
      const target = matchAt(TARGET, text, at + 1);
      const href = target && safeAddress(target[1] ?? target[2]);
      const name = text.slice(i + 1, at);
      return href ? { wrap: inner => link(href, inner), inner: name || href, end: at + 1 + target[0].length } : null;
    }
  }
  return null;
}

function bareLink(text, i) {
  const found = matchAt(BARE, text, i);
  if (!found) return null;
  let address = found[0].replace(/[.,;:!?\]}]+$/, "");
  if (address.endsWith(")") && !address.includes("(")) address = address.replace(/\)+[.,;:!?]*$/, "");
  const href = safeAddress(address);
  return href ? { node: link(href, address), end: i + address.length } : null;
}

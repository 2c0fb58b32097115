// TeX formulas as MathML, built with createElementNS and text nodes only. A formula with something that is not known
// here is left to the caller, who shows it as it was written. Most spaces between operators are the browser's own.

export const LONGEST = 2000;  // characters of a formula
const DEEPEST = 60;  // groups and arguments in each other
const THIN = ".1667em";
const TIGHT = { lspace: "0", rspace: "0" };
const TALL = { stretchy: "true", symmetric: "true", ...TIGHT };
const UNKNOWN = new Error("not known");

/** Words, and nothing that belongs to TeX: \[see below\]. */
export const isProse = tex => /[a-z]{4}|[a-z]{3}\s+\S|[a-z]{2}\s+[a-z]{2}/.test(tex) && !/[\\^_=+]/.test(tex);

/** A formula as a <math> node; null where it has something that is not known here. */
export function formula(tex, display) {
  if (tex.length > LONGEST || !tex.trim() || isProse(tex)) return null;
  try {
    const shown = new Parser(tex).table("", "display");
    need(shown.textContent);
    const annotation = m("annotation", { encoding: "application/x-tex" }, tex.trim());
    return m("math", display ? { display: "block" } : {}, m("semantics", {}, shown, annotation));
  } catch (error) {
    if (error !== UNKNOWN) throw error;
    return null;
  }
}

function m(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/1998/Math/MathML", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** What must be there, or else the formula is not known. */
function need(value) {
  if (!value) throw UNKNOWN;
  return value;
}

const operator = (symbol, how = {}) => m("mo", how, symbol);
const space = width => m("mspace", { width });
const group = nodes => (nodes.length === 1 ? nodes[0] : m("mrow", {}, ...nodes));
const fixed = symbol => operator(symbol, { stretchy: "false", ...("|‖/".includes(symbol) && TIGHT) });
const fences = (...nodes) =>  // texts are delimiters
  m("mrow", {}, ...nodes.filter(Boolean).map(node => (typeof node === "string" ? operator(node, TALL) : node)));
// `isName` and `limits` are for the parser: spaces around a name, and scripts above and below in place of beside
const named = (name, limits) =>
  Object.assign(operator(name, limits ? { movablelimits: "true" } : {}), { isName: true, limits });
const marked = (tag, accent, base, mark, stretchy) => {
  const how = { stretchy, ...(mark === "→" && { mathsize: "80%" }) };
  return Object.assign(m(tag, { [accent]: "true" }, base, operator(mark, how)), { limits: "⏞⏟".includes(mark) });
};

// ---- What is known

const COMMANDS = new Map(Object.entries({  // what makes the node, from the parser `p` that stands behind the name
  ",": () => space(THIN),
  " ": () => space(".25em"),
  begin: p => p.environment(),
  label: p => space(p.raw() && "0"),
  left: p => p.left(),
  operatorname: p => (p.token === "*" ? p.advance() && named(p.words(), true) : named(p.words(), false)),
  pmod: p => m("mrow", {}, space(".5em"), fixed("("), m("mi", {}, "mod"), space(".3em"), p.argument(), fixed(")")),
  substack: p => need(p.advance() === "{") && [p.table("}", "matrix"), p.advance()][0],
  tag: p => m("mrow", {}, space("2em"), m("mtext", {}, `(${p.words()})`)),
  not(p) {
    const node = p.atom();
    need(node.localName === "mo");
    node.textContent = (node.textContent + "\u0338").normalize();
    return node;
  },
  sqrt(p) {
    const index = p.token === "[" && p.advance() && group(p.row("]"));
    return index && p.advance() ? m("mroot", {}, p.argument(), index) : m("msqrt", {}, p.argument());
  },
}));
const pairs = text =>  // "name,name symbol name symbol"
  [...text.matchAll(/(\S+)\s+(\S+)/g)].flatMap(([, names, symbol]) => names.split(",").map(name => [name, symbol]));
const define = (text, make) => pairs(text).forEach(([name, symbol]) => COMMANDS.set(name, p => make(symbol, p, name)));

define(`alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ
  mu μ nu ν xi ξ omicron ο pi π varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ
  omega ω partial ∂ ell ℓ imath ı jmath ȷ`, (symbol, p) => p.letters(symbol));
define(`Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω nabla ∇ infty ∞ hbar ℏ Re ℜ
  Im ℑ emptyset,varnothing ∅ aleph ℵ wp ℘ forall ∀ exists ∃ nexists ∄ neg,lnot ¬ top ⊤ bot ⊥ angle ∠ triangle △
  degree ° prime ′ checkmark ✓ square,Box □ blacksquare ■ dagger † dots,ldots,dotsc … cdots,dotsb ⋯ vdots ⋮ ddots ⋱
  clubsuit ♣ diamondsuit ♢ heartsuit ♡ spadesuit ♠ % % $ $ # # & & _ _`,
  symbol => m("mi", /[Γ-Ω∇]/.test(symbol) ? { mathvariant: "normal" } : {}, symbol));
define(`pm ± mp ∓ times × div ÷ cdot ⋅ ast ∗ star ⋆ circ ∘ bullet ∙ oplus ⊕ ominus ⊖ otimes ⊗ odot ⊙ cup ∪ cap ∩
  sqcup ⊔ sqcap ⊓ setminus ∖ wedge,land ∧ vee,lor ∨ ltimes ⋉ rtimes ⋊ le,leq ≤ ge,geq ≥ leqslant ⩽ geqslant ⩾ lt <
  gt > ne,neq ≠ ll ≪ gg ≫ approx ≈ equiv ≡ sim ∼ simeq ≃ cong ≅ asymp ≍ propto ∝ doteq ≐ triangleq ≜ coloneqq ≔
  lesssim ≲ gtrsim ≳ prec ≺ succ ≻ preceq ⪯ succeq ⪰ in ∈ notin ∉ ni ∋ subset ⊂ supset ⊃ subseteq ⊆ supseteq ⊇
  subsetneq ⊊ supsetneq ⊋ nsubseteq ⊈ mid ∣ nmid ∤ parallel ∥ perp ⟂ models,vDash ⊨ vdash ⊢ therefore ∴ because ∵
  colon : to,rightarrow → gets,leftarrow ← leftrightarrow ↔ Rightarrow ⇒ Leftarrow ⇐ Leftrightarrow ⇔
  implies,Longrightarrow ⟹ impliedby ⟸ iff,Longleftrightarrow ⟺ mapsto ↦ longmapsto ⟼ longrightarrow ⟶
  longleftarrow ⟵ hookrightarrow ↪ rightharpoonup ⇀ rightleftharpoons ⇌ leadsto ⇝ nearrow ↗ searrow ↘ int ∫ iint ∬
  iiint ∭ oint ∮`, symbol => operator(symbol));
define(`sum ∑ prod ∏ coprod ∐ bigcup ⋃ bigcap ⋂ bigsqcup ⨆ bigvee ⋁ bigwedge ⋀ bigoplus ⨁ bigotimes ⨂`,
  symbol => Object.assign(operator(symbol), { limits: true }));
define(`sin,cos,tan,cot,sec,csc,sinh,cosh,tanh,coth,arcsin,arccos,arctan,exp,log,ln,lg,arg,deg,dim,ker,hom,sgn 0`,
  (_, p, name) => named(name, false));
define("lim,max,min,sup,inf,argmax,argmin,det,gcd,lcm,Pr 0", (_, p, name) => named(name, true));
define("limsup sup liminf inf", name => named(`lim\u2009${name}`, true));
define("hat ^ check ˇ tilde ~ acute ´ grave ` dot ˙ ddot ¨ breve ˘ bar ¯ vec → mathring ˚",
  (mark, p) => marked("mover", "accent", p.argument(), mark, "false"));
define("widehat ^ widetilde ~ overrightarrow → overleftarrow ← overbrace ⏞",
  (mark, p) => marked("mover", "accent", p.argument(), mark, "true"));
define("underbrace ⏟", (mark, p) => marked("munder", "accentunder", p.argument(), mark, "true"));
define("boxed boxed overline overline underline underline", (name, p) => m("mrow", { class: name }, p.argument()));
define("big 1.2em Big 1.8em bigg 2.4em Bigg 3em".replace(/(\w*g) /g, "$1,$1l,$1r,$1m "),
  (size, p) => operator(p.delimiter(), { ...TALL, minsize: size, maxsize: size }));
define(`thinspace ${THIN} : .2222em > .2222em ; .2778em enspace .5em quad 1em qquad 2em ! 0 nonumber,notag 0`, space);
define("displaystyle true textstyle false", (displaystyle, p) => m("mstyle", { displaystyle }, ...p.row(...p.stops)));
define("text,textrm,textnormal,mbox mathrm textbf mathbf textit,emph mathit texttt mathtt textsf mathsf",
  (font, p) => m("mtext", {}, styled(p.words(), font)));
define("frac - cfrac,dfrac true tfrac false", (displaystyle, p) =>
  m("mfrac", displaystyle === "-" ? {} : { displaystyle }, p.argument(), p.argument()));
define("binom,dbinom,tbinom 0", (linethickness, p) =>
  fences("(", m("mfrac", { linethickness }, p.argument(), p.argument()), ")"));
define("mod,bmod mod", name => operator(name, { lspace: ".25em", rspace: ".25em" }));
define("overset,stackrel mover underset munder", (tag, p) =>
  m(tag, {}, ...[p.argument({ inScript: true }), p.argument()].reverse()));
define("xrightarrow → xleftarrow ←", (arrow, p) => m("mover", {}, operator(arrow, { stretchy: "true" }),
  m("mrow", {}, space(".5em"), p.argument({ inScript: true }), space(".5em"))));

const DELIMITERS = new Map(pairs(`( ( ) ) [ [ ] ] | | / / \\{,\\lbrace { \\},\\rbrace } \\vert,\\lvert,\\rvert |
  \\|,\\Vert,\\lVert,\\rVert ‖ \\langle ⟨ \\rangle ⟩ \\lfloor ⌊ \\rfloor ⌋ \\lceil ⌈ \\rceil ⌉ \\uparrow ↑ \\downarrow ↓
  \\Uparrow ⇑ \\Downarrow ⇓ \\backslash \\`));
const ENVIRONMENTS = new Map(pairs(`matrix,smallmatrix,array .. pmatrix () bmatrix [] Bmatrix {} vmatrix || Vmatrix ‖‖
  cases,dcases {. rcases .} equation,gather,gathered,multline,align,aligned,split ..`));
const FONTS = {  // where Unicode has A, a, 0, Α and α of a font, but for the letters that it has elsewhere
  mathrm: [], mathit: [0x1d434, 0x1d44e], mathbf: [0x1d400, 0x1d41a, 0x1d7ce, 0x1d6a8, 0x1d6c2],
  boldsymbol: [0x1d468, 0x1d482, 0x1d7ce, 0x1d71c, 0x1d736], bm: [0x1d468, 0x1d482, 0x1d7ce, 0x1d71c, 0x1d736],
  mathbb: [0x1d538, 0x1d552, 0x1d7d8], mathcal: [0x1d49c, 0x1d4b6], mathscr: [0x1d49c, 0x1d4b6],
  mathfrak: [0x1d504, 0x1d51e], mathsf: [0x1d5a0, 0x1d5ba, 0x1d7e2], mathtt: [0x1d670, 0x1d68a, 0x1d7f6],
};
for (const font of Object.keys(FONTS)) COMMANDS.set(font, p => p.argument({ font }));
const ELSEWHERE = new Map(pairs(`1d455 ℎ 1d49d ℬ 1d4a0 ℰ 1d4a1 ℱ 1d4a3 ℋ 1d4a4 ℐ 1d4a7 ℒ 1d4a8 ℳ 1d4ad ℛ 1d4ba ℯ 1d4bc ℊ
  1d4c4 ℴ 1d506 ℭ 1d50b ℌ 1d50c ℑ 1d515 ℜ 1d51d ℨ 1d53a ℂ 1d53f ℍ 1d545 ℕ 1d547 ℙ 1d548 ℚ 1d549 ℝ 1d551 ℤ`));

/** Letters and digits in a font. */
function styled(text, font) {
  const bases = FONTS[font] ?? [];
  return text.replace(/([A-Z])|([a-z])|([0-9])|([Α-Ω])|([α-ω])/g, (char, ...found) => {
    const which = found.findIndex(Boolean);
    const code = bases[which] + char.charCodeAt(0) - "Aa0Αα".charCodeAt(which);
    return bases[which] ? ELSEWHERE.get(code.toString(16)) ?? String.fromCodePoint(code) : char;
  });
}

// ---- How it is read

const SPACE = /\s*/y;
const TOKEN = /\\[a-zA-Z]+|\\[^]|\S/uy;
const NUMBER = /\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+/y;
const WORD = /[A-Za-z]+/y;
const BRACED = /\{((?:[^{}\\]|\\[^])*)\}/y;
const GAP = /\[-?[\d.]+\s*(?:pt|em|ex|mm|cm|in)\]/y;  // after \\

/** The operator that a node is, with scripts or without; null where it is something else. */
function operatorOf(node, within = /^m(sub|sup|under|over)/) {
  while (within.test(node?.localName)) node = node.firstChild;
  return node?.localName === "mo" ? node : null;
}

const isOperand = node => Boolean(node) && ")]}|‖⟩⌋⌉!".includes(operatorOf(node)?.textContent ?? "");

function setSpaces(node, before, after) {
  node.setAttribute("lspace", before);
  node.setAttribute("rspace", after);
}

class Parser {
  constructor(tex) {
    Object.assign(this, { tex, at: 0, depth: 0, font: "", inScript: false, stops: [] });
    this.take(SPACE);
  }

  /** Reads what a pattern finds. `token` is the one behind it then, "" at the end. */
  take(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.tex);
    if (!found) return null;
    SPACE.lastIndex = pattern.lastIndex;
    SPACE.test(this.tex);
    TOKEN.lastIndex = this.at = SPACE.lastIndex;
    this.token = TOKEN.exec(this.tex)?.[0] ?? "";
    return found[1] ?? found[0];
  }

  advance() {
    return this.take(TOKEN);
  }

  /** What is between the braces that come next, as it was written. */
  raw() {
    return need(this.take(BRACED) ?? "");
  }

  words() {
    const text = this.raw();
    need(/^(?:[^\\$]|\\[%$&#_{} ,])*$/.test(text));
    return text.replace(/\\(.)/g, (_, char) => (char === "," ? "\u2009" : char)).replace(/[ \n\t~]/g, "\u00a0");
  }

  delimiter() {
    return need(DELIMITERS.get(this.advance()));
  }

  /** Nodes up to one of the tokens `stops`. */
  row(...stops) {
    need(++this.depth <= DEEPEST);
    const before = this.stops;
    this.stops = stops;
    const nodes = [];
    while (!stops.includes(this.token)) nodes.push(this.scripted());
    this.stops = before;
    this.depth--;
    nodes.forEach((node, i) => this.space(node, nodes[i - 1], nodes[i + 1]));
    return nodes;
  }

  /** What the browser does not know of spaces: signs without an operand before them, names, operators in scripts. */
  space(node, before, after) {
    const mark = operatorOf(node);
    if (!mark) return;
    const next = operatorOf(after, /^m(sub|sup|under|over|row)/);
    if ("+−±∓".includes(mark.textContent) && !isOperand(before)) mark.setAttribute("form", "prefix");
    if (mark.isName) setSpaces(mark, isOperand(before) ? THIN : "0", after && (!next || next.isName) ? THIN : "0");
    else if (this.inScript) setSpaces(mark, "0", "0");
  }

  scripted() {
    let base = /^[\^_']$/.test(this.token) ? m("mrow", {}) : this.atom();
    let { limits } = base;
    while (/^\\(no)?limits$/.test(this.token)) {
      limits = this.advance() === "\\limits";
      operatorOf(base)?.setAttribute("movablelimits", "false");
    }
    let primes = "";
    while (this.token === "'") primes += this.advance() && "′";
    if (primes) base = m("mrow", {}, base, operator(primes, TIGHT));
    const names = limits ? { _: "under", "^": "over" } : { _: "sub", "^": "sup" };
    const scripts = {};
    while (this.token in names) {
      const name = names[this.advance()];
      need(!scripts[name]);
      scripts[name] = this.argument({ inScript: true });
    }
    const found = Object.values(names).filter(name => scripts[name]);
    return found.length ? m("m" + found.join(""), {}, base, ...found.map(name => scripts[name])) : base;
  }

  /** One digit, letter, command or group. */
  argument(how = {}) {
    need(++this.depth <= DEEPEST);
    const { font, inScript } = this;
    Object.assign(this, how);
    const alone = /^[\p{L}\d]$/u.test(this.token) && this.advance();
    const node = !alone ? this.atom() : /\d/.test(alone) ? m("mn", {}, styled(alone, this.font)) : this.letters(alone);
    Object.assign(this, { font, inScript });
    this.depth--;
    return node;
  }

  letters(text) {
    const shown = styled(text, this.font);
    const upright = this.font && shown === text && text.length === 1;  // the browser slants a letter that stands alone
    return m("mi", upright ? { mathvariant: "normal" } : {}, shown);
  }

  atom() {
    if (/^\d$/.test(this.token) || /^\.\d/.test(this.tex.slice(this.at, this.at + 2))) {
      return m("mn", {}, styled(this.take(NUMBER), this.font));
    }
    if (this.font && /^[a-z]$/i.test(this.token)) return this.letters(this.take(WORD));
    const token = this.advance() ?? "";
    if (token === "{") {
      const nodes = this.row("}");
      this.advance();
      if (nodes.length === 1 && operatorOf(nodes[0])) setSpaces(operatorOf(nodes[0]), "0", "0");
      return group(nodes);
    }
    if (token === "-" || token === "–") return operator("−");
    if (token === "~") return space(".25em");
    if (DELIMITERS.has(token)) return fixed(DELIMITERS.get(token));
    if (token[0] === "\\" && COMMANDS.has(token.slice(1))) return COMMANDS.get(token.slice(1))(this);
    if (/^\p{L}$/u.test(token)) return this.letters(token);
    if (/^\p{N}$/u.test(token)) return m("mn", {}, token);
    if (/^[.?%°…′∞∅∇]$/.test(token)) return m("mi", {}, token);
    if (/^[*,;:!·]$|^\p{Sm}$/u.test(token)) return operator(token === "*" ? "∗" : token);
    throw UNKNOWN;
  }

  left() {
    const side = () => (this.token === "." ? this.advance() && "" : this.delimiter());
    const nodes = [side(), ...this.row("\\middle", "\\right")];
    while (this.advance() === "\\middle") nodes.push(this.delimiter(), ...this.row("\\middle", "\\right"));
    return fences(...nodes, side());
  }

  environment() {
    const name = this.raw();
    const sides = [...need(ENVIRONMENTS.get(name.replace(/\*$/, "")))].map(side => (side === "." ? "" : side));
    const columns = name === "array" ? [...this.raw().matchAll(/(\|?)\s*([lcr])\s*(\|?$)?/g)] : [];
    const kind = /matrix|array|cases/.exec(name)?.[0] ?? (/align|split/.test(name) ? "aligned display" : "display");
    const table = this.table("\\end", name === "dcases" ? "cases display" : kind, columns);
    this.advance();
    need(this.raw() === name);
    return sides.join("") ? fences(sides[0], table, sides[1]) : table;
  }

  /** Rows of cells up to the token `stop`. Of a single line, what is in it. */
  table(stop, kind, columns = []) {
    const display = kind.includes("display");
    const table = m("mtable", { class: kind, ...(display && { displaystyle: "true" }) });
    for (;;) {
      const row = m("mtr", {});
      while (this.token === "\\hline") row.setAttribute("class", this.advance() && "line");
      do {
        const [, before, side, after] = columns[row.childNodes.length] ?? [];
        const name = [side, before && "before", after && "after"].filter(Boolean).join(" ");
        row.append(m("mtd", name ? { class: name } : {}, ...this.row("&", "\\\\", stop)));
      } while (this.token === "&" && need(stop) && this.advance());
      const last = this.token === stop;
      if (!last || row.textContent) table.append(row);
      else if (row.className) table.lastChild?.classList.add("last");  // a line behind the last \\
      if (last) break;
      this.advance();
      this.take(GAP);
    }
    const only = display && table.childNodes.length === 1 && table.firstChild;
    return only && only.childNodes.length === 1 ? group([...only.firstChild.childNodes]) : table;
  }
}

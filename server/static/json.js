// JSON as it is shown: a value a line.

const TOKENS = /"[^"\\]*(?:\\.[^"\\]*)*"|[[{]\s*[\]}]|[[\]{},:]|[^\s"[\]{},:]+/g;
const DEEPEST = 40;  // steps to the right: without a limit, 100,000 brackets are gigabytes of spaces

/** JSON with two spaces a level; null where the text is none. Values stay as they are written: 1.0, long numbers. */
export function pretty(text) {
  try {
    JSON.parse(text);
  } catch {
    return null;
  }
  let depth = 0;
  const line = () => "\n" + "  ".repeat(Math.min(depth, DEEPEST));
  return text.match(TOKENS).map(token => {
    if (token === "[" || token === "{") depth++;
    if (token === "]" || token === "}") depth--;
    if (/^[[{,]$/.test(token)) return token + line();
    if (/^[\]}]$/.test(token)) return line() + token;
    return token === ":" ? ": " : token.replace(/^([[{])\s+/, "$1");
  }).join("");
}

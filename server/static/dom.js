// Small helpers to build nodes. Text always goes in as text: nothing in this page parses HTML.

export const $ = id => document.getElementById(id);

/** An element. props are properties, or attributes where the name has a dash or is "role"; null children are left out. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "role" || name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter(child => child != null));
  return node;
}

/** Whether a key belongs to an input method that is composing a character. */
export const composing = event => event.isComposing || event.keyCode === 229;

/** One of the symbols in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", "#i-" + name);
  svg.append(use);
  return svg;
}

/** A button that is an icon only; its name is for screen readers and the tooltip. */
export function iconButton(name, label, onclick) {
  const props = { type: "button", className: "icon-button", title: label, "aria-label": label, onclick };
  return el("button", props, icon(name));
}

/** A button that copies text() and says so with a tick for a moment. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    button.replaceChildren(icon(copied ? "check" : "close"));
    say(copied ? "Copied" : "Could not copy");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // no clipboard API (plain http on another machine), or no permission: the old way
    const area = el("textarea", { value: text, className: "visually-hidden" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/** Politely to screen readers. */
export function say(text) {
  $("announce").textContent = text;
}

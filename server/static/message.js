// One message of a conversation on the page.

import { composing, copyButton, el, icon, iconButton } from "./dom.js";
import { pretty } from "./json.js";
import { chipMark, Markdown, plainSource } from "./markdown.js";

/** What was said, without the calculator's part and without calls. */
function textOf(message) {
  if (message.role === "user") return message.text;
  return message.parts.filter(part => part.type === "text").map(part => part.text).join("");
}

const callsOf = message => message.parts?.filter(part => part.type === "call") ?? [];
const asSent = ({ id, name, text }) => ({ id, type: "function", function: { name, arguments: text || "{}" } });

/** What was said, and the calls as JSON. */
export function wholeOf(message) {
  const calls = callsOf(message).map(asSent);
  return [textOf(message), calls.length ? JSON.stringify(calls, null, 2) : ""].filter(Boolean).join("\n\n");
}

/** A message as the API takes it, null where it says nothing. Of a reply with calculator calls it has exactly what the
 * model said; a call that broke off is left out, as the server would refuse it. */
export function messageOf(message) {
  if (message.role === "user") return { role: "user", content: message.text };
  const said = message.parts.filter(part => part.type !== "call" && part.type !== "think");
  const plain = said.every(part => part.type === "text");
  const content = plain ? textOf(message) || null : said.map(({ type, text }) => ({ type, text }));
  const whole = ({ name, text }) => name && (!text || (text.trimStart()[0] === "{" && pretty(text)));
  const calls = callsOf(message).filter(whole).map(asSent);
  if (!content && !calls.length) return null;
  return { role: "assistant", content, ...(calls.length && { tool_calls: calls }) };
}

/** Adds what a chunk of the stream says to a reply. */
export function take(reply, chunk) {
  if (chunk.context) reply.context = chunk.context;
  if (chunk.usage) Object.assign(reply, { tokens: chunk.usage.completion_tokens, exact: true });
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { content, reasoning_content: thought, tool, tool_calls: calls } = choice.delta ?? {};
  const part = (type, index) => {
    const last = reply.parts.at(-1);
    if (last?.type === type && last.index === index) return last;
    const fresh = { type, text: "", index };
    reply.parts.push(fresh);
    return fresh;
  };
  if (thought) part("think").text += thought;
  if (content) part("text").text += content;
  for (const call of tool ?? []) {
    if (call.input) part("python", call.index).text += call.input;
    if (call.output) part("python_output", call.index).text += call.output;
  }
  for (const { index = 0, id, function: called } of calls ?? []) {
    let call = reply.parts.findLast(known => known.type === "call" && known.index === index);
    if (!call || (id && call.id && id !== call.id)) {
      call = { type: "call", index, name: "", text: "" };
      reply.parts.push(call);
    }
    call.id ||= id;
    call.name ||= called?.name ?? "";
    call.text += called?.arguments ?? "";
  }
  if ((content || thought || tool || calls) && !reply.exact) reply.tokens++;  // nearly: a piece is mostly one token
  if (choice.finish_reason) reply.finish = choice.finish_reason;
}

const thoughtsOf = reply => reply.parts.filter(part => part.type === "think").map(part => part.text).join("\n");

/** Whether thoughts are the last that a reply says so far. */
export const isThinking = reply => reply.parts.at(-1)?.type === "think";

const BAR = "~".repeat(32);  // longer than any that JSON has
const codeOf = (language, text) => `${BAR}${language}\n${plainSource(text)}\n${BAR}`;

/** A reply that is JSON as a whole, or null. While it is being written, one that begins as an object does is taken for
 * one; "[" may begin a link or anything. */
function jsonOf(reply, writing) {
  if (!reply.parts.every(part => part.type === "text" || part.type === "think")) return null;
  const text = textOf(reply).trim();
  if (writing) return /^(?:\[\s*)?\{\s*(?:"|$)/.test(text) ? text : null;
  return /^[[{]/.test(text) ? pretty(text) : null;
}

/** [Markdown source, chips]: the parts of a reply, a mark where each call of the calculator was. */
function sourceOf(reply) {
  let source = "";
  const chips = [];
  for (const part of reply.parts) {
    if (part.type === "call" || part.type === "think") continue;
    if (part.type === "text") source += plainSource(part.text);
    else if (part.type === "python" || !chips.length || chips.at(-1).output) {
      source += chipMark(chips.length);
      chips.push({ input: "", output: "", [part.type === "python" ? "input" : "output"]: part.text });
    } else chips.at(-1).output = part.text;
  }
  return [source, chips];
}

function chip({ input, output }) {
  return el("span", { className: "chip", title: "Worked out by the calculator" },
    icon("calculator"), el("span", { className: "visually-hidden" }, "calculator: "),
    el("span", {}, input), el("span", { className: "equals" }, " = "), el("strong", {}, output || "…"));
}

function speedOf(reply) {
  if (!reply.tokens || !reply.seconds) return "";
  const rate = reply.tokens / reply.seconds;
  const speed = `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`;
  return reply.exact ? `${reply.tokens} tokens · ${speed}` : `≈ ${speed}`;
}

const counted = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

function notesOf(reply, state) {
  const notes = [];
  const { dropped_messages: dropped, truncated } = reply.context ?? {};
  const unseen = dropped && counted(dropped, "message");
  if (unseen) notes.push(`The conversation is too long for the model: it did not see the first ${unseen}.`);
  if (truncated) notes.push("Your message is too long for the model: it saw only a part.");
  if (state === "stopped") notes.push("Stopped.");
  if (state === "elsewhere") notes.push("Being written in another tab …");
  if (state === "interrupted") notes.push("Interrupted: the page was closed or reloaded before the reply was whole.");
  if (reply.finish === "length") notes.push("Cut off at the length set in the settings.");
  return notes;
}

/** `actions`: edit(message, text), regenerate(), copy is its own. */
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    const user = message.role === "user";
    this.body = el("div", { className: user ? "bubble" : "prose" });
    this.tools = el("div", { className: "tools" });
    this.tools.append(copyButton(user ? "Copy message" : "Copy reply", () => wholeOf(message)));
    this.node = el("article", { className: `message ${message.role}` },
      el("h2", { className: "visually-hidden" }, user ? "You said" : "Reply"), this.body);
    if (user) {
      this.body.textContent = message.text;
      this.body.dir = "auto";
      this.again = iconButton("edit", "Edit message", () => this.edit());
    } else {
      this.again = iconButton("again", "Regenerate reply", () => actions.regenerate());
      this.notes = el("div", { className: "notes" });
      this.speed = el("span", { className: "speed" });
      this.calls = el("div", { className: "calls" });
      this.summary = el("summary");
      this.thoughts = el("p", { dir: "auto" });
      this.folded = el("details", { className: "thoughts", hidden: true }, this.summary, this.thoughts);
      this.body.before(this.folded);
      this.boxes = [];  // of calls, each as Markdown
      this.node.append(this.calls, this.notes);
    }
    this.tools.append(this.again);
    if (!user) this.tools.append(this.speed);
    this.node.append(this.tools);
  }

  /** state: the reply's status, "elsewhere" where another tab writes it. */
  update({ state, last, busy }) {
    const { message } = this;
    if (message.role === "user") {
      this.again.hidden = busy;
      return;
    }
    const writing = state === "writing" || state === "elsewhere";
    const thoughts = thoughtsOf(message);
    this.folded.hidden = !thoughts;
    if (this.thoughts.textContent !== thoughts) this.thoughts.textContent = thoughts;
    const seconds = `${(message.thought ?? 0).toFixed(1)} s`;
    this.summary.textContent = writing && isThinking(message) ? `Thinking … ${seconds}` : `Thought for ${seconds}`;
    const json = jsonOf(message, writing);
    if (this.isJson !== (json !== null)) {  // another source, not the last one and more
      this.isJson = json !== null;
      this.body.replaceChildren();
      this.markdown = new Markdown(this.body, index => chip(this.chips[index]));
    }
    const [source, chips] = this.isJson ? [codeOf("json", json), []] : sourceOf(message);
    this.chips = chips;
    this.markdown.update(source);
    callsOf(message).forEach(({ name, text }, i) => {
      if (!this.boxes[i]) this.calls.append(el("div"));
      this.boxes[i] ??= new Markdown(this.calls.lastChild);
      this.boxes[i].update(codeOf(`${name.replace(/[^\w.-]/g, "_")}()`, pretty(text) ?? text));
    });
    this.node.classList.toggle("writing", state === "writing");
    this.node.classList.toggle("waiting", state === "writing" && !message.parts.length);
    const retry = last && !busy && (state === "failed" || state === "interrupted");
    this.again.hidden = busy || !last || retry;
    this.tools.firstChild.hidden = writing || !message.parts.length;
    this.speed.textContent = speedOf(message);
    const notes = notesOf(message, state);
    const key = [...notes, state, retry].join("\n");
    if (key === this.notesKey) return;
    this.notesKey = key;
    this.notes.replaceChildren(...notes.map(note => el("p", { className: "note" }, note)));
    if (state !== "failed" && !retry) return;
    const box = el("div", { className: state === "failed" ? "error" : "retry" });
    const what = message.parts.length ? "The reply broke off" : "There is no reply";
    if (state === "failed") box.append(icon("alert"), el("p", {}, `${what}: ${message.error}`));
    if (retry) box.append(el("button", { type: "button", onclick: () => this.actions.regenerate() }, "Try again"));
    this.notes.append(box);
  }

  edit() {
    const text = el("textarea", { value: this.message.text, rows: 1, dir: "auto", "aria-label": "Edit your message" });
    const close = () => {
      form.replaceWith(this.body);
      this.tools.hidden = false;
      this.again.focus();
    };
    const cancel = el("button", { type: "button", onclick: close }, "Cancel");
    const form = el("form", { className: "edit" }, text,
      el("div", { className: "edit-buttons" }, cancel, el("button", { type: "submit", className: "primary" }, "Send")));
    form.onsubmit = event => {
      event.preventDefault();
      if (text.value.trim()) this.actions.edit(this.message, text.value.trim());
    };
    text.oninput = () => grow(text);
    form.onkeydown = event => {
      if (event.key === "Escape" && !composing(event)) {
        event.stopPropagation();
        close();
      } else if (event.target === text) sendOnEnter(event, form);
    };
    this.body.replaceWith(form);
    this.tools.hidden = true;
    grow(text);
    text.focus();
  }
}

/** A text area as high as its text; the style sheet has the limit. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

export function sendOnEnter(event, form) {
  if (event.key !== "Enter" || event.shiftKey || composing(event)) return;
  if (!matchMedia("(pointer: fine)").matches) return;  // a touch screen has no other key to break a line
  event.preventDefault();
  form.requestSubmit();
}

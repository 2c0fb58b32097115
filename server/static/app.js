// The page: which conversation is shown, what is sent, and what comes back.

import { ApiError, complete, health } from "./api.js";
import { $, composing, el, iconButton, say } from "./dom.js";
import { grow, isThinking, MessageView, messageOf, sendOnEnter, take, wholeOf } from "./message.js";
import { commandOf, HELP, reloadSettings, sampling, setByCommand, settings, setUpSettings } from "./settings.js";
import { closeDrawer, drawerOpen, drawList, setUpSidebar } from "./sidebar.js";
import * as store from "./store.js";

const LONGEST = 200_000;  // characters of a message: the server's limit

const GREEDY = { temperature: 0 };  // as a suggested question was answered rightly
const SAVE_EVERY = 1000;  // ms, of a reply that is being written
const MOST_MESSAGES = 399;  // that are sent, and characters in them: what the server takes, with room for the system's
const MOST_CHARS = 150_000;
const NEAR_BOTTOM = 60;  // px

let chat = store.newChat();  // the one that is shown
let views = [];  // of its messages
let ideas = [];  // questions that this model answered rightly when it was evaluated: {kind, text}
let follow = true;  // the end of the conversation stays in view
let drawing = false;
const runs = new Map();  // replies being written here: id of the conversation → {controller, reply, ending}

// ---- What is shown

function go() {
  const known = store.chats.get(location.hash.slice(1));
  if (known ? known === chat : !chat.messages.length) return;  // it is shown already
  show(known ?? store.newChat());
  focusBox();
}

/** Where nobody asked for it, not on a phone: its keyboard would cover half of the page. */
function focusBox() {
  if (matchMedia("(pointer: fine)").matches) $("text").focus();
}

function show(next) {
  chat = next;
  views = [];
  follow = true;
  $("log").replaceChildren();
  draw();
  watch();
}

/** Should the tab that writes the reply crash, nothing more comes from it: looks again whether it still writes. */
function watch() {
  const now = chat;
  if (busy() && !runs.has(chat.id)) setTimeout(() => chat === now && draw(), store.STALE + 1000);
}

const actions = {
  edit(message, text) {
    if (busy()) return;
    chat.messages.length = chat.messages.indexOf(message);
    ask(text);
  },
  regenerate() {
    if (busy()) return;
    if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
    answer(chat);
  },
};

const listActions = {
  rename(which, title) {
    which.title = title;
    keep(which);
    draw();
  },
  remove(which) {
    stop(which.id, "dropped");
    const shown = which.id === chat.id;
    store.deleteChat(which.id);
    if (shown) newConversation();
    draw();
    notice(`Deleted “${which.title}”.`, {
      undo() {
        keep(which);
        if (shown) location.hash = which.id;
        draw();
      },
    });
  },
};

/** Whether the last reply is being written, here or in another tab. */
function busy() {
  return runs.has(chat.id) || store.beingWritten(chat);
}

function stateOf(message) {
  if (message.status !== "writing") return message.status;
  if (runs.get(chat.id)?.reply === message) return "writing";
  return store.beingWritten(chat) ? "elsewhere" : "interrupted";
}

/** Brings the page up to date with the conversation. Messages that are shown already keep their nodes. */
function draw() {
  const { messages } = chat;
  let same = 0;
  while (same < views.length && views[same].message === messages[same]) same++;
  for (const view of views.splice(same)) view.node.remove();
  $("empty")?.remove();
  for (const message of messages.slice(same)) {
    views.push(new MessageView(message, actions));
    $("log").append(views.at(-1).node);
  }
  if (!messages.length) $("log").append(emptyState());
  views.forEach((view, i) => view.update({ state: stateOf(view.message), last: i === views.length - 1, busy: busy() }));
  drawRunning();
  $("title").textContent = chat.title || "New chat";
  document.title = chat.title ? `${chat.title} · nanochat` : "nanochat";
  drawList(chat.id, listActions);
  if (follow) toBottom();
}

function drawRunning() {
  const running = runs.has(chat.id);
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("stop").hidden = !running;
  $("send").hidden = running;
  $("send").disabled = !$("text").value.trim();
  if (hadFocus) focusBox();
}

/** Once a frame at most, and only the reply that grows. */
function drawSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    const run = runs.get(chat.id);
    const view = views.at(-1);
    if (!run || view?.message !== run.reply) return;
    view.update({ state: "writing", last: true, busy: true });
    if (follow) toBottom();
  });
}

function emptyState() {
  const buttons = ideas.map(({ kind, text }) =>
    el("button", { type: "button", onclick: () => ask(text, GREEDY) },
      el("span", { className: "kind" }, kind), el("span", {}, text)));
  return el("div", { id: "empty" },
    el("h2", {}, "What can I do for you?"),
    el("p", {}, "A small language model, trained from scratch. It is quick, friendly and often wrong."),
    el("div", { className: "ideas" }, ...buttons));
}

function toBottom() {
  if (chat.messages.length) $("scroll").scrollTop = $("scroll").scrollHeight;
}

/** A line above the message box. */
function notice(content, { undo, failed } = {}) {
  const close = () => line.remove();
  const line = el("div", { className: failed ? "notice failed" : "notice" },
    el("div", { className: "notice-text" }, content));
  if (undo) {
    const run = () => {
      close();
      undo();
      $("text").focus();
    };
    line.append(el("button", { type: "button", onclick: run }, "Undo"));
  }
  line.append(iconButton("close", "Dismiss", () => {
    close();
    $("text").focus();
  }));
  $("notice").replaceChildren(line);
}

function keep(which) {
  if (!store.saveChat(which)) {
    notice("The browser's storage is full or blocked: this conversation is gone when the page is closed. " +
      "Deleting other conversations makes room.", { failed: true });
  }
}

// ---- What is sent

function ask(text, how = {}) {
  if (busy()) return;
  chat.title ||= titleOf(text);
  chat.messages.push({ role: "user", text });
  chat.updated = Date.now();
  $("notice").replaceChildren();
  answer(chat, how);
  if (location.hash.slice(1) !== chat.id) history.pushState(null, "", "#" + chat.id);
}

function titleOf(text) {
  const line = text.replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 60).replace(/\s\S*$/, "")} …` : line;
}

/** The conversation as the API takes it: without questions that got no answer, the last one aside, and without the
 * oldest exchanges where there is more than the server takes. */
function said(which) {
  const out = [];
  for (const message of which.messages) {
    const sent = messageOf(message);
    if (!sent) continue;
    if (message.role === out.at(-1)?.role) out.pop();
    out.push(sent);
  }
  while (out.length > 1 && (out.length > MOST_MESSAGES || JSON.stringify(out).length > MOST_CHARS)) out.splice(0, 2);
  const system = settings.system.trim();
  return system ? [{ role: "system", content: system }, ...out] : out;
}

async function answer(which, how = {}) {
  const body = { messages: said(which), stream: true, stream_options: { include_usage: true }, ...sampling(), ...how };
  const reply = { role: "assistant", parts: [], status: "writing", tokens: 0, seconds: 0 };
  for (const message of which.messages) if (message.status === "writing") message.status = "interrupted";
  const run = { controller: new AbortController(), reply, ending: "stopped" };
  which.messages.push(reply);
  runs.set(which.id, run);
  follow = true;
  keep(which);
  draw();
  const saving = setInterval(() => keep(which), SAVE_EVERY);
  const asked = performance.now();
  let first = 0;
  try {
    for await (const chunk of complete(body, $("key").value.trim(), run.controller.signal)) {
      take(reply, chunk);
      if (reply.parts.length && !first) first = performance.now();
      if (isThinking(reply)) reply.thought = (performance.now() - asked) / 1000;
      // from the first token on, but for a reply that came in one piece
      const since = performance.now() - first > 50 ? first : asked;
      reply.seconds = (performance.now() - since) / 1000;
      if (which === chat) drawSoon();
    }
    reply.status = "done";
  } catch (error) {
    reply.status = run.controller.signal.aborted ? run.ending : "failed";
    if (reply.status === "failed") failed(reply, error);
  }
  clearInterval(saving);
  runs.delete(which.id);
  if (run.ending === "dropped") return;
  which.updated = Date.now();
  keep(which);
  if (which === chat) draw();
  else drawList(chat.id, listActions);
  if (reply.status === "done") say(`Reply: ${wholeOf(reply)}`);
}

function failed(reply, error) {
  reply.error = error.message;
  say(`There is no reply: ${error.message}`);
  showHealth();
  if (!(error instanceof ApiError)) console.error(error);
  if (error.status !== 401) return;
  openSettings("key");
  $("settings").addEventListener("close", () => {
    if ($("key").value && chat.messages.at(-1) === reply) actions.regenerate();
  }, { once: true });
}

function stop(id = chat.id, ending = "stopped") {
  const run = runs.get(id);
  if (!run) return;
  run.ending = ending;
  run.controller.abort();
}

function command(name, argument) {
  if (name === "help") {
    const lines = HELP.flatMap(([how, what]) => [el("dt", {}, how), el("dd", {}, what)]);
    notice(el("dl", { className: "commands" }, ...lines));
    say(HELP.map(([how, what]) => `${how}: ${what}`).join(". "));
  } else if (name === "new") {
    newConversation();
  } else if (name === "clear") {
    clear();
  } else {
    const told = setByCommand(name, argument) ?? { text: `There is no command /${name}. Try /help.`, failed: true };
    notice(told.text, told);
    say(told.text);
    return !told.failed;
  }
  return true;
}

function clear() {
  const which = chat;
  const before = which.messages;
  if (!before.length || (busy() && !runs.has(which.id))) return;  // not what another tab is writing
  stop(which.id, "dropped");
  which.messages = [];
  keep(which);
  draw();
  notice("The conversation is empty now.", {
    undo() {
      which.messages = before;
      keep(which);
      draw();
    },
  });
}

function newConversation() {
  history.pushState(null, "", location.pathname + location.search);
  if (chat.messages.length || store.chats.has(chat.id)) show(store.newChat());
  closeDrawer();
  $("text").focus();
}

// ---- The controls

function openSettings(focus = "system") {
  $("settings").showModal();
  $(focus).focus();
}

function toggleTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const root = document.documentElement.dataset;
  const next = (root.theme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
  root.theme = next;
  try {
    localStorage.setItem("nanochat.theme", next);
  } catch {
    // it holds until the page is closed
  }
  nameTheme();
}

function nameTheme() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
  $("theme").title = dark ? "Light theme" : "Dark theme";
  $("theme").setAttribute("aria-label", $("theme").title);
}

async function showHealth() {
  const state = await health();
  const ok = state?.status === "ok";
  const what = state && `${state.run} · ${state.stage}`;
  $("model").textContent = ok ? what : state ? `${what} · the engine is down` : "No connection";
  $("model").classList.toggle("down", !ok);
  if (state?.suggestions && !ideas.length) {
    ideas = state.suggestions;
    $("empty")?.replaceWith(emptyState());
  }
}

function setUp() {
  const text = $("text");
  $("composer").onsubmit = event => {
    event.preventDefault();
    const value = text.value.trim();
    if (!value) return;
    if (value.length > LONGEST) {
      notice(`The message has ${value.length.toLocaleString()} characters; ${LONGEST.toLocaleString()} are the limit.`);
      return;
    }
    const asCommand = commandOf(value);
    if (asCommand ? !command(...asCommand) : busy()) return;
    text.value = "";
    grow(text);
    if (asCommand) drawRunning();
    else ask(value);
  };
  text.onkeydown = event => sendOnEnter(event, $("composer"));
  text.oninput = () => {
    grow(text);
    drawRunning();
  };
  $("stop").onclick = () => stop();
  $("new").onclick = newConversation;
  $("theme").onclick = toggleTheme;
  $("open-settings").onclick = () => openSettings();
  $("close-settings").onclick = () => $("settings").close();
  $("key").onkeydown = event => {
    if (event.key === "Enter") $("settings").close();
  };
  $("settings").onclick = event => {
    if (event.target === $("settings")) $("settings").close();  // beside the panel
  };
  $("latest").onclick = () => {
    follow = true;
    toBottom();
    text.focus();
  };
  $("skip").onclick = event => {
    event.preventDefault();
    text.focus();
  };
  $("chats").onclick = event => {
    if (event.target.closest("a")) closeDrawer();
  };
  $("scroll").onscroll = () => {
    const { scrollHeight, scrollTop, clientHeight } = $("scroll");
    follow = scrollHeight - scrollTop - clientHeight < NEAR_BOTTOM;
    $("latest").hidden = follow;
  };
  new ResizeObserver(() => follow && toBottom()).observe($("scroll"));
  addEventListener("keydown", event => {
    if (event.key !== "Escape" || composing(event) || $("settings").open) return;
    if (drawerOpen()) closeDrawer();
    else if (runs.has(chat.id)) stop();
    else $("notice").replaceChildren();
  });
  addEventListener("hashchange", go);
  addEventListener("popstate", go);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  addEventListener("pagehide", () => {
    for (const [id, { reply }] of runs) {
      reply.status = "interrupted";
      stop(id, "interrupted");
      store.saveChat(store.chats.get(id));
    }
  });
}

function otherTab(id) {
  if (runs.has(id) && !store.chats.has(id)) stop(id, "dropped");
  if (id !== chat.id) drawList(chat.id, listActions);
  else if (store.chats.has(id)) takeOver(store.chats.get(id));
  else if (chat.messages.length) {
    newConversation();
    notice("The conversation was deleted in another tab.");
  }
}

/** Shows what another tab made of the conversation; messages that are the same keep their nodes. */
function takeOver(next) {
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  next.messages = next.messages.map((m, i) => (same(m, chat.messages[i]) ? chat.messages[i] : m));
  chat = next;
  draw();
  watch();
}

store.loadChats();
setUpSettings(() => {
  notice("The browser's storage is full or blocked: the settings hold until the page is closed.", { failed: true });
});
setUpSidebar();
setUp();
nameTheme();
store.onOtherTabs(id => runs.has(id), otherTab, reloadSettings);
show(store.chats.get(location.hash.slice(1)) ?? chat);
showHealth();
focusBox();

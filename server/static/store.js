// Conversations and settings in the browser's storage. Each conversation has a key of its own, so that two tabs
// do not overwrite each other's; what another tab changes arrives through `storage` events.

const CHAT = "nanochat.chat.";
const SETTINGS = "nanochat.settings";
const KEY = "nanochat.key";
// A reply that another tab is writing is saved every second. One that was not saved for so long is no longer written
// (its tab crashed), even where timers of hidden tabs are slow.
export const STALE = 15_000;

export const DEFAULTS = { system: "", temperature: 0.6, top_k: 50, top_p: 1, max_tokens: 512, think: false };

/** All conversations by id: {id, title, updated, saved, messages}. A message is {role: "user", text} or
 * {role: "assistant", parts: [{type, text, ...}], status: writing | done | stopped | interrupted | failed, ...}. */
export const chats = new Map();

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

export function loadChats() {
  try {
    for (const key of Object.keys(localStorage)) if (key.startsWith(CHAT)) read(key, localStorage.getItem(key));
  } catch {
    // storage is blocked: conversations live as long as the page
  }
}

function read(key, text) {
  const chat = parsed(text);
  const known = chat?.messages?.every?.(m => (m.role === "user" ? typeof m.text === "string" : Array.isArray(m.parts)));
  if (known) chats.set(key.slice(CHAT.length), chat);
}

export function newChat() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", updated: Date.now(), saved: 0, messages: [] };
}

export function newestFirst() {
  return [...chats.values()].sort((a, b) => b.updated - a.updated);
}

/** True where it could be written; the conversation stays in memory in any case. */
export function saveChat(chat) {
  chat.saved = Date.now();
  chats.set(chat.id, chat);
  return write(() => localStorage, CHAT + chat.id, JSON.stringify(chat));
}

export function deleteChat(id) {
  chats.delete(id);
  try {
    localStorage.removeItem(CHAT + id);
  } catch {
    // it was never written
  }
}

/** Calls changed(id) for each conversation that another tab changed or deleted (then chats has no id any more). Of one
 * that is written here, writing(id), only the title is taken over. */
export function onOtherTabs(writing, changed, settingsChanged) {
  addEventListener("storage", event => {
    if (event.storageArea !== localStorage) return;
    if (event.key === SETTINGS) settingsChanged();
    if (!event.key?.startsWith(CHAT)) return;
    const id = event.key.slice(CHAT.length);
    if (event.newValue === null) chats.delete(id);
    else if (writing(id)) chats.get(id).title = parsed(event.newValue)?.title ?? chats.get(id).title;
    else read(event.key, event.newValue);
    changed(id);
  });
}

/** Whether a tab is writing the last reply. */
export function beingWritten(chat) {
  return chat.messages.at(-1)?.status === "writing" && Date.now() - chat.saved < STALE;
}

export function loadSettings() {
  try {
    return { ...DEFAULTS, ...parsed(localStorage.getItem(SETTINGS)) };
  } catch {
    return { ...DEFAULTS };
  }
}

export function saveSettings(settings) {
  return write(() => localStorage, SETTINGS, JSON.stringify(settings));
}

// The key to the API goes with the tab: it is a secret, and other people may use this browser later.
export function loadKey() {
  try {
    return sessionStorage.getItem(KEY) || "";
  } catch {
    return "";
  }
}

export function saveKey(key) {
  return write(() => sessionStorage, KEY, key);
}

function write(storage, key, text) {
  try {
    storage().setItem(key, text);  // a function, as even to name a blocked storage throws
    return true;
  } catch {
    return false;
  }
}

// The list of conversations, and on narrow screens the drawer that it is in.

import { $, composing, el, iconButton } from "./dom.js";
import { newestFirst } from "./store.js";

const narrow = matchMedia("(max-width: 800px)");
let shown = "";  // what the list shows now: it is built anew only where that changed

/** actions: rename(chat, title), remove(chat). */
export function drawList(current, actions) {
  if ($("chats").querySelector("input")) return;  // a title is being edited: drawn after that
  const chats = newestFirst();
  const now = JSON.stringify([current, chats.map(chat => [chat.id, chat.title])]);
  if (now === shown) return;
  shown = now;
  const focused = document.activeElement?.closest("#chats li")?.dataset.id;
  $("chats").replaceChildren(...chats.map(chat => row(chat, chat.id === current, actions)));
  $("none").hidden = chats.length > 0;
  if (focused) {
    const again = [...$("chats").children].find(item => item.dataset.id === focused) ?? $("chats").firstElementChild;
    (again?.querySelector("a") ?? $("new")).focus();
  }
}

function row(chat, current, actions) {
  const open = el("a", { href: "#" + chat.id, title: chat.title }, chat.title);
  if (current) open.setAttribute("aria-current", "page");
  const item = el("li", {}, open,
    iconButton("edit", `Rename “${chat.title}”`, () => rename(item, chat, current, actions)),
    iconButton("trash", `Delete “${chat.title}”`, () => actions.remove(chat)));
  item.dataset.id = chat.id;
  return item;
}

function rename(item, chat, current, actions) {
  const input = el("input", { value: chat.title, maxLength: 80, dir: "auto", "aria-label": "Title of the conversation" });
  let ended = false;
  const end = keep => {
    if (ended) return;  // to replace the input blurs it, which ends it as well
    ended = true;
    const title = input.value.trim();
    shown = "";
    item.replaceWith(row(chat, current, actions));
    if (keep && title) actions.rename(chat, title);
    else drawList(current, actions);
  };
  const focusRow = () => [...$("chats").children].find(i => i.dataset.id === chat.id)?.querySelector("button").focus();
  input.onkeydown = event => {
    if ((event.key !== "Enter" && event.key !== "Escape") || composing(event)) return;
    event.stopPropagation();
    event.preventDefault();
    end(event.key === "Enter");
    focusRow();
  };
  input.onblur = () => end(true);
  item.replaceChildren(input);
  input.select();
  input.focus();
}

export const drawerOpen = () => document.body.classList.contains("drawer");

export function openDrawer() {
  document.body.classList.add("drawer");
  place();
  $("new").focus();
}

export function closeDrawer() {
  if (!drawerOpen()) return;
  document.body.classList.remove("drawer");
  place();
  $("menu").focus();
}

/** What is not on the screen takes no focus; behind an open drawer neither. */
function place() {
  if (!narrow.matches) document.body.classList.remove("drawer");
  const open = drawerOpen();
  $("sidebar").inert = narrow.matches && !open;
  $("page").inert = open;
  $("menu").setAttribute("aria-expanded", open);
}

export function setUpSidebar() {
  $("menu").onclick = openDrawer;
  $("close-drawer").onclick = closeDrawer;
  $("scrim").onclick = closeDrawer;
  narrow.onchange = place;
  place();
}

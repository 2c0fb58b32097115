// How replies are made: the settings' dialog, and the same as commands in the message box.

import { $, el } from "./dom.js";
import { DEFAULTS, loadKey, loadSettings, saveKey, saveSettings } from "./store.js";

const SLIDERS = [
  { name: "temperature", command: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05,
    help: "Higher is more varied; 0 always takes the likeliest token." },
  { name: "top_k", command: "topk", label: "Top-k", min: 0, max: 200, step: 1,
    help: "Draws from this many of the likeliest tokens; 0: from all." },
  { name: "top_p", command: "topp", label: "Top-p", min: 0.05, max: 1, step: 0.05,
    help: "Draws from the likeliest tokens that together have this probability." },
  { name: "max_tokens", command: "length", label: "Length", min: 16, max: 2048, step: 16,
    help: "A reply has this many tokens at most." },
];

export const settings = loadSettings();

const outputs = new Map();

/** Builds the dialog's sliders and ties all fields to the settings. failed() is called where they cannot be kept. */
export function setUpSettings(failed) {
  for (const slider of SLIDERS) $("sliders").append(sliderRow(slider));
  const keep = () => saveSettings(settings) || failed();
  for (const { name } of SLIDERS) {
    $(name).oninput = () => {
      settings[name] = Number($(name).value);
      showSettings();
    };
    $(name).onchange = keep;
  }
  $("system").oninput = () => {
    settings.system = $("system").value;
  };
  $("system").onchange = keep;
  $("think").onchange = () => {
    settings.think = $("think").checked;
    keep();
  };
  $("key").value = loadKey();
  $("key").oninput = () => saveKey($("key").value.trim());
  $("defaults").onclick = () => {
    Object.assign(settings, DEFAULTS);
    keep();
    showSettings();
  };
  showSettings();
}

function sliderRow({ name, label, min, max, step, help }) {
  const output = el("output", { htmlFor: name });
  outputs.set(name, output);
  return el("div", { className: "field" },
    el("div", { className: "field-head" }, el("label", { htmlFor: name }, label), output),
    el("input", { type: "range", id: name, min, max, step, "aria-describedby": `${name}-help` }),
    el("p", { className: "help", id: `${name}-help` }, help));
}

/** Takes over what another tab set. */
export function reloadSettings() {
  Object.assign(settings, loadSettings());
  showSettings();
}

function showSettings() {
  for (const { name } of SLIDERS) {
    $(name).value = settings[name];
    outputs.get(name).value = settings[name];  // not the slider's, which rounds to its steps
  }
  if ($("system").value !== settings.system) $("system").value = settings.system;
  $("think").checked = settings.think;
}

/** The part of a request that the settings make. */
export function sampling() {
  const set = Object.fromEntries(SLIDERS.map(({ name }) => [name, settings[name]]));
  return settings.think ? { ...set, enable_thinking: true } : set;
}

export const HELP = [
  ...SLIDERS.map(({ name, command, label, min, max }) => [`/${command} ${DEFAULTS[name]}`, `${label}, ${min} to ${max}`]),
  ["/think on", "Think first, on or off"],
  ["/system You are terse.", "System prompt"],
  ["/new", "New conversation"],
  ["/clear", "Empty this conversation"],
  ["/help", "This list"],
];

/** [command, argument] of a message that is a command, or null. "/etc/passwd" is none. */
export function commandOf(text) {
  const found = /^\/([a-z]+)(?:\s+([^]*))?$/i.exec(text.trim());
  return found && [found[1].toLowerCase(), (found[2] ?? "").trim()];
}

/** Sets what a command says. Returns what to tell, as {text, failed}; null where it is not a setting's command. */
export function setByCommand(command, argument) {
  if (command === "system") {
    if (argument) settings.system = argument;
    saveSettings(settings);
    showSettings();
    return { text: settings.system ? `System prompt: ${settings.system}` : "There is no system prompt." };
  }
  if (command === "think") {
    if (!["", "on", "off"].includes(argument)) return { text: "/think takes on or off.", failed: true };
    if (argument) settings.think = argument === "on";
    saveSettings(settings);
    showSettings();
    return { text: `Thinking first is ${settings.think ? "on" : "off"}.` };
  }
  const slider = SLIDERS.find(s => s.command === command);
  if (!slider) return null;
  const { name, label, min, max } = slider;
  if (!argument) return { text: `${label} is ${settings[name]}.` };
  const value = Number(argument);
  const whole = slider.step >= 1;
  if (!(value >= min && value <= max) || (whole && !Number.isInteger(value))) {
    return { text: `${label} takes ${whole ? "a whole number" : "a number"} from ${min} to ${max}.`, failed: true };
  }
  settings[name] = value;
  saveSettings(settings);
  showSettings();
  return { text: `${label} is ${value} now.` };
}

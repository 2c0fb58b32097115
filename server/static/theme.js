// The theme that was picked here before, set ahead of the first paint (a classic script: modules come too late).
"use strict";
try {
  const theme = localStorage.getItem("nanochat.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // storage is blocked: the system's theme
}

// Light or dark before the first paint; without a choice the system decides.
"use strict";
try {
  const theme = localStorage.getItem("idspam.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing: the system decides.
}

// What cannot wait for the modules: it runs before the first paint.
"use strict";
{
  const root = document.documentElement;
  // Without scripts the header would lead nowhere: it is hidden unless this has run.
  root.dataset.scripts = "";
  try {
    const theme = localStorage.getItem("idspam.theme");
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  } catch {
    // A browser that keeps nothing: the system decides.
  }
  // Try begins with the first adapters (pages/try.js). They are asked for while the scripts come.
  if (/^(#\/?(try)?)?$/.test(location.hash)) {
    const url = new URL("v1/adapters?limit=5", location.href);
    const answer = fetch(url, { cache: "no-store" });
    answer.catch(() => {});
    globalThis.begun = { url: url.href, answer };
  }
  // Modules that cannot be fetched say nothing by themselves, and "Loading" would stay for ever.
  addEventListener(
    "error",
    ({ target }) => {
      const loading = document.getElementById("loading");
      if (target?.tagName === "SCRIPT" && loading) loading.textContent = "A part of this page did not arrive. Reload the page once the service answers.";
    },
    true,
  );
}

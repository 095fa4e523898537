// For keyboards and screen readers: what scrolls takes the focus, and the buttons of code blocks have names.
const mend = () => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code"))
    if (box.scrollWidth > box.clientWidth && box.tabIndex < 0) box.tabIndex = 0
  document.querySelectorAll(".md-code__nav").forEach((nav, number) => {
    if (!nav.ariaLabel) nav.ariaLabel = `Code block ${number + 1}`
  })
}
new MutationObserver(mend).observe(document.body, {
  attributeFilter: ["tabindex"], childList: true, subtree: true
})
mend()

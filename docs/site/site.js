// What scrolls sideways can be reached, and scrolled, from the keyboard. The theme puts tables
// into such a part after the page has loaded.
new MutationObserver(() => {
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach((part) => {
    part.tabIndex = 0;
    part.setAttribute("role", "region");
    part.setAttribute("aria-label", "Table");
  });
}).observe(document.body, { childList: true, subtree: true });

// What scrolls sideways can be reached, and scrolled, from the keyboard; parts of one kind have
// names of their own. The theme makes such parts after the page has loaded.
const named = (part, name, number) => {
  const label = number ? `${name} ${number + 1}` : name;
  if (part.getAttribute("aria-label") !== label) part.setAttribute("aria-label", label);
};
const reachable = () => {
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((part, number) => {
    part.tabIndex = 0;
    part.setAttribute("role", "region");
    named(part, "Table", number);
  });
  document.querySelectorAll(".highlight-ipynb").forEach((part) => (part.tabIndex = 0));
  document.querySelectorAll(".md-code__nav").forEach((part, n) => named(part, "Code tools", n));
  document.querySelectorAll(".md-search").forEach((part) => named(part, "Search", 0));
};
reachable();
new MutationObserver(reachable).observe(document.body, { childList: true, subtree: true });

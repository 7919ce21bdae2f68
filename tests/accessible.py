"""Rules of the Web Content Accessibility Guidelines that a program can check, as JavaScript to run in a page.

After the rules of the same names in axe-core (https://github.com/dequelabs/axe-core), written anew: a broken one of these is
what it calls serious or critical. ``PROBLEMS`` gives a list of ``rule: element``.
"""

PROBLEMS = r"""
(() => {
  const found = [];
  const all = (s) => [...document.querySelectorAll(s)];
  const say = (rule, e) => found.push(`${rule}: ${e.outerHTML.slice(0, 160)}`);
  const seen = (e) => e.checkVisibility({ visibilityProperty: true }) && e.getClientRects().length > 0;
  const labelled = (e) => (e.getAttribute("aria-labelledby") || "").split(/\s+/).filter(Boolean)
    .map((id) => document.getElementById(id)?.textContent || "").join(" ");
  const name = (e) => (labelled(e) || e.getAttribute("aria-label") || e.textContent || e.title || "").trim();

  if (!document.documentElement.lang) say("html-has-lang", document.documentElement);
  if (!document.title) say("document-title", document.head);
  const ids = all("[id]").map((e) => e.id);
  ids.filter((id, n) => ids.indexOf(id) !== n).forEach((id) => say("duplicate-id", document.getElementById(id)));
  if (all("main").length !== 1) say("landmark-one-main", document.body);
  if (all("h1").length !== 1) say("page-has-heading-one", document.body);
  let level = 0;
  all("h1,h2,h3,h4").filter(seen).forEach((h) => { if (+h.tagName[1] > level + 1) say("heading-order", h); level = +h.tagName[1]; });
  all("a[href],button,summary").filter(seen).forEach((e) => name(e) || say("link-name or button-name", e));
  all("input,select,textarea").filter(seen).forEach((e) => e.labels.length || labelled(e) || e.getAttribute("aria-label") || say("label", e));
  all("svg").filter(seen).forEach((e) => name(e) && e.getAttribute("role") || say("svg-img-alt", e));
  all("[role=img] a, [role=img] button, button a, a a, button button").forEach((e) => say("nested-interactive", e));
  all("[tabindex]").forEach((e) => e.tabIndex > 0 && say("tabindex", e));
  all("[aria-labelledby],[aria-describedby],[aria-controls],[popovertarget]").forEach((e) =>
    ["aria-labelledby", "aria-describedby", "aria-controls", "popovertarget"].forEach((key) =>
      (e.getAttribute(key) || "").split(/\s+/).filter(Boolean).forEach((id) => document.getElementById(id) || say("aria-valid-attr-value", e))));
  all("ul,ol").filter((e) => !e.hasAttribute("role")).forEach((e) => [...e.children].every((c) => c.matches("li,script,template")) || say("list", e));
  all("li").forEach((e) => e.parentElement.matches("ul,ol") || say("listitem", e));
  all("[role=tablist]").forEach((e) => e.querySelector("[role=tab]") || say("aria-required-children", e));
  all("[role=tab]").forEach((e) => e.closest("[role=tablist]") || say("aria-required-parent", e));
  all("table").filter(seen).forEach((t) => t.querySelector("th[scope=col]") || say("td-has-header", t));
  all("th").filter(seen).forEach((e) => e.textContent.trim() || say("empty-table-header", e));
  all("*").filter(seen).filter((e) => /auto|scroll/.test(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth)
    .forEach((e) => e.tabIndex >= 0 || say("scrollable-region-focusable", e));
  all("a[href],button,summary,input:not([type=checkbox]),select").filter(seen).forEach((e) => {
    const r = e.getBoundingClientRect();
    if (getComputedStyle(e).display !== "inline" && e.tabIndex >= 0 && Math.min(r.width, r.height) < 24 && !e.closest("svg,p,li")) say("target-size", e);
  });

  const channels = (c) => (c.match(/[\d.]+/g) || []).map(Number);
  const light = (c) => channels(c).slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (channels(c)[3] !== 0) return c; } return "rgb(255, 255, 255)"; };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const looked = new Set();
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement;
    if (!node.data.trim() || looked.has(e) || e.closest("script,style,.only-read,.skip") || !seen(e)) continue;
    looked.add(e);
    const style = getComputedStyle(e);
    const a = light(e.closest("svg") ? style.fill : style.color), b = light(ground(e));
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < (large ? 3 : 4.5)) say("color-contrast", e);
  }
  return found;
})()
"""

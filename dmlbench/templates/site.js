"use strict";
(() => {
  const panels = [...document.querySelectorAll(".panel")];
  const tabs = [...document.querySelectorAll(".tabs a")];
  const boards = [];

  const isNumber = (text) => text !== "" && !Number.isNaN(Number(text));
  const compare = (a, b) => (isNumber(a) && isNumber(b) ? Number(a) - Number(b) : a.localeCompare(b));
  const words = ["model", "defense", "arch", "loss", "paper", "source", "status", "flags"];
  const OPERATORS = /(!=|<=|>=|≤|≥|=|<|>|~)/;
  const plain = (name) => name.toLowerCase().replace(/[^a-z0-9@+-]/g, "").replace(/-(?=.)/g, "");

  // One table with what searches, filters and sorts it.
  class Board {
    constructor(panel) {
      this.panel = panel;
      this.table = panel.querySelector("table.board");
      this.rows = [...this.table.querySelectorAll("tr.row")];
      this.heads = [...this.table.tHead.querySelectorAll("th[data-column]")];
      this.names = this.heads.map((h) => h.dataset.column);
      this.said = panel.querySelector(".said");
      this.form = panel.querySelector(".controls");
      this.sorted = "";
      this.called = {};
      this.heads.forEach((head) => {
        const title = head.querySelector(".sort").textContent;
        [head.dataset.column, title, title.replace(/ %$/, "")].forEach((name) => { this.called[plain(name)] = head.dataset.column; });
        head.querySelector(".sort").addEventListener("click", () => {
          const first = this.first(head);
          const other = first === "ascending" ? "descending" : "ascending";
          this.sort(head.dataset.column, head.getAttribute("aria-sort") === first ? other : first);
          keep();
        });
      });
      this.called.ers = this.called.ers || this.called.claimeders; // where nobody has measured anything
      if (this.form) {
        [this.search, this.status, this.filter] = [".search", ".status-of", ".filter"].map((c) => this.form.querySelector(c));
        [this.search, this.status, this.filter].forEach((control) => control.addEventListener("input", () => { this.narrow(); keep(); }));
        this.form.addEventListener("submit", (event) => event.preventDefault());
        this.form.querySelectorAll(".columns input").forEach((box) => box.addEventListener("change", () => this.column(box.value, box.checked)));
        this.narrow();
      }
    }

    value(row, name) {
      const at = this.names.indexOf(name);
      const found = at < 0 ? "" : row.cells[at].dataset.value;
      return found === "" && name === "ers" && row.dataset.status === "claimed" ? this.value(row, "claimed_ers") : found;
    }

    first(head) {
      return head.classList.contains("number") && head.dataset.column !== "rank" ? "descending" : "ascending";
    }

    sort(name, way) {
      const head = this.heads[this.names.indexOf(name)];
      if (!head) return;
      this.heads.forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", way);
      const sign = way === "ascending" ? 1 : -1;
      for (const body of this.table.tBodies) {
        const own = this.rows.filter((row) => row.parentNode === body);
        own.sort((p, q) => {
          const a = this.value(p, name), b = this.value(q, name);
          if (a === "" || b === "") return (a === "") - (b === "");
          return sign * compare(a, b);
        });
        body.append(...own);
      }
      this.sorted = (way === "descending" ? "-" : "") + name;
      this.tell();
    }

    // The tests that a filter asks for, or what of it is not understood.
    tests() {
      const found = [];
      let rest = this.filter.value.trim();
      while (rest) {
        const m = /^([^!=<>~≤≥]+?)\s*(!=|<=|>=|≤|≥|=|<|>|~)\s*("[^"]*"|[^\s,]+)[\s,]*/.exec(rest);
        if (!m) return `“${rest}” is no column, sign and value, as in ERS>=40`;
        const name = this.called[plain(m[1])];
        if (!name) return `there is no column “${m[1].trim()}” here`;
        const sign = { "≤": "<=", "≥": ">=" }[m[2]] || m[2];
        const wanted = m[3].replace(/^"|"$/g, "");
        if (sign !== "~" && this.heads[this.names.indexOf(name)].classList.contains("number") && !isNumber(wanted)) {
          return `“${m[1].trim()}” holds numbers, and “${wanted}” is none`;
        }
        found.push([name, sign, wanted]);
        rest = rest.slice(m[0].length);
      }
      return found;
    }

    passes(row, [name, sign, wanted]) {
      const found = this.value(row, name);
      if (found === "") return sign === "!=";
      if (sign === "~") return found.toLowerCase().includes(wanted.toLowerCase());
      const order = compare(found, wanted);
      return { "=": order === 0, "!=": order !== 0, "<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0 }[sign];
    }

    narrow() {
      const wanted = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const asked = this.tests();
      this.wrong = typeof asked === "string" ? asked : "";
      this.filter.setAttribute("aria-invalid", String(this.wrong !== ""));
      const kind = this.status.value;
      for (const row of this.rows) {
        const text = words.map((name) => this.value(row, name)).join(" ").toLowerCase();
        const right = kind === "" || row.dataset.status === kind || (kind === "measured" && row.dataset.status !== "claimed");
        row.hidden = !(right && wanted.every((w) => text.includes(w)) && (this.wrong ? [] : asked).every((t) => this.passes(row, t)));
      }
      this.tell();
    }

    tell() {
      if (!this.said) return;
      const shown = this.rows.filter((row) => !row.hidden).length;
      const head = this.heads[this.names.indexOf(this.sorted.replace("-", ""))];
      const order = head ? `, sorted by ${head.querySelector(".sort").textContent}, ${head.getAttribute("aria-sort")}` : "";
      this.said.classList.toggle("wrong", this.wrong !== "");
      this.said.textContent = this.wrong ? `The filter is not applied: ${this.wrong}.` : `${shown} of ${this.rows.length} rows${order}`;
    }

    column(name, on) {
      const at = this.names.indexOf(name);
      this.heads[at].hidden = !on;
      this.rows.forEach((row) => { row.cells[at].hidden = !on; });
    }

    // What of the view is not as at first, for the address.
    view() {
      const asked = this.form ? { q: this.search.value, status: this.status.value, filter: this.filter.value } : {};
      return Object.entries({ ...asked, sort: this.sorted }).filter(([, text]) => text);
    }

    show(view) {
      if (this.form) {
        this.search.value = view.get("q") || "";
        this.status.value = view.get("status") || "";
        this.filter.value = view.get("filter") || "";
        this.narrow();
      }
      const sort = view.get("sort");
      if (sort) this.sort(sort.replace("-", ""), sort.startsWith("-") ? "descending" : "ascending");
    }
  }

  const current = () => panels.findIndex((panel) => !panel.hidden);

  function keep() {
    const at = current();
    const view = boards[at] ? new URLSearchParams(boards[at].view()).toString() : "";
    history.replaceState(null, "", `#${panels[at].id}${view ? `&${view}` : ""}`);
  }

  function choose(at) {
    panels.forEach((panel, n) => { panel.hidden = n !== at; });
    tabs.forEach((tab, n) => {
      tab.setAttribute("aria-selected", String(n === at));
      tab.tabIndex = n === at ? 0 : -1;
    });
  }

  // The address names a tab and a view of it, or a row; anything else leaves the tab as it is.
  function follow() {
    const [id, ...view] = location.hash.slice(1).split("&");
    const target = id && document.getElementById(id);
    const at = target ? panels.findIndex((panel) => panel.contains(target)) : -1;
    if (at < 0) return;
    choose(at);
    if (target === panels[at]) boards[at].show(new URLSearchParams(view.join("&")));
    else target.scrollIntoView({ block: "center" });
  }

  if (panels.length) {
    panels.forEach((panel) => boards.push(new Board(panel)));
    tabs[0].closest("ul").setAttribute("role", "tablist");
    tabs.forEach((tab, n) => {
      tab.parentNode.setAttribute("role", "presentation");
      tab.setAttribute("role", "tab");
      tab.id = `tab-${panels[n].id}`;
      tab.setAttribute("aria-controls", panels[n].id);
      panels[n].setAttribute("role", "tabpanel");
      panels[n].setAttribute("aria-labelledby", tab.id);
      panels[n].removeAttribute("aria-label");
      tab.addEventListener("click", (event) => { event.preventDefault(); choose(n); keep(); });
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (event.key === " ") { event.preventDefault(); tab.click(); }
        if (!step) return;
        const next = (n + step + tabs.length) % tabs.length;
        choose(next);
        keep();
        tabs[next].focus();
      });
    });
    addEventListener("hashchange", follow);
    choose(0);
    follow();
  }

  // A meaning stands below the mark that asks for it.
  document.querySelectorAll("[popovertarget]").forEach((button) => button.addEventListener("click", () => {
    const meaning = document.getElementById(button.getAttribute("popovertarget"));
    const at = button.getBoundingClientRect();
    meaning.style.margin = "0";
    meaning.style.inset = "auto";
    meaning.style.top = `${Math.min(at.bottom + 6, innerHeight - 120)}px`;
    meaning.style.left = `${Math.max(8, Math.min(at.left, innerWidth - 530))}px`;
  }));

  document.querySelectorAll("pre").forEach((block) => {
    const text = block.textContent;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(block);
        button.textContent = "Selected";
      }
    });
    block.prepend(button);
  });
})();

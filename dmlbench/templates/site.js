"use strict";
(() => {
  const table = document.getElementById("board");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.querySelectorAll("th[data-column]")];
  const names = heads.map((h) => h.dataset.column);
  const said = document.getElementById("said");
  const search = document.getElementById("search");
  const status = document.getElementById("status");
  const filter = document.getElementById("filter");
  let sorted = "";

  const words = ["model", "defense", "arch", "loss", "paper", "source", "status", "flags"];

  const value = (row, name) => row.cells[names.indexOf(name)].dataset.value;
  const isNumber = (text) => text !== "" && !Number.isNaN(Number(text));

  function compare(a, b) {
    return isNumber(a) && isNumber(b) ? Number(a) - Number(b) : a.localeCompare(b);
  }

  function sort(head) {
    const name = head.dataset.column;
    const first = head.classList.contains("number") && name !== "rank" ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const way = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    rows.sort((p, q) => {
      const a = value(p, name), b = value(q, name);
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * compare(a, b);
    });
    body.append(...rows);
    sorted = `, sorted by ${head.textContent.trim()}, ${way}`;
    tell();
  }

  function tests() {
    const found = [];
    for (const part of filter.value.split(/\s+/).filter(Boolean)) {
      const m = /^([a-z0-9_]+)(!=|<=|>=|=|<|>|~)(.+)$/i.exec(part);
      if (!m || !names.includes(m[1])) return null;
      found.push(m.slice(1));
    }
    return found;
  }

  function passes(row, [name, sign, wanted]) {
    const found = value(row, name);
    if (found === "") return sign === "!=";
    if (sign === "~") return found.toLowerCase().includes(wanted.toLowerCase());
    const order = compare(found, wanted);
    return { "=": order === 0, "!=": order !== 0, "<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0 }[sign];
  }

  function tell() {
    const shown = rows.filter((row) => !row.hidden).length;
    said.textContent = `${shown} of ${rows.length} rows${sorted}`;
  }

  function narrow() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const asked = tests();
    filter.setAttribute("aria-invalid", String(asked === null));
    for (const row of rows) {
      const text = words.map((name) => value(row, name)).join(" ").toLowerCase();
      const kind = status.value;
      const right = kind === "" || row.dataset.status === kind || (kind === "measured" && row.dataset.status !== "claimed");
      row.hidden = !(right && wanted.every((w) => text.includes(w)) && (asked || []).every((t) => passes(row, t)));
    }
    tell();
  }

  function column(name, on) {
    const at = names.indexOf(name);
    heads[at].hidden = !on;
    rows.forEach((row) => { row.cells[at].hidden = !on; });
  }

  heads.forEach((head) => head.firstElementChild.addEventListener("click", () => sort(head)));
  [search, status, filter].forEach((control) => control.addEventListener("input", narrow));
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  document.querySelectorAll(".columns input").forEach((box) => box.addEventListener("change", () => column(box.value, box.checked)));
  narrow();
})();

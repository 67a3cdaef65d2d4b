"use strict";
(() => {
  const config = JSON.parse(document.getElementById("themes").textContent);
  const root = document.documentElement;
  const media = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme || (media.matches ? "dark" : "light")) === "dark";

  // -- charts: a picture at first, alive when it comes near; nothing is drawn that nobody looks at.
  const drawn = new Map();
  async function draw(figure) {
    const before = drawn.get(figure);
    if (before && before.dark === dark()) return;
    drawn.set(figure, { dark: dark() });
    const live = figure.querySelector(".live");
    const spec = JSON.parse(document.getElementById(figure.dataset.spec).textContent);
    const actions = { export: true, source: false, compiled: false, editor: false };
    try {
      if (before && before.view) before.view.finalize();
      const theme = { ...config[dark() ? "dark" : "light"], background: "transparent" };
      const result = await vegaEmbed(live, spec, { ast: true, renderer: "svg", actions, config: theme });
      drawn.get(figure).view = result.view;
      live.hidden = false;
      figure.querySelector("img").style.display = "none";
      figure.dataset.drawn = dark() ? "dark" : "light";
    } catch (error) {
      // The picture stays.
      console.error(error);
    }
  }
  const figures = [...document.querySelectorAll("figure.chart")];
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
  }, { rootMargin: "400px" });
  figures.forEach((figure) => near.observe(figure));

  function retheme() {
    for (const figure of drawn.keys()) draw(figure);
  }
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    retheme();
  });
  media.addEventListener("change", retheme);

  // -- tables: sorted by their headings, filtered by words, a page at a time.
  const PAGE = 100;
  function readRow(tr) {
    return {
      kind: tr.className,
      cells: [...tr.cells].map((cell) => {
        const small = cell.querySelector("small");
        const more = small ? small.textContent : "";
        const text = small ? cell.textContent.slice(0, -more.length || undefined) : cell.textContent;
        return [text, "key" in cell.dataset ? Number(cell.dataset.key) : null, more];
      }),
    };
  }
  function makeTable(box) {
    const body = box.querySelector("tbody");
    const heads = [...box.querySelectorAll("thead th")];
    const rest = box.querySelector("script.rows");
    const all = rest ? JSON.parse(rest.textContent) : [...body.rows].map(readRow);
    const input = box.querySelector("input[type=search]");
    const count = box.querySelector(".count");
    const [back, on] = [box.querySelector(".back"), box.querySelector(".on")];
    let shown = all, first = 0;
    function cellOf(tr, cell, index) {
      const td = document.createElement(index ? "td" : "th");
      if (!index) td.scope = "row";
      td.textContent = cell[0];
      if (heads[index].classList.contains("number")) td.className = "number";
      if (cell[2]) td.appendChild(Object.assign(document.createElement("small"), { textContent: cell[2] }));
      tr.appendChild(td);
    }
    function render() {
      body.replaceChildren(...shown.slice(first, first + PAGE).map((row) => {
        const tr = document.createElement("tr");
        tr.className = row.kind;
        row.cells.forEach((cell, index) => cellOf(tr, cell, index));
        return tr;
      }));
      if (!count) return;
      const last = Math.min(first + PAGE, shown.length);
      const range = shown.length > PAGE ? `rows ${first + 1} to ${last} of ` : "";
      count.textContent = `${range}${shown.length}` + (shown.length < all.length ? ` (of ${all.length})` : "") + " rows";
      back.hidden = on.hidden = shown.length <= PAGE;
      back.disabled = first === 0;
      on.disabled = last === shown.length;
    }
    const compare = (index, down) => (a, b) => {
      const [x, y] = [a.cells[index], b.cells[index]];
      // What is missing comes last, whichever way.
      if (x[0] === "-" || y[0] === "-") return (x[0] === "-") - (y[0] === "-");
      const order = x[1] !== null && y[1] !== null ? x[1] - y[1] : x[0].localeCompare(y[0], "en", { numeric: true });
      return down ? -order : order;
    };
    heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      all.sort(compare(index, down));
      filter();
    }));
    function filter() {
      const words = input ? input.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
      const text = (row) => row.cells.map((cell) => cell[0]).join(" ").toLowerCase();
      shown = words.length ? all.filter((row) => words.every((word) => text(row).includes(word))) : all;
      first = 0;
      render();
    }
    if (input) input.addEventListener("input", filter);
    if (back) back.addEventListener("click", () => { first = Math.max(0, first - PAGE); render(); });
    if (on) on.addEventListener("click", () => { first += PAGE; render(); });
    if (all.length > PAGE || count) render();
  }
  document.querySelectorAll(".tabular").forEach(makeTable);

  // -- every score matrix, one at a time.
  const source = document.getElementById("explore-data");
  if (source) {
    const data = JSON.parse(source.textContent);
    const [method, scorer, box] = ["method", "scorer", "matrix"].map((id) => document.getElementById(`explore-${id}`));
    data.methods.forEach((m, i) => method.add(new Option(m.name, i)));
    data.scorers.forEach((s, i) => scorer.add(new Option(s.name, i)));
    const stops = [[243, 247, 251], [143, 193, 222], [29, 108, 177], [8, 48, 107]];
    const mix = (share) => {
      const at = Math.min(share * 3, 2.999), i = Math.floor(at), t = at - i;
      return `rgb(${stops[i].map((c, k) => Math.round(c + t * (stops[i + 1][k] - c))).join(",")})`;
    };
    const element = (kind, text, scope) => {
      const found = document.createElement(kind);
      found.textContent = text;
      if (scope) found.scope = scope;
      return found;
    };
    function show() {
      const m = data.methods[method.value], s = data.scorers[scorer.value], R = m.R[s.name];
      if (!R) return box.replaceChildren(element("p", "This method has no such score."));
      const table = element("table", "");
      table.className = "matrix";
      const head = table.createTHead().insertRow();
      ["after", ...m.columns].forEach((name) => head.appendChild(element("th", name, "col")));
      const body = table.createTBody();
      const log = s.log ? Math.log : (v) => v;
      const [low, high] = [log(s.low), log(s.high)];
      R.forEach((row, k) => {
        const tr = body.insertRow();
        tr.appendChild(element("th", k ? m.columns[k - 1] : "base", "row"));
        row.forEach((value, j) => {
          const td = element("td", value === null ? "-" : value.toFixed(s.digits));
          if (value !== null) {
            const up = high > low ? (log(value) - low) / (high - low) : 0.5;
            const share = s.higher ? up : 1 - up;
            td.style.background = mix(Math.min(1, Math.max(0, share)));
            td.style.color = share > 0.6 ? "#fff" : "#1a1a1a";
          }
          if (k === j + 1 && j < m.domains) td.className = "learned";
          tr.appendChild(td);
        });
      });
      box.replaceChildren(table);
    }
    method.addEventListener("change", show);
    scorer.addEventListener("change", show);
    show();
  }
})();

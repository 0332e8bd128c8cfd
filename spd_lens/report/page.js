"use strict";
// The index of subcomponents and the open card. Token strings are data: they enter the page as text nodes and attributes, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("cards").textContent);
  const place = document.getElementById("subcomponents");
  const cards = new Map(data.cards.map((card) => [card.name, card]));
  const COLUMNS = [
    { title: "subcomponent", key: (c) => [c.layer, c.order, c.index], show: (c) => c.name },
    { title: "active at", hint: "share of the positions with g > " + data.threshold, key: (c) => c.share, show: (c) => percent(c.share) },
    { title: "mean g", hint: "mean causal importance over all positions", key: (c) => c.mean, show: (c) => short(c.mean) },
    { title: "cut costs", hint: "KL(original ‖ without it), nats per compared output", key: (c) => c.cost, show: (c) => short(c.cost) },
    { title: "reads", words: true, key: (c) => top(c.reads), show: (c) => top(c.reads) },
    { title: "writes", words: true, key: (c) => top(c.writes), show: (c) => top(c.writes) },
    { title: "strongest context", words: true, key: (c) => sample(c), show: (c) => sample(c) },
  ];
  let sorted = { column: 3, down: true };
  let open = null;

  function make(tag, attributes = {}, ...children) {
    const element = document.createElementNS(SVG.has(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml", tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }
  const SVG = new Set(["svg", "rect", "line", "text", "title"]);
  const short = (x) => (x === null ? "–" : x === 0 ? "0" : Math.abs(x) >= 0.001 && Math.abs(x) < 10000 ? String(+x.toPrecision(3)) : x.toExponential(1));
  const percent = (x) => String(+(100 * x).toPrecision(3)) + " %";
  const top = (pairs) => pairs.slice(0, 3).map((pair) => pair[0]).join(", ");
  const sample = (c) => (c.contexts.length ? c.contexts[0].labels.slice(Math.max(0, c.contexts[0].at - 5), c.contexts[0].at + 1).join(" ") : "");
  const words = (c) => [c.name, c.site, ...c.reads.map((p) => p[0]), ...c.writes.map((p) => p[0]), ...c.contexts.flatMap((x) => x.labels)].join(" ").toLowerCase();
  const compare = (a, b) => {
    if (Array.isArray(a)) { for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return a[i] - b[i]; return 0; }
    return typeof a === "string" ? a.localeCompare(b) : a - b;
  };

  // --- the index ---

  const search = make("input", { type: "search", placeholder: "search names and tokens ( / )", "aria-label": "search subcomponents", oninput: fill });
  const count = make("output", { "aria-live": "polite" });
  const body = make("tbody", { onkeydown: move });
  const heads = COLUMNS.map((column, i) =>
    make("th", { scope: "col", class: column.words ? "words" : null, title: column.hint ?? null },
      make("button", { type: "button", onclick: () => sort(i) }, column.title)));
  const panel = make("article", { class: "card", id: "card", hidden: "" });
  place.append(make("div", { class: "tools" }, search, count),
    make("div", { class: "index" }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body)), panel);

  const rows = new Map(data.cards.map((card) => [card.name, { text: words(card), row: row(card) }]));

  function row(card) {
    const cells = COLUMNS.map((column, i) => {
      const shown = column.show(card);
      const content = i === 0 ? make("a", { href: "#" + encodeURIComponent(card.name) }, shown) : make("bdi", {}, shown);
      return make("td", { class: column.words ? "words" : null, title: column.words ? shown : null }, content);
    });
    const target = "#" + encodeURIComponent(card.name);
    return make("tr", { onclick: (event) => { if (location.hash === target) follow(); else if (event.target.tagName !== "A") location.hash = target; } }, ...cells);
  }

  function fill() {
    const whole = search.value.trim().toLowerCase(), asked = whole.split(/\s+/).filter(Boolean);
    const named = data.cards.filter((card) => card.name.toLowerCase() === whole);
    const { key } = COLUMNS[sorted.column];
    const shown = named.length ? named : data.cards.filter((card) => asked.every((word) => rows.get(card.name).text.includes(word)));
    shown.sort((a, b) => (sorted.down ? -1 : 1) * compare(key(a), key(b)));
    body.replaceChildren(...shown.map((card) => rows.get(card.name).row));
    heads.forEach((head, i) => (i === sorted.column ? head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
    count.textContent = shown.length + " of " + data.cards.length + " subcomponents";
  }

  function sort(column) {
    const first = typeof COLUMNS[column].key(data.cards[0]) === "number"; // figures: largest first
    sorted = { column, down: column === sorted.column ? !sorted.down : first };
    fill();
  }

  function move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || event.target.tagName !== "A") return;
    const links = [...body.querySelectorAll("a")];
    links[links.indexOf(event.target) + step]?.focus();
    event.preventDefault();
  }

  // --- one card ---

  function bars(title, pairs, unit) {
    const largest = Math.max(...pairs.map((pair) => Math.abs(pair[1])), 1e-30);
    return make("div", {}, make("h3", {}, title), make("p", { class: "note" }, unit),
      ...pairs.map(([label, value]) => {
        const width = (50 * Math.abs(value)) / largest;
        const style = `width: ${width}%; ${value < 0 ? "right" : "left"}: 50%`;
        return make("div", { class: "bar", title: label + ": " + short(value) }, make("bdi", { class: "label" }, label),
          make("span", { class: "track" }, make("span", { class: "fill " + (value < 0 ? "down" : "up"), style })), make("span", { class: "value" }, short(value)));
      }));
  }

  function density(counts) {
    const [width, height, base, left] = [260, 96, 78, 42];
    const most = Math.log10(Math.max(...counts) + 1) || 1;
    const step = (width - left - 6) / counts.length;
    const columns = counts.map((n, i) => {
      const tall = (68 * Math.log10(n + 1)) / most;
      const from = (i / counts.length).toFixed(2), to = ((i + 1) / counts.length).toFixed(2);
      return make("rect", { x: left + i * step, y: base - tall, width: step - 1, height: tall, fill: i / counts.length >= data.threshold ? "#0072B2" : "#8a8a8a" },
        make("title", {}, `g ${from} to ${to}: ${n} positions`));
    });
    return make("div", {}, make("h3", {}, "importance g"), make("p", { class: "note" }, "positions by g (log scale); blue: active, g > " + data.threshold),
      make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "histogram of importance over positions", width: "100%", style: "max-width: 320px" },
        ...columns, make("line", { x1: left, x2: width - 6, y1: base, y2: base, stroke: "#57606a" }),
        ...[0, 0.5, 1].map((x) => make("text", { x: left + x * (width - left - 6), y: base + 13, "text-anchor": "middle" }, String(x))),
        make("text", { x: left - 4, y: 18, "text-anchor": "end" }, String(Math.max(...counts)))));
  }

  function partners(card) {
    const lists = [["reads what these write", card.earlier], ["written for these to read", card.later], ["matched with", card.matched]].filter(([, list]) => list.length);
    return make("div", { class: "partners" }, make("h3", {}, "partners"), make("p", { class: "note" }, "cosine of one's u and the other's v (Q and K: of both u, in their best head): a lead, not a proof"),
      ...(lists.length ? lists.map(([title, list]) => make("div", {}, make("b", {}, title), make("ul", {}, ...list.map(([name, cosine]) =>
        make("li", {}, cards.has(name) ? make("a", { href: "#" + encodeURIComponent(name) }, name) : name, " " + (cosine > 0 ? "+" : "−") + Math.abs(cosine).toFixed(2)))))) : ["none among these"]));
  }

  function contexts(card) {
    const lines = card.contexts.map((context) => {
      const limit = Math.max(...context.inner.map(Math.abs), 1e-30);
      return make("li", {}, make("span", { class: "where", title: "sequence : position" }, context.sequence + ":" + context.position),
        ...context.labels.map((label, i) => {
          const a = context.inner[i], rgb = a > 0 ? "0,114,178" : "213,94,0";
          const classes = [context.g[i] > data.threshold ? "on" : "", i === context.at ? "here" : ""].join(" ").trim();
          return make("bdi", { class: classes || null, style: `background: rgba(${rgb},${((0.45 * Math.abs(a)) / limit).toFixed(2)})`, title: `${label}: v·x ${short(a)}, g ${context.g[i].toFixed(2)}` }, label);
        }));
    });
    return make("div", { class: "contexts" }, make("h3", {}, "where it reads most"), make("p", { class: "note" }, "colour: v·x (blue up, orange down); underlined: active; boxed: the place itself; sequence:position before it"),
      lines.length ? make("ol", {}, ...lines) : make("p", {}, "active nowhere in these tokens"));
  }

  function show(card) {
    const unit = { "residual stream": ["v·W_E of a token's vector", "u·W_U, logits of a token"], heads: ["share of the squared norm", "share of the squared norm"], neurons: ["entry of the vector", "entry of the vector"] };
    panel.replaceChildren(
      make("header", {}, make("h3", { tabindex: "-1", id: "card-name" }, card.name), make("span", {}, card.site),
        make("span", { class: "note" }, `active at ${percent(card.share)} of the positions, mean g ${short(card.mean)}; cutting it alone costs ${short(card.cost)} nats per output`),
        make("button", { type: "button", onclick: close }, "close")),
      make("div", { class: "panels" }, bars("reads: " + card.reads_in, card.reads, unit[card.reads_in][0]), bars("writes: " + card.writes_in, card.writes, unit[card.writes_in][1]), density(card.histogram), partners(card)),
      contexts(card));
    panel.hidden = false;
  }

  function close() {
    history.replaceState(null, "", location.pathname + location.search);
    panel.hidden = true;
    const link = open && rows.get(open)?.row.querySelector("a");
    mark(null);
    (link?.isConnected ? link : search).focus();  // a row may be filtered out
  }

  function mark(name) {
    if (open) rows.get(open)?.row.classList.remove("open");
    open = name;
    if (open) rows.get(open)?.row.classList.add("open");
  }

  function follow() {
    let name = "";
    try { name = decodeURIComponent(location.hash.slice(1)); } catch { /* somebody's own idea of an address */ }
    const card = cards.get(name);
    if (!card) { if (open && !name) close(); return; }
    show(card);
    mark(card.name);
    panel.scrollIntoView({ block: "nearest" });
    document.getElementById("card-name").focus({ preventScroll: true });
  }

  addEventListener("hashchange", follow);
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.ctrlKey && !event.metaKey && !event.altKey && document.activeElement !== search) { search.focus(); event.preventDefault(); }
    if (event.key === "Escape") { if (document.activeElement === search && search.value) { search.value = ""; fill(); } else if (open) close(); }
  });
  fill();
  follow();
})();

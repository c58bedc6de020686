"use strict";
// The explorer of all test examples. Texts are data: they become text nodes, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const explorer = $("explorer"), list = $("list"), detail = $("detail"), count = $("count");
  const several = data.variants.length > 2;
  const state = { metric: data.decide, variant: 1, shown: [], at: 0 };

  const make = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const points = (value) => value.toFixed(1);
  const signed = (value) => {
    const size = Math.abs(value), text = size >= 0.1 || size === 0 ? size.toFixed(1) : size.toFixed(2);
    return (value < 0 ? "−" : "+") + text;
  };
  const number = (value) => value.toLocaleString("en");

  // Each example's facts, computed once.
  data.examples.forEach((one, i) => {
    one.at = i;
    one.source = data.sources[one.s];
    one.long = { source: one.w[0], reference: one.w[1], base: one.v[0].w };
  });
  const score = (one, variant) => one.v[variant].p[state.metric];
  const gain = (one) => {
    const found = score(one, state.variant) - score(one, 0);
    return Math.abs(found) < 0.005 ? 0 : found;
  };
  const length = (one, of) => (of === "tuned" ? one.v[state.variant].w : one.long[of]);
  const haystack = (one) => {
    if (one.hay === undefined) {
      const history = (one.h || []).map((message) => message[1]);
      one.hay = [one.id, one.source, ...history, ...one.r, ...one.v.map((v) => v.t)].join("\n").normalize("NFKC").toLowerCase();
    }
    return one.hay;
  };

  const ORDERS = {
    gain: (a, b) => gain(b) - gain(a),
    loss: (a, b) => gain(a) - gain(b),
    change: (a, b) => Math.abs(gain(b)) - Math.abs(gain(a)),
    tuned: (a, b) => score(b, state.variant) - score(a, state.variant),
    base: (a, b) => score(b, 0) - score(a, 0),
    longest: (a, b) => length(b, $("of").value) - length(a, $("of").value),
    shortest: (a, b) => length(a, $("of").value) - length(b, $("of").value),
    id: (a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : 0),
    order: () => 0,
  };
  const OUTCOMES = {
    all: () => true,
    higher: (one) => gain(one) > 0,
    equal: (one) => gain(one) === 0,
    lower: (one) => gain(one) < 0,
    capped: (one) => one.v[0].c || one.v[state.variant].c,
  };

  function filter() {
    const wanted = $("search").value.normalize("NFKC").toLowerCase().split(/\s+/).filter(Boolean);
    const aspect = $("aspect") ? $("aspect").value : "";
    const of = $("of").value, least = $("least").value, most = $("most").value;
    const outcome = OUTCOMES[$("outcome").value];
    state.shown = data.examples.filter((one) => {
      const long = length(one, of);
      return (aspect === "" || one.a === Number(aspect)) && outcome(one) &&
        (least === "" || long >= Number(least)) && (most === "" || long <= Number(most)) &&
        wanted.every((word) => haystack(one).includes(word));
    });
    const order = ORDERS[$("sort").value];
    state.shown.sort((a, b) => order(a, b) || a.at - b.at);
  }

  function summary() {
    const n = state.shown.length, all = data.examples.length;
    if (!n) return `0 of ${number(all)} examples`;
    const mean = (f) => state.shown.reduce((sum, one) => sum + f(one), 0) / n;
    const base = mean((one) => score(one, 0)), tuned = mean((one) => score(one, state.variant));
    const sides = [1, 0, -1].map((side) => state.shown.filter((one) => Math.sign(gain(one)) === side).length);
    return `${number(n)} of ${number(all)} examples · ${data.metrics[state.metric]} of each alone, mean ` +
      `${points(base)} → ${points(tuned)} (${signed(tuned - base)}) · ` +
      `${number(sides[0])} higher, ${number(sides[1])} equal, ${number(sides[2])} lower`;
  }

  function fill() {
    const most = Math.max(1, ...data.examples.map((one) => Math.abs(gain(one))));
    list.replaceChildren(...state.shown.map((one, i) => {
      const by = gain(one), bar = make("i", by > 0 ? { class: "up" } : {});
      const width = 50 * Math.abs(by) / most;
      bar.style.left = `${by > 0 ? 50 : 50 - width}%`;
      bar.style.width = `${width}%`;
      return make("div", { role: "option", id: `option-${i}`, class: "option", "aria-selected": "false" },
        make("span", { dir: "auto" }, one.id), make("span", { class: "gain" }, signed(by)),
        make("span", { class: "bar", "aria-hidden": "true" }, bar));
    }));
    if (!state.shown.length) list.append(make("p", { class: "empty" }, "No example fits: change the filters."));
    count.textContent = summary();
  }

  function select(i, scroll) {
    const before = $(`option-${state.at}`);
    if (before) before.setAttribute("aria-selected", "false");
    if (!state.shown.length) {
      list.removeAttribute("aria-activedescendant");
      detail.hidden = true;
      return;
    }
    state.at = Math.min(Math.max(i, 0), state.shown.length - 1);
    const option = $(`option-${state.at}`);
    option.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", option.id);
    if (scroll) {
      // Not scrollIntoView, which would move the whole page as well.
      const top = option.offsetTop - list.offsetTop, bottom = top + option.offsetHeight;
      if (top < list.scrollTop) list.scrollTop = top;
      if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
    }
    detail.hidden = false;
    show(state.shown[state.at]);
  }

  // Runs are [gap, length, level, ...]; one level for each character of the text.
  function levels(text, runs) {
    const found = new Uint8Array(text.length);
    let at = 0;
    for (let i = 0; i < runs.length; i += 3) {
      at += runs[i];
      found.fill(runs[i + 2], at, at + runs[i + 1]);
      at += runs[i + 1];
    }
    return found;
  }

  // A text in pieces of equal classes.
  function marked(text, classes) {
    const node = make("p", { class: "text", dir: "auto" });
    if (!text) node.append(make("em", {}, "(empty)"));
    for (let from = 0, to = 1; from < text.length; from = to, to += 1) {
      while (to < text.length && classes(to) === classes(from)) to += 1;
      const piece = text.slice(from, to), name = classes(from);
      node.append(name ? make("mark", { class: name }, piece) : piece);
    }
    return node;
  }

  function output(variant, one, kind) {
    const written = one.v[variant], level = levels(written.t, written.m);
    const long = written.w;
    const card = make("div", { class: `card of-${kind}` },
      make("div", { class: "label" }, make("h4", {}, data.variants[variant]),
        make("span", {}, `${data.metrics[state.metric]} ${points(score(one, variant))} · ${number(long)} word${long === 1 ? "" : "s"}, ${number(written.n)} token${written.n === 1 ? "" : "s"}`)),
      marked(written.t, (i) => (level[i] ? `m${level[i]}` : "")));
    if (written.c) card.append(make("span", { class: "badge" }, "stopped by the cap"));
    return card;
  }

  function reference(one) {
    const base = one.v[0], tuned = one.v[state.variant];
    const long = one.w.slice(1);
    const card = make("div", { class: "card of-reference" },
      make("div", { class: "label" }, make("h4", {}, one.r.length > 1 ? `${one.r.length} references` : "reference"),
        make("span", {}, `${long.map(number).join(" / ")} words`)));
    one.r.forEach((text, i) => {
      const b = levels(text, (base.b || 0) === i ? base.k : []), t = levels(text, (tuned.b || 0) === i ? tuned.k : []);
      card.append(marked(text, (at) => [b[at] && `b${b[at]}`, t[at] && `t${t[at]}`].filter(Boolean).join(" ")));
    });
    return card;
  }

  function scores(one) {
    const head = make("tr", {}, make("th", { scope: "col" }, "this example"),
      ...data.metrics.map((label) => make("th", { scope: "col" }, label)));
    const rows = [0, state.variant].map((variant) => make("tr", {}, make("th", { scope: "row" }, data.variants[variant]),
      ...one.v[variant].p.map((value) => make("td", {}, points(value)))));
    const differences = make("tr", {}, make("th", { scope: "row" }, "difference"),
      ...one.v[0].p.map((value, i) => make("td", {}, signed(one.v[state.variant].p[i] - value))));
    const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows, differences));
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Scores of this example" }, table);
  }

  let open = true;
  function show(one) {
    const step = (by, label, text) => {
      const button = make("button", { type: "button", "aria-label": label }, text);
      button.addEventListener("click", () => {
        select(state.at + by, true);
        detail.querySelector(`[aria-label="${label}"]`).focus();
      });
      return button;
    };
    const title = make("h3", { id: "title", tabindex: "-1" }, make("bdi", {}, one.id));
    const aspect = data.aspects.length > 1 ? ` · ${data.aspects[one.a]}` : "";
    const source = make("details", {}, make("summary", {}, `Source, ${number(one.long.source)} words`));
    source.open = open;
    source.addEventListener("toggle", () => { open = source.open; });
    for (const [role, content] of one.h || []) {
      source.append(make("p", { class: "text", dir: "auto" }, make("b", {}, `${role}: `), content));
    }
    source.append(make("p", { class: "text", dir: "auto" }, one.source));
    const mark = (name, text) => make("span", {}, make("mark", { class: name }, "word"), ` ${text}`);
    detail.replaceChildren(
      make("div", { class: "detail-head" },
        make("div", {}, title, make("p", {}, `${number(state.at + 1)} of ${number(state.shown.length)}${aspect} · ` +
          `${data.metrics[state.metric]} ${points(score(one, 0))} → ${points(score(one, state.variant))} (${signed(gain(one))})`)),
        make("div", {}, step(-1, "previous example", "↑ previous"), " ", step(1, "next example", "↓ next"))),
      make("div", { class: "side" }, reference(one), output(0, one, "base"), output(state.variant, one, "tuned")),
      make("p", { class: "legend" },
        make("span", { class: "of-base" }, make("mark", { class: "m1" }, "word"), " shared by base"),
        mark("t1", `shared by ${several ? data.variants[state.variant] : "tuned"}`),
        make("span", {}, make("mark", { class: "t2" }, "two words"), " side by side in both")),
      source, scores(one));
    if (location.hash.startsWith("#example=") || touched) {
      history.replaceState(null, "", `#example=${encodeURIComponent(one.id)}`);
    }
  }

  let touched = false;
  function refresh(keep) {
    const before = state.shown[state.at];
    filter();
    fill();
    list.scrollTop = 0;
    select(keep ? Math.max(0, state.shown.indexOf(before)) : 0, true);
  }

  // Controls: lists of choices come from the data.
  const choices = (id, pairs) => $(id).append(...pairs.map(([value, label]) => make("option", { value }, label)));
  if ($("aspect")) choices("aspect", data.aspects.map((name, i) => [i, name || "(none)"]));
  choices("metric", data.metrics.map((label, i) => [i, label]));
  $("metric").value = state.metric;
  if (several) {
    choices("seed", data.variants.slice(1).map((name, i) => [i + 1, name]));
    $("seed").addEventListener("change", () => { state.variant = Number($("seed").value); refresh(true); });
  }
  $("metric").addEventListener("change", () => { state.metric = Number($("metric").value); refresh(true); });
  for (const id of ["sort", "outcome", "of", "aspect"]) if ($(id)) $(id).addEventListener("change", () => refresh(false));
  for (const id of ["search", "least", "most"]) $(id).addEventListener("input", () => refresh(false));
  $("restart").addEventListener("click", () => {
    $("form").reset();
    state.metric = data.decide;
    state.variant = 1;
    $("metric").value = state.metric;
    refresh(false);
  });
  $("form").addEventListener("submit", (event) => event.preventDefault());

  list.addEventListener("click", (event) => {
    const option = event.target.closest(".option");
    if (option) { touched = true; select(Number(option.id.slice(7)), false); }
  });
  const page = () => Math.max(1, Math.floor(list.clientHeight / 48) - 1);
  const MOVES = {
    ArrowDown: () => state.at + 1, ArrowUp: () => state.at - 1, j: () => state.at + 1, k: () => state.at - 1,
    PageDown: () => state.at + page(), PageUp: () => state.at - page(), Home: () => 0, End: () => state.shown.length - 1,
  };
  // Letters act inside of the explorer alone, where they cannot surprise.
  explorer.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
    const inList = event.target === list;
    if (event.key === "/") {
      $("search").focus();
    } else if (event.key === "Enter" && inList) {
      $("title").focus();
    } else if (MOVES[event.key] && (inList || event.key === "j" || event.key === "k")) {
      touched = true;
      select(MOVES[event.key](), true);
      if (!inList) list.focus({ preventScroll: true });
    } else {
      return;
    }
    event.preventDefault();
  });

  // What is folded on the screen is printed.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details.print:not([open])")];
    folded.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((one) => { one.open = false; }));

  document.querySelectorAll("[data-copy]").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const text = $(button.dataset.copy).innerText;
      try {
        await navigator.clipboard.writeText(text);
        $("said").textContent = "copied";
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren($(button.dataset.copy));
        $("said").textContent = "selected: copy it with your keyboard";
      }
    });
  });

  const save = (name, rows) => {
    // A text that a spreadsheet would take for a formula is marked as text.
    const plain = (value) => (typeof value === "string" ? value.replace(/^(?=[=+\-@\t\r])/, "'") : String(value));
    const cell = (value) => `"${plain(value).replaceAll('"', '""')}"`;
    const text = rows.map((row) => row.map(cell).join(",") + "\n").join("");
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: `${name}.csv` });
    link.click();
    URL.revokeObjectURL(link.href);
  };
  document.querySelectorAll("[data-csv]").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", () => {
      const rows = [...$(button.dataset.csv).rows];
      save(button.dataset.csv, rows.map((row) => [...row.cells].map((cell) => cell.innerText.replace(/\s+/g, " ").trim())));
    });
  });
  $("save").addEventListener("click", () => {
    const head = ["id", "aspect", "variant", "words", "tokens", "capped", ...data.metrics, "text"];
    const rows = state.shown.flatMap((one) => one.v.map((v, i) => [one.id, data.aspects[one.a], data.variants[i],
      v.w, v.n, v.c || 0, ...v.p, v.t]));
    save("examples", [head, ...rows]);
  });

  explorer.hidden = false;
  filter();
  fill();
  let start = 0;
  if (location.hash.startsWith("#example=")) {
    let wanted = "";
    try { wanted = decodeURIComponent(location.hash.slice(9)); } catch { /* no address of this page's */ }
    start = Math.max(0, state.shown.findIndex((one) => one.id === wanted));
    if (wanted) explorer.scrollIntoView();
  }
  select(start, true);
})();

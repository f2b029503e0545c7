"use strict";
// Draws the page from its JSON. Strings become text nodes and properties only, so that nothing in them is markup.

const found = JSON.parse(document.getElementById("content").textContent);
const samples = new Map(Object.entries(found.samples || {}));
const queries = found.queries || [];
const SIDES = ["proponents", "opponents"];
const PAGE = 40;
const MOST_CHOICES = 60;
const HUBS = 8;
const LUCK = 0.5;
const LONGEST = 22;
const HUB_SHARE = 0.5;
const shown = { search: "", columns: new Map(), sides: new Set(SIDES), hidden: new Set(), pages: 1 };
// The live page replaces these: how an explanation, a query's group totals, and what its halves share are had, and what
// can be done with a query.
const source = {
  explain: (query, estimator, side, result) => result.explanation,
  groups: (query, column) => query.groups[column],
  shared: (query) => query.shared || {},
  tools: () => [],
};

const at = (id) => document.getElementById(id);

function h(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("aria")) element.setAttribute(key.replace(/^aria(?=[A-Z])/, "aria-").toLowerCase(), value);
    else if (key === "for" || key === "role" || key === "scope") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const number = (x) => (x === null || x === undefined ? "–" : x === 0 ? "0" : Number(x.toPrecision(3)).toString());
const signed = (x) => (x > 0 ? "+" : "") + number(x);
const percent = (x) => `${Math.round(100 * x)} %`;
const names = () => [...new Set(queries.flatMap((query) => Object.keys(query.lists)))];
const valuesOf = (id) => samples.get(id)?.columns || {};

// The part of each name that tells it from all others: the end of a path, without what all share.
function shortNames(ids) {
  const bare = ids.map((id) => id.replace(/(?<=[^/])\.[a-z]\w{1,4}$/i, "").split("/"));
  const short = new Map();
  for (let parts = 1, left = ids.map((_, place) => place); left.length; parts += 1) {
    const ends = new Map();
    for (const place of left) {
      const end = bare[place].slice(-parts).join("/");
      ends.set(end, [...(ends.get(end) || []), place]);
    }
    left = [];
    for (const [end, places] of ends) {
      const whole = places.every((place) => bare[place].length <= parts);
      if (places.length === 1 || whole) places.forEach((place) => short.set(ids[place], places.length === 1 ? end : ids[place]));
      else left.push(...places);
    }
  }
  const cut = (name) => (name.length > LONGEST ? `…${name.slice(1 - LONGEST)}` : name);
  const cuts = [...short.values()].map(cut);
  const alike = new Set(cuts.filter((name, place) => cuts.indexOf(name) !== place));
  return new Map([...short].map(([id, name]) => [id, alike.has(cut(name)) ? name : cut(name)]));
}

let called = new Map();
let calledOf = -1;
// A sample's or a query's name, in short.
function shortName(id) {
  const known = [...new Set([...samples.keys(), ...queries.filter(({ source }) => source !== "uploads").map((query) => query.id)])];
  if (known.length !== calledOf) [called, calledOf] = [shortNames(known), known.length];
  return called.get(id) || id;
}

// ---- tabs -----------------------------------------------------------------------------------------------------------

const TABS = ["answers", "trust", "overview"];

function offer(name, there) {
  at(`tab-${name}`).hidden = !there;
  if (!there && !at(name).hidden) choose("answers");
  at("tabs").hidden = TABS.slice(1).every((other) => at(`tab-${other}`).hidden);
}

function choose(name) {
  for (const one of TABS) {
    at(one).hidden = one !== name;
    at(`tab-${one}`).setAttribute("aria-selected", String(one === name));
    at(`tab-${one}`).tabIndex = one === name ? 0 : -1;
  }
}

function tabKeys(event) {
  const tabs = TABS.filter((name) => !at(`tab-${name}`).hidden);
  const place = tabs.findIndex((name) => at(`tab-${name}`) === document.activeElement);
  const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (next === undefined || !tabs[next]) return;
  event.preventDefault();
  choose(tabs[next]);
  at(`tab-${tabs[next]}`).focus();
}

function picture(uri, alt) {
  return h("img", { src: uri, alt, loading: "lazy", decoding: "async", className: uri.startsWith("data:image/png") ? "small" : "" });
}

// ---- filters --------------------------------------------------------------------------------------------------------

function search(text) {
  shown.search = text;
  at("search").value = text;
  shown.pages = 1;
  drawList();
  at("queries").focus();
}

function drawFilters() {
  const changed = (change) => (event) => { change(event.target); shown.pages = 1; drawList(); };
  const parts = [h("label", {}, "Search ids and columns",
    h("input", { type: "search", id: "search", value: shown.search, placeholder: "text, or id:12", oninput: changed((field) => { shown.search = field.value; }) }))];
  const columns = new Map();
  for (const { columns: own } of samples.values()) {
    for (const [name, value] of Object.entries(own)) {
      if (!columns.has(name)) columns.set(name, new Set());
      columns.get(name).add(String(value));
    }
  }
  for (const [name, values] of columns) {
    const pick = changed((field) => (field.value === "" ? shown.columns.delete(name) : shown.columns.set(name, field.value)));
    const field = values.size <= MOST_CHOICES
      ? h("select", { onchange: pick }, h("option", { value: "" }, "all"), [...values].sort((a, b) => a.localeCompare(b, undefined, { numeric: true })).map((value) => h("option", { value: `=${value}` }, value)))
      : h("input", { type: "search", oninput: pick, placeholder: "contains" });
    field.value = shown.columns.get(name) || "";
    parts.push(h("label", {}, name, field));
  }
  const toggle = (text, on, change) => h("label", { className: "check" }, h("input", { type: "checkbox", checked: on, onchange: changed(change) }), text);
  for (const side of SIDES) {
    parts.push(toggle(side, shown.sides.has(side), (box) => (box.checked ? shown.sides.add(side) : shown.sides.delete(side))));
  }
  if (names().length > 1) {
    for (const name of names()) {
      parts.push(toggle(name, !shown.hidden.has(name), (box) => (box.checked ? shown.hidden.delete(name) : shown.hidden.add(name))));
    }
  }
  at("filters").replaceChildren(...parts);
}

function matches(id) {
  const own = valuesOf(id);
  for (const [name, wanted] of shown.columns) {
    const value = String(own[name]);
    if (wanted.startsWith("=") ? value !== wanted.slice(1) : !value.toLowerCase().includes(wanted.toLowerCase())) return false;
  }
  const text = shown.search.trim().toLowerCase();
  if (text.startsWith("id:")) return id.toLowerCase() === text.slice(3).trim();
  return text === "" || id.toLowerCase().includes(text) || Object.values(own).some((value) => String(value).toLowerCase().includes(text));
}

// ---- queries --------------------------------------------------------------------------------------------------------

function drawList() {
  const filtering = shown.search.trim() !== "" || shown.columns.size > 0;
  let kept = 0;
  const rows = [];
  for (const query of queries) {
    const lists = {};
    let here = 0;
    for (const [name, sides] of Object.entries(query.lists)) {
      if (shown.hidden.has(name)) continue;
      lists[name] = {};
      for (const side of SIDES.filter((one) => sides[one] && shown.sides.has(one))) {
        lists[name][side] = sides[side].map((result, rank) => ({ result, rank: rank + 1 })).filter(({ result }) => matches(result.id));
        here += lists[name][side].length;
      }
    }
    kept += here;
    if (here || !filtering) rows.push([query, lists]);
  }
  const held = rows.slice(0, PAGE * shown.pages);
  at("list").replaceChildren(...held.map(([query, lists]) => article(query, lists)));
  at("more").hidden = held.length === rows.length;
  const total = queries.flatMap((query) => Object.values(query.lists).flatMap((sides) => Object.values(sides).flat())).length;
  at("count").textContent = `${rows.length} of ${queries.length} queries, ${kept} of ${total} results${held.length < rows.length ? `; the first ${held.length} queries are shown` : ""}`;
}

function article(query, lists) {
  const lines = new Map();
  const columns = Object.entries(lists).map(([name, sides]) => {
    const every = Object.values(query.lists[name]).flat();
    const scale = Math.max(0, ...every.map(({ score, error }) => Math.abs(score) + (error || 0))) || 1;
    if (sides.proponents) lines.set(name, h("p", { className: "hint shared", hidden: true }));
    return h("section", {}, h("h3", {}, name), lines.get(name), Object.entries(sides).map(([side, results]) => [
      h("h4", {}, side),
      results.length ? strip(query, name, side, results, scale) : h("p", { className: "hint" }, query.lists[name][side].length ? "none that match" : `none: no score is ${side === "proponents" ? "positive" : "negative"}`),
    ]));
  });
  if (lines.size) tellShared(query, lines);
  const groups = query.groupColumns || Object.keys(query.groups || {});
  return h("article", { className: query.whole ? "query part card" : "query card", ariaLabel: query.whole ? query.label : `Query ${query.id}` },
    h("figure", { className: "asked" }, picture(query.picture, `query ${query.id}`), h("figcaption", { title: query.id }, query.label || `query ${shortName(query.id)}`), source.tools(query)),
    h("div", { className: "estimators" }, columns),
    h("div", { className: "details" }, groups.map((column) => groupDetails(query, column))));
}

function strip(query, estimator, side, results, scale) {
  const buttons = results.map(({ result, rank }, place) => {
    const near = result.resolved === false;
    const error = result.error === null || result.error === undefined ? "" : ` ± ${number(result.error)}`;
    return h("button", {
      type: "button", className: near ? "result near" : "result", tabIndex: place ? -1 : 0,
      title: `sample ${result.id}: ${number(result.score)}${error}${near ? "; the order against the next one is not resolved" : ""}`,
      onclick: () => openExplanation(query, estimator, side, result, rank),
    },
    picture(samples.get(result.id).picture, `training sample ${result.id}`),
    h("span", { className: "name", ariaHidden: "true" }, shortName(result.id)),
    h("span", { className: "score" }, number(result.score)),
    bar(result, scale),
    h("span", { className: "unseen" }, `${error}, rank ${rank}${near ? ", order against the next not resolved" : ""}`));
  });
  return h("ol", { className: `strip ${side}`, ariaLabel: `${side} of query ${query.id} under ${estimator}`, onkeydown: rove },
    buttons.map((button, place) => h("li", {}, button, results[place].result.copies ? copiesOf(results[place].result) : null)));
}

// What was folded into a result, behind it when it is asked for.
function copiesOf({ copies }) {
  const count = `and ${copies.length} ${copies.length > 1 ? "copies" : "copy"}`;
  const toggle = h("button", { type: "button", className: "copies link", tabIndex: -1, ariaExpanded: "false", onclick: () => {
    const open = toggle.getAttribute("aria-expanded") === "false";
    toggle.setAttribute("aria-expanded", String(open));
    if (open) toggle.parentElement.after(...copies.map((id) => h("li", { className: "result copy", title: `sample ${id}` }, picture(samples.get(id).picture, `copy ${id}`), h("span", { className: "name" }, shortName(id)))));
    else copies.forEach(() => toggle.parentElement.nextElementSibling.remove());
  } }, count);
  return toggle;
}

function bar({ score, error }, scale) {
  const length = (60 * Math.abs(score)) / scale;
  const drawn = [svg("line", { class: "zero", x1: 0.5, x2: 0.5, y1: 0, y2: 9 }), svg("rect", { class: "value", x: 1, y: 2, height: 5, width: length.toFixed(1) })];
  if (error) {
    const [from, to] = [Math.max(0, length - (60 * error) / scale), length + (60 * error) / scale].map((x) => (1 + x).toFixed(1));
    drawn.push(svg("path", { class: "error", d: `M${from} 4.5H${to}M${from} 2V7M${to} 2V7` }));
  }
  return svg("svg", { class: "bar", viewBox: "0 0 64 9", "aria-hidden": "true" }, ...drawn);
}

// One stop for the Tab key per list; arrows move within it.
function rove(event) {
  const buttons = [...event.currentTarget.querySelectorAll("button")];
  const place = buttons.indexOf(document.activeElement);
  const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (next === undefined || !buttons[next]) return;
  event.preventDefault();
  buttons[place].tabIndex = -1;
  buttons[next].tabIndex = 0;
  buttons[next].focus();
}

function groupDetails(query, column) {
  const body = h("div", { className: "estimators" });
  const details = h("details", { className: "groups" }, h("summary", {}, `totals by ${column}`), body);
  details.addEventListener("toggle", async () => {
    if (!details.open || body.childElementCount) return;
    try {
      const totals = await source.groups(query, column);
      body.replaceChildren(...Object.entries(totals).map(([name, sides]) => h("section", {}, h("h4", {}, name), groupTable(column, sides))));
    } catch (error) {
      body.replaceChildren(h("p", { role: "alert" }, error.message));
    }
  });
  return details;
}

function groupTable(column, sides) {
  const rows = SIDES.flatMap((side) => (sides[side] || []).map((group) => ({ ...group, side }))).sort((a, b) => b.score - a.score);
  const most = Math.max(...rows.map(({ share }) => share)) || 1;
  const head = [column, "share", "", "sum"].map((name, place) => h("th", { scope: "col", className: place % 2 ? "number" : "" }, name));
  return [
    h("div", { className: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, head)),
      h("tbody", {}, rows.map(({ id, score, share, share_error: error, side }) => h("tr", { className: side },
        h("th", { scope: "row" }, id), h("td", { className: "number" }, `${(100 * share).toFixed(1)} ± ${(100 * error).toFixed(1)} %`),
        h("td", {}, bar({ score: share, error }, most)), h("td", { className: "number" }, signed(score))))))),
    h("p", { className: "hint" }, "Share: what of a group's scores is above zero, of opponents below, as a part of all that is; ± one standard error over samples: how much hangs on few of them, not what another measurement, or leaving the group out, would say. Sum: of its scores."),
  ];
}

// ---- one score, taken apart -----------------------------------------------------------------------------------------

async function openExplanation(query, estimator, side, result, rank) {
  const dialog = at("explanation");
  const sample = samples.get(result.id);
  const error = result.error === null || result.error === undefined ? "" : ` ± ${number(result.error)}`;
  const own = Object.entries(sample.columns);
  const body = h("div", {}, h("p", { role: "status" }, "Taking the score apart …"));
  dialog.replaceChildren(
    h("div", { className: "top" },
      h("h2", { id: "explanation-title" }, `Sample ${result.id} for query ${query.id}`),
      h("button", { type: "button", autofocus: true, onclick: () => dialog.close() }, "Close")),
    h("div", { className: "pair" },
      h("figure", {}, picture(query.picture, `query ${query.id}`), h("figcaption", {}, "query")),
      h("figure", {}, picture(sample.picture, `training sample ${result.id}`), h("figcaption", {}, "training sample")),
      h("table", {}, h("tbody", {},
        [["estimator", estimator], ["score", number(result.score) + error], ["rank", `${rank} of the ${side}`], ...own].map(([name, value]) =>
          h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, String(value ?? "–"))))))),
    body);
  if (!dialog.open) dialog.showModal();
  try {
    const parts = await source.explain(query, estimator, side, result);
    body.replaceChildren(...(parts ? explanation(parts).filter(Boolean) : [h("p", { className: "hint" }, "This page carries no explanations: it was written without the indexes.")]));
  } catch (error) {
    body.replaceChildren(h("p", { role: "alert" }, error.message));
  }
}

function explanation({ checkpoints, contributions, timesteps, query_timesteps: steps, measures, view }) {
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const totals = contributions.map(sum);
  const bySteps = contributions[0].map((_, s) => sum(contributions.map((row) => row[s])));
  const label = (s) => (steps ? String(steps[s]) : `no. ${s + 1}`);
  const each = bySteps.length / (measures ?? [""]).length;
  const whole = (s) => (measures ? `${label(s)}, ${spaced(measures[Math.floor(s / each)])}` : label(s));
  return [
    view ? h("p", {}, `Of the query's views, the one with this score: ${view}.`) : null,
    h("h3", {}, "By checkpoint"),
    h("div", { className: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, ["checkpoint", "sample's timesteps", "contribution"].map((head, i) => h("th", { scope: "col", className: i === 2 ? "number" : "" }, head)))),
      h("tbody", {}, checkpoints.map((name, c) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, timesteps ? few(timesteps[c].slice(0, each)) : "–"), h("td", { className: "number" }, signed(totals[c]))))))),
    h("h3", {}, "By timestep of the query"),
    stepBars(bySteps, label, whole, measures ?? []),
    h("details", {}, h("summary", {}, "All numbers"), h("div", { className: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "timestep"), checkpoints.map((name) => h("th", { scope: "col", className: "number" }, name)), h("th", { scope: "col", className: "number" }, "all"))),
      h("tbody", {}, bySteps.map((all, s) => h("tr", {}, h("th", { scope: "row" }, whole(s)), contributions.map((row) => h("td", { className: "number" }, signed(row[s]))), h("td", { className: "number" }, signed(all)))))))),
    h("p", { className: "hint" }, `Together ${number(sum(totals))}: the score of the store's own rows, which the rounding of the index changes a little.`),
  ];
}

const few = (values) => (values.length > 6 ? `${values.slice(0, 3).join(", ")}, … ${values.at(-1)}` : values.join(", "));

const spaced = (name) => name.replaceAll("_", " ");

function stepBars(values, label, whole, measures) {
  const [w, height, middle, left] = [720, 190, 85, 68];
  const top = Math.max(...values.map(Math.abs)) || 1;
  const step = (w - left) / values.length;
  const drawn = values.flatMap((value, s) => {
    const size = (75 * Math.abs(value)) / top;
    const rect = svg("rect", { class: value >= 0 ? "plus" : "minus", x: left + s * step + step * 0.1, width: Math.max(1, step * 0.8), y: value >= 0 ? middle - size : middle, height: Math.max(0.5, size) });
    const title = svg("title");
    title.textContent = `timestep ${whole(s)}: ${signed(value)}`;
    rect.append(title);
    return [rect];
  });
  const text = (x, y, anchor, content) => { const t = svg("text", { x, y, "text-anchor": anchor }); t.textContent = content; return t; };
  const every = Math.ceil(values.length / 12);
  const marks = values.map((_, s) => s).filter((s) => s % every === 0).map((s) => text(left + (s + 0.5) * step, height - 18, "middle", label(s)));
  const names = measures.map((name, m) => text(left + (m + 0.5) * ((w - left) / measures.length), height - 4, "middle", spaced(name)));
  const best = values.indexOf(Math.max(...values));
  return svg("svg", { class: "steps", viewBox: `0 0 ${w} ${height}`, role: "img", "aria-label": `Contribution by timestep of the query; largest ${signed(values[best])} at ${whole(best)}. The table below holds all.` },
    svg("line", { class: "zero", x1: left, x2: w, y1: middle, y2: middle }), ...drawn, ...marks, ...names,
    text(left - 6, 14, "end", `+${number(top)}`), text(left - 6, middle + 4, "end", "0"), text(left - 6, 2 * middle - 4, "end", `−${number(top)}`));
}

// ---- start ----------------------------------------------------------------------------------------------------------

function draw() {
  drawTrust();
  drawOverview();
  drawFilters();
  drawList();
}

function start() {
  at("filtering").open = !found.live && queries.length > 1 && window.matchMedia("(min-width: 60rem)").matches;
  for (const name of TABS) at(`tab-${name}`).onclick = () => choose(name);
  at("tabs").addEventListener("keydown", tabKeys);
  at("more").onclick = () => { shown.pages += 1; drawList(); };
  at("explanation").addEventListener("click", (event) => { if (event.target === event.currentTarget) event.currentTarget.close(); });
  draw();
}

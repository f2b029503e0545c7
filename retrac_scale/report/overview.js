// What the page tells of all lists together: how far to trust them, hubs, norms.

// ---- trust ----------------------------------------------------------------------------------------------------------

// Nothing to tell: no tab; null: still being measured, by the service.
function drawTrust() {
  const told = found.repeatability === null ? null : Object.entries(found.repeatability || {});
  const checked = Object.entries(found.check || {});
  offer("trust", told === null || told.length > 0 || checked.length > 0);
  at("trust").replaceChildren(h("h2", {}, "How far to trust these lists"), ...(told === null
    ? [h("p", { className: "hint" }, "Parts of the measurements are being compared …")]
    : [h("ul", { className: "told" }, told.map(([name, { sentence }]) => h("li", {}, h("strong", {}, name), `: ${sentence}`))), ...halves(told.filter(([, one]) => one.halves))]),
  ...(checked.length ? [h("h3", {}, "Training images as queries"), ...checked.map(check)] : []));
  drawVerdict();
}

function check([name, { meaning, firsts, causes }]) {
  return h("div", { className: "checked" },
    h("p", {}, h("strong", {}, name), `: ${meaning}`),
    h("p", { className: "hint" }, `Originals that come first: ${firsts}.`),
    causes.length ? h("p", {}, "Likely causes:") : null, h("ul", {}, causes.map((cause) => h("li", {}, `${cause}.`))));
}

// What must be known before the first list is read, in as few lines as it takes; the tab has the rest.
function drawVerdict() {
  const parts = [];
  for (const [name, one] of Object.entries(found.check || {})) {
    if (!one.well) parts.push(h("p", { className: "alarm" }, h("strong", {}, `${name}: `), `${one.meaning} `, toTrust("likely causes")));
  }
  const told = Object.entries(found.repeatability || {}).filter(([, one]) => one.overlap);
  if (told.length) {
    const again = told.map(([name, one]) => `${told.length > 1 ? `${name} ` : ""}${(one.k * one.overlap[0]).toFixed(1)}`).join(", ");
    const luck = told.some(([, one]) => one.overlap[0] < LUCK) ? " Where it is few, read a list as a set, and measure at more timesteps." : "";
    parts.push(h("p", {}, `Measured again, so many of ${told[0][1].k} names would come again: ${again}.${luck}`));
  }
  const lines = warnings();
  if (lines.length) {
    parts.push(h("details", { className: "warnings" }, h("summary", {}, `Read with care: ${lines.length} ${lines.length > 1 ? "notes" : "note"}`), h("ul", {}, lines.map((line) => h("li", {}, line)))));
  }
  at("verdict").replaceChildren(...parts);
}

const toTrust = (text) => h("button", { type: "button", className: "link", onclick: () => choose("trust") }, text);

function halves(told) {
  if (!told.length) return [];
  const range = (ends, k, digits) => {
    const [value, low, high] = ends.map((x) => (k * x).toFixed(digits).replace(/^-(?=[0.]+$)/, ""));
    return `${value} (${low} to ${high})`;
  };
  const rows = {
    "measured": ({ measurements }) => `${measurements} times`,
    "two halves share": ({ halves, k }) => range(halves, k, 1),
    "two whole runs would share": ({ overlap, k }) => range(overlap, k, 1),
    "rank correlation of their scores": ({ correlation }) => range(correlation, 1, 2),
  };
  return [
    h("div", { className: "scroll" }, h("table", { id: "halves" },
      h("thead", {}, h("tr", {}, h("td"), told.map(([name]) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, Object.entries(rows).map(([head, cell]) => h("tr", {}, h("th", { scope: "row" }, head), told.map(([, one]) => h("td", {}, cell(one)))))))),
    h("p", { className: "hint" }, "Each half of the measurements answers by itself; from how far halves agree, the agreement of two whole runs is foretold. In brackets 95 % intervals over queries and halves."),
  ];
}

// One line for each estimator that can tell; it may come later than the lists.
async function tellShared(query, lines) {
  try {
    const shared = await source.shared(query);
    for (const [name, line] of lines) {
      const own = shared[name];
      if (own) line.textContent = `Two halves of the measurements share ${Math.round(own.shared)} of the ${own.k} proponents.`;
      line.hidden = !own;
    }
  } catch (error) {
    for (const line of lines.values()) Object.assign(line, { textContent: error.message, hidden: false });
  }
}

// ---- overview -------------------------------------------------------------------------------------------------------

function counts(estimator) {
  const times = new Map();
  let places = 0;
  const lists = queries.map((query) => query.lists[estimator]?.proponents).filter(Boolean);
  for (const list of lists) {
    places += list.length;
    for (const { id } of list) times.set(id, (times.get(id) || 0) + 1);
  }
  const hubs = [...times].sort((a, b) => b[1] - a[1]);
  return { lists: lists.length, length: Math.max(0, ...lists.map((list) => list.length)), unique: places ? times.size / places : 0, hubs };
}

function warnings() {
  const lines = [...(found.notes || [])];
  for (const estimator of names()) {
    const results = queries.flatMap((query) => Object.values(query.lists[estimator] || {}).flat());
    const near = results.filter((result) => result.resolved === false).length;
    if (near) {
      lines.push(
        `${estimator}: ${near} of ${results.length} results stand less than two standard errors of the difference before the next one (≈), so that their order is not resolved: read such a list as a set, or measure at more timesteps (retrac-scale sketch --until 0.9).`,
      );
    }
    const { lists, hubs } = counts(estimator);
    if (lists > 3 && hubs.length && hubs[0][1] > HUB_SHARE * lists) {
      lines.push(`${estimator}: sample ${hubs[0][0]} is among the top proponents of ${hubs[0][1]} of ${lists} queries; it says little about any one of them: look at the next names${estimator === "TracIn" ? ", or at an estimator that divides the norm out, such as ReTracRidge or ReTrac" : ", or compare another estimator"}.`);
    }
  }
  return lines;
}

function drawOverview() {
  const parts = [];
  const several = queries.length > 1; // of one list nothing can be shared
  if (several) parts.push(hubs(), summary());
  if (found.curve && found.curve.timestep.length > 1) parts.push(curve(found.curve));
  at("overview").replaceChildren(...parts);
  offer("overview", parts.length > 0);
  drawVerdict();
}

function summary() {
  const heads = ["estimator", "list length", "unique fraction", "largest share"];
  const rows = names().map((name) => {
    const { length, unique, hubs, lists } = counts(name);
    const cells = [String(length), unique.toFixed(3), hubs.length ? percent(hubs[0][1] / lists) : "–"];
    return h("tr", {}, h("th", { scope: "row" }, name), cells.map((cell) => h("td", { className: "number" }, cell)));
  });
  return h(
    "section",
    { className: "card" },
    h("h3", {}, "How specific the answers are"),
    h("div", { className: "scroll" }, h("table", { id: "specificity" },
      h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { scope: "col", className: i ? "number" : "" }, head)))),
      h("tbody", {}, rows))),
    h("p", { className: "hint" }, "Unique fraction: distinct samples in all top lists over all places in them; 1 when no two queries share one. Largest share: of the lists, those that hold the most frequent sample."),
  );
}

function hubs() {
  const parts = names().map((name) => {
    const { hubs, lists } = counts(name);
    const items = hubs.slice(0, HUBS).filter(([, times]) => times > 1).map(([id, times]) =>
      h("li", {}, h("button", { type: "button", className: "hub", onclick: () => { choose("answers"); search(`id:${id}`); }, title: `Show where sample ${id} stands` },
        picture(samples.get(id).picture, `training sample ${id}`), h("span", {}, `in ${times} of ${lists}`))));
    return h("div", {}, h("h4", {}, name), items.length ? h("ul", { className: "hubs", ariaLabel: `Hubs under ${name}` }, items) : h("p", { className: "hint" }, "No sample is shared by two lists."));
  });
  return h("section", { className: "card", id: "hubs" }, h("h3", {}, "Hubs: samples that influence everything"), h("div", { className: "estimators" }, parts));
}

function curve({ timestep, mean, deviation }) {
  const [w, height, left, bottom] = [560, 200, 44, 34];
  const [low, high] = [Math.min(...timestep), Math.max(...timestep)];
  const top = Math.max(...mean.map((m, i) => m + deviation[i])) || 1;
  const x = (t) => left + ((w - left - 10) * (t - low)) / (high - low || 1);
  const y = (v) => height - bottom - ((height - bottom - 10) * Math.max(0, v)) / top;
  const line = (values) => values.map((v, i) => `${x(timestep[i]).toFixed(1)},${y(v).toFixed(1)}`);
  const band = [...line(mean.map((m, i) => m + deviation[i])), ...line(mean.map((m, i) => m - deviation[i])).reverse()];
  const text = (px, py, anchor, label) => { const t = svg("text", { x: px, y: py, "text-anchor": anchor }); t.textContent = label; return t; };
  const label = `Mean gradient norm by timestep: ${number(mean[0])} at timestep ${Math.round(low)}, ${number(mean.at(-1))} at timestep ${Math.round(high)}`;
  return h("figure", { className: "card" },
    h("h3", {}, "Gradient norm by timestep"),
    svg("svg", { class: "curve", viewBox: `0 0 ${w} ${height}`, role: "img", "aria-label": label },
      svg("line", { class: "axis", x1: left, x2: w - 10, y1: y(0), y2: y(0) }),
      svg("line", { class: "axis", x1: left, x2: left, y1: 10, y2: y(0) }),
      svg("polygon", { class: "band", points: band.join(" ") }),
      svg("polyline", { class: "mean", points: line(mean).join(" ") }),
      text(left - 6, 16, "end", number(top)), text(left - 6, y(0), "end", "0"),
      text(x(low), height - 18, "start", String(Math.round(low))), text(x(high), height - 18, "end", String(Math.round(high))),
      text((left + w) / 2, height - 4, "middle", "diffusion timestep")),
    h("figcaption", {}, "Mean and standard deviation over samples and checkpoints. Where the norm is large, a sample trained at that timestep scores high for every query under TracIn; ReTrac divides the norm out."));
}


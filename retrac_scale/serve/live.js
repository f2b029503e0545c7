// The same page, live: asks the service it came from.

const token = new URLSearchParams(location.hash.slice(1)).get("token") || sessionStorage.getItem("token") || "";
let about = null;

async function call(path, options = {}) {
  const headers = { ...(options.headers || {}), ...(call.token ? { Authorization: `Bearer ${call.token}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The service does not answer; is it still running?");
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(body.detail || `The service answered ${response.status}.`), { status: response.status });
  return body;
}
call.token = token;

const post = (path, body, signal = null) => call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

source.explain = (query, estimator, side, { id }) => post("/api/explain", { source: query.source, id: query.id, sample: id, index: estimator, side });
source.groups = (query, column) => post("/api/groups", { source: query.source, id: query.id, column, where: query.where, duplicates: query.duplicates });
// Asked once for each answer; the lists are on the page by then. The best of several views has no halves.
source.shared = (query) => {
  if (query.views) return {};
  const k = Math.max(1, ...Object.values(query.lists).map((sides) => sides.proponents.length));
  query.shared ??= post("/api/repeatability", { source: query.source, id: query.id, k, where: query.where });
  return query.shared;
};

async function tellTrust() {
  if (!about.sources.includes("queries")) return;
  found.repeatability = null;
  drawTrust();
  try {
    found.repeatability = await call("/api/repeatability");
  } catch (error) {
    found.repeatability = Object.fromEntries(about.estimators.map((name) => [name, { sentence: error.message }]));
  }
  drawTrust();
}

// What lists are to be like, as the service takes it.
function wanted(views = false) {
  if (views && at("fold").checked) throw new Error("Copies are not folded where a picture is also asked about moved, smaller, …; untick one of the two.");
  return { k: Number(at("k").value), where: at("where").value || null, duplicates: at("fold").checked ? "fold" : "keep", ...(views ? { views } : {}) };
}
const groupColumns = ({ views }) => (views ? [] : about.group_columns);
const working = (views) => (views ? `Asking in ${about.views.length} views, up to ${about.views.length} times as long …` : "Asking …");
const viewsField = (properties) => h("label", { className: "check" }, h("input", { type: "checkbox", ...properties }), "also moved, smaller, larger, lighter or darker");

function take({ queries: answered, samples: shownSamples }, like) {
  for (const [id, sample] of Object.entries(shownSamples)) samples.set(id, sample);
  for (const query of answered) {
    const place = queries.findIndex((one) => one.source === query.source && one.id === query.id);
    if (place >= 0) queries.splice(place, 1);
    queries.unshift({ ...query, ...like, groupColumns: groupColumns(like) });
  }
  for (const query of queries.filter((one) => !one.whole)) {
    const label = { queries: `query ${shortName(query.id)}`, training: `training sample ${shortName(query.id)}`, uploads: "upload" }[query.source];
    query.label = query.note ? `${label}, ${query.note}` : label;
  }
  closePart();
  choose("answers");
  draw();
}

const CHOICES = 24;

function drawAsk() {
  const alert = h("p", { role: "alert" });
  const status = h("p", { role: "status", className: "hint" });
  const k = h("input", { type: "number", id: "k", min: 1, max: about.limits.k, value: 10, required: true });
  const where = h("input", { type: "text", id: "where", placeholder: Object.keys(about.columns).length ? `${Object.keys(about.columns)[0]} == …` : "id < 100", maxLength: 2000 });
  const fold = h("input", { type: "checkbox", id: "fold" });
  const from = h("select", { id: "source", ariaLabel: "Ask about" }, about.sources.map((name) => h("option", { value: name }, { queries: "stored queries", training: "training samples" }[name])));
  const choices = h("ul", { id: "choices", ariaLabel: "Pictures to ask about" });
  const contains = h("input", { type: "search", id: "part", placeholder: "part of a name", ariaLabel: "part of a name" });
  const file = h("input", { type: "file", id: "file", accept: "image/png,image/jpeg,image/webp,image/bmp", required: true });

  // The lists of a question, wherever it comes from; false when it was refused.
  async function answering(ask, button, views = false) {
    alert.textContent = "";
    status.textContent = working(views);
    button.disabled = true;
    try {
      const like = wanted(views);
      take(await ask(like), like);
      return true;
    } catch (error) {
      alert.textContent = error.message;
      return false;
    } finally {
      status.textContent = "";
      button.disabled = false;
    }
  }
  const ask = (button) => answering((like) => post("/api/query", { source: from.value, ids: [button.value], ...like }), button);

  async function pick(event) {
    const button = event.currentTarget;
    if (!(await ask(button))) return;
    for (const other of choices.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
  }
  async function suggest() {
    try {
      const { ids, pictures } = await call(`/api/ids?${new URLSearchParams({ source: from.value, contains: contains.value, count: CHOICES, pictures: true })}`);
      const short = shortNames(ids);
      choices.replaceChildren(...ids.map((value, place) => h("li", {}, h("button", { type: "button", value, title: value, onclick: pick, ariaPressed: "false" },
        picture(pictures[place], value), h("span", {}, short.get(value))))));
    } catch (error) {
      alert.textContent = error.message;
    }
  }
  let timer = 0;
  contains.oninput = () => { clearTimeout(timer); timer = setTimeout(suggest, 200); };
  from.onchange = () => { contains.value = ""; suggest(); };

  const parts = [];
  if (about.sources.length) {
    parts.push(h("form", { id: "pick", onsubmit: (event) => event.preventDefault() }, from, contains), choices);
  }
  const further = [h("form", { onsubmit: (event) => event.preventDefault() }, h("label", {}, "results per side", k), h("label", {}, "only samples where", where), h("label", { className: "check" }, fold, "fold copies"))];
  if (about.uploads) {
    const idea = ideaFields("upload");
    further.push(h("form", { id: "upload", onsubmit: (event) => {
      event.preventDefault();
      answering((like) => {
        if (file.files[0].size > about.limits.upload_bytes) throw new Error(`The file is larger than ${about.limits.upload_bytes} bytes.`);
        const body = new FormData();
        body.append("file", file.files[0]);
        for (const [name, value] of Object.entries({ ...like, ...idea.said() })) if (value !== null) body.append(name, value);
        return call("/api/upload", { method: "POST", body });
      }, event.target.querySelector("button"), at("upload-views").checked);
    } }, h("label", {}, "an image of your own", file), idea.fields, viewsField({ id: "upload-views" }), h("button", {}, "Upload and ask")));
  }
  parts.push(h("details", { id: "further", open: !about.sources.length }, h("summary", {}, about.uploads ? "an image of your own, more options" : "more options"), further));
  at("ask").replaceChildren(...parts, status, alert);
  at("ask").className = "card";
  at("ask").hidden = false;
  return about.sources.length ? suggest().then(() => choices.querySelector("button")?.click()) : null;
}

function drawToken() {
  const field = h("input", { type: "password", id: "token", required: true, autocomplete: "off" });
  const alert = h("p", { role: "alert" });
  at("ask").replaceChildren(h("h2", {}, "This service asks for a token"), h("form", { onsubmit: async (event) => {
    event.preventDefault();
    call.token = field.value;
    try { await begin(); } catch (error) { alert.textContent = error.message; }
  } }, h("label", {}, "token", field), h("button", {}, "Enter")), alert);
  at("ask").className = "card";
  at("ask").hidden = false;
}

async function begin() {
  about = await call("/api/about");
  if (call.token) sessionStorage.setItem("token", call.token);
  history.replaceState(null, "", location.pathname);
  found.curve = about.curve;
  if (about.uploads) drawPart();
  draw();
  await drawAsk(); // opens with the first picture
  tellTrust();
}

begin().catch((error) => {
  if (error.status === 401) drawToken();
  else {
    at("ask").replaceChildren(h("p", { role: "alert" }, error.message));
    at("ask").hidden = false;
  }
});

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

const post = (path, body) => call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

source.explain = (query, estimator, { id }) => post("/api/explain", { source: query.source, id: query.id, sample: id, index: estimator });
source.groups = (query, column) => post("/api/groups", { source: query.source, id: query.id, column, where: query.where });
// Asked once for each answer; the lists are on the page by then.
source.shared = (query) => {
  const k = Object.values(query.lists)[0].proponents.length;
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

function take({ queries: answered, samples: shownSamples }, where) {
  for (const [id, sample] of Object.entries(shownSamples)) samples.set(id, sample);
  for (const query of answered) {
    const place = queries.findIndex((one) => one.source === query.source && one.id === query.id);
    if (place >= 0) queries.splice(place, 1);
    const label = { queries: `query ${query.id}`, training: `training sample ${query.id}`, uploads: "upload" }[query.source];
    queries.unshift({ ...query, where, groupColumns: about.group_columns, label: query.note ? `${label}, ${query.note}` : label });
  }
  draw();
  at("queries").focus();
}

function drawAsk() {
  const alert = h("p", { role: "alert" });
  const status = h("p", { role: "status", className: "hint" });
  const k = h("input", { type: "number", id: "k", min: 1, max: about.limits.k, value: 10, required: true });
  const where = h("input", { type: "text", id: "where", placeholder: Object.keys(about.columns).length ? `${Object.keys(about.columns)[0]} == …` : "id < 100", maxLength: 2000 });
  const from = h("select", { id: "source" }, about.sources.map((name) => h("option", { value: name }, { queries: "stored queries", training: "training samples" }[name])));
  const choices = h("datalist", { id: "ids" });
  const id = h("input", { type: "text", id: "id", required: true });
  id.setAttribute("list", "ids");
  const file = h("input", { type: "file", id: "file", accept: "image/png,image/jpeg,image/webp,image/bmp", required: true });

  async function suggest() {
    try {
      const { ids } = await call(`/api/ids?${new URLSearchParams({ source: from.value, contains: id.value, count: 50 })}`);
      choices.replaceChildren(...ids.map((value) => h("option", { value })));
      if (!id.value && ids.length) id.placeholder = `such as ${ids[0]}`;
    } catch (error) {
      alert.textContent = error.message;
    }
  }
  let timer = 0;
  id.oninput = () => { clearTimeout(timer); timer = setTimeout(suggest, 200); };
  from.onchange = () => { id.value = ""; suggest(); };

  const answering = (ask) => async (event) => {
    event.preventDefault();
    alert.textContent = "";
    status.textContent = "Asking …";
    const button = event.target.querySelector("button");
    button.disabled = true;
    try {
      take(await ask(), where.value || null);
    } catch (error) {
      alert.textContent = error.message;
    } finally {
      status.textContent = "";
      button.disabled = false;
    }
  };
  const forms = [];
  if (about.sources.length) {
    forms.push(h("form", { id: "pick", onsubmit: answering(() => post("/api/query", { source: from.value, ids: [id.value], k: Number(k.value), where: where.value || null })) },
      h("label", {}, "Ask about", from), h("label", {}, "id", id), choices, h("button", {}, "Ask")));
  }
  if (about.uploads) {
    forms.push(h("form", { id: "upload", onsubmit: answering(() => {
      if (file.files[0].size > about.limits.upload_bytes) throw new Error(`The file is larger than ${about.limits.upload_bytes} bytes.`);
      const body = new FormData();
      body.append("file", file.files[0]);
      body.append("k", k.value);
      if (where.value) body.append("where", where.value);
      return call("/api/upload", { method: "POST", body });
    }) }, h("label", {}, "or about an image of your own", file), h("button", {}, "Upload and ask")));
  }
  at("ask").replaceChildren(h("h2", { id: "ask-title" }, "Ask"), ...forms,
    h("form", { onsubmit: (event) => event.preventDefault() }, h("label", {}, "results per side", k), h("label", {}, "only samples where", where)), status, alert);
  at("ask").className = "card";
  at("ask").hidden = false;
  if (about.sources.length) suggest();
}

function drawToken() {
  const field = h("input", { type: "password", id: "token", required: true, autocomplete: "off" });
  const alert = h("p", { role: "alert" });
  at("ask").replaceChildren(h("h2", { id: "ask-title" }, "This service asks for a token"), h("form", { onsubmit: async (event) => {
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
  drawAsk();
  draw();
  tellTrust();
}

begin().catch((error) => {
  if (error.status === 401) drawToken();
  else {
    at("ask").replaceChildren(h("p", { role: "alert" }, error.message));
    at("ask").hidden = false;
  }
});

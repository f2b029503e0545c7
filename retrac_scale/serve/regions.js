// A part of a query's picture, a box or what is painted, or an idea in it, each with lists of its own beside the others.

const WAIT = 500; // milliseconds without a key before the service is asked
const VIEW = 640; // pixels that the picture is drawn with, about
const OUTSIDE = 0.18; // how much of the rest of the picture is seen, on grey
const GREY = "#808080";
const SIDES_OF_BOX = ["left", "top", "right", "bottom"];

// What is being drawn: of which query, a box [x0, y0, x1, y1] or a mask, and the answer that the next one replaces.
const drawn = { query: null, image: null, mask: null, tool: "box", box: null, painted: false, rest: false, views: false, idea: null, answer: null };
const asking = { now: false, again: false, timer: 0, stop: null };

source.tools = (query) => (about?.uploads && !query.whole
  ? [h("button", { type: "button", className: "link", onclick: () => openPart(query) }, `ask about a part${drawn.idea.fields.length ? " or an idea" : ""}`)]
  : query.whole ? [h("button", { type: "button", className: "link", onclick: () => removePart(query) }, "remove")] : []);

async function openPart(query) {
  const [width, height] = about.size;
  const image = new Image();
  image.src = query.picture;
  await image.decode();
  Object.assign(drawn, { query, image, mask: new OffscreenCanvas(width, height), tool: "box", rest: false, views: false });
  at("rest").checked = at("views").checked = false;
  drawn.idea.clear();
  at("region-title").textContent = `A part of ${query.label}${drawn.idea.fields.length ? ", or an idea in it" : ""}`;
  at("bench").className = "editing";
  at("region").hidden = false;
  fresh();
  at("region").scrollIntoView({ block: "nearest" });
  at("surface").focus({ preventScroll: true });
}

function closePart() {
  if (!drawn.query) return;
  halt();
  drawn.query = null;
  at("region").hidden = true;
  at("bench").className = "";
}

function removePart(query) {
  queries.splice(queries.indexOf(query), 1);
  if (drawn.answer === query) drawn.answer = null;
  draw();
}

// Nothing drawn; the lists that there are stay.
function fresh() {
  drawn.answer = null;
  clearPart();
}

function clearPart() {
  halt();
  setBox(null);
  say("");
  drawSurface();
}

function setBox(box) {
  Object.assign(drawn, { box, painted: false });
  drawn.mask.getContext("2d").clearRect(0, 0, ...about.size);
}

const say = (error, status = "") => {
  at("region-alert").textContent = error;
  at("region-status").textContent = status;
};

// ---- the picture ----------------------------------------------------------------------------------------------------

// Opaque where it counts, of the model's size.
function counted() {
  const [width, height] = about.size;
  const canvas = new OffscreenCanvas(width, height);
  const pen = canvas.getContext("2d");
  const [x0, y0, x1, y1] = drawn.box || [0, 0, 0, 0];
  if (drawn.painted) pen.drawImage(drawn.mask, 0, 0);
  else pen.fillRect(x0, y0, x1 - x0, y1 - y0);
  if (drawn.rest) {
    pen.globalCompositeOperation = "source-out";
    pen.fillRect(0, 0, width, height);
  }
  return canvas;
}

// The picture with all but the part faint, of about VIEW pixels.
function paint(canvas) {
  const [width, height] = about.size;
  const scale = Math.max(1, Math.floor(VIEW / Math.max(width, height)));
  Object.assign(canvas, { width: width * scale, height: height * scale });
  const pens = [canvas, new OffscreenCanvas(canvas.width, canvas.height)].map((one) => one.getContext("2d"));
  for (const pen of pens) pen.imageSmoothingEnabled = false;
  const [pen, inside] = pens;
  const whole = [0, 0, canvas.width, canvas.height];
  if (drawn.box || drawn.painted) {
    inside.drawImage(counted(), ...whole);
    inside.globalCompositeOperation = "source-in";
    pen.fillStyle = GREY;
    pen.fillRect(...whole);
    pen.globalAlpha = OUTSIDE;
  }
  inside.drawImage(drawn.image, ...whole);
  pen.drawImage(drawn.image, ...whole);
  pen.globalAlpha = 1;
  pen.drawImage(inside.canvas, 0, 0);
  return scale;
}

function drawSurface() {
  const surface = at("surface");
  const scale = paint(surface);
  const pen = surface.getContext("2d");
  if (drawn.box) {
    const [x0, y0, x1, y1] = drawn.box.map((x) => x * scale);
    for (const [color, wide] of [["#fff", 7], [getComputedStyle(surface).getPropertyValue("--focus"), 4]]) {
      Object.assign(pen, { strokeStyle: color, lineWidth: wide });
      pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  }
  SIDES_OF_BOX.forEach((side, place) => { at(side).value = drawn.box ? drawn.box[place] : ""; });
  for (const tool of ["box", "brush"]) at(tool).setAttribute("aria-pressed", String(drawn.tool === tool));
  at("brush-size").parentElement.hidden = drawn.tool !== "brush";
  at("fields").hidden = drawn.tool !== "box";
  at("another").disabled = asking.now || !drawn.answer;
}

function pixelAt(event) {
  const frame = at("surface").getBoundingClientRect();
  const place = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
  return place.map((share, axis) => Math.min(about.size[axis] - 1, Math.max(0, Math.floor(share * about.size[axis]))));
}

// A square of the brush's size at each pixel on the way.
function stroke([fromX, fromY], [x, y]) {
  const pen = drawn.mask.getContext("2d");
  const size = Number(at("brush-size").value);
  const steps = Math.max(1, Math.abs(x - fromX), Math.abs(y - fromY));
  pen.fillStyle = "#fff";
  for (let step = 0; step <= steps; step += 1) {
    const corner = [fromX + ((x - fromX) * step) / steps, fromY + ((y - fromY) * step) / steps];
    pen.fillRect(...corner.map((c) => Math.round(c) - Math.floor((size - 1) / 2)), size, size);
  }
  Object.assign(drawn, { box: null, painted: true });
}

function press(event) {
  if (event.button !== 0) return;
  const first = pixelAt(event);
  let last = first;
  const move = (at) => {
    const here = pixelAt(at);
    if (drawn.tool === "brush") stroke(last, here);
    else {
      const [xs, ys] = [0, 1].map((axis) => [first[axis], here[axis]].sort((a, b) => a - b));
      setBox([xs[0], ys[0], xs[1] + 1, ys[1] + 1]);
    }
    last = here;
    drawSurface();
  };
  const surface = event.currentTarget;
  surface.setPointerCapture(event.pointerId);
  surface.onpointermove = move;
  surface.onpointerup = surface.onpointercancel = () => {
    surface.onpointermove = surface.onpointerup = surface.onpointercancel = null;
    askPart();
  };
  halt();
  move(event);
}

// Arrows move the box, with Shift its right and bottom side; the first one makes a box in the middle.
function arrow(event) {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!by) return;
  event.preventDefault();
  drawn.tool = "box";
  if (!drawn.box) {
    const quarter = about.size.map((size) => Math.floor(size / 4));
    place([...quarter, ...about.size.map((size, axis) => size - quarter[axis])]);
    return;
  }
  const box = [...drawn.box];
  for (const axis of [0, 1]) {
    const step = by[axis] * Math.max(1, Math.round(about.size[axis] / 64));
    const [low, high] = [box[axis], box[axis + 2]];
    if (event.shiftKey) box[axis + 2] = Math.min(about.size[axis], Math.max(low + 1, high + step));
    else {
      const shift = Math.min(about.size[axis] - high, Math.max(-low, step));
      [box[axis], box[axis + 2]] = [low + shift, high + shift];
    }
  }
  place(box);
}

function place(box) {
  setBox(box);
  drawSurface();
  soon();
}

// Nothing waits to be asked any more, and what is asked in views, which takes long, is given up.
function halt() {
  clearTimeout(asking.timer);
  asking.stop?.abort();
}

function soon() {
  halt();
  asking.timer = setTimeout(askPart, WAIT);
}

// ---- asking ---------------------------------------------------------------------------------------------------------

// Fields for what a conditional model can be told, and what they say as the service takes it; none for another model.
function ideaFields(id, onchange = null) {
  const { prompts, classes, count, no_class: none } = about.told || {};
  if (!prompts && !classes) return { fields: [], said: () => ({}), clear: () => {} };
  const chosen = (empty) => h("select", { onchange }, h("option", { value: "" }, empty), Array.from({ length: count }, (_, number) => h("option", { value: number }, `class ${number}`)));
  const written = (placeholder) => h("input", { type: prompts ? "text" : "number", min: 0, maxLength: 2000, placeholder, onchange });
  const field = !prompts && count ? chosen : written;
  const concept = field(prompts ? "a red car" : "none");
  const against = field(prompts ? "no words" : none === null ? "another class" : "no class");
  concept.id = `${id}-concept`;
  against.id = `${id}-against`;
  return {
    fields: [h("label", {}, prompts ? "about the idea" : "about the class", concept), h("label", {}, "against", against)],
    said: () => (concept.value ? { concept: concept.value, ...(against.value ? { against: against.value } : {}) } : {}),
    clear: () => { concept.value = against.value = ""; },
  };
}

// What is drawn, the idea, and whether in views, in words.
function inWords({ concept, against }) {
  const place = drawn.painted ? "what is painted" : drawn.box && `box ${drawn.box.join(", ")}`;
  const idea = concept && `about ${about.told.prompts ? "" : "class "}${concept}${against ? ` against ${against}` : ""}`;
  return [place && `${drawn.rest ? "all but " : ""}${place}`, idea, drawn.views && "in views"].filter(Boolean).join(", ");
}

// One question at a time; what was drawn meanwhile is asked next.
async function askPart() {
  halt();
  const idea = drawn.idea.said();
  const place = drawn.box || drawn.painted;
  if (!drawn.query || !(place || idea.concept || drawn.views)) return;
  asking.again = asking.now;
  if (asking.now) return;
  asking.now = true;
  const { query, rest, views } = drawn;
  say("", working(views));
  const stop = new AbortController();
  asking.stop = views ? stop : null;
  try {
    const like = wanted(views);
    const what = inWords(idea);
    const region = place ? { ...(drawn.painted ? { mask: await png(drawn.mask) } : { box: drawn.box }), rest } : {};
    const shownPart = document.createElement("canvas");
    paint(shownPart);
    const answer = await post("/api/region", { source: query.source, id: query.id, ...region, ...idea, ...like }, stop.signal);
    if (drawn.query === query && !stop.signal.aborted) takePart(answer, { ...like, whole: query, label: `${query.label}, ${what}`, picture: shownPart.toDataURL() });
    say("");
  } catch (error) {
    say(stop.signal.aborted ? "" : error.message);
  } finally {
    Object.assign(asking, { now: false, stop: null });
    if (drawn.query) drawSurface();
    if (asking.again) askPart();
  }
}

async function png(canvas) {
  const bytes = new Uint8Array(await (await canvas.convertToBlob({ type: "image/png" })).arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}

// In the place of the answer to what was drawn before, or behind the other parts, before the whole picture.
function takePart({ queries: [answered], samples: shownSamples }, more) {
  for (const [id, sample] of Object.entries(shownSamples)) samples.set(id, sample);
  const one = { ...answered, ...more, groupColumns: groupColumns(more) };
  const same = queries.find((other) => other.id === one.id && other !== drawn.answer);
  if (same) queries.splice(queries.indexOf(same), 1);
  const replaced = queries.includes(drawn.answer);
  queries.splice(Math.max(0, queries.indexOf(replaced ? drawn.answer : more.whole)), replaced ? 1 : 0, one);
  drawn.answer = one;
  draw();
}

// ---- the tools ------------------------------------------------------------------------------------------------------

function drawPart() {
  const use = (tool) => h("button", { type: "button", id: tool, onclick: () => { drawn.tool = tool; drawSurface(); } }, tool);
  const typed = () => {
    const box = SIDES_OF_BOX.map((side) => at(side).valueAsNumber);
    if (box.every(Number.isInteger)) place(box);
  };
  const field = (side, axis) => h("label", {}, side, h("input", { type: "number", id: side, min: 0, max: about.size[axis], onchange: typed }));
  const largest = Math.max(1, Math.floor(Math.min(...about.size) / 2));
  const brush = h("input", { type: "range", id: "brush-size", min: 1, max: largest, value: Math.max(1, Math.round(largest / 4)) });
  const surface = h("canvas", { id: "surface", tabIndex: 0, role: "application", ariaLabel: "The picture", onpointerdown: press, onkeydown: arrow });
  surface.setAttribute("aria-describedby", "region-how");
  const all = h("input", { type: "checkbox", id: "rest", onchange: (event) => { drawn.rest = event.target.checked; drawSurface(); askPart(); } });
  const views = viewsField({ id: "views", onchange: (event) => { drawn.views = event.target.checked; askPart(); } });
  drawn.idea = ideaFields("part", askPart);
  const section = h("section", { id: "region", className: "card", hidden: true },
    h("div", { className: "top" }, h("h3", { id: "region-title" }), h("button", { type: "button", onclick: closePart }, "Close")),
    surface,
    h("p", { className: "hint", id: "region-how" }, "Drag a box or paint; arrow keys move the box, with Shift they change its size."),
    h("div", { className: "tools" }, use("box"), use("brush"), h("label", { className: "check" }, all, "all but this"), h("button", { type: "button", onclick: clearPart }, "Clear")),
    h("label", {}, "size of the brush", brush),
    h("div", { id: "fields" }, SIDES_OF_BOX.map((side, place) => field(side, place % 2))),
    h("div", { className: "tools" }, drawn.idea.fields),
    views,
    h("button", { type: "button", id: "another", onclick: fresh }, "Keep it and draw another"),
    h("p", { role: "status", className: "hint", id: "region-status" }), h("p", { role: "alert", id: "region-alert" }));
  const list = at("list");
  const bench = h("div", { id: "bench" });
  list.before(bench);
  bench.append(section, list);
}

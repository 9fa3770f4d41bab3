// Sends the forms of the page as API requests, and fills the grid row by row from their events.

import { GivenImage } from "./canvas.js";

const $ = (id) => document.getElementById(id);
const state = { model: null, token: "", running: null, cells: [] };
const given = new GivenImage($("given"), {
  left: $("left"), top: $("top"), right: $("right"), bottom: $("bottom"),
});

function element(name, fields = {}, ...children) {
  const made = Object.assign(document.createElement(name), fields);
  made.append(...children);
  return made;
}

function dataUrl(base64) {
  return `data:image/png;base64,${base64}`;
}

function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

/** Sends a request. If it fails, throws an Error with the message from the server. */
async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) $("token-form").hidden = false;
  const body = await answer.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answered ${answer.status}.`);
}

function json(body, signal) {
  const headers = { "Content-Type": "application/json" };
  return { method: "POST", headers, body: JSON.stringify(body), signal };
}

/** Yields the data of each server-sent event. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((found) => found.startsWith("data: "));
      if (!line || line === "data: [DONE]") continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

/** Runs one request at a time. Stop aborts it, and the server then cancels its job. */
async function run(work) {
  state.running?.abort();
  const control = new AbortController();
  state.running = control;
  complain("");
  $("stop").hidden = false;
  $("results").scrollIntoView({ block: "nearest" });
  try {
    await work(control.signal);
  } catch (error) {
    if (control.signal.aborted) {
      if (state.running === control) say("Stopped.");
    } else {
      say("");
      complain(error.message);
    }
  } finally {
    if (state.running === control) {
      state.running = null;
      if (document.activeElement === $("stop")) $("results").focus();
      $("stop").hidden = true;
    }
  }
}

function cells(count, what) {
  $("grid").replaceChildren();
  $("images-title").textContent = `Images: ${what}`;
  $("images-title").hidden = false;
  state.cells = Array.from({ length: count }, (_, index) => {
    const image = element("img", { alt: `Sample ${index + 1} of ${count}, in progress: ${what}` });
    image.className = "working";
    image.src = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7";
    const bar = element("progress", { max: 1, value: 0 });
    bar.setAttribute("aria-label", `Rows of sample ${index + 1}`);
    const label = element("figcaption");
    const figure = element("figure", {}, image, bar, label);
    $("grid").append(element("li", {}, figure));
    return { image, bar, label, figure, alt: `Sample ${index + 1} of ${count}: ${what}` };
  });
  return state.cells;
}

/** Colors the codes of all samples that a neighbor made more likely; -1 removes the colors. */
function mark(number) {
  for (const cell of state.cells) {
    cell.marks?.remove();
    const ratios = cell.ratios?.[number];
    if (!ratios) continue;
    const squares = ratios.flat().filter((ratio) => ratio >= 1).length;
    const label = `${squares} of ${ratios.length ** 2} squares by this neighbor`;
    cell.marks = element("canvas", { width: ratios.length, height: ratios.length, role: "img", ariaLabel: label });
    const brush = cell.marks.getContext("2d");
    brush.fillStyle = "#d6006c";
    ratios.forEach((row, y) => row.forEach((ratio, x) => {
      brush.globalAlpha = Math.min(Math.max(ratio / 4, 0), 0.8);
      brush.fillRect(x, y, 1, 1);
    }));
    cell.figure.append(cell.marks);
  }
  document.querySelectorAll("#neighbor-list button").forEach((button, place) => {
    button.setAttribute("aria-pressed", place === number);
  });
}

function finish(cell, event, index) {
  const url = dataUrl(event.b64_json);
  cell.image.src = url;
  cell.image.alt = cell.alt;
  cell.image.className = "";
  cell.bar.remove();
  cell.ratios = event.ratios;
  const score = event.clip_score == null ? "" : `\nCLIP ${event.clip_score.toFixed(2)}`;
  cell.label.textContent = `seed ${event.seed}${score}`;
  const use = element("button", { type: "button", textContent: "Use" });
  use.setAttribute("aria-label", `Use sample ${index + 1} as your image`);
  use.addEventListener("click", async () => {
    const bytes = Uint8Array.from(atob(event.b64_json), (letter) => letter.charCodeAt(0));
    await take(new Blob([bytes], { type: "image/png" }), cell.alt);
    $("given-title").scrollIntoView({ block: "nearest" });
  });
  const save = element("a", { href: url, download: `sample-${event.seed}.png`, textContent: "Save" });
  save.className = "button";
  save.setAttribute("aria-label", `Save sample ${index + 1}`);
  const buttons = element("div", {}, use, save);
  buttons.className = "buttons";
  cell.figure.append(buttons);
}

function showNeighbors(neighbors) {
  $("neighbors").hidden = !neighbors.length;
  $("neighbor-list").replaceChildren(
    ...neighbors.map((found, number) => {
      const image = element("img", { src: dataUrl(found.b64_json), alt: found.caption });
      const show = element("button", { type: "button", title: "Show what it changed" }, image);
      show.addEventListener("click", () => {
        mark(show.getAttribute("aria-pressed") === "true" ? -1 : number);
      });
      const origin = [found.source, found.license, found.attribution].filter(Boolean).join(" · ");
      const caption = element("figcaption", {}, element("strong", { textContent: found.caption }), origin);
      return element("li", {}, element("figure", {}, show, caption));
    }),
  );
}

/** Fills the grid from a stream of partial and complete images. */
async function images(answer, count, what) {
  const places = cells(count, what);
  const plural = count === 1 ? "image" : "images";
  say(`Generating ${count} ${plural}…`);
  let known = false;
  let done = 0;
  for await (const event of events(answer)) {
    const cell = places[event.index];
    if (event.neighbors && !known) {
      known = true;
      showNeighbors(event.neighbors);
    }
    if (event.type.endsWith(".partial_image")) {
      cell.image.src = dataUrl(event.b64_json);
      cell.bar.max = event.of_rows;
      cell.bar.value = event.rows;
      cell.label.textContent = `row ${event.rows} of ${event.of_rows}`;
    } else {
      finish(cell, event, event.index);
      done += 1;
    }
  }
  say(`Done: ${done} ${done === 1 ? "image" : "images"} for “${what}”.`);
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? null : Number(value);
}

$("generate").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("prompt").value.trim();
  const count = number("samples");
  const body = {
    prompt, n: count, stream: true, guidance: number("guidance"), retrieve: number("retrieve"),
    top_p: number("top-p"), top_k: number("top-k"), temperature: number("temperature"),
    seed: number("seed"), explain: number("retrieve") > 0,
  };
  run(async (signal) => {
    say("Waiting for a free slot…");
    await images(await send("/v1/images/generations", json(body, signal)), count, prompt);
  });
});

async function take(blob, name) {
  try {
    await given.show(blob, name);
    $("with-image").hidden = false;
  } catch {
    complain("The browser cannot show this file as an image.");
  }
}

$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) take(file, file.name);
});

function readAsDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The image cannot be read."));
    reader.readAsDataURL(blob);
  });
}

/** Requests a caption or an answer about the input image, and shows the text as it arrives. */
function chat(label, text) {
  run(async (signal) => {
    say("Reading the image…");
    const content = [{ type: "image_url", image_url: { url: await readAsDataUrl(given.blob) } }];
    if (text) content.push({ type: "text", text });
    const messages = [{ role: "user", content }];
    const body = { model: state.model.id, messages, stream: true };
    const answer = await send("/v1/chat/completions", json(body, signal));
    const shown = element("dd");
    $("texts").hidden = false;
    $("text-list").prepend(element("dt", { textContent: label }), shown);
    for await (const chunk of events(answer)) shown.textContent += chunk.choices[0]?.delta.content ?? "";
    say(`Done: the ${text ? "answer" : "caption"} is “${shown.textContent}”.`);
  });
}

$("caption").addEventListener("submit", (event) => {
  event.preventDefault();
  chat("Caption:", "");
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  chat(question, question);
});

/** Requests an edit of the input image. `fields` become fields of the form. */
function change(fields, what) {
  run(async (signal) => {
    say("Sending the image…");
    const form = new FormData();
    form.append("image", given.blob, "image");
    form.append("stream", "true");
    for (const [name, value] of Object.entries(fields)) if (value !== "") form.append(name, value);
    const answer = await send("/v1/images/edits", { method: "POST", body: form, signal });
    await images(answer, 1, what);
  });
}

$("edit").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("instruction").value.trim();
  change({ prompt }, prompt);
});

$("infill").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("whole").value.trim();
  const box = given.box().join(",");
  change({ prompt, box }, prompt || `box ${box} filled in`);
});

$("stop").addEventListener("click", () => state.running?.abort());
$("guidance").addEventListener("input", () => {
  $("guidance-value").textContent = Number($("guidance").value).toFixed(2);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => given.draw());

async function connect() {
  try {
    const list = await (await send("/v1/models")).json();
    const [model] = list.data;
    state.model = model;
    $("token-form").hidden = true;
    complain("");
    $("model").textContent = `${model.id}, ${model.resolution} × ${model.resolution} pixels`;
    document.title = `${model.id} — cm3leon_jax`;
    $("guidance").value = model.sampling.guidance;
    $("guidance-value").textContent = model.sampling.guidance.toFixed(2);
    $("top-p").value = model.sampling.top_p;
    $("top-k").value = model.sampling.top_k;
    $("temperature").value = model.sampling.temperature;
    $("samples").max = model.most_samples;
    $("samples").value = Math.min(4, model.most_samples);
    $("retrieve").max = model.most_retrieve;
    $("retrieve").value = model.retrieve;
    given.resize(model.resolution);
  } catch (error) {
    $("model").textContent = "not connected";
    complain(error.message);
  }
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token").value.trim();
  connect();
});

connect();

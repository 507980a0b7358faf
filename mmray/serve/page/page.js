// The page's behaviour: ask the endpoint it came from, show what it answers. Nothing is kept, nothing is sent elsewhere.

const at = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(1)} %`;
let picture = null; // the chosen image, a File
let maxItems = 1;

function headers() {
  const token = at("token").value;
  return { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
}

async function ask(items) {
  const response = await fetch("v1/score", { method: "POST", headers: headers(), body: JSON.stringify({ items }) });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.message);
  return answer;
}

function encode(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ base64: reader.result.slice(reader.result.indexOf(",") + 1) });
    reader.onerror = () => reject(new Error(`cannot read ${file.name}`));
    reader.readAsDataURL(file);
  });
}

function cell(row, text, tag = "td") {
  const made = document.createElement(tag);
  if (tag === "th") made.scope = "row";
  made.textContent = text;
  row.append(made);
  return made;
}

const labelOf = (result) =>
  result.predicted_label === null || result.predicted_label === undefined
    ? ""
    : [].concat(result.predicted_label).join(", ") || "none";

// One item

function choose(file) {
  picture = file ?? null;
  at("preview").hidden = at("hint").hidden = false;
  at(picture ? "hint" : "preview").hidden = true;
  if (picture) {
    at("preview").src = URL.createObjectURL(picture);
    at("preview").alt = `The chosen image, ${picture.name}`;
  } else {
    at("image").value = "";
  }
}

function views(item) {
  const all = [["image and text", item], ["image only", { image: item.image }], ["text only", { text: item.text }]];
  return item.image && item.text !== undefined ? all : all.slice(0, 1);
}

async function scoreItem(event) {
  event.preventDefault();
  const item = {};
  if (picture) item.image = await encode(picture);
  if (at("text").value) item.text = at("text").value;
  at("status").textContent = "Scoring …";
  at("status").className = "";
  try {
    const asked = views(item).slice(0, maxItems);
    const answer = await ask(asked.map(([, view]) => view));
    show(item, answer, asked.map(([name], k) => [name, answer.results[k]]));
  } catch (error) {
    at("result").hidden = true;
    at("status").className = "wrong";
    at("status").textContent = error.message;
    if (/token/.test(error.message)) at("access").open = true;
  }
}

function show(item, answer, found) {
  const result = answer.results[0];
  const why = result.reason_detail ? ` (${result.reason_detail})` : "";
  at("status").textContent = `${result.status}${why}, ${answer.milliseconds.toFixed(0)} ms`;
  at("label").textContent = labelOf(result);
  at("score").textContent = result.score === null ? "no score" : `score ${result.score.toFixed(4)}`;
  showBars(result.probabilities ?? {});
  showWeights(result.image_weight);
  at("views").hidden = found.length < 2;
  at("views").tBodies[0].replaceChildren(...found.map(([name, view]) => {
    const row = document.createElement("tr");
    cell(row, name, "th");
    cell(row, labelOf(view));
    cell(row, view.score === null ? view.reason : view.score.toFixed(4));
    return row;
  }));
  at("json").textContent = JSON.stringify({ ...answer, results: [result] }, null, 1);
  at("curl").textContent = curl(item);
  at("result").hidden = false;
}

function showBars(probabilities) {
  const sorted = Object.entries(probabilities).sort((a, b) => b[1] - a[1]);
  at("bars").hidden = !sorted.length;
  at("bars").tBodies[0].replaceChildren(...sorted.map(([name, value]) => {
    const row = document.createElement("tr");
    cell(row, name, "th");
    const meter = document.createElement("meter");
    meter.value = value;
    meter.setAttribute("aria-label", `probability of ${name}`);
    cell(row, "").append(meter);
    cell(row, percent(value));
    return row;
  }));
}

function showWeights(weight) {
  at("weights").hidden = weight === null || weight === undefined;
  if (at("weights").hidden) return;
  at("weight-image").style.flexGrow = weight;
  at("weight-text").style.flexGrow = 1 - weight;
  at("weights-text").textContent = `image ${percent(weight)}, text ${percent(1 - weight)}`;
}

function curl(item) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = ["curl"];
  if (at("token").value) parts.push("-H 'Authorization: Bearer TOKEN'");
  if (item.image) parts.push(`-F image=${quote(`@${picture.name}`)}`);
  if (item.text !== undefined) parts.push(`--form-string text=${quote(item.text)}`);
  if (parts.length === 1) parts.push("-F text=");
  return [...parts, new URL("v1/score", location.href).href].join(" \\\n  ");
}

// A table

export function parseCsv(text) {
  const rows = [[""]];
  let quoted = false;
  for (let k = text.charCodeAt(0) === 0xfeff ? 1 : 0; k < text.length; k++) {
    const row = rows[rows.length - 1], sign = text[k];
    if (quoted) {
      if (sign !== '"') row[row.length - 1] += sign;
      else if (text[k + 1] === '"') row[row.length - 1] += text[++k];
      else quoted = false;
    } else if (sign === '"') quoted = true;
    else if (sign === ",") row.push("");
    else if (sign === "\n") rows.push([""]);
    else if (sign !== "\r") row[row.length - 1] += sign;
  }
  const [names, ...cells] = rows.filter((row) => row.length > 1 || row[0] !== "");
  return { names: names ?? [], rows: cells };
}

// A cell that a spreadsheet would take for a formula begins with an apostrophe.
const written = (value) => `"${String(value ?? "").replace(/^[=+\-@\t\r](?![\d.]*$)/, "'$&").replaceAll('"', '""')}"`;

async function scoreTable(event) {
  event.preventDefault();
  const { names, rows } = parseCsv(await at("csv").files[0].text());
  const files = new Map([...at("images").files].map((file) => [file.name, file]));
  const [text, image] = [names.indexOf("text"), names.indexOf("image")];
  at("work").hidden = false;
  at("download").hidden = true;
  if (text < 0 && image < 0) {
    at("count").textContent = `The table has no column text or image; it has ${names.join(", ")}.`;
    return;
  }
  const scored = [];
  try {
    for (let start = 0; start < rows.length; start += maxItems) {
      const part = rows.slice(start, start + maxItems);
      const items = await Promise.all(part.map(async (row) => {
        const file = files.get(row[image]?.split(/[\\/]/).pop());
        return {
          ...(row[text] ? { text: row[text] } : {}),
          ...(file ? { image: await encode(file) } : row[image] ? { image: { path: row[image] } } : {}),
        };
      }));
      scored.push(...(await ask(items)).results);
      at("progress").max = rows.length;
      at("progress").value = scored.length;
      at("count").textContent = `${scored.length} of ${rows.length}`;
    }
    offer(names, rows, scored);
  } catch (error) {
    at("count").textContent = `${error.message} (${scored.length} of ${rows.length} rows were scored)`;
  }
}

function offer(names, rows, scored) {
  const added = ["score", "predicted_label", "image_weight", "modalities_used", "status", "reason", "reason_detail"];
  const lines = rows.map((row, k) => [...names.map((_, c) => row[c]), ...added.map((name) => scored[k][name])]);
  const csv = [[...names, ...added], ...lines].map((line) => line.map(written).join(",")).join("\r\n");
  at("download").href = URL.createObjectURL(new Blob([csv], { type: "text/csv" }));
  at("download").hidden = false;
}

async function introduce() {
  const response = await fetch("v1/model", { headers: headers() });
  const model = await response.json();
  if (!response.ok) {
    at("model").textContent = model.message;
    at("access").open = response.status === 401;
    return;
  }
  maxItems = model.max_items;
  at("model").textContent =
    `A ${model.task} model of ${model.modalities.join(" and ")}, ${model.fingerprint.slice(0, 12)}, mmray ${model.version}.`;
}

at("item").addEventListener("submit", scoreItem);
at("table").addEventListener("submit", scoreTable);
at("clear").addEventListener("click", () => choose(null));
at("image").addEventListener("change", () => choose(at("image").files[0]));
at("token").addEventListener("change", introduce);
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  at("drop").addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", over);
    if (name === "drop" && event.dataTransfer.files[0]) choose(event.dataTransfer.files[0]);
  });
}
introduce();

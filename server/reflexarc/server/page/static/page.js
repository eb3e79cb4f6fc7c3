// Asks the server for its status once a second while somebody looks, one question at a time.
// Everything that came from clients is set as text, never as markup.

import { barChart, curveChart, element, milliseconds, shortNumber, timeChart } from "./charts.js";

const POLL_MS = 1000;
const SLOW_POLL_MS = 5000; // while the server does not answer
const TIMEOUT_MS = 8000;
const SPAN_S = 120;
const KEPT_S = 300;

const at = (id) => document.getElementById(id);
const SILENT_S = 10;
const OVER_S = 5;
const page = {
  timeline: [], contract: null, contractTag: "", now: 0, // as the server said
  chosen: null, // tag of the session that is shown
  picked: false, // whether somebody chose it
  shown: "", // what of it is on the page
  order: new Map(), // places of sessions in the list
};
let readLatency = () => null;

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (answer.status === 404) return null;
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return answer.json();
}

async function poll() {
  let wait = POLL_MS;
  try {
    const since = page.timeline.length ? page.timeline[page.timeline.length - 1].at : 0;
    const contract = encodeURIComponent(page.contractTag);
    show(await ask(`/v1/status?since=${since}&contract=${contract}`));
    await showSession();
    at("trouble").hidden = true;
  } catch (error) {
    wait = SLOW_POLL_MS;
    at("trouble").textContent = `The server does not answer; asking again. (${error.message})`;
    at("trouble").hidden = false;
    setPhase("gone");
  }
  const again = () => (document.hidden ? null : poll());
  if (document.hidden) document.addEventListener("visibilitychange", again, { once: true });
  else setTimeout(poll, wait);
}

function show(status) {
  if (page.now > status.now + 5) page.timeline = []; // another server, or its clock was set back
  page.now = status.now;
  page.timeline.push(...status.timeline);
  page.timeline = page.timeline.filter((second) => second.at >= status.now - KEPT_S);
  if (status.contract) {
    page.contract = status.contract;
    page.contractTag = status.contract_tag;
    showContract(status.contract);
  }
  setPhase(status.phase);
  at("uptime").textContent = `version ${status.version}, up ${duration(status.uptime_s)}`;
  if (status.error) throw new Error(status.error);
  showNumbers(status);
  showLatency();
  showStages(status.stages);
  showBatches();
  showSessions(status.sessions);
}

function setPhase(phase) {
  at("phase").textContent = phase === "gone" ? "no answer" : phase;
  at("phase").className = `pill ${phase}`;
}

function duration(seconds) {
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
}

const lately = (seconds) => page.timeline.filter((row) => row.at >= page.now - seconds - 1);
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

// Of medians of seconds, weighted by their answers: near enough for a number at a glance.
function weighted(rows, name) {
  const known = rows.filter((row) => row[name] !== null).sort((a, b) => a[name] - b[name]);
  let left = sum(known.map((row) => row.answered)) / 2;
  return known.find((row) => (left -= row.answered) <= 0)?.[name];
}

function batchSizes(rows) {
  const counts = new Map();
  for (const row of rows) {
    for (const [size, count] of Object.entries(row.batch_sizes)) {
      counts.set(Number(size), (counts.get(Number(size)) ?? 0) + count);
    }
  }
  return [...counts].sort((a, b) => a[0] - b[0]);
}

function showNumbers(status) {
  const rows = lately(10), sizes = batchSizes(rows);
  const answers = sum(rows.map((row) => row.answered));
  at("rate").textContent = shortNumber(answers / 10);
  at("median").textContent = milliseconds(weighted(rows, "p50"));
  at("p95").textContent = milliseconds(weighted(rows, "p95"));
  const batched = sum(sizes.map(([, count]) => count));
  const mean = sum(sizes.map(([size, count]) => size * count)) / batched;
  at("batch").textContent = batched ? mean.toFixed(1) : "–";
  at("waiting").textContent = shortNumber(status.waiting);
  at("active").textContent = shortNumber(status.active);
  for (const name of ["answered", "refused"]) {
    at(name).textContent = shortNumber(sum(page.timeline.map((row) => row[name])));
  }
}

function showLatency() {
  const rows = lately(SPAN_S).map((row) => ({ ...row, values: [row.p50, row.p95] }));
  const label = "Median and 95th percentile of the last two minutes";
  readLatency = timeChart(at("latency"), rows, { now: page.now, span: SPAN_S, label });
}

at("latency").addEventListener("pointermove", (event) => {
  const near = readLatency(event.clientX - at("latency").getBoundingClientRect().left);
  at("latency-at").textContent = near
    ? `${Math.round(page.now - near.at)} s ago: median ${milliseconds(near.p50)}, ` +
      `95th percentile ${milliseconds(near.p95)}, ${near.answered} answered, ${near.refused} refused`
    : "";
});

function showStages(names) {
  const rows = lately(60), answers = sum(rows.map((row) => row.answered));
  const means = names.map((_, stage) => sum(rows.map((row) => row.stages[stage] * row.answered)) / answers);
  const whole = sum(means.filter(Number.isFinite));
  const stack = element("div", { class: "stack", "aria-hidden": "true" });
  const legend = element("div", { class: "legend" });
  names.forEach((name, index) => {
    const part = element("span", { class: `s${index}` });
    part.style.flexGrow = whole ? means[index] / whole : 0;
    stack.append(part);
    legend.append(
      element("span", { class: `swatch s${index}` }),
      element("span", {}, name),
      element("b", {}, means[index] ? milliseconds(means[index]) : "–"), // 0: not measured
    );
  });
  at("stages").replaceChildren(stack, legend);
}

function showBatches() {
  const bars = batchSizes(lately(60)).map(([size, count]) => ({ name: String(size), value: count }));
  barChart(at("batches"), bars, "Answers by the size of their batch");
}

function showSessions(sessions) {
  at("no-sessions").hidden = sessions.length > 0;
  at("session-list").hidden = sessions.length === 0;
  const shown = sessions.find((session) => session.tag === page.chosen);
  const over = shown && !page.picked && shown.age_s >= OVER_S; // its episode: show who asks now
  if (!shown || over) page.chosen = sessions[0]?.tag ?? null;
  if (!shown) page.picked = false;
  const focused = document.activeElement?.dataset?.tag;
  at("sessions").replaceChildren(...inOrder(sessions).map(sessionRow));
  if (focused) document.querySelector(`button[data-tag="${CSS.escape(focused)}"]`)?.focus();
}

// Rows keep their place while they are looked at; sessions that fell silent stand below.
function inOrder(sessions) {
  const known = page.order;
  page.order = new Map(sessions.map(({ tag }) => [tag, known.get(tag) ?? 0]));
  let newest = Math.max(0, ...known.values());
  for (const [tag, place] of [...page.order].reverse()) if (!place) page.order.set(tag, (newest += 1));
  const silent = (session) => Number(session.age_s >= SILENT_S);
  return [...sessions].sort(
    (a, b) => silent(a) - silent(b) || page.order.get(b.tag) - page.order.get(a.tag),
  );
}

function sessionRow(session) {
  const chosen = session.tag === page.chosen ? "chosen" : "";
  const row = element("tr", { class: `${chosen} ${session.age_s >= SILENT_S ? "silent" : ""}` });
  const name = element("td");
  const pressed = String(session.tag === page.chosen);
  const button = element("button", { type: "button", "aria-pressed": pressed }, session.tag);
  button.dataset.tag = session.tag;
  name.append(button);
  row.append(
    name,
    element("td", { class: "more left" }, session.dialect),
    element("td", {}, shortNumber(session.count)),
    element("td", { class: "more" }, milliseconds(session.total_ms)),
    element("td", {}, duration(Math.round(session.age_s))),
    element("td", session.code === "ok" ? {} : { class: "refused" }, session.code),
  );
  return row;
}

at("sessions").addEventListener("click", async (event) => {
  const tag = event.target?.dataset?.tag;
  if (!tag) return;
  page.chosen = tag;
  page.picked = true;
  for (const row of at("sessions").children) {
    const here = row.querySelector("button").dataset.tag === tag;
    row.classList.toggle("chosen", here);
    row.querySelector("button").setAttribute("aria-pressed", String(here));
  }
  await showSession().catch(() => null); // the next poll says what is wrong
});

async function showSession() {
  const tag = page.chosen;
  const session = tag === null ? null : await ask(`/v1/sessions/${encodeURIComponent(tag)}`);
  if (tag !== page.chosen) return; // another was chosen meanwhile
  at("session").hidden = session === null;
  if (session === null || page.shown === `${tag} ${session.count}`) return;
  page.shown = `${tag} ${session.count}`;
  at("session-tag").textContent = session.tag;
  const step = session.step === null ? "" : `, step ${session.step}`;
  at("session-step").textContent = `${session.dialect}${step}, ${milliseconds(session.total_ms)}`;
  at("instruction").textContent = session.instruction ?? "";
  at("session-error").hidden = session.error === null;
  at("session-error").textContent = session.error === null ? "" : `${session.code}: ${session.error}`;
  showImages(session);
  showActions(session.actions);
}

function showImages(session) {
  const figures = [...at("images").children];
  const same = figures.length === session.cameras.length &&
    figures.every((figure, index) => figure.dataset.camera === session.cameras[index]);
  if (!same) at("images").replaceChildren(...session.cameras.map(cameraFigure));
  session.cameras.forEach((name, index) => {
    const path = [session.tag, "images", name].map(encodeURIComponent).join("/");
    at("images").children[index].querySelector("img").src = `/v1/sessions/${path}?v=${session.count}`;
  });
}

function cameraFigure(name) {
  const camera = page.contract?.cameras.find((known) => known.name === name);
  const figure = element("figure"), image = element("img", { alt: `Last image of ${name}` });
  figure.dataset.camera = name;
  if (camera) image.style.setProperty("--shape", `${camera.width} / ${camera.height}`);
  const size = camera ? `, ${camera.width}×${camera.height}, ${camera.orientation}` : "";
  figure.append(image, element("figcaption", {}, `${name}${size}`));
  return figure;
}

function showActions(actions) {
  const spec = page.contract?.action;
  if (!actions || !spec) {
    at("actions").replaceChildren();
    at("chunk-note").textContent = "No answer yet.";
    return;
  }
  const seconds = (actions.length / spec.control_hz).toFixed(2);
  at("chunk-note").textContent =
    `${actions.length} actions, ${seconds} s at ${spec.control_hz} Hz, each between its limits`;
  const boxes = spec.names.map((name, index) => {
    const values = actions.map((row) => row[index]);
    const box = element("div", { class: "action" });
    const head = element("p");
    const limits = `${shortNumber(spec.low[index])} to ${shortNumber(spec.high[index])}`;
    head.append(element("b", {}, name), element("span", { class: "soft" }, limits));
    const chart = element("div", { class: "chart" });
    box.append(head, chart);
    return { box, chart, values, name, low: spec.low[index], high: spec.high[index] };
  });
  at("actions").replaceChildren(...boxes.map(({ box }) => box));
  for (const { chart, values, name, low, high } of boxes) {
    curveChart(chart, values, { low, high, label: `${name} over the chunk` });
  }
}

function showContract(contract) {
  const { action, state, history } = contract;
  const gripper = action.gripper === null
    ? "none"
    : `${action.names[action.gripper.index]}: ${action.gripper.open} opens, ${action.gripper.closed} closes`;
  const lines = [
    ...contract.cameras.map((camera) => [
      `camera ${camera.name}`,
      `${camera.width}×${camera.height} RGB, ${camera.orientation}, ` +
        `rendered at ${camera.source_width}×${camera.source_height}`,
    ]),
    ["state", `${state.names.length} numbers, ${state.layout}: ${state.names.join(", ")}`],
    ["history", `${history.frames} frames, ${history.states} states, every ${history.stride} steps`],
    ["instruction", contract.needs_language ? "needed" : "not read"],
    ["goal image", contract.needs_goal_image ? "needed" : "not read"],
    ["action", `${action.horizon} × ${action.names.length}, ${action.kind}, ${action.control_hz} Hz: ` +
      action.names.join(", ")],
    ["gripper", gripper],
    ["normalisation", `state ${contract.state_normalization}, action ${contract.action_normalization}`],
    ["checkpoint", contract.checkpoint_fingerprint || "none"],
  ];
  at("family").textContent = contract.family;
  document.title = `${contract.family} - Reflexarc policy server`;
  at("no-contract").hidden = true;
  at("contract").replaceChildren(
    ...lines.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]),
  );
}

let resized = null;
new ResizeObserver(() => {
  clearTimeout(resized);
  resized = setTimeout(() => {
    page.shown = "";
    if (page.now) { showLatency(); showBatches(); }
  }, 100);
}).observe(document.documentElement);

poll();

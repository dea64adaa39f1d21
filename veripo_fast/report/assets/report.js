"use strict";

// Hover read-out: nearest step of one chart, shown in every chart of the same kind of stage.
for (const group of document.querySelectorAll("[data-linked]")) {
  const charts = [...group.querySelectorAll("svg[data-points]")].map((svg) => ({
    svg,
    points: JSON.parse(svg.dataset.points),
    cursor: svg.querySelector(".cursor"),
    dot: svg.querySelector(".dot"),
    output: svg.closest("figure").querySelector("output"),
    rest: svg.closest("figure").querySelector("output").textContent,
  }));
  const nearest = (points, distance) => points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  const place = (chart, x, y) => {
    chart.cursor.setAttribute("x1", x);
    chart.cursor.setAttribute("x2", x);
    chart.dot.setAttribute("cx", y === null ? -9 : x);
    chart.dot.setAttribute("cy", y === null ? -9 : y);
  };
  const show = (step) => {
    for (const chart of charts) {
      const point = nearest(chart.points, (p) => Math.abs(p[0] - step));
      place(chart, point[1], point[2]);
      chart.output.textContent = `step ${point[0]}: ${point[3]}`;
    }
  };
  const hide = () => {
    for (const chart of charts) {
      place(chart, -9, null);
      chart.output.textContent = chart.rest;
    }
  };
  for (const chart of charts) {
    const follow = (event) => {
      const box = chart.svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.svg.viewBox.baseVal.width;
      show(nearest(chart.points, (p) => Math.abs(p[1] - x))[0]);
    };
    chart.svg.addEventListener("pointermove", follow);
    chart.svg.addEventListener("pointerdown", follow);
    chart.svg.addEventListener("pointerleave", hide);
  }
}

// Samples and pairs. Text from models only ever becomes text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

function node(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null));
  return made;
}

const fixed = (value, digits) => value.toFixed(digits).replace("-", "−");
const signed = (value) => (value > 0 ? "+" : "") + fixed(value, 2);

function frameStrip(key) {
  const strip = data.media[key];
  const title = node("h3", "", strip.label);
  if (strip.error) return [title, node("p", "missing", `Not shown: ${strip.error}`)];
  const items = strip.frames.map((frame) => {
    const image = node("img");
    image.src = frame.source;
    image.width = frame.width;
    image.height = frame.height;
    const when = frame.seconds === null ? "" : `${frame.seconds.toFixed(2)} s`;
    image.alt = when ? `Frame at ${when}` : strip.label;
    return node("li", "", image, node("span", "", when));
  });
  const part = strip.frames.length < strip.total ? `${strip.frames.length} of ${strip.total} frames` : "";
  return [title, node("ul", "frames", ...items), part ? node("p", "caption", part) : null];
}

function optionList(group) {
  const goldLetter = /^[A-Z]$/.test(group.gold.trim()) ? group.gold.trim() : null;
  const items = group.options.map((text, i) => {
    const letter = String.fromCharCode(65 + i);
    const isGold = letter === goldLetter || text === group.gold;
    const item = node("li", isGold ? "gold" : "", node("span", "letter", letter), text, isGold ? "  ✓" : "");
    return item;
  });
  return node("ul", "options", ...items);
}

function ask(group) {
  const gold = node("p", "gold-line", "Gold ", node("b", "", group.gold), node("span", "caption", `  ${group.problem_type}`));
  return node("div", "ask", ...group.media.flatMap(frameStrip), node("p", "question", group.question),
    group.options.length ? optionList(group) : null, gold);
}

// Splits at the tags; what is in <answer> is the answer, what is in <think> the reasoning.
function marked(text) {
  const out = [];
  let inside = "";
  const structured = /<think>|<answer>/.test(text);
  for (const piece of text.split(/(<\/?(?:think|answer)>)/)) {
    const tag = /^<(\/?)(think|answer)>$/.exec(piece);
    if (tag) {
      inside = tag[1] ? "" : tag[2];
      out.push(node("span", "tag", piece));
    } else if (piece) {
      out.push(node("span", inside || (structured ? "outside" : ""), piece));
    }
  }
  return out;
}

function said(text) {
  const box = node("div", "said", ...marked(text));
  if (text.length < 700) return [box];
  box.classList.add("folded");
  const more = node("button", "more", "Show all of it");
  more.addEventListener("click", () => {
    const folded = box.classList.toggle("folded");
    more.textContent = folded ? "Show all of it" : "Show less";
  });
  return [box, more];
}

function advantageBar(value, scale) {
  const bar = node("i", value < 0 ? "down" : "up");
  bar.style.width = `${(Math.abs(value) / scale) * 50}%`;
  const axis = node("span", "axis", bar);
  axis.setAttribute("aria-hidden", "true");
  return node("span", "advantage", node("span", "soft", "advantage"), axis, node("b", "", signed(value)));
}

function verdictChips(verdict) {
  if (!verdict) return [];
  const chips = [];
  for (const flag of verdict.flags) {
    if (["inconsistent", "wrong", "format"].includes(flag)) continue; // said above or below
    chips.push(["bad", flag === "repetition" ? `repetition ${fixed(verdict.repetition * 100, 0)} %` : flag]);
  }
  const supported = verdict.supported === null ? "" : `: reasoning supports ${verdict.supported}`;
  if (verdict.consistent === true) chips.push(["ok", `consistent${supported}`]);
  if (verdict.consistent === false) chips.push(["bad", `inconsistent${supported}`]);
  if (verdict.consistent === null) chips.push(["", "consistency undecided"]);
  if (verdict.judge_score !== null) chips.push(["", `judge score ${fixed(verdict.judge_score, 2)}`]);
  return chips;
}

function pairChips(group, index) {
  const count = (side) => group.pairs.filter((pair) => pair[side].index === index).length;
  return ["chosen", "rejected"].filter(count).map((side) => ["", `${side} in ${count(side)} pair${count(side) > 1 ? "s" : ""}`]);
}

function scoreWord(accuracy) {
  if (accuracy === 1) return node("span", "right", "✓ right");
  if (accuracy === 0) return node("span", "wrong", "✗ wrong");
  return node("span", "", `${fixed(accuracy, 2)} right`);
}

function completion(group, item, index, scale) {
  const reward = node("span", "reward", "reward ", node("b", "", fixed(item.reward, 2)));
  const unfinished = item.finish === "stop" ? null : "unfinished";
  const facts = node("div", "facts", node("span", "index", String(index)), scoreWord(item.accuracy),
    node("span", "soft", item.format > 0 ? "format ✓" : "format ✗"), reward,
    node("span", "soft tokens", `${item.tokens.toLocaleString("en")} tokens`), advantageBar(item.advantage, scale));
  const chips = [...verdictChips(item.verdict), ...pairChips(group, index)];
  if (unfinished && !chips.some((chip) => chip[1] === unfinished)) chips.unshift(["bad", unfinished]);
  const list = chips.length ? node("ul", "chips", ...chips.map(([tone, text]) => node("li", tone, text))) : null;
  const made = node("article", "completion", facts, ...said(item.text), list);
  made.setAttribute("aria-label", `Completion ${index}`);
  return made;
}

function side(name, value) {
  const from = value.index < 0 ? "assembled" : `completion ${value.index}`;
  const used = value.loss_tokens === value.tokens ? `${value.tokens} tokens` : `loss on ${value.loss_tokens} of ${value.tokens} tokens`;
  const text = value.runs
    ? node("div", "said", ...value.runs.map(([enters, run]) => node("span", enters ? "" : "masked", run)))
    : node("div", "said", ...marked(value.text));
  return node("div", `side ${name}`, node("h4", "", name, node("span", "", `  ${from}, ${used}`)), text);
}

function pairList(group) {
  if (!group.pairs.length) return null;
  const made = group.pairs.map((pair) => node("article", "pair",
    node("header", "", node("b", "", pair.family), pair.reason ? ` – ${pair.reason}` : ""),
    node("div", "sides", side("chosen", pair.chosen), side("rejected", pair.rejected))));
  return node("div", "pairs", node("h3", "", "Pairs built from this prompt"), ...made);
}

function fill(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => {
    const option = node("option", "", text);
    option.value = value;
    option.selected = value === chosen;
    return option;
  }));
}

// What a search looks for, in any of the texts; empty finds all.
function holds(needle, ...texts) {
  const wanted = needle.trim().toLowerCase();
  return !wanted || texts.some((text) => String(text).toLowerCase().includes(wanted));
}

const unique = (list) => [...new Set(list)];

const KINDS = {
  any: () => true,
  "with pairs": (g) => g.pairs.length > 0,
  "right and wrong": (g) => g.completions.some((c) => c.accuracy === 1) && g.completions.some((c) => c.accuracy === 0),
  "all right": (g) => g.completions.every((c) => c.accuracy === 1),
  "all wrong": (g) => g.completions.every((c) => c.accuracy === 0),
  contradiction: (g) => g.completions.some((c) => c.verdict && c.verdict.consistent === false),
  unfinished: (g) => g.completions.some((c) => c.finish !== "stop"),
};

function startViewer(data) {
  const stagePick = find("pick-stage"), stepPick = find("pick-step"), promptPick = find("pick-prompt");
  const kindPick = find("pick-kind"), textPick = find("pick-text");
  let groups = data.groups;
  let current = 0;

  function fillPickers(group) {
    const inStage = groups.filter((g) => g.stage === group.stage);
    fill(stagePick, unique(groups.map((g) => g.stage)).map((s) => [s, s]), group.stage);
    fill(stepPick, unique(inStage.map((g) => g.run_step)).map((s) => [String(s), String(s)]), String(group.run_step));
    fill(promptPick, groups.flatMap((g, i) => {
      if (g.stage !== group.stage || g.run_step !== group.run_step) return [];
      const right = g.completions.filter((c) => c.accuracy === 1).length;
      const name = g.prompt_id.length > 36 ? `${g.prompt_id.slice(0, 35)}…` : g.prompt_id;
      return [[String(i), `${name} (${right} of ${g.completions.length} right)`]];
    }), String(current));
  }

  function show(index) {
    current = Math.max(0, Math.min(groups.length - 1, index));
    const group = groups[current];
    find("previous").disabled = current === 0;
    find("next").disabled = current >= groups.length - 1;
    find("where").textContent = groups.length ? `${current + 1} of ${groups.length}` : "none";
    if (!group) {
      find("sample").replaceChildren(node("p", "none", "No sample matches."));
      for (const select of [stagePick, stepPick, promptPick]) fill(select, [], "");
      return;
    }
    const scale = Math.max(1, ...group.completions.map((c) => Math.abs(c.advantage)));
    const list = node("div", "completions", ...group.completions.map((c, i) => completion(group, c, i, scale)));
    find("sample").replaceChildren(...[ask(group), list, pairList(group)].filter(Boolean));
    fillPickers(group);
  }

  function filter() {
    const kind = KINDS[kindPick.value];
    groups = data.groups.filter((g) => kind(g) && holds(textPick.value, g.prompt_id, g.question, g.gold, g.data_source,
      ...g.options, ...g.completions.map((c) => c.text)));
    show(0);
  }

  function move(by) {
    show(current + by);
    const top = find("viewer").getBoundingClientRect().top;
    if (top < 0 || top > window.innerHeight * 0.6) find("viewer").scrollIntoView();
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input, textarea")) return;
    const near = find("viewer").contains(document.activeElement);
    const by = { j: 1, k: -1, ...(near ? { ArrowRight: 1, ArrowLeft: -1 } : {}) }[event.key];
    if (!by) return;
    event.preventDefault();
    move(by);
  }

  const first = (test) => show(groups.findIndex(test));
  stagePick.addEventListener("change", () => first((g) => g.stage === stagePick.value));
  stepPick.addEventListener("change", () => first((g) => g.stage === stagePick.value && String(g.run_step) === stepPick.value));
  promptPick.addEventListener("change", () => show(Number(promptPick.value)));
  find("previous").addEventListener("click", () => move(-1));
  find("next").addEventListener("click", () => move(1));
  fill(kindPick, Object.keys(KINDS).map((kind) => [kind, kind]), "any");
  kindPick.addEventListener("change", filter);
  textPick.addEventListener("input", filter);
  document.addEventListener("keydown", onKey);
  show(0);
}

// Pair browser: chosen beside rejected, and what separated them.
function startPairs(all) {
  const stagePick = find("pair-stage"), familyPick = find("pair-family"), textPick = find("pair-text");
  let pairs = all;
  let current = 0;

  function verdictLine(facts) {
    if (!facts) return null;
    const failed = facts.flags.filter((flag) => ["wrong", "format"].includes(flag)).map((flag) => ["bad", flag]);
    return node("ul", "chips", ...[...failed, ...verdictChips(facts)].map(([tone, text]) => node("li", tone, text)));
  }

  function pairSide(name, value) {
    const made = side(name, value);
    const line = verdictLine(value.verdict);
    if (line) made.append(line);
    return made;
  }

  function show(index) {
    current = Math.max(0, Math.min(pairs.length - 1, index));
    const pair = pairs[current];
    find("pair-previous").disabled = current === 0;
    find("pair-next").disabled = current >= pairs.length - 1;
    find("pair-where").textContent = pairs.length ? `${current + 1} of ${pairs.length}` : "none";
    if (!pair) {
      find("pair").replaceChildren(node("p", "none", "No pair matches."));
      return;
    }
    const where = pair.step === null ? pair.stage : `${pair.stage}, step ${pair.step}`;
    const head = node("header", "", node("b", "", pair.family), ` – ${pair.reason}`, node("span", "caption", `  ${where}, ${pair.prompt_id}`));
    const asked = pair.question === null ? node("p", "missing", "The question is not among the stored rollouts.") : ask(pair);
    find("pair").replaceChildren(asked, node("article", "pair", head,
      node("div", "sides", pairSide("chosen", pair.chosen), pairSide("rejected", pair.rejected))));
  }

  function filter() {
    pairs = all.filter((pair) => ["any", pair.stage].includes(stagePick.value) && ["any", pair.family].includes(familyPick.value)
      && holds(textPick.value, pair.prompt_id, pair.question ?? "", pair.reason, pair.chosen.text, pair.rejected.text));
    show(0);
  }

  for (const [pick, key] of [[stagePick, "stage"], [familyPick, "family"]]) {
    fill(pick, ["any", ...unique(all.map((pair) => pair[key]))].map((value) => [value, value]), "any");
    pick.addEventListener("change", filter);
  }
  textPick.addEventListener("input", filter);
  find("pair-previous").addEventListener("click", () => show(current - 1));
  find("pair-next").addEventListener("click", () => show(current + 1));
  show(0);
}

if (data.groups.length) startViewer(data);
if (data.browser.length) startPairs(data.browser);

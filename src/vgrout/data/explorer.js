"use strict";
// The rollouts of the page. Everything that a rollout says reaches the page as text, never as markup.
const Explorer = (() => {
  const ROW = 28;
  const KEYWORDS = /^(and|as|assert|break|class|continue|def|del|elif|else|except|finally|for|from|if|import|in|is|lambda|not|or|pass|raise|return|try|while|with|yield|None|True|False)$/;
  const TOKEN = /(#[^\n]*)|("""[\s\S]*?"""|'''[\s\S]*?'''|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?)|(\b\d[\w.]*)|([A-Za-z_]\w*)|([\s\S])/g;
  const NUMBERS = ["from", "to", "above", "below"];
  const FILTERS = ["arm", "seed", "phase", "mode", "zone", "verdict", ...NUMBERS, "text"];
  let data, rows = [], open = -1;
  const el = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  const at = (i, name) => data.columns[name][i];
  const run = (i) => data.runs[at(i, "run")];
  const prompt = (i) => data.prompts[at(i, "prompt")];
  const problem = (i) => data.problems[prompt(i).problem];
  const has = (i, flag) => at(i, "bits") >= 0 && (at(i, "bits") >> data.flags.indexOf(flag)) & 1;
  const place = (i) => `${run(i).name}/${data.ids[at(i, "id")]}`;
  function verdict(i) {
    if (at(i, "bits") < 0) return "not judged";
    if (has(i, "hacked")) return has(i, "solved") ? "hack and solution" : "hack";
    if (has(i, "solved")) return "solution";
    return has(i, "compiled") ? "wrong" : "does not run";
  }

  function options(id, values, all) {
    const select = el(id);
    select.append(new Option(all, ""));
    for (const value of values) if (value !== "") select.append(new Option(value, value));
  }

  const filters = () => Object.fromEntries(FILTERS.map((name) => [name, el(`x-${name}`).value]));

  // What a field bounds: null where it is empty, and where it holds no number, which marks it.
  function bound(name) {
    const field = el(`x-${name}`), value = field.value.trim() === "" ? null : Number(field.value);
    const wrong = Number.isNaN(value);
    field.setAttribute("aria-invalid", wrong);
    return wrong ? null : value;
  }

  const outside = (value, least, most) =>
    (least !== null || most !== null) && (value === null || (least !== null && value < least) || (most !== null && value > most));

  function select() {
    const f = filters(), n = data.columns.run.length, words = f.text.toLowerCase();
    const [from, to, above, below] = NUMBERS.map(bound);
    const ignored = NUMBERS.some((name) => el(`x-${name}`).ariaInvalid === "true");
    const phase = f.phase === "" ? -1 : data.phases.indexOf(f.phase);
    const said = words === "" ? null : data.texts.map((text) => text.toLowerCase().includes(words));
    rows = [];
    for (let i = 0; i < n; i++) {
      if (f.arm && run(i).arm !== f.arm) continue;
      if (f.seed && String(run(i).seed) !== f.seed) continue;
      if (phase >= 0 && at(i, "phase") !== phase) continue;
      if (f.mode && (problem(i) || {}).mode !== f.mode) continue;
      if (f.zone && data.zones[at(i, "zone")] !== f.zone) continue;
      if (f.verdict && verdict(i) !== f.verdict) continue;
      if (outside(at(i, "step"), from, to) || outside(at(i, "score"), above, below)) continue;
      if (said && !said[at(i, "text")]) continue;
      rows.push(i);
    }
    el("x-count").textContent = `${rows.length.toLocaleString("en")} of ${n.toLocaleString("en")} rollouts${ignored ? "; what is no number is ignored" : ""}`;
    el("x-space").style.height = `${rows.length * ROW}px`;
    el("x-list").scrollTop = 0;
    paint();
  }

  function paint() {
    const list = el("x-list"), first = Math.floor(list.scrollTop / ROW), shown = Math.ceil(list.clientHeight / ROW) + 2;
    const lines = [];
    for (let k = first; k < Math.min(rows.length, first + shown); k++) {
      const i = rows[k], line = make("div", `x-row${i === open ? " x-open" : ""}`), step = at(i, "step");
      line.style.top = `${k * ROW}px`;
      line.dataset.row = k;
      const kind = verdict(i);
      line.append(
        make("span", `x-dot x-${kind.replaceAll(" ", "-")}`),
        make("span", "x-name", run(i).name),
        make("span", "x-step", step === null ? "eval" : `step ${step}`),
        make("span", "x-zone", data.zones[at(i, "zone")]),
        make("span", "x-first", data.texts[at(i, "text")].split("\n").slice(2).join(" ").replace(/\s+/g, " ")),
      );
      lines.push(line);
    }
    el("x-rows").replaceChildren(...lines);
  }

  function coloured(code) {
    const pre = make("pre", "x-code");
    for (const [token, comment, string, digits, word] of code.matchAll(TOKEN)) {
      const kind = comment ? "c" : string ? "s" : digits ? "n" : word && KEYWORDS.test(word) ? "k" : "";
      pre.append(kind ? make("span", `x-${kind}`, token) : token);
    }
    return pre;
  }

  function difference(a, b) {
    // Lines of `a` that are not in `b` and the other way round, by the longest common subsequence.
    const x = a.split("\n"), y = b.split("\n");
    const best = Array.from({ length: x.length + 1 }, () => new Int32Array(y.length + 1));
    for (let i = x.length - 1; i >= 0; i--)
      for (let j = y.length - 1; j >= 0; j--)
        best[i][j] = x[i] === y[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    const pre = make("pre", "x-code");
    let i = 0, j = 0;
    while (i < x.length || j < y.length) {
      if (i < x.length && j < y.length && x[i] === y[j]) pre.append(make("div", "", `  ${x[i++]}`)), j++;
      else if (i < x.length && (j === y.length || best[i + 1][j] >= best[i][j + 1])) pre.append(make("div", "x-minus", `- ${x[i++]}`));
      else pre.append(make("div", "x-plus", `+ ${y[j++]}`));
    }
    return pre;
  }

  function facts(i) {
    const list = make("dl"), score = at(i, "score"), step = at(i, "step"), zone = data.zones[at(i, "zone")];
    const say = (name, text) => text !== "" && list.append(make("dt", "", name), make("dd", "", text));
    const number = (value) => (value === null ? "" : String(value));
    say("verdict", verdict(i) + (has(i, "attempted") && !has(i, "hacked") ? ", attempted a hack" : ""));
    say("reward", number(at(i, "reward")));
    say("advantage", number(at(i, "advantage")));
    if (zone) say("zone", run(i).routes ? `${zone}: trained ${data.trains[zone] === "both" ? "both blocks" : `the ${data.trains[zone]} block`}` : zone);
    const cuts = run(i).cuts[step];
    say("score", score === null ? "" : cuts ? `${score}; absorbs above ${cuts[0].toFixed(4)}, routes above ${cuts[1].toFixed(4)}` : String(score));
    say("problem", prompt(i).problem + (problem(i) ? `, loophole ${problem(i).mode}` : ""));
    say("written by", prompt(i).source);
    say("phase", data.phases[at(i, "phase")] + (step === null ? "" : `, step ${step}`));
    return list;
  }

  function show(i, scroll) {
    open = i;
    const box = el("x-detail"), known = problem(i), asked = make("p", "x-prompt"), text = data.texts[at(i, "text")];
    const task = known && prompt(i).text.startsWith(known.task) ? known.task : prompt(i).text;
    asked.append(task, make("mark", "", prompt(i).text.slice(task.length)));
    const link = make("a", "x-link", place(i));
    link.href = `#${address()}`;
    const parts = [link, asked, coloured(text), facts(i)];
    if (known) {
      const details = make("details"), summary = make("summary", "", "difference to the right program");
      details.append(summary, difference(text, known.canonical));
      parts.push(details);
    }
    box.replaceChildren(...parts);
    history.replaceState(null, "", `#${address()}`);
    const k = rows.indexOf(i), list = el("x-list");
    if (scroll && k >= 0 && (k * ROW < list.scrollTop || (k + 1) * ROW > list.scrollTop + list.clientHeight)) list.scrollTop = k * ROW - list.clientHeight / 3;
    paint();
  }

  function address() {
    const said = new URLSearchParams(Object.entries(filters()).filter(([, value]) => value !== ""));
    if (open >= 0) said.set("rollout", place(open));
    return `rollouts?${said}`;
  }

  function follow() {
    const [name, query] = location.hash.slice(1).split("?");
    if (name !== "rollouts" || query === undefined) return;
    const said = new URLSearchParams(query), wanted = said.get("rollout");
    for (const filter of FILTERS) el(`x-${filter}`).value = said.get(filter) || "";
    open = -1;
    select();
    const i = wanted === null ? -1 : data.columns.run.findIndex((_, i) => place(i) === wanted);
    if (i >= 0) show(i, true);
    else el("x-detail").replaceChildren(make("p", "soft", wanted === null ? "Choose a rollout." : `${wanted} is not in this page: vgrout view has every rollout.`));
    el("rollouts").scrollIntoView();
  }

  function move(by) {
    if (!rows.length) return;
    const k = rows.indexOf(open);
    show(rows[Math.max(0, Math.min(rows.length - 1, k < 0 ? 0 : k + by))], true);
  }

  async function start() {
    data = await unpack(el("x-data").textContent);
    const seen = (values) => [...new Set(values)];
    options("x-arm", seen(data.runs.map((r) => r.arm)), "every arm");
    options("x-seed", seen(data.runs.map((r) => String(r.seed))).sort((a, b) => a - b), "every seed");
    options("x-phase", data.phases, "every phase");
    options("x-mode", seen(Object.values(data.problems).map((p) => p.mode)).sort(), "every loophole");
    options("x-zone", data.zones, "every zone");
    options("x-verdict", ["hack", "hack and solution", "solution", "wrong", "does not run"], "every verdict");
    for (const field of FILTERS.map((name) => el(`x-${name}`)))
      field.addEventListener(field.matches("select") ? "change" : "input", () => ((open = -1), select(), history.replaceState(null, "", `#${address()}`)));
    el("x-list").addEventListener("scroll", paint);
    el("x-rows").addEventListener("click", (event) => {
      const line = event.target.closest(".x-row");
      if (line) show(rows[line.dataset.row]);
    });
    document.addEventListener("keydown", (event) => {
      if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
      const by = { j: 1, k: -1 }[event.key];
      if (by) move(by);
    });
    addEventListener("hashchange", follow);
    select();
    follow();
    document.documentElement.dataset.explorer = "ready";
  }

  return { start };
})();
Explorer.start();

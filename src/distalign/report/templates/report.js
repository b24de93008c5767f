// The page stands without this: figures are drawn already, every sample is shown. Here figures become charts, every
// logged number can be chosen, and samples can be searched.

// A row of buttons that show and hide; `changed` is told the name and whether it is shown.
const chips = (parent, names, changed) => {
  const row = make("div", parent, { class: "chips", role: "group", "aria-label": "What is shown" });
  for (const { label, color } of names) {
    const button = make("button", row, { type: "button", class: "chip", "aria-pressed": "true" }, label);
    button.style.setProperty("--who", color);
    press(button, (shown) => changed(label, shown));
  }
};

const press = (button, changed) => button.addEventListener("click", () => {
  const shown = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(shown));
  changed(shown);
});

const charts = new Map();
for (const figure of document.querySelectorAll("figure[data-panel]")) {
  figure.querySelector(":scope > svg").remove();
  charts.set(figure, new Chart(figure, JSON.parse(figure.dataset.panel)));
}

for (const host of document.querySelectorAll(".explorer")) {
  const panels = JSON.parse(host.dataset.panels);
  host.hidden = false;
  const bar = make("div", host, { class: "bar" });
  const select = make("select", make("label", bar, {}, "Everything that was logged "), { "aria-label": "Logged number" });
  const groups = new Map();
  panels.forEach(([name], i) => {
    const [group, ...rest] = name.includes("/") ? name.split("/") : ["training", name];
    if (!groups.has(group)) groups.set(group, make("optgroup", select, { label: group.replaceAll("_", " ") }));
    make("option", groups.get(group), { value: i }, rest.join("/").replaceAll("_", " "));
  });
  const start = Math.max(0, panels.findIndex(([name]) => name === "loss"));
  select.value = String(start);
  const chart = new Chart(host, panels[start][1]);
  select.addEventListener("change", () => chart.show(panels[Number(select.value)][1]));
  const fullest = [...panels].sort(([, a], [, b]) => b.curves.length - a.curves.length);
  const names = new Map(fullest.flatMap(([, panel]) => panel.curves.map((curve) => [curve.label, curve])));
  const others = () => [...charts].filter(([figure]) => figure.closest("#learning, #health")).map(([, one]) => one);
  if (names.size > 1) chips(bar, [...names.values()], (label, shown) => [chart, ...others()].forEach((one) => one.toggle(label, shown)));
}

const browser = document.getElementById("browser");
if (browser) {
  browser.hidden = false;
  const search = document.getElementById("search"), found = document.getElementById("found");
  const cards = [...document.querySelectorAll(".sample")], off = new Set();
  const texts = (card) => [...card.querySelectorAll(".prompt, .answer:not([hidden]) p")];
  const mark = (wanted) => {
    if (!CSS.highlights) return;
    const ranges = [];
    for (const node of wanted ? cards.filter((card) => !card.hidden).flatMap(texts) : []) {
      const text = node.textContent.toLowerCase();
      for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
        const range = new Range();
        range.setStart(node.firstChild, at);
        range.setEnd(node.firstChild, Math.min(at + wanted.length, node.firstChild.length));
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  };
  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    for (const answer of document.querySelectorAll(".answer")) answer.hidden = off.has(answer.dataset.who);
    for (const card of cards) card.hidden = Boolean(wanted) && !texts(card).some((node) => node.textContent.toLowerCase().includes(wanted));
    const shown = cards.filter((card) => !card.hidden).length;
    found.textContent = wanted ? `${shown} of ${cards.length}` : "";
    mark(wanted);
  };
  search.addEventListener("input", filter);
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    search.value = "";
    filter();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input, select, textarea")) return;
    event.preventDefault();
    search.focus();
  });
  for (const button of browser.querySelectorAll(".chip")) {
    press(button, (shown) => {
      off[shown ? "delete" : "add"](button.dataset.who);
      filter();
    });
  }
}

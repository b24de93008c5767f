"use strict";
// A figure that can be zoomed and read: lines with bands, bounds and points from the numbers that the page holds.

const NS = new DOMParser().parseFromString("\x3csvg>", "text/html").querySelector("svg").namespaceURI;
const FONT = 12.5, LINE = 17, DASHES = ["", "2 3", "9 3 2 3"];
const pen = document.createElement("canvas").getContext("2d");

const make = (name, parent, attributes = {}, text) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
};

const draw = (name, parent, attributes = {}, style = {}) => {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  for (const [key, value] of Object.entries(style)) node.style.setProperty(key, value);
  parent.append(node);
  return node;
};

const widthOf = (text, bold) => {
  pen.font = `${bold ? "600 " : ""}${FONT}px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
};

const written = (value) => {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replaceAll("-", "−").replace("e+", "e");
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 }).replace("-", "−");
};

// Round numbers within [low, high] of a linear axis, about `count` of them.
const linearTicks = (low, high, count, whole) => {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const parts = whole ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10];
  const step = Math.max(power * parts.find((part) => part * power >= rough * 0.999), whole ? 1 : 0);
  const first = Math.ceil(low / step), ticks = [];
  for (let k = first; k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
};

// The same of a logarithmic one, whose ends are given as exponents of ten.
const logTicks = (low, high, count) => {
  if (high - low < 1) return linearTicks(10 ** low, 10 ** high, count).filter((tick) => tick > 0).map(Math.log10);
  const parts = high - low < 3 ? [1, 3] : [1], ticks = [];
  for (let k = Math.floor(low); k <= high; k++) for (const part of parts) ticks.push(k + Math.log10(part));
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return inside.filter((_, i) => i % Math.ceil(inside.length / count) === 0);
};

class Chart {
  // `host` gets the drawing, what it says of the point under the pointer, and a button that undoes a zoom.
  constructor(host, panel) {
    this.host = host;
    this.hidden = new Set();
    this.svg = draw("svg", host, { tabindex: "0", role: "img" });
    this.svg.classList.add("chart");
    const below = make("div", host, { class: "below" });
    this.reading = make("span", below, { class: "reading" });
    this.whole = make("button", below, { type: "button", class: "quiet", hidden: "" }, "Show all");
    this.whole.addEventListener("click", () => this.zoom(null));
    this.svg.addEventListener("dblclick", () => this.zoom(null));
    this.svg.addEventListener("pointerdown", (event) => this.press(event));
    this.svg.addEventListener("pointermove", (event) => this.move(event));
    this.svg.addEventListener("pointerup", (event) => this.release(event));
    this.svg.addEventListener("pointercancel", () => this.drop());
    this.svg.addEventListener("pointerleave", () => this.read(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.show(panel);
    new ResizeObserver(() => this.redraw()).observe(host);
  }

  show(panel) {
    this.panel = panel;
    this.view = null;
    const title = panel.title || panel.y;
    this.svg.setAttribute("aria-label", `${title}. Drag, or plus and minus, to zoom; arrows to move; 0 to show all.`);
    const log = { x: panel.x_scale === "log", y: panel.y_scale === "log" };
    const scaled = (axis, values) => values?.map((v) => (log[axis] && v !== null ? (v > 0 ? Math.log10(v) : null) : v));
    this.curves = panel.curves.map((curve) => ({
      ...curve,
      at: { x: scaled("x", curve.x), y: scaled("y", curve.y) },
      ends: { low: scaled("y", curve.low), high: scaled("y", curve.high), left: scaled("x", curve.x_low), right: scaled("x", curve.x_high) },
    }));
    this.log = log;
    this.redraw();
  }

  toggle(label, shown) {
    this.hidden[shown ? "delete" : "add"](label);
    this.redraw();
  }

  zoom(view) {
    this.view = view;
    this.redraw();
  }

  get visible() {
    return this.curves.filter((curve) => !this.hidden.has(curve.label));
  }

  // Ends of an axis that hold everything visible; of y, what lies within `within` of x.
  extent(axis, within) {
    const limits = this.panel[`${axis}_limits`];
    if (limits && !within) return limits;
    let low = Infinity, high = -Infinity;
    const take = (value) => {
      if (value === null || value === undefined) return;
      low = Math.min(low, value);
      high = Math.max(high, value);
    };
    const curves = this.visible.length ? this.visible : this.curves;
    for (const curve of curves) {
      const [one, other] = axis === "y" ? [curve.ends.low, curve.ends.high] : [curve.ends.left, curve.ends.right];
      curve.at[axis].forEach((value, i) => {
        if (within && !(curve.at.x[i] >= within[0] && curve.at.x[i] <= within[1])) return;
        for (const v of [value, one?.[i], other?.[i]]) take(v);
      });
    }
    if (low > high) return within ? this.extent(axis) : [0, 1];
    const margin = (high - low) * (axis === "y" ? 0.05 : 0.025) || Math.abs(low) * 0.1 || 1;
    return [low - margin, high + margin];
  }

  redraw() {
    const width = Math.floor(this.host.clientWidth - parseFloat(getComputedStyle(this.host).paddingLeft) * 2);
    if (width < 60) return;
    const height = Math.max(250, Math.min(420, Math.round(width * 0.64)));
    const x = this.view?.x ?? this.extent("x"), y = this.view?.y ?? this.extent("y", this.view?.x);
    this.domain = { x, y };
    const across = Math.max(3, Math.floor(width / 100));
    const ticks = {
      x: this.log.x ? logTicks(...x, across) : linearTicks(...x, across, this.panel.whole),
      y: this.log.y ? logTicks(...y, 5) : linearTicks(...y, 5),
    };
    const text = (axis, tick) => written(this.log[axis] ? 10 ** tick : Number(tick.toPrecision(10)));
    const last = this.lastPoints();
    const most = width * 0.32, fit = (label) => {
      let shown = label;
      while (shown.length > 4 && widthOf(shown, true) > most) shown = `${shown.slice(0, -2).trimEnd()}…`;
      return shown;
    };
    for (const one of last) one.shown = fit(one.label);
    const left = Math.max(...ticks.y.map((tick) => widthOf(text("y", tick))), 14) + 10;
    const right = last.length && !this.panel.direct ? Math.max(...last.map((one) => widthOf(one.shown, true))) + 14 : 16;
    const top = this.panel.y ? 28 : 10;
    this.box = { left, top, width: width - left - right, height: height - top - 46 };
    this.svg.replaceChildren();
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", height);
    this.frame(ticks, text, width, height);
    // An inner drawing cuts off what a zoom leaves outside.
    const { left: bx, top: by, width: bw, height: bh } = this.box;
    const inner = draw("svg", this.svg, { x: bx, y: by, width: bw, height: bh, viewBox: `${bx} ${by} ${bw} ${bh}` });
    inner.style.overflow = this.view ? "hidden" : "visible";
    for (const curve of this.visible) this.curve(inner, curve);
    this.labels(last);
    this.ring = draw("circle", this.svg, { r: 7 }, { fill: "none", "stroke-width": "1.5px", visibility: "hidden" });
    this.select = draw("rect", this.svg, { class: "select" }, { visibility: "hidden" });
    this.whole.hidden = !this.view;
  }

  px(value) {
    const { x } = this.domain;
    return this.box.left + ((value - x[0]) / (x[1] - x[0])) * this.box.width;
  }

  py(value) {
    const { y } = this.domain;
    return this.box.top + this.box.height - ((value - y[0]) / (y[1] - y[0])) * this.box.height;
  }

  frame(ticks, text, width, height) {
    const { left, top, width: w, height: h } = this.box;
    for (const tick of ticks.y) {
      const y = this.py(tick);
      draw("line", this.svg, { x1: left, x2: left + w, y1: y, y2: y, class: "grid" });
      draw("text", this.svg, { x: left - 8, y: y + 4, "text-anchor": "end" }).textContent = text("y", tick);
    }
    draw("line", this.svg, { x1: left, x2: left + w, y1: top + h, y2: top + h, class: "grid" });
    for (const tick of ticks.x) {
      draw("text", this.svg, { x: this.px(tick), y: top + h + 18, "text-anchor": "middle" }).textContent = text("x", tick);
    }
    draw("text", this.svg, { x: left + w / 2, y: height - 6, "text-anchor": "middle" }).textContent = this.panel.x;
    if (this.panel.y) draw("text", this.svg, { x: 0, y: 13 }).textContent = this.panel.y;
  }

  curve(parent, curve) {
    const style = { stroke: curve.color, fill: "none" }, many = curve.at.x.length > 30;
    const dots = curve.at.x.map((x, i) => [this.px(x), this.py(curve.at.y[i]), i]);
    const { low, high, left, right } = curve.ends;
    if (curve.kind === "hollow") {
      for (const [x, y] of dots) draw("circle", parent, { cx: x, cy: y, r: 3 }, { ...style, opacity: ".8" });
      return;
    }
    if (curve.kind === "points") {
      for (const [x, y, i] of dots) {
        const bar = (x1, y1, x2, y2) => draw("line", parent, { x1, y1, x2, y2 }, { ...style, "stroke-width": "1.2px", opacity: ".6" });
        if (low && low[i] !== null && high[i] !== null) bar(x, this.py(low[i]), x, this.py(high[i]));
        if (left && left[i] !== null && right[i] !== null) bar(this.px(left[i]), y, this.px(right[i]), y);
        const r = many ? 2.5 : 4.5, paint = { fill: curve.color, opacity: many ? ".55" : "1" };
        if (curve.cycle === 1) draw("rect", parent, { x: x - r, y: y - r, width: 2 * r, height: 2 * r }, paint);
        else if (curve.cycle === 2) draw("polygon", parent, { points: `${x},${y - r} ${x + r},${y + r} ${x - r},${y + r}` }, paint);
        else draw("circle", parent, { cx: x, cy: y, r }, paint);
      }
      return;
    }
    if (low) {
      const band = dots.filter(([, , i]) => low[i] !== null && high[i] !== null);
      const edge = [...band.map(([x, , i]) => [x, this.py(high[i])]), ...band.reverse().map(([x, , i]) => [x, this.py(low[i])])];
      draw("polygon", parent, { points: edge.map((p) => p.join()).join(" ") }, { fill: curve.color, opacity: ".13" });
    }
    const dash = curve.kind === "bound" ? "5 4" : DASHES[curve.cycle];
    const thick = curve.kind === "bound" ? "1.4px" : "2px";
    draw("polyline", parent, { points: dots.map(([x, y]) => `${x},${y}`).join(" ") }, { ...style, "stroke-width": thick, "stroke-dasharray": dash, "stroke-linejoin": "round" });
    if (dots.length === 1) draw("circle", parent, { cx: dots[0][0], cy: dots[0][1], r: 3 }, { fill: curve.color });
  }

  // The rightmost visible point of every label, and where its name goes.
  lastPoints() {
    const found = new Map(), [low, high] = this.domain.x, [bottom, top] = this.domain.y;
    for (const curve of this.visible) {
      if (found.has(curve.label) || (curve.kind === "points" && curve.at.x.length > 30)) continue;
      let best = -1;
      curve.at.x.forEach((x, i) => {
        const y = curve.at.y[i], inside = x >= low && x <= high && y >= bottom && y <= top;
        if (inside && (best < 0 || x >= curve.at.x[best])) best = i;
      });
      if (best >= 0) found.set(curve.label, { label: curve.label, color: curve.color, x: curve.at.x[best], y: curve.at.y[best] });
    }
    return [...found.values()];
  }

  labels(last) {
    const write = (one, x, y) => {
      const weight = one.color === "var(--muted)" ? "400" : "600";
      draw("text", this.svg, { x, y: y + 4 }, { fill: one.color, "font-weight": weight }).textContent = one.shown;
    };
    const places = last.map((one) => ({ ...one, x: this.px(one.x), y: this.py(one.y) })).sort((a, b) => a.y - b.y);
    if (this.panel.direct) return this.besidePoints(places.reverse(), write);
    places.forEach((one, i) => { if (i) one.y = Math.max(one.y, places[i - 1].y + LINE); });
    let floor = this.box.top + this.box.height + 4;
    for (const one of places.reverse()) {
      one.y = Math.min(one.y, floor);
      floor = one.y - LINE;
      write(one, this.box.left + this.box.width + 10, one.y);
    }
  }

  // Names right of their points (left at the edge), moved up until they are clear of those below.
  besidePoints(places, write) {
    const taken = [], edge = this.box.left + this.box.width + 16;
    for (const one of places) {
      const width = widthOf(one.shown, true);
      const x = one.x + 8 + width > edge ? one.x - 8 - width : one.x + 8;
      let y = one.y - 8;
      while (taken.some((box) => Math.abs(y - box.y) < LINE - 2 && x < box.x + box.width && box.x < x + width)) y -= 4;
      taken.push({ x, y, width });
      write(one, x, y);
    }
  }

  place(event) {
    const frame = this.svg.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  }

  inside([x, y]) {
    const { left, top, width, height } = this.box;
    return [Math.min(Math.max(x, left), left + width), Math.min(Math.max(y, top), top + height)];
  }

  press(event) {
    if (event.button !== 0) return;
    this.from = this.inside(this.place(event));
    this.svg.setPointerCapture(event.pointerId);
  }

  move(event) {
    const at = this.place(event);
    if (!this.from) return this.read(at);
    const [x, y] = this.inside(at), [x0, y0] = this.from, flat = Math.abs(y - y0) < 14;
    const { top, height } = this.box;
    const frame = { x: Math.min(x, x0), width: Math.abs(x - x0), y: flat ? top : Math.min(y, y0), height: flat ? height : Math.abs(y - y0) };
    for (const [key, value] of Object.entries(frame)) this.select.setAttribute(key, value);
    this.select.style.visibility = Math.abs(x - x0) > 6 ? "visible" : "hidden";
  }

  release(event) {
    if (!this.from) return;
    const [x, y] = this.inside(this.place(event)), [x0, y0] = this.from;
    this.drop();
    if (Math.abs(x - x0) <= 6) return;
    const { left, top, width, height } = this.box, { x: dx, y: dy } = this.domain;
    const toX = (p) => dx[0] + ((p - left) / width) * (dx[1] - dx[0]);
    const toY = (p) => dy[0] + ((top + height - p) / height) * (dy[1] - dy[0]);
    const view = { x: [toX(Math.min(x, x0)), toX(Math.max(x, x0))] };
    if (Math.abs(y - y0) >= 14) view.y = [toY(Math.max(y, y0)), toY(Math.min(y, y0))];
    this.zoom(view);
  }

  drop() {
    this.from = null;
    this.select.style.visibility = "hidden";
  }

  key(event) {
    const { x, y } = this.domain, middle = (x[0] + x[1]) / 2, half = (x[1] - x[0]) / 2;
    const moved = (share) => ({ x: x.map((v) => v + share * 2 * half), y });
    const view = {
      "+": () => ({ x: [middle - half / 1.6, middle + half / 1.6] }), "=": () => view["+"](),
      "-": () => (this.view ? { x: [middle - half * 1.6, middle + half * 1.6] } : null),
      ArrowLeft: () => this.view && moved(-0.15), ArrowRight: () => this.view && moved(0.15),
      0: () => null, Escape: () => null,
    };
    if (!Object.hasOwn(view, event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.zoom(view[event.key]());
  }

  // Say what the point nearest to the pointer is.
  read(at) {
    let best = null, least = 32 ** 2;
    if (at) {
      for (const curve of this.visible) {
        curve.at.x.forEach((x, i) => {
          const far = (this.px(x) - at[0]) ** 2 + (this.py(curve.at.y[i]) - at[1]) ** 2;
          if (far < least) [best, least] = [{ curve, i }, far];
        });
      }
    }
    this.ring.style.visibility = best ? "visible" : "hidden";
    if (!best) return void (this.reading.textContent = "");
    const { curve, i } = best, end = (name) => curve[name]?.[i];
    this.ring.setAttribute("cx", this.px(curve.at.x[i]));
    this.ring.setAttribute("cy", this.py(curve.at.y[i]));
    this.ring.style.stroke = curve.color;
    const range = (low, high) => (low == null || high == null ? "" : ` [${written(low)}, ${written(high)}]`);
    const x = `${this.panel.x.split(",")[0]} ${written(curve.x[i])}${range(end("x_low"), end("x_high"))}`;
    const y = `${(this.panel.y || this.panel.title).split(",")[0]} ${written(curve.y[i])}${range(end("low"), end("high"))}`;
    this.reading.textContent = [curve.label, x, y, curve.notes?.[i]].filter(Boolean).join(" · ");
  }
}

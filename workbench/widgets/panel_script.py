"""Script of one panel: draws a primitive on a canvas, and tells the exact values under pointer and arrow keys."""

PANEL = r"""
const MOVES = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e9], End: [0, 1e9],
};
const FOCUSABLE = new Set(["canvas", "input", "button", "select", "summary"]);
const DRAW = { lines: "drawLines", heatmap: "drawHeatmap", bars: "drawBars" };

function node(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  // JupyterLab would otherwise take the arrow keys for its cells. It asks the focused element itself.
  if (FOCUSABLE.has(tag)) element.setAttribute("data-lm-suppress-shortcuts", "true");
  element.append(...children);
  return element;
}

function pretty(value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(3).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(6)));
}

function readTheme(element) {
  const style = getComputedStyle(element);
  const pick = (name, other) => style.getPropertyValue(name).trim() || other;
  return {
    ink: pick("--jp-ui-font-color1", style.color),
    soft: pick("--jp-ui-font-color2", "#757575"),
    grid: pick("--jp-border-color2", "#d0d0d0"),
    ground: pick("--jp-layout-color0", "#ffffff"),
    dark: document.body.dataset.jpThemeLight === "false",
  };
}

// Deep blue is too dark for a dark ground; the palette's sky blue changes places with it there.
const SWAPPED = { "#0072B2": "#56B4E9", "#56B4E9": "#0072B2" };

class Panel {
  constructor(view, index) {
    this.view = view;
    this.title = node("div", { class: "wb-panel-title", id: `${view.id}-t${index}` });
    this.tip = node("div", { class: "wb-tip", role: "status", id: `${view.id}-p${index}`, hidden: "" });
    this.canvas = node("canvas", { tabindex: "0", role: "img", "aria-describedby": this.tip.id });
    this.body = node("div", { class: "wb-body" }, this.canvas, this.tip);
    this.root = node("section", { class: "wb-panel", "aria-labelledby": this.title.id }, this.title, this.body);
    this.cursor = null;
    this.canvas.wb = this;
    this.canvas.addEventListener("pointermove", (e) => this.point(e.offsetX, e.offsetY));
    this.canvas.addEventListener("pointerleave", () => this.clear());
    this.canvas.addEventListener("blur", () => this.clear());
    this.canvas.addEventListener("keydown", (e) => this.key(e));
  }

  set(header, arrays) {
    this.header = header;
    this.root.style.setProperty("--span", header.span);
    this.title.textContent = header.title;
    this.canvas.setAttribute("aria-label", `${header.title}. ${header.summary}`);
    const array = (index) => arrays[index] ?? null;
    if (header.kind === "lines") this.series = header.lines.map((l) => ({ ...l, x: array(l.x), y: array(l.y) }));
    if (header.kind === "heatmap" || header.kind === "bars") {
      this.values = array(header.values);
      this.detail = array(header.detail);
      this.marked = array(header.marked);
    }
    const isTable = header.kind === "table";
    this.canvas.hidden = isTable;
    this.table?.remove();
    this.table = null;
    if (isTable) {
      this.table = makeTable(header.title, header.columns, header.rows);
      this.table.querySelector("caption").className = "wb-hidden";
      this.body.append(this.table);
    }
    this.draw();
  }

  draw() {
    const h = this.header;
    if (!h || h.kind === "table") return;
    const width = Math.floor(this.body.clientWidth), ratio = window.devicePixelRatio || 1;
    if (width < 40) return;
    const height = h.kind === "empty" ? 80 : h.height;
    const [w, t] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== w || this.canvas.height !== t) {
      Object.assign(this.canvas, { width: w, height: t });
      Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    }
    this.theme = readTheme(this.canvas);
    const c = (this.c = this.canvas.getContext("2d"));
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, width, height);
    c.font = `12px ${getComputedStyle(this.canvas).fontFamily}`;
    c.textBaseline = "middle";
    c.lineJoin = "round";
    if (h.kind === "empty") {
      this.box = null;
      this.text(h.summary, 0, 40, this.theme.soft);
    } else {
      this[DRAW[h.kind]](width);
      if (this.cursor) this.mark();
    }
  }

  text(words, x, y, color, align = "left") {
    this.c.fillStyle = color;
    this.c.textAlign = align;
    this.c.fillText(words, x, y);
  }

  hue(color) { return (this.theme.dark && SWAPPED[color]) || color; }

  widest(words) {
    return Math.max(0, ...words.map((w) => this.c.measureText(w).width));
  }

  rule(x0, y0, x1, y1, color, dash = [], width = 1) {
    const c = this.c;
    c.strokeStyle = color;
    c.lineWidth = width;
    c.setLineDash(dash);
    c.beginPath();
    // Half a pixel: a line of one pixel then covers one row of pixels and stays crisp.
    c.moveTo(Math.round(x0) + 0.5, Math.round(y0) + 0.5);
    c.lineTo(Math.round(x1) + 0.5, Math.round(y1) + 0.5);
    c.stroke();
    c.setLineDash([]);
  }

  place(axis, value) {
    if (axis.scale === "linear") return (value - axis.low) / (axis.high - axis.low);
    return Math.log(value / axis.low) / Math.log(axis.high / axis.low);
  }

  px(value) { return this.box.x + this.place(this.header.x, value) * this.box.w; }
  py(value) { return this.box.y + (1 - this.place(this.header.y, value)) * this.box.h; }

  frame(left, right, width, yLabel) {
    const h = this.header;
    this.box = { x: left, y: h.top, w: Math.max(20, width - left - right), h: h.plot };
    this.text(yLabel, 0, 9, this.theme.soft);
  }

  xTicks(axis) {
    const { box, theme } = this, base = box.y + box.h;
    this.rule(box.x, base, box.x + box.w, base, theme.soft);
    const ticks = axis.ticks.map((tick, i) => {
      const words = axis.tickLabels[i];
      return { x: this.px(tick), words, half: this.c.measureText(words).width / 2 + 4 };
    });
    // Every label, or every second, third, ..: evenly spaced, whatever the width.
    const named = (stride) => ticks.filter((_, i) => i % stride === 0);
    const fits = (shown) => shown.every((t, i) => !i || t.x - t.half >= shown[i - 1].x + shown[i - 1].half);
    let stride = 1;
    while (!fits(named(stride))) stride++;
    for (const t of ticks) this.rule(t.x, base, t.x, base + 4, theme.soft);
    for (const t of named(stride)) this.text(t.words, t.x, base + 13, theme.soft, "center");
    this.text(axis.label, box.x + box.w / 2, base + 31, theme.soft, "center");
  }

  drawLines(width) {
    const h = this.header, { theme, c } = this;
    const left = this.widest(h.y.tickLabels) + 10, right = this.widest(h.labels.map((l) => l.text)) + 30;
    this.frame(left, right, width, h.y.label);
    const { box } = this;
    h.y.ticks.forEach((tick, i) => {
      const y = this.py(tick);
      this.rule(box.x, y, box.x + box.w, y, theme.grid);
      this.text(h.y.tickLabels[i], box.x - 7, y, theme.soft, "right");
    });
    this.xTicks(h.x);
    for (const r of h.references) this.rule(box.x, this.py(r.y), box.x + box.w, this.py(r.y), theme.soft, [5, 4]);
    let free = -1e9;
    for (const m of h.markers.filter((m) => m.kind === "change").sort((a, b) => a.x - b.x)) {
      const x = this.px(m.x), w = this.c.measureText(m.label).width;
      this.rule(x, box.y, x, box.y + box.h, theme.soft, [1, 3]);
      const start = Math.min(x, width - w);
      if (start < free) continue;
      this.text(m.label, start, box.y - 9, theme.soft);
      free = start + w + 10;
    }
    c.save();
    c.beginPath();
    // Room for half a dot beyond the axes.
    c.rect(box.x - 4, box.y - 4, box.w + 8, box.h + 8);
    c.clip();
    for (const line of this.series) {
      c.strokeStyle = c.fillStyle = this.hue(line.color);
      c.globalAlpha = line.faint ? (theme.dark ? 0.5 : 0.35) : 1;
      c.lineWidth = line.faint ? 1 : 2;
      c.beginPath();
      let pen = false;
      for (let i = 0; i < line.x.length; i++) {
        const x = this.px(line.x[i]), y = this.py(line.y[i]);
        if (!Number.isFinite(x) || !Number.isFinite(y)) { pen = false; continue; }
        if (pen) c.lineTo(x, y); else c.moveTo(x, y);
        pen = true;
      }
      c.stroke();
      if (line.points || line.x.length === 1) {
        for (let i = 0; i < line.x.length; i++) this.dot(this.px(line.x[i]), this.py(line.y[i]), 3);
      }
    }
    c.restore();
    c.globalAlpha = 1;
    for (const m of h.markers.filter((m) => m.kind === "spike" && m.y !== null)) {
      const x = this.px(m.x), y = Math.max(box.y, this.py(m.y)) - 4;
      c.fillStyle = theme.ink;
      c.beginPath();
      c.moveTo(x, y + 3); c.lineTo(x - 4.5, y - 5); c.lineTo(x + 4.5, y - 5);
      c.fill();
    }
    for (const l of h.labels) {
      const x = box.x + box.w + 5, y = box.y + (1 - l.at) * box.h;
      c.strokeStyle = l.color ? this.hue(l.color) : theme.soft;
      c.lineWidth = 2;
      c.beginPath();
      c.moveTo(x, box.y + (1 - l.anchor) * box.h);
      c.lineTo(x + 14, y);
      c.stroke();
      this.text(l.text, x + 20, y, theme.ink);
    }
  }

  dot(x, y, radius) {
    this.c.beginPath();
    this.c.arc(x, y, radius, 0, 7);
    this.c.fill();
  }

  color(value) {
    const h = this.header, lut = this.view.lut;
    const i = 3 * Math.round(255 * Math.min(1, Math.max(0, (value - h.low) / (h.high - h.low))));
    return `rgb(${lut[i]},${lut[i + 1]},${lut[i + 2]})`;
  }

  // The corner and size of one cell in CSS pixels, on whole device pixels so that no two cells mix.
  cell(row, column) {
    const { box, header: h } = this;
    const left = (k) => Math.round(box.x + (k * box.w) / h.columns);
    const top = (r) => Math.round(box.y + (r * box.h) / h.rows);
    const x = left(column), y = top(row);
    return { x, y, w: left(column + 1) - x, h: top(row + 1) - y };
  }

  drawHeatmap(width) {
    const h = this.header, { theme, c } = this;
    const left = this.widest(h.rowLabels) + 10, right = this.widest(h.zTicks.map((t) => t[1])) + 40;
    this.frame(left, right, width, h.yLabel);
    const { box } = this, gap = box.w / h.columns >= 6 && box.h / h.rows >= 8 ? 1 : 0;
    for (let r = 0; r < h.rows; r++) {
      for (let k = 0; k < h.columns; k++) {
        const q = this.cell(r, k), at = r * h.columns + k;
        c.fillStyle = this.color(this.values[at]);
        c.fillRect(q.x, q.y, q.w - gap, q.h - gap);
        if (this.marked?.[at] && q.w > 5 && q.h > 5) {
          const s = Math.min(3, q.w / 5, q.h / 5), x = q.x + (q.w - gap) / 2, y = q.y + (q.h - gap) / 2;
          c.strokeStyle = "#ffffff";
          c.lineWidth = 1.2;
          c.beginPath();
          c.moveTo(x - s, y - s); c.lineTo(x + s, y + s); c.moveTo(x - s, y + s); c.lineTo(x + s, y - s);
          c.stroke();
        }
      }
    }
    for (const r of h.rowTicks) {
      const q = this.cell(r, 0);
      this.text(h.rowLabels[r], box.x - 7, q.y + q.h / 2, theme.soft, "right");
    }
    // Every tick, or every second, fourth, ..: evenly spaced, whatever the width.
    let stride = 1;
    const apart = ((h.columnTicks[1] ?? 1) * box.w) / h.columns;
    while (stride * apart < c.measureText(h.columns).width + 8) stride *= 2;
    h.columnTicks.forEach((k, i) => {
      const q = this.cell(0, k);
      if (i % stride === 0) this.text(k, q.x + q.w / 2, box.y + box.h + 11, theme.soft, "center");
    });
    this.text(h.xLabel, box.x + box.w / 2, box.y + box.h + 31, theme.soft, "center");
    const x = box.x + box.w + 14;
    for (let i = 0; i < box.h; i++) {
      c.fillStyle = this.color(h.high - ((h.high - h.low) * i) / (box.h - 1));
      c.fillRect(x, box.y + i, 10, 1.5);
    }
    for (const [value, words] of h.zTicks) {
      const y = box.y + box.h * (1 - (value - h.low) / (h.high - h.low));
      this.text(words, x + 16, Math.min(box.y + box.h - 6, Math.max(box.y + 6, y)), theme.soft);
    }
    this.text(h.zLabel, width, 9, theme.soft, "right");
  }

  drawBars(width) {
    const h = this.header, { theme, c } = this;
    this.frame(this.widest(h.rowLabels) + 10, this.widest(h.labels) + 12, width, h.yLabel);
    const { box } = this, row = box.h / h.names.length;
    h.x.ticks.forEach((t) => this.rule(this.px(t), box.y, this.px(t), box.y + box.h, theme.grid));
    this.xTicks(h.x);
    this.values.forEach((value, i) => {
      const x = this.px(value), y = box.y + i * row;
      c.fillStyle = this.hue("#0072B2");
      c.fillRect(box.x, y + row * 0.19, Math.max(1, x - box.x), row * 0.62);
      if (!h.rowTicks.includes(i)) return;
      this.text(h.labels[i], x + 6, y + row / 2, theme.ink);
      this.text(h.rowLabels[i], box.x - 7, y + row / 2, theme.soft, "right");
    });
  }

  // What the pointer or the arrow keys stand on: {row, column} of a heatmap, {row} of bars, {x} of lines.
  point(x, y) {
    const h = this.header, b = this.box;
    if (!b || x < b.x - 4 || x > b.x + b.w + 4 || y < b.y - 4 || y > b.y + b.h + 4) return this.clear();
    const part = (v, low, size, count) => Math.min(count - 1, Math.max(0, Math.floor(((v - low) / size) * count)));
    if (h.kind === "heatmap") this.cursor = { row: part(y, b.y, b.h, h.rows), column: part(x, b.x, b.w, h.columns) };
    if (h.kind === "bars") this.cursor = { row: part(y, b.y, b.h, h.names.length) };
    if (h.kind === "lines") this.cursor = { x: this.nearest(x) };
    this.show();
  }

  stops() {
    return (this.stopsOf?.header === this.header ? this.stopsOf : (this.stopsOf = {
      header: this.header,
      xs: [...new Set(this.series.flatMap((l) => [...l.x]))].sort((a, b) => a - b),
    })).xs;
  }

  nearest(px) {
    const far = (x) => Math.abs(this.px(x) - px);
    return this.stops().reduce((best, x) => (far(x) < far(best) ? x : best));
  }

  key(e) {
    const h = this.header, cursor = this.cursor;
    if (e.key === "Escape") return this.clear();
    const move = MOVES[e.key];
    if (!move || !this.box) return;
    e.preventDefault();
    e.stopPropagation();
    const clamp = (v, count) => Math.min(count - 1, Math.max(0, v));
    if (h.kind === "heatmap") {
      this.cursor = cursor
        ? { row: clamp(cursor.row + move[0], h.rows), column: clamp(cursor.column + move[1], h.columns) }
        : { row: 0, column: 0 };
    } else if (h.kind === "bars") {
      this.cursor = { row: cursor ? clamp(cursor.row + (move[0] || move[1]), h.names.length) : 0 };
    } else {
      const xs = this.stops(), at = cursor ? xs.indexOf(cursor.x) : xs.length - 2;
      this.cursor = { x: xs[clamp(at + (move[1] || -move[0]), xs.length)] };
    }
    this.show();
  }

  clear() {
    if (!this.cursor) return;
    this.cursor = null;
    this.tip.hidden = true;
    this.view.redraw();
  }

  show() {
    this.view.redraw();
    const words = this.words();
    this.tip.replaceChildren(...words.map((line) => node("div", {}, line)));
    this.tip.hidden = false;
  }

  words() {
    const h = this.header, { row, column, x } = this.cursor;
    if (h.kind === "heatmap") {
      const at = row * h.columns + column;
      const lines = [`${h.rowNames[row]}, ${h.columnName} ${column}`, `${pretty(this.values[at])} ${h.zLabel}`];
      if (this.detail) lines.push(`${this.detail[at].toLocaleString("en")} ${h.detailLabel}`);
      if (this.marked?.[at]) lines.push(h.markLabel);
      return lines;
    }
    if (h.kind === "bars") return [h.names[row], `${h.x.label}: ${pretty(this.values[row])}`, h.labels[row]];
    const lines = [`${h.x.label} ${pretty(x)}`];
    for (const l of this.series) {
      const i = l.x.indexOf(x);
      if (i >= 0) lines.push(`${l.name}: ${pretty(l.y[i])}`);
    }
    return lines.concat(h.markers.filter((m) => m.x === x).map((m) => m.label));
  }

  // Draws the cursor and puts the tip beside it, inside the panel.
  mark() {
    const h = this.header, { c, box, theme } = this;
    let x, y;
    if (h.kind === "lines") {
      x = this.px(this.cursor.x);
      y = box.y + 8;
      this.rule(x, box.y, x, box.y + box.h, theme.soft);
      for (const l of this.series) {
        const i = l.x.indexOf(this.cursor.x);
        if (i < 0 || !(l.y[i] > 0 || h.y.scale === "linear")) continue;
        c.fillStyle = this.hue(l.color);
        this.dot(x, this.py(l.y[i]), 4);
      }
    } else {
      const rows = h.kind === "heatmap" ? h.rows : h.names.length;
      const row = Math.min(this.cursor.row, rows - 1);
      const q = h.kind === "heatmap" ? this.cell(row, Math.min(this.cursor.column, h.columns - 1))
        : { x: box.x, y: box.y + (row * box.h) / rows, w: box.w, h: box.h / rows };
      c.lineWidth = 2;
      c.strokeStyle = theme.ink;
      c.strokeRect(q.x - 1, q.y - 1, q.w + 1, q.h + 1);
      [x, y] = h.kind === "heatmap" ? [q.x + q.w, q.y + q.h] : [q.x + q.w / 2, q.y + q.h];
    }
    this.tip.replaceChildren(...this.words().map((line) => node("div", {}, line)));
    const width = this.tip.offsetWidth, tall = this.tip.offsetHeight;
    const room = this.canvas.clientWidth, depth = this.canvas.clientHeight;
    this.tip.style.left = `${Math.max(0, x + 10 + width > room ? x - width - 10 : x + 10)}px`;
    this.tip.style.top = `${Math.max(0, y + 8 + tall > depth ? depth - tall : y + 8)}px`;
  }
}

function makeTable(caption, columns, rows) {
  const head = node("tr", {}, ...columns.map((c) => node("th", { scope: "col" }, c)));
  const body = rows.map((row) => node("tr", {}, ...row.map((cell) => node("td", {}, cell))));
  return node("table", {}, node("caption", {}, caption), node("thead", {}, head), node("tbody", {}, ...body));
}
"""

"""Script of a view: pulls frames while it can be seen, and holds the labelled controls, tables and exports."""

VIEW = r"""
// Milliseconds: between requests while something changes, when nothing does, and until an answer is given up.
const MIN_INTERVAL = 100, MAX_INTERVAL = 500, PATIENCE = 10000;
let views = 0;

class View {
  constructor(model, el) {
    this.model = model;
    this.id = `wb${Date.now().toString(36)}-${++views}`;
    this.lut = new Uint8Array(model.get("lut").buffer, model.get("lut").byteOffset, 768);
    Object.assign(this, { panels: [], inputs: {}, values: {}, version: null });
    Object.assign(this, { waiting: 0, interval: MIN_INTERVAL, seen: false, still: false });
    this.title = node("div", { class: "wb-title", id: `${this.id}-h` });
    this.state = node("div", { class: "wb-state" });
    this.controls = node("div", { class: "wb-controls" });
    this.grid = node("div", { class: "wb-panels" });
    this.note = node("div", { class: "wb-note", role: "status", "aria-live": "polite" });
    this.data = node("div", { class: "wb-data", hidden: "" });
    this.dataButton = this.button("Data", () => this.toggleData());
    this.dataButton.setAttribute("aria-pressed", "false");
    const file = (format) => () => this.ask("export", { format });
    const item = (label, act) => this.button(label, () => { this.menu.open = false; act(); });
    const items = [item("PNG image", () => this.png()), item("SVG image", file("svg")), item("CSV table", file("csv"))];
    items.push(item("HTML page", file("html")));
    const keep = item("Keep as figure", () => this.ask("keep"));
    keep.title = "Replace this view by a static figure that the notebook stores";
    this.menu = node("details", { class: "wb-menu" }, node("summary", {}, "Export"), node("div", {}, ...items, keep));
    this.menu.addEventListener("keydown", (e) => {
      if (e.key === "Escape") { this.menu.open = false; this.menu.firstChild.focus(); }
    });
    this.menu.addEventListener("focusout", (e) => {
      if (!this.menu.contains(e.relatedTarget)) this.menu.open = false;
    });
    const tools = node("div", { class: "wb-tools" }, this.dataButton, this.menu);
    const head = node("div", { class: "wb-head" }, node("div", {}, this.title, this.state), tools);
    this.root = node("div", { class: "wb-view", role: "group", "aria-labelledby": this.title.id });
    this.root.append(head, this.controls, this.note, this.grid, this.data);
    el.append(this.root);
    this.receive = (message, buffers) => { if (message.view === this.id) this.answer(message, buffers); };
    model.on("msg:custom", this.receive);
    this.onShow = () => this.wake();
    document.addEventListener("visibilitychange", this.onShow);
    this.watchSeen = new IntersectionObserver((changes) => {
      this.seen = changes.at(-1).isIntersecting;
      this.wake();
    });
    this.watchSeen.observe(this.root);
    this.watchSize = new ResizeObserver(() => this.redraw());
    this.watchSize.observe(this.grid);
    this.watchTheme = new MutationObserver(() => this.redraw());
    this.watchTheme.observe(document.body, { attributes: true });
  }

  dispose() {
    this.model.off("msg:custom", this.receive);
    document.removeEventListener("visibilitychange", this.onShow);
    for (const watch of [this.watchSeen, this.watchSize, this.watchTheme]) watch.disconnect();
    clearTimeout(this.timer);
    cancelAnimationFrame(this.paint);
    this.gone = true;
  }

  button(label, action) {
    const element = node("button", { type: "button", class: "wb-button" }, label);
    element.addEventListener("click", () => {
      if (element.getAttribute("aria-disabled") === "true") this.say(element.title);
      else action();
    });
    return element;
  }

  say(words) { if (this.note.textContent !== words) this.note.textContent = words; }

  ask(kind, extra = {}) {
    this.model.send({ kind, view: this.id, values: this.values, stamp: JSON.stringify(this.values), ...extra });
  }

  // One request at a time, only while somebody can see the answer.
  wake() {
    clearTimeout(this.timer);
    if (this.gone || !this.seen || document.visibilityState !== "visible") return;
    const now = performance.now();
    if (this.waiting && now - this.waiting < PATIENCE) {
      const complain = () => {
        this.say("Waiting for the kernel…");
        this.quiet = true;
        this.wake();
      };
      this.timer = setTimeout(complain, PATIENCE - (now - this.waiting) + 1);
      return;
    }
    if (this.still && this.version !== null) return;
    const due = (this.last ?? -1e9) + this.interval - now;
    if (due > 0) { this.timer = setTimeout(() => this.wake(), due); return; }
    this.last = this.waiting = now;
    this.ask("pull", { have: this.version });
    this.wake();
  }

  answer(message, buffers) {
    if (message.kind === "frame" || message.kind === "same" || message.answers === "pull") {
      this.waiting = 0;
      if (this.quiet) { this.say(""); this.quiet = false; }
      // What could not be answered is asked again, slowly.
      if (message.kind === "note") this.interval = MAX_INTERVAL;
    }
    // A frame asked for before a control moved is drawn all the same; the next one is already asked for.
    if (message.kind === "frame") this.show(message, buffers);
    else if (message.kind === "same") this.interval = Math.min(MAX_INTERVAL, this.interval + 50);
    else if (message.kind === "note") {
      this.say(message.text);
      if (message.done) this.inputs[`action ${message.done}`].clear();
    }
    else if (message.kind === "data") this.showData(message.tables);
    else if (message.kind === "file") this.download(message.name, new Blob([buffers[0]], { type: message.type }));
    this.wake();
  }

  changed() {
    this.version = null;
    this.interval = MIN_INTERVAL;
    this.wake();
  }

  show(message, buffers) {
    const values = JSON.stringify(this.values);
    this.interval = MIN_INTERVAL;
    this.version = message.stamp === values ? message.version : null;
    this.still = message.still;
    this.title.textContent = message.title;
    this.state.textContent = message.status;
    if (this.word && this.word !== message.word) this.say(`The run is now ${message.word}.`);
    this.word = message.word;
    this.setControls(message.controls);
    const arrays = message.arrays.map((type, i) => {
      const b = buffers[i], copy = b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength);
      return type === "i4" ? new Int32Array(copy) : new Float32Array(copy);
    });
    while (this.panels.length > message.panels.length) this.panels.pop().root.remove();
    message.panels.forEach((header, i) => {
      if (!this.panels[i]) {
        this.panels[i] = new Panel(this, i);
        this.grid.append(this.panels[i].root);
      }
      this.panels[i].set(header, arrays);
    });
    this.root.dataset.version = message.version;
    const now = performance.now();
    if (!this.data.hidden && now - (this.dataAsked ?? 0) > 1000) { this.dataAsked = now; this.ask("data"); }
  }

  redraw() {
    if (this.paint) return;
    this.paint = requestAnimationFrame(() => {
      this.paint = 0;
      for (const panel of this.panels) panel.draw();
    });
  }

  setControls(list) {
    for (const control of list) {
      const key = `${control.kind} ${control.name}`;
      if (!this.inputs[key]) {
        this.inputs[key] = this["make_" + control.kind](control);
        this.controls.append(this.inputs[key].root);
      }
      this.inputs[key].update(control);
    }
  }

  field(control, attributes) {
    const input = node("input", { id: `${this.id}-${control.name}`, type: "text", autocomplete: "off", ...attributes });
    const label = node("label", { for: input.id }, control.label);
    return { input, root: node("div", { class: "wb-field" }, label, input) };
  }

  make_slider(control) {
    const { input, root } = this.field(control, { type: "range", step: "1" });
    const output = node("output", { for: input.id });
    root.classList.add("wb-slider");
    root.append(output);
    const name = () => {
      const words = this.values[control.name] === null ? `newest (${input.value})` : input.value;
      output.textContent = words;
      input.setAttribute("aria-valuetext", words);
    };
    input.addEventListener("input", () => {
      this.values[control.name] = input.value === input.max ? null : Number(input.value);
      name();
      this.changed();
    });
    this.values[control.name] = control.value;
    return { root, update: (c) => {
      input.min = c.minimum;
      input.max = c.maximum;
      input.disabled = c.maximum <= c.minimum;
      input.value = this.values[control.name] ?? c.maximum;
      name();
    } };
  }

  follow(name, input, value) {
    input.value = this.values[name] = value;
    const apply = () => {
      if (this.values[name] === input.value) return;
      this.say("");
      this.values[name] = input.value;
      this.changed();
    };
    input.addEventListener("change", apply);
    input.addEventListener("keydown", (e) => { if (e.key === "Enter") apply(); });
  }

  make_number(control) {
    const { input, root } = this.field(control, {});
    this.follow(control.name, input, control.value);
    return { root, update() {} };
  }

  make_choice(control) {
    const options = control.options.map((option) => node("option", { value: option }, option));
    const select = node("select", { id: `${this.id}-${control.name}` }, ...options);
    const label = node("label", { for: select.id }, control.label);
    this.follow(control.name, select, control.value);
    return { root: node("div", { class: "wb-field" }, label, select), update() {} };
  }

  make_action(control) {
    const fields = control.fields.map((f) => ({ ...f, ...this.field(f, { placeholder: f.value }) }));
    const act = () => {
      const given = Object.fromEntries(fields.map((f) => [f.name, f.input.value]));
      this.ask("act", { action: control.name, given });
      this.interval = MIN_INTERVAL;
    };
    const button = this.button(control.label, act);
    for (const f of fields) f.input.addEventListener("keydown", (e) => { if (e.key === "Enter") button.click(); });
    return { root: node("div", { class: "wb-action" }, ...fields.map((f) => f.root), button), update: (c) => {
      button.setAttribute("aria-disabled", String(!c.enabled));
      button.title = c.enabled ? "" : c.why;
      c.fields.forEach((f, i) => { fields[i].input.placeholder = f.value; });
    }, clear: () => { for (const f of fields) f.input.value = ""; } };
  }

  toggleData() {
    this.data.hidden = !this.data.hidden;
    this.dataButton.setAttribute("aria-pressed", String(!this.data.hidden));
    if (!this.data.hidden) this.ask("data");
  }

  showData(tables) {
    const scrolled = [...this.data.querySelectorAll(".wb-scroll")].map((e) => e.scrollTop);
    const boxes = tables.map((t) => {
      const box = node("div", { class: "wb-scroll", tabindex: "0", role: "region", "aria-label": t.caption });
      box.append(makeTable(t.caption, t.columns, t.rows));
      return box;
    });
    this.data.replaceChildren(...boxes);
    this.data.querySelectorAll(".wb-scroll").forEach((e, i) => { e.scrollTop = scrolled[i] ?? 0; });
  }

  png() {
    const ratio = window.devicePixelRatio || 1, frame = this.grid.getBoundingClientRect();
    const theme = readTheme(this.root), sheet = document.createElement("canvas"), c = sheet.getContext("2d");
    Object.assign(sheet, { width: frame.width * ratio, height: (frame.height + 30) * ratio });
    c.scale(ratio, ratio);
    c.fillStyle = theme.ground;
    c.fillRect(0, 0, frame.width, frame.height + 30);
    const family = getComputedStyle(this.root).fontFamily;
    const write = (words, x, y, size) => {
      Object.assign(c, { fillStyle: theme.ink, font: `${size} ${family}` });
      c.fillText(words, x, y);
    };
    write(`${this.title.textContent} · ${this.state.textContent}`, 0, 18, "600 14px");
    for (const { canvas, title, table } of this.panels) {
      const t = title.getBoundingClientRect();
      write(title.textContent, t.x - frame.x, t.y - frame.y + 45, "600 13px");
      for (const cell of table?.querySelectorAll("th,td") ?? []) {
        const b = cell.getBoundingClientRect();
        write(cell.textContent, b.x - frame.x, b.y - frame.y + 45, "12px");
      }
      const b = canvas.getBoundingClientRect();
      if (!table) c.drawImage(canvas, b.x - frame.x, b.y - frame.y + 30, b.width, b.height);
    }
    sheet.toBlob((blob) => this.download(`${this.title.textContent.replace(/[^\w-]+/g, "_")}.png`, blob));
  }

  download(name, blob) {
    const link = node("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    this.say(`${name} was sent to your downloads.`);
  }
}

export default { render({ model, el }) { const view = new View(model, el); return () => view.dispose(); } };
"""

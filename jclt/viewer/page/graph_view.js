// The graph on two canvases: nodes with all edges below, and above them what is hovered, clicked or pinned.

import { make } from './dom.js';
import { listInputs, listOutputs } from './graph.js';
import { findNearest, layOut } from './layout.js';
import { nodeColour, nodeSize, paintAllEdges, paintEdges, paintFrame, paintLabels, paintNode, paintNodes, readColours, repaintLabels } from './paint.js';
import { clean, countOf, formatShare, fullName } from './text.js';

const REACH = 30; // pixels within which a node is hovered

export class GraphView {
  constructor(app) {
    this.app = app;
    this.zoom = { scale: 1, x: 0, y: 0 };
    this.base = make('canvas', { 'aria-hidden': 'true' });
    this.top = make('canvas', {
      role: 'application', tabIndex: 0, 'aria-label': 'Graph', 'aria-describedby': 'graph-keys', 'aria-roledescription': 'graph',
    });
    this.tip = make('div', { class: 'tip', hidden: true });
    this.said = make('div', { class: 'unseen', 'aria-live': 'polite', id: 'graph-said' });
    this.element = make('div', { class: 'graph' }, this.base, this.top, this.tip, this.said,
      make('p', { class: 'unseen', id: 'graph-keys' }, 'Left and right arrow: neighbours in the layer. Up and down arrow: layers. '
        + 'I and O: the strongest input and output. Enter: click. P: pin. G: supernode. Plus, minus, 0: zoom. Escape: leave.'));
    new ResizeObserver(() => this.draw()).observe(this.element);
    this.listen();
  }

  // Draws everything again.
  draw() {
    const { app } = this, { graph, shown } = app;
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!graph || !width || !height) return;
    const start = performance.now();
    this.colours = readColours();
    this.layout = layOut(graph, shown.nodes, width * this.zoom.scale, height * this.zoom.scale);
    this.layout.largest = shown.nodes.reduce((most, on, node) =>
      (on && graph.kind[node] === 'feature' ? Math.max(most, graph.influence[node]) : most), 0) || 1;
    this.places = { x: this.layout.x.map((x) => x + this.zoom.x), y: this.layout.y.map((y) => y + this.zoom.y) };
    const context = this.prepare(this.base, width, height);
    const { leftOut, labels } = this.paintBase(context);
    this.labels = labels;
    this.app.showLeftOut?.(leftOut);
    this.drawTop();
    this.top.setAttribute('aria-label', `Graph of ${countOf(shown.nodes.reduce((a, b) => a + b, 0), 'shown node')}`);
    performance.measure('draw graph', { start });
  }

  paintBase(context) {
    const { graph, shown, state } = this.app, { layout, colours } = this;
    paintFrame(context, graph, layout, colours);
    const leftOut = state.faint ? paintAllEdges(context, graph, layout, shown, colours) : 0;
    paintNodes(context, graph, layout, shown, colours);
    const wanted = new Set([...this.app.pinned, this.app.clicked]);
    const labels = paintLabels(context, graph, layout, shown, wanted, colours, { groups: this.nameGroups() });
    return { leftOut, labels };
  }

  // The names of supernodes, by the strongest of their shown members.
  nameGroups() {
    const { graph, shown, groups } = this.app;
    const strongest = (nodes) => nodes.reduce((a, b) => (graph.influence[b] > graph.influence[a] ? b : a));
    return new Map(groups.map(({ name, members }) => [members.filter((node) => shown.nodes[node]), name])
      .filter(([members]) => members.length).map(([members, name]) => [strongest(members), name]));
  }

  prepare(canvas, width, height) {
    const dots = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * dots) || canvas.height !== Math.round(height * dots)) {
      canvas.width = Math.round(width * dots);
      canvas.height = Math.round(height * dots);
    }
    const context = canvas.getContext('2d');
    context.setTransform(dots, 0, 0, dots, 0, 0);
    context.clearRect(0, 0, width, height);
    context.translate(this.zoom.x, this.zoom.y);
    return context;
  }

  // Draws only what changes while the pointer moves.
  drawTop() {
    const { app } = this, { graph, shown, hovered, chosen, pinned } = app;
    if (!this.layout) return;
    const context = this.prepare(this.top, this.element.clientWidth, this.element.clientHeight);
    const { layout, colours } = this;
    const edgesOf = (node) => (node < 0 || !shown.nodes[node] ? [] : [...listInputs(graph, node, shown.edges), ...listOutputs(graph, node, shown.edges)]);
    const between = [...pinned].flatMap((node) => listInputs(graph, node, shown.edges)).filter((edge) => pinned.has(graph.sources[edge]));
    paintEdges(context, graph, layout, between, colours, 0.5);
    const edges = new Set([...chosen, hovered].flatMap(edgesOf));
    paintEdges(context, graph, layout, edges, colours, 0.75);
    const ends = new Set([...edges].flatMap((edge) => [graph.sources[edge], graph.targets[edge]]));
    const paint = (node, more, stroke, line) => {
      if (node < 0 || !shown.nodes[node]) return;
      paintNode(context, graph.kind[node], layout.x[node], layout.y[node], nodeSize(graph, node, layout.largest) + more, nodeColour(graph, node, colours), stroke, line);
    };
    for (const node of ends) paint(node, 0, colours.ground, 1.2);
    for (const node of pinned) paint(node, 1.2, colours.pinned, 2.2);
    for (const node of app.grouping ?? []) paint(node, 3, colours.chosen, 3);
    for (const node of chosen) paint(node, 2, colours.chosen, 2.6);
    if (!chosen.includes(hovered)) paint(hovered, 2, colours.text, 2);
    if (edges.size || between.length) repaintLabels(context, graph, this.labels, colours, this.nameGroups());
    if (hovered >= 0 || chosen.length) {
      const named = [...ends].sort((a, b) => graph.influence[b] - graph.influence[a]).slice(0, 12);
      const wanted = new Set([...chosen, hovered]);
      paintLabels(context, graph, layout, { nodes: mask(graph.size, [...named, ...wanted]) }, wanted, colours, { earlier: this.labels });
    }
    this.showTip();
  }

  showTip() {
    const { graph, hovered, shown } = this.app;
    this.tip.hidden = hovered < 0 || !shown.nodes[hovered];
    if (this.tip.hidden) return;
    const inputs = listInputs(graph, hovered, shown.edges).length, outputs = listOutputs(graph, hovered, shown.edges).length;
    const inGroup = this.app.groups[this.app.groupOf(hovered)];
    this.tip.textContent = `${fullName(graph, hovered)}${inGroup ? ` · in the supernode ${clean(inGroup.name, 200)}` : ''} · influence ${formatShare(graph.influence[hovered])} · ${countOf(inputs, 'input')}, ${countOf(outputs, 'output')}`;
    const left = this.places.x[hovered], top = this.places.y[hovered];
    this.tip.style.left = `${Math.max(8, Math.min(left + 12, this.element.clientWidth - this.tip.offsetWidth - 8))}px`;
    this.tip.style.top = `${top > this.element.clientHeight / 2 ? top - this.tip.offsetHeight - 14 : top + 14}px`;
  }

  listen() {
    const { app, top } = this;
    const at = (event) => {
      const box = top.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    let from = null, moved = false;
    top.addEventListener('pointerdown', (event) => { from = [...at(event), this.zoom.x, this.zoom.y]; moved = false; });
    top.addEventListener('pointermove', (event) => {
      const [x, y] = at(event);
      if (from && event.buttons && (moved || Math.hypot(x - from[0], y - from[1]) > 6)) {
        moved = true;
        this.move(this.zoom.scale, from[2] + x - from[0], from[3] + y - from[1]);
      } else if (!event.shiftKey) {
        const named = this.findNamed(x, y);
        top.style.cursor = named < 0 ? '' : 'pointer';
        app.hover(named < 0 ? this.find(x, y) : named);
      }
    });
    top.addEventListener('pointerleave', (event) => { if (!event.shiftKey) app.hover(-1); });
    top.addEventListener('pointerup', () => { from = null; });
    top.addEventListener('click', (event) => {
      if (moved) return;
      const node = event.shiftKey && app.hovered >= 0 ? app.hovered : this.find(...at(event)), named = this.findNamed(...at(event));
      if (app.grouping && node >= 0) app.addToGroup(node);
      else if ((event.ctrlKey || event.metaKey) && node >= 0) app.togglePin([node]);
      else if (named >= 0) app.chooseGroup(app.groupOf(named));
      else app.click(node === app.clicked ? -1 : node);
    });
    top.addEventListener('wheel', (event) => {
      event.preventDefault();
      this.zoomAt(...at(event), Math.exp(-event.deltaY / 500));
    }, { passive: false });
    top.addEventListener('keydown', (event) => this.press(event));
    top.addEventListener('blur', () => app.hover(-1));
  }

  find(x, y) {
    return this.places ? findNearest(this.places, this.app.shown.nodes, x, y, REACH) : -1;
  }

  // The node beside which the name of its group is drawn at a point; -1 if there is none.
  findNamed(x, y) {
    const [px, py] = [x - this.zoom.x, y - this.zoom.y];
    const isInside = (box) => box && px >= box[0] && px <= box[2] && py >= box[1] && py <= box[3];
    return this.labels ? [...this.nameGroups().keys()].find((node) => isInside(this.labels.get(node))) ?? -1 : -1;
  }

  zoomAt(x, y, factor) {
    const scale = Math.min(Math.max(this.zoom.scale * factor, 1), 24), ratio = scale / this.zoom.scale;
    this.move(scale, x - (x - this.zoom.x) * ratio, y - (y - this.zoom.y) * ratio);
  }

  move(scale, x, y) {
    const { clientWidth: width, clientHeight: height } = this.element;
    const limit = (offset, size) => Math.min(0, Math.max(offset, size - size * scale));
    this.zoom = { scale, x: limit(x, width), y: limit(y, height) };
    this.waiting ??= requestAnimationFrame(() => { this.waiting = null; this.draw(); });
  }

  press(event) {
    const { app } = this, { graph, shown } = app;
    const at = app.hovered >= 0 ? app.hovered : app.clicked >= 0 ? app.clicked : -1;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const middle = [this.element.clientWidth / 2, this.element.clientHeight / 2];
    const first = (edges, ends) => (edges.length ? ends[edges[0]] : at);
    const actions = {
      ArrowLeft: () => this.walk(at, -1, 0), ArrowRight: () => this.walk(at, 1, 0),
      ArrowUp: () => this.walk(at, 0, 1), ArrowDown: () => this.walk(at, 0, -1),
      i: () => this.say(at < 0 ? at : first(listInputs(graph, at, shown.edges), graph.sources)),
      o: () => this.say(at < 0 ? at : first(listOutputs(graph, at, shown.edges), graph.targets)),
      Enter: () => (app.grouping ? app.addToGroup(at) : app.click(at === app.clicked ? -1 : at)),
      ' ': () => (app.grouping ? app.addToGroup(at) : app.click(at === app.clicked ? -1 : at)),
      p: () => at >= 0 && app.togglePin([at]),
      '+': () => this.zoomAt(...middle, 1.4), '=': () => this.zoomAt(...middle, 1.4), '-': () => this.zoomAt(...middle, 1 / 1.4),
      0: () => this.move(1, 0, 0),
      Escape: () => { app.hover(-1); app.click(-1); },
    };
    if (!actions[key]) return;
    event.preventDefault();
    actions[key]();
  }

  // The nearest node sideways in the same layer, or in the next layer up or down that has nodes.
  walk(from, across, upward) {
    const { graph, shown } = this.app, { x } = this.layout;
    const nodes = [...graph.kind.keys()].filter((node) => shown.nodes[node]);
    if (from < 0 || !shown.nodes[from]) return this.say(nodes.findLast((node) => graph.kind[node] === 'output') ?? nodes.at(-1) ?? -1);
    const gap = (node) => Math.abs(x[node] - x[from]);
    const layers = nodes.map((node) => graph.layer[node]).filter((layer) => (layer - graph.layer[from]) * upward > 0);
    const layer = !upward ? graph.layer[from] : upward > 0 ? Math.min(...layers) : Math.max(...layers);
    const beside = (node) => !upward && ((x[node] - x[from]) * across > 0 || (x[node] === x[from] && (node - from) * across > 0));
    const candidates = nodes.filter((node) => graph.layer[node] === layer && node !== from && (upward || beside(node)));
    return this.say(candidates.reduce((best, node) => (best < 0 || gap(node) < gap(best) ? node : best), -1));
  }

  say(node) {
    if (node < 0) return;
    this.app.hover(node);
    this.said.textContent = this.tip.textContent + (this.app.pinned.has(node) ? ', pinned' : '');
  }

}

function mask(size, nodes) {
  const on = new Uint8Array(size);
  for (const node of nodes) if (node >= 0) on[node] = 1;
  return on;
}

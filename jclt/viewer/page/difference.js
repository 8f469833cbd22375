// A picture of two graphs in one layout: what both have, and what one of them lacks, by shape and by colour.

import { download, make } from './dom.js';
import { nodeKey } from './graph.js';
import { layOut, MARGIN } from './layout.js';
import { FONT, SEGMENTS, paintFrame, paintLabels, readColours } from './paint.js';
import { SvgContext } from './svg_context.js';
import { clean, countOf } from './text.js';

const SIDES = ['both', 'here', 'there'];

// The union of the nodes and edges that two prunings keep, errors left out. Each has its side: 0 in both, 1 only here,
// 2 only there. The outputs are the last nodes, as in every graph.
export function mergeGraphs(here, keptHere, there, keptThere) {
  const found = new Map(), edges = new Map();
  const layers = Math.max(here.layers, there.layers);
  [[here, keptHere], [there, keptThere]].forEach(([graph, kept], other) => {
    const keys = [...graph.kind.keys()].map((node) => (kept.nodes[node] && graph.kind[node] !== 'error' ? nodeKey(graph, node) : null));
    keys.forEach((key, node) => {
      if (key === null) return;
      if (found.has(key)) found.get(key).side = 0;
      else found.set(key, { key, graph, node, side: other + 1 });
    });
    for (let edge = 0; edge < graph.edges; edge++) {
      const ends = [keys[graph.sources[edge]], keys[graph.targets[edge]]];
      if (!kept.edges[edge] || ends.includes(null)) continue;
      const key = ends.join(' > ');
      edges.set(key, { ends, side: edges.has(key) ? 0 : other + 1 });
    }
  });
  const isOutput = ({ graph, node }) => (graph.kind[node] === 'output' ? 1 : 0);
  const nodes = [...found.values()].sort((a, b) => isOutput(a) - isOutput(b));
  const numbers = new Map(nodes.map(({ key }, number) => [key, number]));
  const column = (name) => nodes.map(({ graph, node }) => graph[name][node]);
  return {
    size: nodes.length, layers, tokens: mergeTokens(here.tokens, there.tokens), kind: column('kind'), position: column('position'), index: column('index'),
    layer: nodes.map(({ graph, node }) => (graph.kind[node] === 'output' ? layers : graph.layer[node])),
    influence: column('influence'), labels: column('labels'), side: nodes.map(({ side }) => side),
    outputs: nodes.filter(isOutput).map(({ graph, node }) => graph.outputs[node - (graph.size - graph.outputs.length)]),
    edges: [...edges.values()].map(({ ends, side }) => ({ source: numbers.get(ends[0]), target: numbers.get(ends[1]), side })),
  };
}

function mergeTokens(here, there) {
  return Array.from({ length: Math.max(here.length, there.length) }, (_, i) => {
    const [a, b] = [here[i], there[i]];
    return a === b || b === undefined ? a : a === undefined ? b : `${a} |${b}`;
  });
}

export function countSides(sides) {
  return SIDES.map((_, side) => sides.filter((other) => other === side).length);
}

// Only here: an upward triangle; only there: a hollow downward one; both: a dot.
function paintMark(context, x, y, side, colours) {
  const size = side ? 6 : 4, up = side === 1 ? -1 : 1;
  context.beginPath();
  if (side) {
    context.moveTo(x - size, y - up * size * 0.8);
    context.lineTo(x + size, y - up * size * 0.8);
    context.lineTo(x, y + up * size);
    context.closePath();
  } else context.arc(x, y, size, 0, 2 * Math.PI);
  context.fillStyle = side === 2 ? colours.ground : sideColour(side, colours);
  context.fill();
  context.strokeStyle = side ? sideColour(side, colours) : colours.ground;
  context.lineWidth = side === 2 ? 2 : 1;
  context.stroke();
}

function sideColour(side, colours) {
  return [colours.soft, colours.raises, colours.lowers][side];
}

export function paintDifference(context, merged, width, height, colours) {
  const all = { nodes: new Uint8Array(merged.size).fill(1) };
  const layout = layOut(merged, all.nodes, width, height), { x, y } = layout;
  paintFrame(context, merged, layout, colours);
  context.lineWidth = 1.2;
  for (const side of [0, 1, 2]) {
    context.globalAlpha = Math.min(0.5, 12 / Math.sqrt(merged.edges.length || 1));
    context.strokeStyle = sideColour(side, colours);
    const edges = merged.edges.filter((edge) => edge.side === side);
    for (let start = 0; start < edges.length; start += SEGMENTS) {
      context.beginPath();
      for (const { source, target } of edges.slice(start, start + SEGMENTS)) {
        context.moveTo(x[source], y[source]);
        context.lineTo(x[target], y[target]);
      }
      context.stroke();
    }
  }
  context.globalAlpha = 1;
  for (let node = 0; node < merged.size; node++) paintMark(context, x[node], y[node], merged.side[node], colours);
  paintLabels(context, merged, layout, all, new Set(), colours);
}

function paintLegend(context, names, width, colours) {
  const counts = [`in both`, `only in ${clean(names[0], 28)}`, `only in ${clean(names[1], 28)}`];
  context.font = FONT;
  context.textAlign = 'left';
  context.textBaseline = 'middle';
  let left = MARGIN.left;
  counts.forEach((text, side) => {
    paintMark(context, left, 10, side, colours);
    context.fillStyle = colours.text;
    context.fillText(text, left + 11, 10);
    left += context.measureText(text).width + 38;
  });
}

// A window with the picture, which can be saved.
export class DifferenceWindow {
  constructor() {
    this.canvas = make('canvas', { role: 'img' });
    const button = (text, run) => make('button', { type: 'button', onclick: run }, text);
    this.close = button('Close', () => this.element.close());
    this.element = make('dialog', { class: 'difference', 'aria-label': 'Picture of the difference' },
      make('div', { class: 'line' }, make('h2', {}, 'What two graphs share'), button('PNG', () => this.savePng()), button('SVG', () => this.saveSvg()), this.close), this.canvas);
  }

  open(merged, names) {
    Object.assign(this, { merged, names });
    if (!this.element.isConnected) document.body.append(this.element);
    this.element.showModal();
    const { clientWidth: width, clientHeight: height } = this.canvas, dots = window.devicePixelRatio || 1;
    Object.assign(this, { width, height });
    this.canvas.width = width * dots;
    this.canvas.height = height * dots;
    const context = this.canvas.getContext('2d');
    context.scale(dots, dots);
    this.paint(context);
    const [both, here, there] = countSides(merged.side);
    this.canvas.setAttribute('aria-label', `${countOf(both, 'node')} in both graphs, ${here} only in ${clean(names[0])}, ${there} only in ${clean(names[1])}`);
    this.close.focus();
  }

  paint(context) {
    const colours = readColours();
    context.fillStyle = colours.ground;
    context.fillRect(0, 0, this.width, this.height);
    paintDifference(context, this.merged, this.width, this.height, colours);
    paintLegend(context, this.names, this.width, colours);
  }

  savePng() {
    this.canvas.toBlob((blob) => download('difference.png', blob));
  }

  saveSvg() {
    const context = new SvgContext(this.width, this.height, readColours().ground);
    this.paint(context);
    download('difference.svg', context.finish(), 'image/svg+xml');
  }
}

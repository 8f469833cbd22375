// Draws a graph on a canvas, or on a context that writes SVG.

import { readColour } from './dom.js';
import { shareOf } from './graph.js';
import { MARGIN } from './layout.js';
import { clean, shortName } from './text.js';

export const FONT = '11px system-ui, "DejaVu Sans", sans-serif';
const BOLD = `bold ${FONT}`;
const WIDTHS = [0.6, 1, 1.6, 2.6, 4, 6];
const MOST_FAINT = 40_000, MOST_LABELS = 70;
export const SEGMENTS = 512; // in one path: longer ones are slow, and cover nothing twice

export function readColours() {
  return Object.fromEntries(['ground', 'text', 'soft', 'line', 'raises', 'lowers', 'feature', 'error', 'input', 'chosen', 'pinned']
    .map((name) => [name, readColour(name)]));
}

export function paintFrame(context, graph, layout, colours) {
  const { columns, rows, width } = layout;
  context.font = FONT;
  let named = Infinity; // the height of the last layer that has its number beside it
  for (const [layer, row] of rows) {
    if (layer < 0) continue;
    context.strokeStyle = colours.line;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(MARGIN.left, row.bottom);
    context.lineTo(width - MARGIN.right, row.bottom);
    context.stroke();
    const middle = row.bottom - row.height / 2;
    if (named - middle < 12 && layer !== graph.layers) continue;
    named = middle;
    context.fillStyle = colours.soft;
    context.textAlign = 'right';
    context.textBaseline = 'middle';
    context.fillText(layer === graph.layers ? 'output' : layer, MARGIN.left - 8, middle);
  }
  const bottom = rows.get(-1).bottom;
  const isNarrow = columns.some((column, i) => context.measureText(clean(graph.tokens[i], 14)).width > column.width - 4);
  graph.tokens.forEach((token, position) => {
    const column = columns[position], middle = column.left + column.width / 2;
    if (position % 2) {
      context.fillStyle = colours.line;
      context.globalAlpha = 0.25;
      context.fillRect(column.left, MARGIN.top - 8, column.width, bottom - MARGIN.top + 8);
      context.globalAlpha = 1;
    }
    if (column.width < 9) return;
    context.fillStyle = colours.text;
    context.save();
    context.translate(middle + (isNarrow ? 3 : 0), bottom + (isNarrow ? 6 : 16));
    if (isNarrow) context.rotate(-Math.PI / (column.width < 17 ? 2 : 3.4));
    context.textAlign = isNarrow ? 'right' : 'center';
    context.textBaseline = isNarrow && column.width < 17 ? 'middle' : 'alphabetic';
    context.fillText(clean(token, 11), 0, isNarrow && column.width >= 17 ? 6 : 0);
    context.restore();
  });
}

// The edges with these numbers, thin to thick; `share` is an edge's part of all that reaches its target.
export function paintEdges(context, graph, layout, edges, colours, alpha) {
  const groups = new Map();
  for (const edge of edges) {
    const share = shareOf(graph, edge);
    const key = (graph.weights[edge] > 0 ? 10 : 0) + Math.min(5, Math.floor(7 * Math.sqrt(share)));
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(edge);
  }
  context.globalAlpha = alpha;
  for (const key of [...groups.keys()].sort((a, b) => (a % 10) - (b % 10))) {
    context.strokeStyle = key >= 10 ? colours.raises : colours.lowers;
    context.lineWidth = WIDTHS[key % 10];
    const group = groups.get(key);
    for (let start = 0; start < group.length; start += SEGMENTS) {
      context.beginPath();
      for (const edge of group.slice(start, start + SEGMENTS)) {
        context.moveTo(layout.x[graph.sources[edge]], layout.y[graph.sources[edge]]);
        context.lineTo(layout.x[graph.targets[edge]], layout.y[graph.targets[edge]]);
      }
      context.stroke();
    }
  }
  context.globalAlpha = 1;
}

// All shown edges; of too many the heaviest parts of their targets. Returns how many are left out.
export function paintAllEdges(context, graph, layout, shown, colours) {
  let edges = [];
  for (let edge = 0; edge < graph.edges; edge++) if (shown.edges[edge]) edges.push(edge);
  const count = edges.length;
  if (count > MOST_FAINT) {
    const share = (edge) => shareOf(graph, edge);
    const cutoff = Float64Array.from(edges, share).sort()[count - MOST_FAINT];
    edges = edges.filter((edge) => share(edge) >= cutoff);
  }
  paintEdges(context, graph, layout, edges, colours, Math.min(0.4, 8 / Math.sqrt(count || 1)));
  return count - edges.length;
}

export function paintNode(context, kind, x, y, size, fill, stroke, line = 1.2) {
  context.beginPath();
  if (kind === 'feature') context.arc(x, y, size, 0, 2 * Math.PI);
  else if (kind === 'error') {
    context.moveTo(x, y - size * 1.15);
    context.lineTo(x + size * 1.15, y);
    context.lineTo(x, y + size * 1.15);
    context.lineTo(x - size * 1.15, y);
    context.closePath();
  } else context.rect(x - size, y - size, 2 * size, 2 * size);
  context.fillStyle = fill;
  context.fill();
  context.strokeStyle = stroke;
  context.lineWidth = line;
  context.stroke();
}

export function nodeColour(graph, node, colours) {
  return { feature: colours.feature, error: colours.error }[graph.kind[node]] ?? colours.input;
}

export function nodeSize(graph, node, largest) {
  if (graph.kind[node] !== 'feature') return graph.kind[node] === 'error' ? 3.4 : 4.4;
  return 3.2 + 3.6 * Math.sqrt(graph.influence[node] / largest);
}

export function paintNodes(context, graph, layout, shown, colours) {
  for (let node = 0; node < graph.size; node++) {
    if (!shown.nodes[node]) continue;
    const size = nodeSize(graph, node, layout.largest);
    paintNode(context, graph.kind[node], layout.x[node], layout.y[node], size, nodeColour(graph, node, colours), colours.ground);
  }
}

// Labels of the wanted nodes and then of the strongest, as far as none covers another or a node. `earlier` are labels that
// are there already; `groups` are names of groups, each in place of the label of one member. Returns all labels, by node.
export function paintLabels(context, graph, layout, shown, wanted, colours, { earlier = new Map(), groups = new Map() } = {}) {
  context.textBaseline = 'middle';
  context.textAlign = 'left';
  const taken = [...earlier.values()], labels = new Map(earlier);
  const blocks = (box) => taken.some((t) => box[0] < t[2] && box[2] > t[0] && box[1] < t[3] && box[3] > t[1]);
  const inner = [...graph.kind.keys()].filter((node) => shown.nodes[node] && graph.kind[node] !== 'token');
  const tokens = [...graph.kind.keys()].filter((node) => shown.nodes[node] && graph.kind[node] === 'token');
  for (const node of inner.length < 4000 ? [...inner, ...tokens] : []) {
    taken.push([layout.x[node] - 4, layout.y[node] - 4, layout.x[node] + 4, layout.y[node] + 4]);
  }
  const named = inner.filter((node) => ['feature', 'output'].includes(graph.kind[node]) && !earlier.has(node));
  const rank = (node) => (groups.has(node) ? 4 : 0) + (wanted.has(node) ? 2 : 0) + (graph.kind[node] === 'output' ? 1 : 0);
  named.sort((a, b) => rank(b) - rank(a) || graph.influence[b] - graph.influence[a]);
  let count = 0;
  for (const node of named) {
    if (count >= MOST_LABELS) break;
    const text = chooseLabel(context, graph, node, groups);
    const wide = context.measureText(text).width;
    const [x, y] = [layout.x[node], layout.y[node]];
    const places = [[x + 11, y], [x - 11 - wide, y], [x - wide / 2, y - 13], [x - wide / 2, y + 13]];
    const place = places.find(([left, middle]) => left > MARGIN.left - 5 && left + wide < layout.width - 2
      && !blocks([left - 1, middle - 6, left + wide + 1, middle + 6]));
    if (!place) continue;
    const [left, middle] = place;
    taken.push([left, middle - 6, left + wide, middle + 6]);
    labels.set(node, taken.at(-1));
    writeLabel(context, text, left, middle, colours);
    count++;
  }
  return labels;
}

// The same labels again, over edges that were drawn since.
export function repaintLabels(context, graph, labels, colours, groups) {
  context.textBaseline = 'middle';
  context.textAlign = 'left';
  for (const [node, [left, top, , bottom]] of labels) writeLabel(context, chooseLabel(context, graph, node, groups), left, (top + bottom) / 2, colours);
}

function chooseLabel(context, graph, node, groups) {
  context.font = groups.has(node) ? BOLD : FONT;
  return groups.has(node) ? clean(groups.get(node), 28) : shortName(graph, node, 22);
}

function writeLabel(context, text, left, middle, colours) {
  context.lineWidth = 3;
  context.strokeStyle = colours.ground;
  context.lineJoin = 'round';
  context.strokeText(text, left, middle);
  context.fillStyle = colours.text;
  context.fillText(text, left, middle);
}

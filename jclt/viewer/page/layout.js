// Where each node is drawn: tokens sideways, layers upward, outputs on top.

export const MARGIN = { left: 52, right: 14, top: 26, bottom: 74 };
const PITCH = 15; // the least distance of neighbours in a cell, where there is room

export function layOut(graph, shown, width, height) {
  const cells = new Map(); // the nodes of one layer and position
  for (let node = 0; node < graph.size; node++) {
    if (!shown[node]) continue;
    const cell = `${graph.layer[node]} ${graph.position[node]}`;
    if (!cells.has(cell)) cells.set(cell, []);
    cells.get(cell).push(node);
  }
  const columns = placeColumns(graph, cells, width);
  const rows = placeRows(graph, cells, columns, height);
  const x = new Float64Array(graph.size).fill(NaN), y = new Float64Array(graph.size).fill(NaN);
  for (const nodes of cells.values()) {
    nodes.sort((a, b) => graph.influence[b] - graph.influence[a]);
    const [layer, position] = [graph.layer[nodes[0]], graph.position[nodes[0]]];
    const column = columns[position], row = rows.get(layer);
    const perLine = Math.ceil(nodes.length / countLines(nodes.length, column.width, row.height));
    const lines = Math.ceil(nodes.length / perLine);
    nodes.forEach((node, number) => {
      const line = Math.floor(number / perLine), inLine = Math.min(perLine, nodes.length - line * perLine);
      x[node] = column.left + column.width * ((number % perLine) + 1) / (inLine + 1);
      y[node] = row.bottom - row.height * (lines - line) / (lines + 1);
    });
  }
  return { x, y, columns, rows, width, height };
}

function countLines(count, width, height) {
  const most = Math.max(1, Math.floor(height / 9));
  return Math.min(most, Math.max(1, Math.ceil(count * PITCH / width)), count);
}

function placeColumns(graph, cells, width) {
  const weights = graph.tokens.map(() => 1.6);
  for (const nodes of cells.values()) {
    const position = graph.position[nodes[0]];
    weights[position] = Math.max(weights[position], 1 + Math.min(nodes.length, 12));
  }
  const scale = (width - MARGIN.left - MARGIN.right) / weights.reduce((a, b) => a + b, 0);
  let left = MARGIN.left;
  return weights.map((weight) => {
    const column = { left, width: weight * scale };
    left += column.width;
    return column;
  });
}

// Layers without nodes are thin.
function placeRows(graph, cells, columns, height) {
  const weights = new Map();
  for (let layer = -1; layer <= graph.layers; layer++) weights.set(layer, layer === -1 ? 0.6 : 0.3);
  for (const nodes of cells.values()) {
    const layer = graph.layer[nodes[0]], column = columns[graph.position[nodes[0]]];
    const lines = Math.min(Math.ceil(nodes.length * PITCH / column.width), 12);
    weights.set(layer, Math.max(weights.get(layer), layer === -1 ? 0.6 : 0.7 + 0.45 * lines));
  }
  const total = [...weights.values()].reduce((a, b) => a + b, 0);
  const scale = (height - MARGIN.top - MARGIN.bottom) / total;
  const rows = new Map();
  let bottom = height - MARGIN.bottom;
  for (const [layer, weight] of weights) {
    rows.set(layer, { bottom, height: weight * scale });
    bottom -= weight * scale;
  }
  return rows;
}

// The shown node nearest to a point, within a distance; -1 if there is none.
export function findNearest({ x, y }, shown, px, py, within) {
  let best = -1, least = within * within;
  for (let node = 0; node < x.length; node++) {
    if (!shown[node]) continue;
    const distance = (x[node] - px) ** 2 + (y[node] - py) ** 2;
    if (distance < least) { best = node; least = distance; }
  }
  return best;
}

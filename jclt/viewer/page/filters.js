// Which nodes and edges are shown: what pruning keeps, less what the filters hide. All that is hidden is counted.

import { isInner } from './graph.js';
import { keepNodes } from './pruning.js';
import { readPercents, readRanges } from './state.js';
import { fullName } from './text.js';

export function filter(graph, kept, state, pinned) {
  const inLayers = readRanges(state.layers), atTokens = readRanges(state.tokens);
  const densities = graph.density && readPercents(state.density);
  const wanted = state.text.trim().toLowerCase();
  const nodes = new Uint8Array(graph.size);
  const hidden = { thresholds: 0, filters: 0, loose: 0 };
  for (let node = 0; node < graph.size; node++) {
    const kind = graph.kind[node], isInLayer = isInner(kind);
    if (!kept.nodes[node] && !pinned.has(node)) { hidden.thresholds++; continue; }
    const isHidden = state.hidden.includes(kind)
      || (isInLayer && inLayers && !inLayers(graph.layer[node]))
      || (densities && (graph.density[node] < densities[0] || graph.density[node] > densities[1]))
      || (kind !== 'output' && atTokens && !atTokens(graph.position[node]))
      || (isInLayer && wanted && !fullName(graph, node).toLowerCase().includes(wanted));
    if (isHidden && !pinned.has(node)) { hidden.filters++; continue; }
    nodes[node] = 1;
  }
  const edges = keepNodes(graph, nodes, kept.edges);
  if (state.sign !== 'both') {
    const sign = state.sign === 'positive' ? 1 : -1;
    for (let edge = 0; edge < graph.edges; edge++) if (graph.weights[edge] * sign <= 0) edges[edge] = 0;
  }
  if (state.hidden.includes('loose')) hideLoose(graph, nodes, edges, pinned, hidden);
  return { nodes, edges, hidden };
}

// Nodes of layers to which no shown edge leads or from which none comes.
function hideLoose(graph, nodes, edges, pinned, hidden) {
  const isTied = new Uint8Array(graph.size);
  for (let edge = 0; edge < graph.edges; edge++) if (edges[edge]) isTied[graph.sources[edge]] = isTied[graph.targets[edge]] = 1;
  for (let node = 0; node < graph.size; node++) {
    if (nodes[node] && isInner(graph.kind[node]) && !isTied[node] && !pinned.has(node)) { nodes[node] = 0; hidden.loose++; }
  }
}

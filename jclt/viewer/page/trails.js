// The strongest path through a node: from a token up to an output, by the product of the edges' shares.

import { shareOf } from './graph.js';

export function findTrail(graph, shown, node) {
  if (node < 0) return [];
  const order = [...graph.kind.keys()].filter((other) => shown.nodes[other]).sort((a, b) => graph.order[a] - graph.order[b]);
  return [...followUp(graph, shown, node, order), node, ...followDown(graph, shown, node, order.toReversed())];
}

function followDown(graph, shown, node, fromTop) {
  const best = new Float64Array(graph.size), previous = new Int32Array(graph.size).fill(-1);
  best[node] = 1;
  for (const target of fromTop) {
    if (!best[target]) continue;
    for (let edge = graph.starts[target]; edge < graph.starts[target + 1]; edge++) {
      const source = graph.sources[edge], product = shown.edges[edge] ? best[target] * shareOf(graph, edge) : 0;
      if (product > best[source]) { best[source] = product; previous[source] = target; }
    }
  }
  return readBack(graph, best, previous, node, ['token', 'position']);
}

function followUp(graph, shown, node, fromBottom) {
  const best = new Float64Array(graph.size), previous = new Int32Array(graph.size).fill(-1);
  best[node] = 1;
  for (const source of fromBottom) {
    if (!best[source]) continue;
    for (let place = graph.outStarts[source]; place < graph.outStarts[source + 1]; place++) {
      const edge = graph.outgoing[place], target = graph.targets[edge];
      const product = shown.edges[edge] ? best[source] * shareOf(graph, edge) : 0;
      if (product > best[target]) { best[target] = product; previous[target] = source; }
    }
  }
  return readBack(graph, best, previous, node, ['output']);
}

// The path from the best end of these kinds back to the node, without the node.
function readBack(graph, best, previous, node, kinds) {
  let end = -1;
  for (let other = 0; other < graph.size; other++) {
    if (other !== node && kinds.includes(graph.kind[other]) && best[other] > (end < 0 ? 0 : best[end])) end = other;
  }
  const path = [];
  for (; end >= 0 && end !== node; end = previous[end]) path.push(end);
  return path;
}

// Pruning and scores: the same formulas as graphs/influence.py and graphs/pruning.py, on the list of edges. Numbers are
// rounded to float32 where numpy rounds them, so that both keep the same nodes and edges.

import { isComputed } from './graph.js';

const FLOOR = 1e-10;

// Which nodes and edges are kept: `{ nodes, edges }`, arrays of 0 and 1.
export function prune(graph, nodeThreshold, edgeThreshold, rule = 'paper') {
  const round = graph.single ? Math.fround : (x) => x;
  const isFixed = graph.kind.map((kind) => !isComputed(kind) && !(kind === 'error' && rule !== 'paper'));
  const cutoff = findCutoff(graph.influence.filter((x) => x > 0), nodeThreshold, round);
  const nodes = new Uint8Array(graph.size);
  for (let node = 0; node < graph.size; node++) nodes[node] = isFixed[node] || graph.influence[node] >= cutoff ? 1 : 0;
  const edges = chooseEdges(graph, nodes, edgeThreshold, round);
  removeDeadEnds(graph, nodes, edges, isFixed);
  return { nodes, edges };
}

export function keepAll(graph) {
  return { nodes: new Uint8Array(graph.size).fill(1), edges: new Uint8Array(graph.edges).fill(1) };
}

// The edges among these nodes, and no other.
export function keepNodes(graph, nodes, edges) {
  const kept = new Uint8Array(graph.edges);
  for (let edge = 0; edge < graph.edges; edge++) {
    kept[edge] = edges[edge] && nodes[graph.sources[edge]] && nodes[graph.targets[edge]] ? 1 : 0;
  }
  return kept;
}

function chooseEdges(graph, nodes, threshold, round) {
  const within = keepNodes(graph, nodes, new Uint8Array(graph.edges).fill(1));
  const mass = measureMass(graph, within, graph.restMass);
  const visits = countVisits(graph, within, mass, round);
  const influence = new Float64Array(graph.edges);
  for (let edge = 0; edge < graph.edges; edge++) {
    if (!within[edge]) continue;
    const target = graph.targets[edge];
    influence[edge] = round(round(Math.abs(graph.weights[edge]) / round(mass[target])) * round(visits[target]));
  }
  const cutoff = findCutoff(influence.filter((x) => x > 0), threshold, round);
  for (let edge = 0; edge < graph.edges; edge++) within[edge] = within[edge] && influence[edge] >= cutoff ? 1 : 0;
  return within;
}

function measureMass(graph, kept, restMass) {
  const mass = new Float64Array(graph.size);
  for (let edge = 0; edge < graph.edges; edge++) if (kept[edge]) mass[graph.targets[edge]] += Math.abs(graph.weights[edge]);
  for (let node = 0; node < graph.size; node++) mass[node] = Math.max(mass[node] + restMass[node], FLOOR);
  return mass;
}

// Influence plus output weight: one pass from the outputs down.
function countVisits(graph, kept, mass, round) {
  const visits = Float64Array.from(graph.outputWeights);
  for (const node of listFromTop(graph)) {
    if (!visits[node]) continue;
    const times = round(visits[node]);
    for (let edge = graph.starts[node]; edge < graph.starts[node + 1]; edge++) {
      if (kept[edge]) visits[graph.sources[edge]] += times * round(Math.abs(graph.weights[edge]) / round(mass[node]));
    }
  }
  return visits;
}

// Nodes with inputs, from the outputs down.
function listFromTop(graph) {
  graph.fromTop ??= Int32Array.from(graph.kind.keys())
    .filter((node) => graph.starts[node] < graph.starts[node + 1])
    .sort((a, b) => graph.order[b] - graph.order[a]);
  return graph.fromTop;
}

// The largest cutoff such that the values from it on sum to at least this share of the total.
function findCutoff(values, share, round) {
  if (!values.length) return Infinity;
  values.sort();
  if (share === 1) return values[0];
  let total = 0;
  for (let i = values.length - 1; i >= 0; i--) total += values[i];
  const all = round(total) || 1;
  let sum = 0;
  for (let i = values.length - 1; i >= 0; i--) {
    sum += values[i];
    if (round(round(sum) / all) >= round(share)) return values[i];
  }
  return values[0];
}

// Removes nodes without an edge out, and those without an edge in into which edges may lead, until there is none.
function removeDeadEnds(graph, nodes, edges, isFixed) {
  const inputs = new Int32Array(graph.size), outputs = new Int32Array(graph.size);
  for (let edge = 0; edge < graph.edges; edge++) {
    inputs[graph.targets[edge]] += edges[edge];
    outputs[graph.sources[edge]] += edges[edge];
  }
  const isDead = (node) => nodes[node] && !isFixed[node]
    && (!outputs[node] || (!inputs[node] && isComputed(graph.kind[node])));
  const dead = [...graph.kind.keys()].filter(isDead);
  for (const node of dead) nodes[node] = 0;
  const remove = (edge) => {
    if (!edges[edge]) return;
    edges[edge] = 0;
    const source = graph.sources[edge], target = graph.targets[edge];
    inputs[target]--;
    outputs[source]--;
    for (const end of [source, target]) if (isDead(end)) { nodes[end] = 0; dead.push(end); }
  };
  while (dead.length) {
    const node = dead.pop();
    for (let edge = graph.starts[node]; edge < graph.starts[node + 1]; edge++) remove(edge);
    for (let place = graph.outStarts[node]; place < graph.outStarts[node + 1]; place++) remove(graph.outgoing[place]);
  }
}

// Replacement, completeness and the visits of each node, when what is not kept counts as error.
export function measureScores(graph, kept) {
  const exact = (x) => x;
  const mass = graph.mass.map((x) => Math.max(x, FLOOR));
  const inside = measureMass(graph, kept.edges, new Float64Array(graph.size));
  const visits = countVisits(graph, kept.edges, mass, exact);
  const ofErrors = new Float64Array(graph.size);
  for (let edge = 0; edge < graph.edges; edge++) {
    if (kept.edges[edge] && graph.kind[graph.sources[edge]] === 'error') {
      ofErrors[graph.targets[edge]] += Math.abs(graph.weights[edge]);
    }
  }
  let tokens = 0, errors = 0, leaving = 0, total = 0, explained = 0;
  for (let node = 0; node < graph.size; node++) {
    const kind = graph.kind[node], count = visits[node];
    if (kind === 'token' || kind === 'position') tokens += count;
    if (kind === 'error') errors += count;
    const rest = graph.mass[node] - (inside[node] > FLOOR ? inside[node] : 0);
    leaving += count * Math.max(rest, 0) / mass[node];
    total += count;
    explained += count * (1 - ofErrors[node] / mass[node]);
  }
  return {
    replacement: divide(tokens, tokens + errors + leaving), completeness: divide(explained - leaving, total), visits,
  };
}

function divide(part, total) {
  return total ? part / total : 0;
}

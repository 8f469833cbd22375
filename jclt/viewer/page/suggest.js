// Supernodes that a graph suggests, features that are fed alike and do alike: the formulas of graphs/supernodes.py, on the
// nodes and edges that pruning keeps.

import { addGroup } from './groups.js';
import { shortName } from './text.js';

const LIKENESS = 0.75, MOST_FEATURES = 1500, FLOOR = 1e-10;

// Groups as `{ name, members }`, those with most influence first. `visits` are those of the pruned graph.
export function suggestSupernodes(graph, kept, visits) {
  const nodes = [...graph.kind.keys()].filter((node) => kept.nodes[node]);
  const features = [...nodes.keys()].filter((place) => graph.kind[nodes[place]] === 'feature');
  if (features.length > MOST_FEATURES) {
    throw new Error(`${features.length.toLocaleString('en')} features are too many to suggest supernodes, expected at most ${MOST_FEATURES.toLocaleString('en')}: move the node threshold to the left.`);
  }
  const influence = (node) => visits[node] - graph.outputWeights[node], sum = (members) => members.reduce((total, node) => total + influence(node), 0);
  return groupAlike(measureLikeness(graph, kept, visits, nodes, features), features.length)
    .map((group) => group.map((place) => nodes[features[place]]).sort((a, b) => influence(b) - influence(a) || a - b))
    .sort((a, b) => sum(b) - sum(a))
    .reduce((groups, members) => addGroup(groups, members, nameGroup(graph, members, influence)), []);
}

// Of each pair of features: the cosine of what feeds them times the cosine of what they do.
function measureLikeness(graph, kept, visits, nodes, features) {
  const size = nodes.length, flow = sumPaths(graph, kept, nodes);
  const inputs = features.map((place) => flow.subarray(place * size, (place + 1) * size));
  const effects = features.map((place) => Float64Array.from(nodes, (node, target) => visits[node] * flow[target * size + place]));
  const [fed, done] = [inputs, effects].map((rows) => rows.map(toUnit));
  const likeness = new Float64Array(features.length ** 2);
  for (let a = 0; a < features.length; a++) {
    for (let b = a + 1; b < features.length; b++) {
      const cosine = Math.max(multiply(fed[a], fed[b]), 0);
      likeness[a * features.length + b] = likeness[b * features.length + a] = cosine && cosine * Math.max(multiply(done[a], done[b]), 0);
    }
  }
  return likeness;
}

// Row t, column s: what of node t comes from node s, over all paths, with signs.
function sumPaths(graph, kept, nodes) {
  const size = nodes.length, flow = new Float64Array(size * size), places = new Int32Array(graph.size).fill(-1);
  nodes.forEach((node, place) => { places[node] = place; });
  for (const node of nodes.toSorted((a, b) => graph.order[a] - graph.order[b])) {
    const row = flow.subarray(places[node] * size, (places[node] + 1) * size);
    for (let edge = graph.starts[node]; edge < graph.starts[node + 1]; edge++) {
      if (!kept.edges[edge]) continue;
      const step = graph.weights[edge] / Math.max(graph.mass[node], FLOOR), source = places[graph.sources[edge]];
      const below = flow.subarray(source * size, (source + 1) * size);
      for (let i = 0; i < size; i++) row[i] += step * below[i];
      row[source] += step;
    }
  }
  return flow;
}

function multiply(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function toUnit(row) {
  const length = Math.max(Math.sqrt(multiply(row, row)), FLOOR);
  return row.map((x) => x / length);
}

// Groups of at least two, joined as long as the mean likeness between their members is at least LIKENESS. Each chain leads
// from a group to the one most like it, until two are most like each other.
function groupAlike(likeness, size) {
  const members = Array.from({ length: size }, (_, i) => [i]), open = new Set(members.keys());
  let chain = [];
  while (open.size) {
    if (!chain.length) chain = [open.values().next().value];
    const last = chain.at(-1), before = chain.at(-2);
    let best = before, most = before === undefined ? -1 : likeness[last * size + before];
    for (const other of open) if (other !== last && likeness[last * size + other] > most) [best, most] = [other, likeness[last * size + other]];
    if (most < LIKENESS - 1e-9) {
      open.delete(last); // whatever else is joined, no other group becomes more like it
      chain.pop();
    } else if (best !== before) chain.push(best);
    else {
      joinGroups(likeness, size, members, open, before, last);
      chain.length -= 2;
    }
  }
  return members.filter((group) => group.length > 1);
}

function joinGroups(likeness, size, members, open, into, from) {
  const [a, b] = [members[into].length, members[from].length];
  for (const other of open) {
    const mean = (a * likeness[into * size + other] + b * likeness[from * size + other]) / (a + b);
    likeness[into * size + other] = likeness[other * size + into] = mean;
  }
  members[into].push(...members[from]);
  members[from] = [];
  open.delete(from);
}

// The label that carries at least half of what the labelled members carry, or else the two that carry most.
function nameGroup(graph, members, influence) {
  const weights = new Map();
  for (const node of members) {
    const text = graph.labels[node].split(/\s+/).filter((word) => word).join(' ');
    if (text) weights.set(text, (weights.get(text) ?? 0) + influence(node));
  }
  const ranked = [...weights.keys()].sort((a, b) => weights.get(b) - weights.get(a));
  const labelled = ranked.reduce((sum, text) => sum + weights.get(text), 0), all = members.reduce((sum, node) => sum + influence(node), 0);
  if (!ranked.length || 2 * labelled < all) return `${shortName(graph, members[0])} @${graph.position[members[0]]} and ${members.length - 1} more`;
  return 2 * weights.get(ranked[0]) >= labelled ? ranked[0] : ranked.slice(0, 2).join(' / ');
}

// A graph as arrays: what `page_data.py` writes, and the edges out of each node.

export function readGraph(data) {
  const kinds = data.kinds;
  const codes = decode(data.kind, Uint8Array);
  const size = codes.length;
  const graph = {
    name: data.name, tokens: data.tokens, layers: data.layers, single: data.single, pruned: data.pruned,
    about: data.about, scores: data.scores, view: data.view, ids: data.ids, outputs: data.outputs, size,
    kind: Array.from(codes, (code) => kinds[code]),
    layer: decode(data.layer, Int32Array),
    order: decode(data.order, Int32Array),  // edges lead from lower numbers to higher ones
    position: decode(data.position, Int32Array),
    index: decode(data.index, Float64Array),
    value: decode(data.value, Float64Array),
    activation: decode(data.activation, Float64Array),
    influence: decode(data.influence, Float64Array),
    restMass: decode(data.restMass, Float64Array),
    outputWeights: decode(data.outputWeights, Float64Array),
    starts: decode(data.starts, Int32Array),
    sources: decode(data.sources, Int32Array),
    weights: decode(data.weights, data.single ? Float32Array : Float64Array),
  };
  graph.edges = graph.sources.length;
  graph.targets = listTargets(graph);
  Object.assign(graph, sortBySource(graph));
  graph.numbers = new Map(graph.ids.map((id, node) => [id, node]));
  graph.labels = [...data.labels, ...new Array(size - data.labels.length).fill('')];
  graph.givenLabels = graph.labels.slice();
  graph.mass = measureMass(graph);
  graph.density = data.density ? decode(data.density, Float64Array) : null;  // NaN where it is unknown
  return graph;
}

function decode(text, Type) {
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : decodeSlowly(text);
  return new Type(bytes.buffer, bytes.byteOffset, bytes.byteLength / Type.BYTES_PER_ELEMENT);
}

function decodeSlowly(text) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

function listTargets({ starts, size, edges }) {
  const targets = new Int32Array(edges);
  for (let node = 0; node < size; node++) targets.fill(node, starts[node], starts[node + 1]);
  return targets;
}

// The edges out of node n are outgoing[outStarts[n]] to outgoing[outStarts[n + 1]].
function sortBySource({ sources, size, edges }) {
  const outStarts = new Int32Array(size + 1);
  for (let edge = 0; edge < edges; edge++) outStarts[sources[edge] + 1]++;
  for (let node = 0; node < size; node++) outStarts[node + 1] += outStarts[node];
  const next = outStarts.slice();
  const outgoing = new Int32Array(edges);
  for (let edge = 0; edge < edges; edge++) outgoing[next[sources[edge]]++] = edge;
  return { outStarts, outgoing };
}

// The sum of the absolute values of all that reaches each node.
function measureMass({ starts, weights, restMass, size }) {
  const mass = new Float64Array(size);
  for (let node = 0; node < size; node++) {
    let sum = 0;
    for (let edge = starts[node]; edge < starts[node + 1]; edge++) sum += Math.abs(weights[edge]);
    mass[node] = sum + restMass[node];
  }
  return mass;
}

// An edge's part of all that reaches its target.
export function shareOf(graph, edge) {
  return Math.abs(graph.weights[edge]) / (graph.mass[graph.targets[edge]] || 1);
}

// Numbers of the edges into or out of a node, among those that are kept, the heaviest first.
export function listInputs(graph, node, kept) {
  const found = [];
  for (let edge = graph.starts[node]; edge < graph.starts[node + 1]; edge++) if (kept[edge]) found.push(edge);
  return sortByWeight(graph, found);
}

export function listOutputs(graph, node, kept) {
  const found = [];
  for (let place = graph.outStarts[node]; place < graph.outStarts[node + 1]; place++) {
    if (kept[graph.outgoing[place]]) found.push(graph.outgoing[place]);
  }
  return sortByWeight(graph, found);
}

function sortByWeight(graph, edges) {
  return edges.sort((a, b) => Math.abs(graph.weights[b]) - Math.abs(graph.weights[a]));
}

// Whether edges lead into nodes of this kind and out of them again.
export function isComputed(kind) {
  return kind === 'feature' || kind === 'head' || kind === 'stream';
}

// Whether nodes of this kind are in a layer.
export function isInner(kind) {
  return kind === 'error' || isComputed(kind);
}

// What tells a node apart in all graphs: its kind, place and number.
export function nodeKey(graph, node) {
  const { kind, layer, position, index } = graph;
  return `${kind[node]} ${layer[node]} ${position[node]} ${index[node]}`;
}

// What tells a feature apart at all positions; labels belong to it.
export function featureKey(graph, node) {
  return graph.kind[node] === 'feature' ? `${graph.layer[node]}/${graph.index[node]}` : '';
}

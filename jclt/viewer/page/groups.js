// The subgraph of pinned nodes: its items are supernodes and single nodes, with edges between them.

// Groups as `{ name, members }`; members that are not pinned are left out, and so are groups without members.
export function listItems(graph, groups, pinned) {
  const grouped = new Set(groups.flatMap(({ members }) => members));
  const supernodes = groups.map(({ name, members }, number) => ({ name, group: number, members: members.filter((node) => pinned.has(node)) }));
  const single = [...pinned].filter((node) => !grouped.has(node)).map((node) => ({ name: '', group: -1, members: [node] }));
  return [...supernodes.filter(({ members }) => members.length), ...single].map((item) => ({ ...item, id: itemId(graph, item) }));
}

function itemId(graph, { group, name, members }) {
  return group < 0 ? graph.ids[members[0]] : `group ${name}`;
}

// The edge from item Q to item P, as in graphs/paths.py: the mean over P's members, weighted by their visits, of the
// signed shares that come from Q's members.
export function listGroupEdges(graph, items, kept, visits) {
  const owner = new Int32Array(graph.size).fill(-1);
  items.forEach(({ members }, number) => members.forEach((node) => { owner[node] = number; }));
  const edges = new Map();
  items.forEach(({ members }, target) => {
    const total = members.reduce((sum, node) => sum + visits[node], 0);
    for (const node of members) {
      const weight = total > 0 ? visits[node] / total : 1 / members.length;
      for (let edge = graph.starts[node]; edge < graph.starts[node + 1]; edge++) {
        const source = owner[graph.sources[edge]];
        if (!kept[edge] || source < 0 || source === target) continue;
        const key = `${source} ${target}`;
        edges.set(key, (edges.get(key) ?? 0) + weight * graph.weights[edge] / (graph.mass[node] || 1));
      }
    }
  });
  return [...edges].map(([key, weight]) => {
    const [source, target] = key.split(' ').map(Number);
    return { source, target, weight };
  });
}

// A group of these nodes; they leave the groups in which they were.
export function addGroup(groups, members, name) {
  const taken = new Set(members);
  const others = removeMembers(groups, taken);
  return [...others, { name: freeName(others, name), members: [...taken] }];
}

export function removeMembers(groups, nodes) {
  return groups.map(({ name, members }) => ({ name, members: members.filter((node) => !nodes.has(node)) })).filter(({ members }) => members.length);
}

export function renameGroup(groups, number, name) {
  const others = groups.filter((_, other) => other !== number);
  return groups.map((group, other) => (other === number ? { ...group, name: freeName(others, name) } : group));
}

function freeName(groups, name) {
  const names = new Set(groups.map((group) => group.name));
  let free = name;
  for (let number = 2; names.has(free); number++) free = `${name} (${number})`;
  return free;
}

const ROW = 46; // the least height of a row of items

// Where items lie at first: by layer upward, side by side within a layer, in the order of positions. Where there is no
// room for all layers, neighbouring ones share a row.
export function placeItems(graph, items, width, height) {
  const mean = ({ members }, column) => members.reduce((sum, node) => sum + graph[column][node], 0) / members.length;
  const layerOf = (item) => Math.round(mean(item, 'layer'));
  const layers = [...new Set(items.map((item) => layerOf(item)))].sort((a, b) => a - b);
  const rows = Math.min(layers.length, Math.max(1, Math.floor(height / ROW)));
  const below = (layer) => items.filter((item) => layerOf(item) < layer).length;
  const rowOf = (item) => (rows === layers.length ? layers.indexOf(layerOf(item)) : Math.floor(below(layerOf(item)) * rows / items.length));
  const places = new Map();
  for (let row = 0; row < rows; row++) {
    const inRow = items.filter((item) => rowOf(item) === row).sort((a, b) => mean(a, 'position') - mean(b, 'position'));
    inRow.forEach((item, number) => places.set(item.id, {
      x: width * (number + 0.5) / inRow.length,
      y: height - height * (row + 0.5) / rows,
      most: width / inRow.length - 4, // pixels that it may be wide
    }));
  }
  return places;
}

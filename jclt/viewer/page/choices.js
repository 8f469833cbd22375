// What the user chose and made on the page, as a notebook's cell has it in Python: nodes are numbers, as in the graph.

export function readChoices(app) {
  const { graph, groups, pinned, edited, places, thresholds, chosen } = app;
  return {
    _graph_name: graph.name, pinned: [...pinned], supernodes: Object.fromEntries(groups.map(({ name, members }) => [name, members])),
    labels: edited, places, thresholds: [thresholds.nodes, thresholds.edges], selected: chosen,
  };
}

// Shows what Python chose; another graph is not opened for it.
export function applyChoices(app, { _graph_name: name, pinned, supernodes, labels, places, thresholds: [nodes, edges], selected }) {
  const { graph } = app, ids = (list) => list.map((node) => graph.ids[node]);
  if (name !== graph.name) return;
  app.groups = Object.entries(supernodes).map(([title, members]) => ({ name: title, members }));
  app.places = places;
  app.relabel(labels);
  const isSame = (members) => members.length === selected.length && members.every((node) => selected.includes(node));
  const group = app.groups.find(({ members }) => isSame(members));
  app.change({ pinned: ids(pinned), nodes, edges, clicked: group ? '' : ids(selected)[0] ?? '', group: group?.name ?? '' });
}

// The page's one model: the graph, the user's choices, and what follows from them. Panels read it and call its methods.

import { filter } from './filters.js';
import { featureKey, readGraph } from './graph.js';
import { addGroup, removeMembers, renameGroup } from './groups.js';
import { keepAll, keepNodes, measureScores, prune } from './pruning.js';
import { DEFAULTS, keepAddress, readState } from './state.js';
import { suggestSupernodes } from './suggest.js';
import { findTrail } from './trails.js';
import { shortName } from './text.js';

const MOST_SUGGESTED = 10; // supernodes added at once: more would hide each other

export class App {
  constructor(server) {
    Object.assign(this, { server, graph: null, hovered: -1, clicked: -1, groups: [], grouping: null, panels: [] });
    this.state = readState(location.hash);
    window.addEventListener('popstate', () => this.restore());
  }

  // Draws the panels after a change.
  show() {
    for (const panel of this.panels) panel.show();
  }

  async open(name, content = null) {
    const turn = this.turn = (this.turn ?? 0) + 1;
    const data = content ?? await this.server.readGraph(name);
    if (turn !== this.turn) return; // another was opened meanwhile
    this.graph = readGraph(data);
    const { view } = data;
    this.relabel(view.labels ?? {});
    this.groups = (view.supernodes ?? []).map(([title, ...ids]) => ({ name: title, members: this.findNodes(ids) })).filter(({ members }) => members.length);
    this.places = view.places ?? {};
    this.saved = this.findNodes(view.pinnedIds ?? []);
    if (this.state.graph !== data.name) {
      this.state = { ...DEFAULTS, graph: data.name, tab: this.state.tab };
      keepAddress(this.state, location.hash === '');
    }
    document.title = `${data.tokens.join('').slice(0, 60)} – jclt`;
    this.hovered = -1;
    this.prune();
    this.refresh();
    this.report(null);
  }

  findNodes(ids) {
    return ids.map((id) => this.graph.numbers.get(id)).filter((node) => node !== undefined);
  }

  get thresholds() {
    const whole = this.graph.pruned ? [1, 1] : [0.8, 0.98];
    return { nodes: this.state.nodes ?? whole[0], edges: this.state.edges ?? whole[1] };
  }

  // The number of the chosen group; -1 if there is none.
  get group() {
    return this.groups.findIndex(({ name }) => name === this.state.group);
  }

  groupOf(node) {
    return this.groups.findIndex(({ members }) => members.includes(node));
  }

  // The members of the chosen group, or the clicked node.
  get chosen() {
    return this.groups[this.group]?.members ?? (this.clicked >= 0 ? [this.clicked] : []);
  }

  prune() {
    const { nodes, edges } = this.thresholds, start = performance.now();
    this.kept = nodes === 1 && edges === 1 ? keepAll(this.graph) : prune(this.graph, nodes, edges);
    this.scores = measureScores(this.graph, this.kept);
    performance.measure('prune', { start });
  }

  // Computes what follows from the choices, and shows it.
  refresh() {
    const { graph, state } = this;
    this.pinned = new Set(state.pinned === null ? this.saved : this.findNodes(state.pinned));
    this.clicked = graph.numbers.get(state.clicked) ?? -1;
    this.shown = filter(graph, this.kept, state, this.pinned);
    this.pinnedScores = this.pinned.size ? this.scorePinned() : null;
    this.show();
  }

  // Of the graph of the pinned nodes, embeddings and outputs; all else counts as error.
  scorePinned() {
    const nodes = Uint8Array.from(this.graph.kind, (kind, node) => (['token', 'position', 'output'].includes(kind) || this.pinned.has(node) ? 1 : 0));
    return measureScores(this.graph, { nodes, edges: keepNodes(this.graph, nodes, this.kept.edges) });
  }

  // Other choices; `isMinor` ones, such as each step of a slider, take no place in the history.
  change(changes, isMinor = false) {
    this.state = { ...this.state, ...changes };
    keepAddress(this.state, isMinor);
    if ('nodes' in changes || 'edges' in changes) this.prune();
    this.refresh();
  }

  restore() {
    const was = this.state;
    this.state = readState(location.hash);
    if (this.state.graph !== was.graph) {
      this.open(this.state.graph).catch((error) => this.report(error));
      return;
    }
    if (this.state.nodes !== was.nodes || this.state.edges !== was.edges) this.prune();
    this.refresh();
  }

  clearFilters() {
    const { hidden, sign, layers, tokens, text, density } = DEFAULTS;
    this.change({ hidden, sign, layers, tokens, text, density });
  }

  hover(node) {
    if (node === this.hovered) return;
    this.hovered = node;
    this.view.drawTop();
  }

  click(node) {
    this.change({ clicked: node < 0 ? '' : this.graph.ids[node], group: '' });
  }

  togglePin(nodes) {
    const pinned = new Set(this.pinned), isOn = nodes.every((node) => pinned.has(node));
    for (const node of nodes) isOn ? pinned.delete(node) : pinned.add(node);
    if (isOn) this.groups = removeMembers(this.groups, new Set(nodes));
    this.setPinned(pinned);
  }

  unpinAll() {
    this.groups = [];
    this.state = { ...this.state, group: '' };
    this.setPinned(new Set());
  }

  setPinned(pinned) {
    const ids = [...pinned].map((node) => this.graph.ids[node]);
    this.change({ pinned: ids });
    this.save({ pinnedIds: ids, supernodes: this.listGroups() });
  }

  pinTrail(node) {
    this.setPinned(new Set([...this.pinned, ...findTrail(this.graph, this.shown, node)]));
  }

  setGrouping(isOn) {
    const chosen = this.grouping ?? [];
    this.grouping = isOn ? [] : null;
    if (!isOn && chosen.length) {
      const named = chosen.find((node) => this.graph.kind[node] === 'feature') ?? chosen[0];
      this.groups = addGroup(this.groups, chosen, shortName(this.graph, named, 40));
      this.setPinned(new Set([...this.pinned, ...chosen]));
      this.chooseGroup(this.groups.length - 1);
    } else this.show();
  }

  addToGroup(...nodes) {
    const isOn = nodes.every((node) => this.grouping.includes(node));
    this.grouping = isOn ? this.grouping.filter((node) => !nodes.includes(node)) : [...new Set([...this.grouping, ...nodes.filter((node) => node >= 0)])];
    this.show();
  }

  // Adds suggested supernodes, a few at a time; what is in one already stays there. Returns the new ones, and how many more
  // there are.
  suggestGroups() {
    const taken = new Set(this.groups.flatMap(({ members }) => members));
    const free = suggestSupernodes(this.graph, this.kept, this.scores.visits)
      .map(({ name, members }) => ({ name, members: members.filter((node) => !taken.has(node)) }))
      .filter(({ members }) => members.length > 1);
    const added = free.slice(0, MOST_SUGGESTED);
    for (const { name, members } of added) this.groups = addGroup(this.groups, members, name);
    if (added.length) this.setPinned(new Set([...this.pinned, ...added.flatMap(({ members }) => members)]));
    return { added: this.groups.slice(this.groups.length - added.length), left: free.length - added.length };
  }

  // The part of all influence in the pruned graph that these nodes have.
  shareOfInfluence(members) {
    const { graph, scores: { visits } } = this;
    const influence = (node) => visits[node] - graph.outputWeights[node];
    const total = visits.reduce((sum, _, node) => sum + influence(node), 0);
    return total > 0 ? members.reduce((sum, node) => sum + influence(node), 0) / total : 0;
  }

  ungroup(number) {
    const { name } = this.groups[number];
    this.groups = this.groups.filter((_, other) => other !== number);
    if (name === this.state.group) this.change({ group: '' }, true);
    this.saveGroups();
  }

  renameGroup(number, name) {
    const isChosen = number === this.group;
    this.groups = renameGroup(this.groups, number, name);
    if (isChosen) this.change({ group: this.groups[number].name }, true);
    this.saveGroups();
  }

  chooseGroup(number) {
    this.change({ clicked: '', group: this.groups[number].name });
  }

  setPlaces(places) {
    this.places = places;
    this.show();
    this.save({ places });
  }

  listGroups() {
    return this.groups.map(({ name, members }) => [name, ...members.map((node) => this.graph.ids[node])]);
  }

  saveGroups() {
    this.show();
    this.save({ supernodes: this.listGroups() });
  }

  // Labels that were edited, by layer and number, stand in place of those that the graph had.
  relabel(edited) {
    const { graph } = this;
    this.edited = edited;
    for (let node = 0; node < graph.size; node++) graph.labels[node] = edited[featureKey(graph, node)] ?? graph.givenLabels[node];
  }

  setLabel(key, label) {
    this.relabel({ ...this.edited, [key]: label });
    this.show();
    this.save({ labels: { [key]: label } });
  }

  // Saves changes beside the graph. The answer has what others have saved meanwhile.
  async save(changes) {
    if (!this.server) return;
    const { graph } = this;
    try {
      const { labels } = await this.server.saveView(graph.name, changes);
      if (graph === this.graph) this.relabel({ ...this.edited, ...labels });
      this.report(null);
    } catch (error) {
      this.report(new Error(`Not saved: ${error.message}`));
    }
  }

  // An error; without one, how much of a large graph is shown.
  report(error) {
    const shown = this.graph?.about.shown;
    this.notice?.show(error ? error.message : shown ? `This page shows ${shown}.` : '');
  }
}

// Two graphs side by side: nodes that both have, and those that one of them lacks.

import { DifferenceWindow, mergeGraphs } from './difference.js';
import { LongList, make } from './dom.js';
import { nodeKey, readGraph } from './graph.js';
import { keepAll, prune } from './pruning.js';
import { clean, countOf, formatShare, fullName } from './text.js';

export class ComparePart {
  constructor(app) {
    this.app = app;
    this.name = 'Compare';
    this.wanted = '';
    this.rows = [];
    this.picker = make('select', { 'aria-label': 'The other graph', onchange: () => this.load() });
    this.window = new DifferenceWindow();
    this.picture = make('button', { type: 'button', hidden: true, onclick: () => this.draw() }, 'Picture');
    this.summary = make('p', { class: 'facts', role: 'status' });
    this.list = new LongList('Nodes of both graphs', 24, (number) => this.makeRow(number));
    this.element = make('div', { class: 'part' }, make('div', { class: 'line' }, make('span', {}, 'with'), this.picker, this.picture), this.summary, this.list.element);
  }

  show() {
    const { app } = this;
    if (!app.server) { this.summary.textContent = 'Other graphs are not part of this file.'; return; }
    const names = app.header.names.filter((name) => name !== app.graph.name);
    if (names.join('\n') !== this.listed) {
      this.listed = names.join('\n');
      this.picker.replaceChildren(make('option', { value: '' }, 'choose a graph'), ...names.map((name) => make('option', { value: name }, clean(name, 40))));
    }
    this.picker.value = app.state.other;
    if (app.state.other !== this.wanted) this.load();
    else this.compare();
  }

  async load() {
    const { app } = this, name = this.picker.value;
    this.other = null;
    this.wanted = name;
    if (name !== app.state.other) app.change({ other: name });
    try {
      const other = name ? readGraph(await app.server.readGraph(name)) : null;
      if (this.wanted === name) this.other = other; // no other was chosen meanwhile
    } catch (error) {
      app.report(error);
    }
    this.compare();
  }

  // By kind, layer, position and number; the other graph is pruned by the same thresholds.
  compare() {
    const { app, other } = this, { graph, kept } = app;
    this.rows = [];
    this.picture.hidden = !other;
    this.summary.textContent = '';
    if (other) {
      const keptThere = this.keepThere();
      const list = (one, mask) => new Map([...one.kind.keys()].filter((node) => mask[node] && one.kind[node] !== 'error').map((node) => [nodeKey(one, node), node]));
      const here = list(graph, kept.nodes), there = list(other, keptThere.nodes);
      const both = [...here.keys()].filter((key) => there.has(key));
      const change = (key) => Math.abs(graph.influence[here.get(key)] - other.influence[there.get(key)]);
      this.rows = [
        ...[...here.keys()].filter((key) => !there.has(key)).map((key) => ({ sign: 'only here', graph, node: here.get(key) })).sort(byInfluence),
        ...[...there.keys()].filter((key) => !here.has(key)).map((key) => ({ sign: 'only there', graph: other, node: there.get(key) })).sort(byInfluence),
        ...both.sort((a, b) => change(b) - change(a)).map((key) => ({ sign: 'both', graph, node: here.get(key), there: there.get(key) })),
      ];
      this.summary.textContent = `${countOf(both.length, 'node')} in both, ${here.size - both.length} only here, ${there.size - both.length} only there (without errors; same layer, position and number).`;
    }
    this.list.show(this.rows.length);
  }

  keepThere() {
    const { nodes, edges } = this.app.thresholds;
    return this.other.pruned || (nodes === 1 && edges === 1) ? keepAll(this.other) : prune(this.other, nodes, edges);
  }

  draw() {
    const { graph, kept } = this.app;
    this.window.open(mergeGraphs(graph, kept, this.other, this.keepThere()), [graph.name, this.other.name]);
  }

  makeRow(number) {
    const { app, other } = this, { sign, graph, node, there } = this.rows[number], isHere = sign !== 'only there';
    const influence = `${formatShare(graph.influence[node])}${sign === 'both' ? ` → ${formatShare(other.influence[there])}` : ''}`;
    return make('button', {
      type: 'button', class: 'row', title: fullName(graph, node),
      onclick: () => isHere && app.click(node), onpointerenter: () => isHere && app.hover(node), onpointerleave: () => app.hover(-1),
    }, make('span', { class: `side ${isHere ? '' : 'there'}` }, sign), make('span', { class: 'what' }, fullName(graph, node)), make('span', { class: 'weight' }, influence));
  }
}

function byInfluence(a, b) {
  return b.graph.influence[b.node] - a.graph.influence[a.node];
}

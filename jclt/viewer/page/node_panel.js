// The clicked node: what it is, its label, and its inputs and outputs sorted by weight.

import { LongList, make } from './dom.js';
import { featureKey, isInner, listInputs, listOutputs, shareOf } from './graph.js';
import { clean, countOf, formatNumber, formatShare, fullName, shortName } from './text.js';

export class NodePanel {
  constructor(app) {
    this.app = app;
    this.title = make('h2', { class: 'name' });
    this.facts = make('p', { class: 'facts' });
    this.label = make('input', { type: 'text', maxLength: 200, placeholder: 'label', 'aria-label': 'Label of the feature', autocomplete: 'off' });
    this.label.addEventListener('keydown', (event) => {
      if (event.key === 'Enter') this.label.blur();
      if (event.key === 'Escape') { this.label.value = this.was; this.label.blur(); }
    });
    this.label.addEventListener('blur', () => this.rename());
    this.pin = make('button', { type: 'button', onclick: () => app.togglePin([app.clicked]) }, 'Pin');
    this.trail = make('button', { type: 'button', onclick: () => app.pinTrail(app.clicked), title: 'Pin the strongest path from a token through this node to an output' }, 'Pin trail');
    this.inputs = this.makeList('Inputs');
    this.outputs = this.makeList('Outputs');
    this.body = make('div', { class: 'node-body' },
      make('div', { class: 'line' }, this.label, this.pin, this.trail),
      make('div', { class: 'two' }, this.inputs.box, this.outputs.box));
    this.hint = make('p', { class: 'hint' }, 'Click a node to see its inputs and outputs. Ctrl-click pins a node below. '
      + 'Shift freezes the pointer’s node. With the keyboard: Tab to the graph, then arrows, Enter, P.');
    this.members = make('div', { class: 'members', role: 'group', 'aria-label': 'Members' });
    this.element = make('section', { class: 'panel node', 'aria-label': 'Node' }, this.title, this.facts, this.hint, this.members, this.body);
  }

  makeList(name) {
    const heading = make('h3', {}, name);
    const part = { name, heading, edges: [], ends: null };
    part.list = new LongList(name, 24, (row) => this.makeRow(part, row));
    part.box = make('div', { class: 'column' }, heading, part.list.element);
    return part;
  }

  show() {
    const { graph, clicked, shown, pinned } = this.app;
    const isOn = clicked >= 0;
    this.hint.hidden = isOn;
    this.members.replaceChildren();
    this.body.hidden = this.facts.hidden = !isOn;
    this.title.textContent = this.title.title = isOn ? fullName(graph, clicked) : 'No node is clicked';
    if (this.app.group >= 0) return this.showGroup(this.app.groups[this.app.group]);
    if (!isOn) return;
    this.facts.textContent = this.describe(clicked);
    const key = featureKey(graph, clicked);
    this.label.hidden = !key;
    if (document.activeElement !== this.label) this.label.value = this.was = graph.labels[clicked];
    this.pin.textContent = pinned.has(clicked) ? 'Unpin' : 'Pin';
    this.fill(this.inputs, listInputs(graph, clicked, shown.edges), graph.sources);
    this.fill(this.outputs, listOutputs(graph, clicked, shown.edges), graph.targets);
  }

  showGroup({ name, members }) {
    const { graph } = this.app;
    this.title.textContent = `Supernode ${clean(name)}`;
    this.title.title = clean(name, 400);
    this.hint.hidden = this.body.hidden = true;
    this.facts.hidden = false;
    this.facts.textContent = `${countOf(members.length, 'node')}, ${formatShare(this.app.shareOfInfluence(members))} of the influence. Double-click or F2 renames it.`;
    this.members.replaceChildren(...members.map((node) => make('button', {
      type: 'button', class: 'row', title: fullName(graph, node), onclick: () => this.app.click(node),
      onpointerenter: () => this.app.hover(node), onpointerleave: () => this.app.hover(-1),
      onfocus: () => this.app.hover(node), onblur: () => this.app.hover(-1),
    }, make('span', { class: 'weight' }, formatShare(graph.influence[node])), make('span', { class: 'what' }, fullName(graph, node)))));
  }

  describe(node) {
    const { graph, scores } = this.app;
    const parts = [`influence ${formatShare(graph.influence[node])}`];
    if (graph.kind[node] === 'feature') parts.push(`activation ${formatNumber(graph.activation[node])}`);
    if (graph.kind[node] === 'feature' || graph.kind[node] === 'output') parts.push(`value ${formatNumber(graph.value[node])}`);
    if (scores.visits) parts.push(`in the pruned graph ${formatShare(scores.visits[node] - graph.outputWeights[node])}`);
    return parts.join(' · ');
  }

  fill(part, edges, ends) {
    Object.assign(part, { edges, ends });
    part.heading.textContent = `${part.name} (${edges.length.toLocaleString('en')})`;
    part.largest = edges.length ? Math.abs(this.app.graph.weights[edges[0]]) : 1;
    part.list.show(edges.length);
  }

  makeRow(part, number) {
    const { app } = this, { graph } = app;
    const edge = part.edges[number], node = part.ends[edge], weight = graph.weights[edge];
    const share = shareOf(graph, edge);
    const bar = make('span', { class: `bar ${weight > 0 ? 'raises' : 'lowers'}`, 'aria-hidden': 'true' });
    bar.style.width = `${100 * Math.abs(weight) / part.largest}%`;
    return make('button', {
      type: 'button', class: `row${app.pinned.has(node) ? ' pinned' : ''}`,
      title: `${fullName(graph, node)}: ${formatNumber(weight)}, ${formatShare(share)} of what reaches its target`,
      'aria-label': `${fullName(graph, node)}, ${formatNumber(weight)}, ${countOf(Math.round(100 * share), 'percent')}`,
      onclick: (event) => (event.ctrlKey || event.metaKey ? app.togglePin([node]) : app.click(node)),
      onpointerenter: () => app.hover(node), onpointerleave: () => app.hover(-1),
      onfocus: () => app.hover(node), onblur: () => app.hover(-1),
    }, bar, make('span', { class: 'weight' }, formatNumber(weight)), make('span', { class: 'what' }, placeOf(graph, node)));
  }

  rename() {
    const { graph, clicked } = this.app, key = clicked >= 0 ? featureKey(graph, clicked) : '';
    if (!key || this.label.value === this.was) return;
    this.was = this.label.value;
    this.app.setLabel(key, this.label.value);
  }
}

function placeOf(graph, node) {
  const place = isInner(graph.kind[node]) ? ` @${graph.position[node]}` : '';
  return shortName(graph, node, 40) + place;
}

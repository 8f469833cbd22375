// An intervention on the clicked node or the chosen supernode: the model is run again, beside the graph's prediction.

import { make } from './dom.js';
import { featureKey } from './graph.js';
import { clean, fullName, formatNumber, quote } from './text.js';

export class IntervenePart {
  constructor(app) {
    this.app = app;
    this.name = 'Intervene';
    this.what = make('p', { class: 'facts' });
    this.factor = make('input', { type: 'number', value: 0, step: 0.5, 'aria-label': 'Factor' });
    this.slider = make('input', { type: 'range', min: -2, max: 3, step: 0.25, value: 0, 'aria-label': 'Factor', oninput: () => { this.factor.value = this.slider.value; } });
    this.factor.addEventListener('input', () => { this.slider.value = this.factor.value; });
    this.scale = make('button', { type: 'button', onclick: () => this.run({ factor: Number(this.factor.value) }) }, 'Scale');
    this.other = make('textarea', { rows: 2, 'aria-label': 'Another prompt', placeholder: 'another prompt', autocomplete: 'off' });
    this.swap = make('button', { type: 'button', onclick: () => this.run({ prompt: this.other.value }), title: 'Its features become those that the other prompt has at the same layers and places' }, 'Set to what this prompt has');
    this.result = make('div', { class: 'result', 'aria-live': 'polite' });
    this.form = make('div', {}, make('div', { class: 'line' }, make('span', {}, '×'), this.slider, this.factor, this.scale), this.other, make('div', { class: 'line' }, this.swap));
    this.element = make('div', { class: 'part', tabIndex: 0 }, this.what, this.form, this.result);
  }

  show() {
    const { app } = this, { graph, group, groups, chosen: members } = app;
    const isPossible = members.length > 0 && members.every((node) => ['feature', 'error'].includes(graph.kind[node]));
    this.form.hidden = !app.model || !isPossible;
    if (!app.model) this.what.textContent = app.server?.hint ?? 'There is no model in this file.';
    else if (!isPossible) this.what.textContent = 'Click a feature or an error, or the name of a supernode, to change it in the model.';
    else this.what.textContent = `Change ${group >= 0 ? `${clean(groups[group].name)} (${members.length} nodes)` : fullName(graph, members[0])} in the model`;
    if (!this.other.value && app.graph) this.other.value = graph.tokens.filter((token) => !/^<[^<>]*>$/.test(token)).join('');
    if (this.graph !== graph) this.result.replaceChildren();
    this.graph = graph;
  }

  suggestPrompt(text) {
    this.other.value = text;
    this.swap.focus();
  }

  async run(change) {
    const { app } = this, { graph } = app;
    this.result.replaceChildren(make('p', { class: 'hint' }, 'The model runs …'));
    for (const button of [this.scale, this.swap]) button.disabled = true;
    try {
      this.draw(await app.server.intervene(graph.name, { nodes: app.chosen.map((node) => graph.ids[node]), ...change }));
    } catch (error) {
      this.result.replaceChildren(make('p', { class: 'notice' }, error.message));
    } finally {
      for (const button of [this.scale, this.swap]) button.disabled = false;
    }
  }

  // By its label, if the graph has the feature somewhere.
  nameFeature({ layer, feature, position }) {
    const { graph } = this.app, key = `${layer}/${feature}`;
    const label = graph.labels.find((text, node) => text && featureKey(graph, node) === key);
    return `${label ? `${clean(label, 60)} ` : ''}${key} @${position}`;
  }

  draw({ outputs, features, setting }) {
    const best = (name) => outputs.reduce((a, b) => (b[name] > a[name] ? b : a));
    const before = best('probability_before'), after = best('probability_after');
    const token = ({ text }) => make('span', { class: 'token' }, quote(text));
    const percent = (x) => `${(100 * x).toFixed(1)}%`;
    const cell = (text, properties = {}) => make('td', properties, text);
    const bar = (share, kind) => {
      const inner = make('span', { class: `meter ${kind}`, 'aria-hidden': 'true' });
      inner.style.width = `${28 * share}px`;
      return inner;
    };
    const rows = outputs.map((o) => make('tr', { class: o === after ? 'best' : '' }, make('th', { scope: 'row' }, quote(o.text)),
      make('td', {}, bar(o.probability_before, 'was'), percent(o.probability_before)), make('td', {}, bar(o.probability_after, 'is'), percent(o.probability_after)),
      cell(formatNumber(o.after - o.before)), cell(o.predicted === null ? '–' : formatNumber(o.predicted - o.before))));
    const changed = features.map((f) => make('tr', {}, make('th', { scope: 'row', title: this.nameFeature(f) }, this.nameFeature(f)), cell(formatNumber(f.before)), cell(formatNumber(f.after))));
    const head = (...names) => make('thead', {}, make('tr', {}, ...names.map((name) => make('th', { scope: 'col' }, name))));
    this.result.replaceChildren(
      make('p', { class: 'verdict' }, ...(before.token === after.token ? ['The answer stays ', token(after)] : ['The answer changes from ', token(before), ' to ', token(after)]), '.'),
      make('table', {}, make('caption', {}, 'next token; its logit’s change, measured and predicted'), head('token', 'before', 'after', 'logit', 'predicted'), make('tbody', {}, ...rows)),
      make('table', {}, make('caption', {}, 'features that change most'), head('feature', 'before', 'after'), make('tbody', {}, ...changed)),
      make('p', { class: 'hint' }, setting));
  }
}

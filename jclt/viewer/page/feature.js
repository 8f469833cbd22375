// What the clicked feature is: where it is active, and which tokens it raises and lowers.

import { make } from './dom.js';
import { featureKey } from './graph.js';
import { clean, formatNumber, formatShare, quote } from './text.js';

const EXAMPLES = 'There are no examples of this feature here. `jclt features CODER --model MODEL --data TEXT --out DIR` finds them, and `jclt serve --features DIR` shows them.';

export class FeaturePart {
  constructor(app) {
    this.app = app;
    this.name = 'Feature';
    this.body = make('div', { class: 'feature-body' });
    this.element = make('div', { class: 'part', tabIndex: 0 }, this.body);
  }

  async show() {
    const { app } = this, { graph, clicked } = app;
    const isFeature = clicked >= 0 && graph.kind[clicked] === 'feature';
    const key = isFeature ? `${graph.name} ${graph.layer[clicked]}/${graph.index[clicked]}` : '';
    if (key === this.key) return;
    this.key = key;
    if (!isFeature) return this.say('Click a feature.');
    const here = this.drawPrompt(clicked);
    if (!app.server) return this.say('Other examples are not part of this file.', ...here);
    this.say('…', ...here);
    try {
      const feature = await app.server.readFeature(graph.name, graph.layer[clicked], graph.index[clicked]);
      if (key === this.key) this.draw(feature ?? {}, here);
    } catch (error) {
      if (key === this.key) this.say(error.message, ...here);
    }
  }

  say(text, ...parts) {
    this.body.replaceChildren(make('p', { class: 'hint' }, text), ...parts);
  }

  // The graph's prompt, with the activations of the feature's nodes.
  drawPrompt(node) {
    const { graph } = this.app, key = featureKey(graph, node), values = graph.tokens.map(() => 0);
    for (let other = 0; other < graph.size; other++) if (featureKey(graph, other) === key) values[graph.position[other]] = graph.activation[other];
    return [make('h3', {}, 'In this prompt'), this.drawExample({ tokens: graph.tokens, tokens_acts_list: values })];
  }

  draw(feature, here) {
    const parts = [];
    if (feature.checked === false) parts.push(make('p', { class: 'hint' }, 'Whether this is said of the graph’s coder is not known.'));
    if (Number.isFinite(feature.activation_frequency)) parts.push(make('p', { class: 'facts' }, `active on ${formatShare(feature.activation_frequency)} of the tokens`));
    if (feature.top_logits?.length || feature.bottom_logits?.length) {
      parts.push(make('p', { class: 'facts' }, 'raises ', ...this.listTokens(feature.top_logits)), make('p', { class: 'facts' }, 'lowers ', ...this.listTokens(feature.bottom_logits)));
    }
    if (feature.histogram?.length) parts.push(this.drawHistogram(feature.histogram), make('p', { class: 'facts' }, `how often it has which activation, from 0 to ${formatNumber(feature.act_max)}`));
    if (feature.jclt?.decoder_norms?.length) parts.push(this.drawNorms(feature.jclt.decoder_norms, feature.jclt.layer));
    if (!feature.examples_quantiles) parts.push(make('p', { class: 'hint' }, EXAMPLES));
    parts.push(...here);
    for (const { quantile_name: title, examples } of feature.examples_quantiles ?? []) {
      parts.push(make('h3', {}, clean(title)), ...examples.slice(0, 20).map((example) => this.drawExample(example, feature.act_max)));
    }
    this.body.replaceChildren(...parts);
  }

  listTokens(tokens) {
    return (tokens ?? []).slice(0, 10).flatMap((token) => [make('code', {}, quote(Array.isArray(token) ? token[0] : token)), ' ']);
  }

  drawHistogram(counts) {
    const most = Math.max(...counts, 1);
    const bars = counts.map((count) => {
      const bar = make('span', {});
      bar.style.height = `${100 * count / most}%`;
      return bar;
    });
    return make('div', { class: 'histogram', role: 'img', 'aria-label': `Histogram of activations: ${counts.length} bins, the fullest has ${most}` }, ...bars);
  }

  // How much it writes to each layer from its own on.
  drawNorms(norms, first) {
    const most = Math.max(...norms, 1e-30);
    const rows = norms.map((norm, i) => {
      const bar = make('span', { class: 'norm', 'aria-hidden': 'true' });
      bar.style.width = `${100 * norm / most}%`;
      return make('tr', {}, make('th', { scope: 'row' }, `layer ${first + i}`), make('td', {}, bar), make('td', {}, formatNumber(norm)));
    });
    return make('table', { class: 'norms' }, make('caption', {}, 'what it writes: decoder norm by target layer'), make('tbody', {}, ...rows));
  }

  drawExample({ tokens, tokens_acts_list: values }, most) {
    const largest = most || Math.max(...values) || 1;
    return make('p', { class: 'example' }, ...tokens.map((token, i) => {
      const word = make('span', { title: formatNumber(values[i]) }, clean(token, 40));
      if (values[i] > 0) word.style.backgroundColor = `color-mix(in srgb, var(--active) ${Math.round(60 * Math.min(values[i] / largest, 1))}%, transparent)`;
      return word;
    }));
  }
}

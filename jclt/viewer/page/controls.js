// Thresholds, filters, scores, and what is hidden and why.

import { make } from './dom.js';
import { countOf, formatShare } from './text.js';

const KINDS = [['feature', 'features'], ['error', 'errors'], ['head', 'heads'], ['stream', 'residual streams'], ['token', 'tokens'], ['position', 'position embeddings'], ['output', 'outputs'], ['loose', 'nodes without an edge']];

export class Controls {
  constructor(app) {
    this.app = app;
    this.nodes = this.makeSlider('nodes', 'Node threshold', 'Keep the strongest nodes that together have this share of the influence');
    this.edges = this.makeSlider('edges', 'Edge threshold', 'Keep the strongest edges that together have this share of the influence');
    this.kinds = KINDS.map(([kind, text]) => {
      const box = make('input', { type: 'checkbox', onchange: () => this.toggleKind(kind, box.checked) });
      return { kind, box, element: make('label', { class: 'check' }, box, text) };
    });
    this.sign = make('select', { 'aria-label': 'Sign of edges', onchange: () => app.change({ sign: this.sign.value }) },
      ...[['both', 'edges of both signs'], ['positive', 'positive edges'], ['negative', 'negative edges']].map(([value, text]) => make('option', { value }, text)));
    this.layers = this.makeText('layers', 'Layers', 'such as 0-3, 7');
    this.tokens = this.makeText('tokens', 'Positions', 'such as 4, 12-');
    this.text = this.makeText('text', 'Text', 'a part of a name');
    this.density = this.makeText('density', 'Density, %', 'such as 0.1-5', 'Features that are active on this share of the tokens; those of which it is unknown stay');
    this.faint = make('input', { type: 'checkbox', onchange: () => app.change({ faint: this.faint.checked }) });
    this.count = make('summary', {}, 'Filters');
    this.status = make('p', { class: 'status', role: 'status' });
    this.leftOut = make('p', { class: 'facts', hidden: true });
    app.showLeftOut = (count) => {
      this.leftOut.hidden = !count;
      this.leftOut.textContent = `Of the faint edges the ${count.toLocaleString('en')} lightest are not drawn.`;
    };
    this.element = make('div', { class: 'controls' },
      this.nodes.element, this.edges.element,
      make('details', { class: 'filters' }, this.count, make('div', { class: 'popup' },
        make('fieldset', {}, make('legend', {}, 'Show'), ...this.kinds.map(({ element }) => element), make('label', { class: 'check' }, this.faint, 'all edges, faint')),
        make('div', { class: 'fields' }, this.sign, this.layers.element, this.tokens.element, this.text.element, this.density.element,
          make('button', { type: 'button', onclick: () => app.clearFilters() }, 'Clear filters')))),
      this.status, this.leftOut);
  }

  makeSlider(name, text, title) {
    const input = make('input', { type: 'range', min: 0, max: 1, step: 0.005, title, oninput: () => this.app.change({ [name]: Number(input.value) }, true) });
    const value = make('b', {});
    return { input, value, element: make('label', { class: 'slider' }, make('span', {}, text, ' ', value), input) };
  }

  makeText(name, text, placeholder, title = '') {
    const input = make('input', { type: 'search', placeholder, title, autocomplete: 'off', oninput: () => this.app.change({ [name]: input.value }, true) });
    return { input, element: make('label', { class: 'field' }, make('span', {}, text), input) };
  }

  toggleKind(kind, isOn) {
    const hidden = this.app.state.hidden.filter((other) => other !== kind);
    this.app.change({ hidden: isOn ? hidden : [...hidden, kind] });
  }

  show() {
    const { app } = this, { state, graph, shown, scores, pinnedScores } = app;
    const { nodes, edges } = app.thresholds;
    for (const [slider, share] of [[this.nodes, nodes], [this.edges, edges]]) {
      slider.input.value = share;
      slider.value.textContent = share === 1 ? 'all' : formatShare(share);
      slider.input.setAttribute('aria-valuetext', slider.value.textContent);
    }
    for (const { kind, box } of this.kinds) box.checked = !state.hidden.includes(kind);
    this.sign.value = state.sign;
    this.faint.checked = state.faint;
    this.density.element.hidden = !graph.density;
    for (const name of ['layers', 'tokens', 'text', 'density']) if (document.activeElement !== this[name].input) this[name].input.value = state[name];
    const isFiltered = state.hidden.some((kind) => kind !== 'loose') || state.sign !== 'both' || state.layers || state.tokens || state.text || (graph.density && state.density);
    this.count.textContent = isFiltered ? 'Filters (on)' : 'Filters';
    this.status.textContent = [
      `Shown: ${sum(shown.nodes).toLocaleString('en')} of ${countOf(graph.size, 'node')}, ${sum(shown.edges).toLocaleString('en')} of ${countOf(graph.edges, 'edge')}.`,
      describeHidden(shown.hidden),
      `Replacement ${scores.replacement.toFixed(2)}, completeness ${scores.completeness.toFixed(2)}`
        + (pinnedScores ? `; of the pinned nodes ${pinnedScores.replacement.toFixed(2)}, ${pinnedScores.completeness.toFixed(2)}.` : '.'),
    ].filter((part) => part).join(' ');
  }
}

function describeHidden({ thresholds, filters, loose }) {
  const parts = [[thresholds, 'by thresholds'], [filters, 'by filters'], [loose, 'without an edge']].filter(([count]) => count);
  return parts.length ? `Hidden: ${parts.map(([count, why]) => `${count.toLocaleString('en')} ${why}`).join(', ')}.` : '';
}

function sum(mask) {
  let total = 0;
  for (const on of mask) total += on;
  return total;
}

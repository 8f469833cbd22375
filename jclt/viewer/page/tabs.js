// The last panel: the feature, an intervention, the comparison of two graphs, and how the graph was made.

import { make } from './dom.js';
import { ComparePart } from './compare.js';
import { FeaturePart } from './feature.js';
import { IntervenePart } from './intervene.js';
import { clean, formatNumber } from './text.js';

export class Tabs {
  constructor(app) {
    this.app = app;
    this.parts = [new FeaturePart(app), new IntervenePart(app), new ComparePart(app), new AboutPart(app)];
    this.buttons = this.parts.map((part, number) => make('button', {
      type: 'button', role: 'tab', id: `tab-${number}`, 'aria-controls': `part-${number}`, onclick: () => this.choose(number), onkeydown: (event) => this.walk(event, number),
    }, part.name));
    this.parts.forEach((part, number) => {
      part.element.id = `part-${number}`;
      part.element.setAttribute('role', 'tabpanel');
      part.element.setAttribute('aria-labelledby', `tab-${number}`);
    });
    this.element = make('section', { class: 'panel tabs', 'aria-label': 'Details' },
      make('div', { role: 'tablist', 'aria-label': 'Details' }, ...this.buttons), ...this.parts.map((part) => part.element));
    this.mark();
  }

  // The number of the open one; the address has its name.
  get open() {
    const number = this.parts.findIndex((part) => part.name === this.app.state.tab);
    return number < 0 ? 1 : number;
  }

  choose(number) {
    const tab = this.parts[number].name;
    if (this.app.graph) return this.app.change({ tab }, true);
    this.app.state = { ...this.app.state, tab };
    this.mark();
  }

  chooseByName(name) {
    const number = this.parts.findIndex((part) => part.name === name);
    this.choose(number);
    return this.parts[number];
  }

  walk(event, number) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (number + step + this.parts.length) % this.parts.length;
    this.choose(next);
    this.buttons[next].focus();
  }

  mark() {
    this.buttons.forEach((button, number) => {
      button.setAttribute('aria-selected', String(number === this.open));
      button.tabIndex = number === this.open ? 0 : -1;
      this.parts[number].element.hidden = number !== this.open;
    });
  }

  show() {
    this.mark();
    this.parts[this.open].show();
  }
}

class AboutPart {
  constructor(app) {
    this.app = app;
    this.name = 'About';
    this.list = make('dl', { class: 'about' });
    this.element = make('div', { class: 'part', tabIndex: 0 }, this.list);
  }

  show() {
    const { graph } = this.app, rows = [];
    const add = (name, value) => {
      if (value && typeof value === 'object') Object.entries(value).forEach(([key, inner]) => add(`${name}: ${key}`, inner));
      else if (value !== null && value !== '') rows.push(make('dt', {}, clean(name).replaceAll('_', ' ')), make('dd', {}, clean(typeof value === 'number' ? formatNumber(value) : value, 400)));
    };
    add('graph', graph.name);
    Object.entries(graph.about).forEach(([name, value]) => add(name, value));
    add('replacement before pruning here', graph.scores.replacement);
    add('completeness before pruning here', graph.scores.completeness);
    this.list.replaceChildren(...rows);
  }
}

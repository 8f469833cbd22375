// What the page in a notebook's cell asks of Python, through a port that the cell's script gives it. The methods are those
// of `Server`; what the user makes on the page is sent as soon as it changes.

import { applyChoices, readChoices } from './choices.js';
import { download } from './dom.js';

export class Kernel {
  hint = 'There is no model here: `graph.show(model=model, coder=coder)` gives one.';

  static connect() {
    return new Promise((done) => addEventListener('message', ({ data, ports, source }) => {
      if (source === parent && data?.choices && ports.length) done(new Kernel(ports[0], data.choices));
    }));
  }

  constructor(port, choices) {
    Object.assign(this, { port, choices, asked: 0, waiting: new Map() });
    port.onmessage = ({ data }) => this.receive(data);
  }

  receive({ number, choices, answer, error }) {
    if (choices) {
      this.choices = choices;
      return this.app && this.apply();
    }
    const { done, fail } = this.waiting.get(number);
    this.waiting.delete(number);
    error === undefined ? done(answer) : fail(new Error(error));
  }

  ask(name, ...values) {
    const number = ++this.asked;
    this.port.postMessage({ number, name, values });
    return new Promise((done, fail) => this.waiting.set(number, { done, fail }));
  }

  // From now on the page shows what Python chooses, and Python has what the page shows.
  follow(app) {
    this.app = app;
    app.panels.push({ show: () => this.tell() });
    this.apply();
  }

  apply() {
    this.known = listTexts(this.choices);
    applyChoices(this.app, this.choices);
    this.tell();
  }

  // Only what Python does not know yet: the rest may be older than what it has set meanwhile.
  tell() {
    const choices = readChoices(this.app), texts = listTexts(choices);
    const news = Object.keys(choices).filter((name) => texts[name] !== this.known[name]);
    this.known = texts;
    if (news.length) this.port.postMessage({ choices: Object.fromEntries(news.map((name) => [name, choices[name]])) });
  }

  async saveView() { return {}; } // told already

  listGraphs() { return this.ask('list'); }

  readGraph(name) { return this.ask('graph', name); }

  intervene(name, request) { return this.ask('intervene', name, request); }

  attribute(prompt) { return this.ask('attribute', { prompt }); }

  readFeature(name, layer, index) { return this.ask('feature', name, layer, index); }

  async saveJson(name, { nodes, edges }) { download(`${name}.json`, await this.ask('json', name, nodes, edges), 'application/json'); }

  async savePage(name) { download(`${name}.html`, await this.ask('page', name), 'text/html'); }
}

function listTexts(choices) {
  return Object.fromEntries(Object.entries(choices).map(([name, value]) => [name, JSON.stringify(value)]));
}

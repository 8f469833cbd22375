// The head of the page: which graph, a new one from a prompt, files.

import { download, make } from './dom.js';
import { readColours } from './paint.js';
import { SvgContext } from './svg_context.js';
import { clean } from './text.js';

export class Header {
  constructor(app) {
    this.app = app;
    this.names = [];
    this.prompt = make('h1', { class: 'prompt' });
    this.picker = make('input', { type: 'search', 'aria-label': 'Graph', autocomplete: 'off', onchange: () => this.pick() });
    this.picker.addEventListener('focus', () => { this.picker.value = ''; }); // browsers offer what begins so: all
    this.picker.addEventListener('blur', () => this.showName());
    this.picker.setAttribute('list', 'graph-names');
    this.options = make('datalist', { id: 'graph-names' });
    this.file = make('input', { type: 'file', accept: '.json,.gz,.npz,.pt', hidden: true, onchange: () => this.file.files[0] && this.upload(this.file.files[0]) });
    this.asked = make('input', { type: 'text', 'aria-label': 'Prompt of a new graph', placeholder: 'a prompt for a new graph', autocomplete: 'off' });
    this.ask = make('form', { class: 'ask', onsubmit: (event) => { event.preventDefault(); this.attribute(); } }, this.asked, make('button', { type: 'submit' }, 'Trace'));
    const menu = make('details', { class: 'menu' }, make('summary', {}, 'Files'), make('div', { class: 'popup right' }, ...this.listActions()));
    menu.addEventListener('click', (event) => { if (event.target.tagName === 'BUTTON') menu.open = false; });
    const tools = app.server ? [this.picker, this.options, this.file, this.ask, menu] : [menu];
    this.element = make('header', {}, this.prompt, make('div', { class: 'tools' }, ...tools));
  }

  listActions() {
    const { app } = this, action = (text, run) => make('button', { type: 'button', onclick: run }, text);
    const own = [
      action('Picture as PNG', () => this.savePng()),
      action('Picture as SVG', () => this.saveSvg()),
    ];
    if (!app.server) return own;
    this.look = action('First look', () => app.tour.go(0));
    return [
      ...(app.server.upload ? [action('Open a file …', () => this.file.click())] : []), ...own,
      action('This page as one file', () => this.attempt(() => app.server.savePage(app.graph.name))),
      action('JSON for graph viewers', () => this.attempt(() => app.server.saveJson(app.graph.name, app.thresholds))),
      this.look,
    ];
  }

  show() {
    const { graph } = this.app;
    this.prompt.textContent = clean(graph.tokens.join(''), 160);
    this.prompt.title = clean(graph.tokens.join(''), 2000);
    if (document.activeElement !== this.picker) this.showName();
  }

  showName() {
    this.picker.value = this.picker.title = this.app.graph?.name ?? '';
    this.picker.placeholder = this.picker.value || 'find a graph';
  }

  async list() {
    const { graphs, model, tour } = await this.app.server.listGraphs();
    this.graphs = graphs;
    this.names = graphs.map(({ name }) => name);
    this.options.replaceChildren(...graphs.map(({ name, prompt }) => make('option', { value: name, label: clean(prompt ?? '', 60) })));
    this.ask.hidden = !model;
    this.picker.hidden = graphs.length < 2 && !this.app.server.upload;
    Object.assign(this.app, { model, hasTour: tour });
    this.look.hidden = !tour;
  }

  async pick() {
    const wanted = this.picker.value.trim().toLowerCase();
    if (!wanted) return;
    const found = this.graphs.filter((graph) => `${graph.name} ${graph.prompt ?? ''}`.toLowerCase().includes(wanted));
    const { name } = found.find((graph) => graph.name.toLowerCase() === wanted) ?? found[0] ?? {};
    if (!name) return this.app.report(new Error(`No graph has ${clean(this.picker.value)} in its name or prompt`));
    await this.attempt(() => this.app.open(name));
  }

  upload(file) {
    return this.attempt(async () => this.openNew(await this.app.server.upload(file.name, file)));
  }

  attribute() {
    if (!this.asked.value) return;
    return this.attempt(async () => this.openNew(await this.app.server.attribute(this.asked.value)));
  }

  async openNew(content) {
    await this.list();
    await this.app.open(content.name, content);
  }

  async attempt(work) {
    this.element.setAttribute('aria-busy', 'true');
    try {
      this.app.report(null);
      await work();
    } catch (error) {
      this.app.report(error);
    } finally {
      this.element.removeAttribute('aria-busy');
    }
  }

  savePng() {
    const { view } = this.app, canvas = make('canvas', { width: view.base.width, height: view.base.height });
    const context = canvas.getContext('2d');
    context.fillStyle = readColours().ground;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(view.base, 0, 0);
    context.drawImage(view.top, 0, 0);
    canvas.toBlob((blob) => download(`${this.app.graph.name || 'graph'}.png`, blob));
  }

  saveSvg() {
    const { graph, view } = this.app;
    const context = new SvgContext(view.layout.width, view.layout.height, view.colours.ground);
    view.paintBase(context);
    download(`${graph.name || 'graph'}.svg`, context.finish(), 'image/svg+xml');
  }
}

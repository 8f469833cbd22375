// Puts the page together, from a server, or from a graph that lies in the file; in a notebook's cell Python answers beside.

import { App } from './app.js';
import { Controls } from './controls.js';
import { make } from './dom.js';
import { GraphView } from './graph_view.js';
import { Header } from './header.js';
import { Kernel } from './kernel.js';
import { NodePanel } from './node_panel.js';
import { Server } from './server.js';
import { SubgraphPanel } from './subgraph_panel.js';
import { Tabs } from './tabs.js';
import { Tour } from './tour.js';

function build(root, server) {
  const app = new App(server);
  const notice = make('div', { class: 'notice', role: 'alert', hidden: true });
  app.notice = { show(text) { notice.textContent = text; notice.hidden = !text; } };
  app.view = new GraphView(app);
  const header = new Header(app), controls = new Controls(app), node = new NodePanel(app), subgraph = new SubgraphPanel(app), tabs = new Tabs(app);
  app.panels = [header, controls, node, subgraph, tabs, { show: () => app.view.draw() }];
  Object.assign(app, { header, tabs, tour: new Tour(app) });
  root.replaceChildren(header.element, notice, app.tour.element, make('main', {},
    make('div', { class: 'left' }, make('section', { class: 'panel main-graph', 'aria-label': 'Graph' }, controls.element, app.view.element), subgraph.element),
    make('div', { class: 'right' }, node.element, tabs.element)));
  listenKeys(app);
  listenDrops(app, root);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => app.graph && app.show());
  return app;
}

// Holding G groups what is clicked meanwhile.
function listenKeys(app) {
  const isTyping = (event) => /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== 'range' && event.target.type !== 'checkbox';
  document.addEventListener('keydown', (event) => {
    if (event.key.toLowerCase() !== 'g' || event.repeat || event.ctrlKey || event.metaKey || isTyping(event) || !app.graph || app.grouping) return;
    app.heldG = true;
    app.setGrouping(true);
  });
  document.addEventListener('keyup', (event) => {
    if (event.key.toLowerCase() !== 'g' || !app.heldG) return;
    app.heldG = false;
    if (app.grouping) app.setGrouping(false);
  });
}

function listenDrops(app, root) {
  if (!app.server?.upload) return;
  root.addEventListener('dragover', (event) => event.preventDefault());
  root.addEventListener('drop', (event) => {
    event.preventDefault();
    const file = event.dataTransfer.files[0];
    if (file) app.header.upload(file);
  });
}

async function start() {
  const inside = document.getElementById('graph-data');
  const kernel = inside && 'kernel' in inside.dataset ? await Kernel.connect() : null;
  const app = build(make('div', { id: 'app' }), inside ? kernel : new Server());
  document.body.append(app.header.element.parentElement);
  globalThis.jcltPage = app;
  try {
    if (app.server) await app.header.list();
    if (inside) {
      await app.open('', JSON.parse(inside.textContent));
      return kernel?.follow(app);
    }
    const name = app.state.graph || app.header.names[0];
    if (name) await app.open(name);
    else app.report(new Error('There is no graph. Drop a file here, or type a prompt.'));
    if (app.hasTour) app.tour.begin();
  } catch (error) {
    app.report(error);
  }
}

start();

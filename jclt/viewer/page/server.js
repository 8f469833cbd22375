// What the page asks of its server. In a file of its own there is none.

import { make } from './dom.js';

export class Server {
  hint = 'There is no model here: `jclt serve --model NAME` gives one.';

  async ask(path, options = {}) {
    let answer;
    try {
      answer = await fetch(path, { cache: 'no-store', ...options });
    } catch {
      throw new Error('The server does not answer; was it stopped?');
    }
    const type = answer.headers.get('content-type') ?? '';
    const content = type.includes('json') ? await answer.json() : null;
    if (!answer.ok) throw new Error(content?.error ?? `The server answered ${answer.status}`);
    return content;
  }

  post(path, content) {
    return this.ask(path, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(content) });
  }

  listGraphs() { return this.ask('api/graphs'); }

  readGraph(name) { return this.ask(`api/graphs/${encodeURIComponent(name)}`); }

  upload(name, file) {
    return this.ask(`api/upload?name=${encodeURIComponent(name)}`, { method: 'POST', headers: { 'content-type': 'application/octet-stream' }, body: file });
  }

  saveView(name, changes) { return this.post(`api/graphs/${encodeURIComponent(name)}/view`, changes); }

  intervene(name, request) { return this.post(`api/graphs/${encodeURIComponent(name)}/intervene`, request); }

  attribute(prompt) { return this.post('api/attribute', { prompt }); }

  readFeature(name, layer, index) { return this.ask(`api/graphs/${encodeURIComponent(name)}/features/${layer}/${index}`); }

  saveJson(name, { nodes, edges }) { follow(`api/graphs/${encodeURIComponent(name)}/export.json?nodes=${nodes}&edges=${edges}`, `${name}.json`); }

  savePage(name) { follow(`api/graphs/${encodeURIComponent(name)}/page.html`, `${name}.html`); }
}

function follow(href, download) {
  make('a', { href, download }).click();
}

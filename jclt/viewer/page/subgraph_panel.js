// Pinned nodes and supernodes: grouped, renamed, dragged; the edges between them.

import { make, makeSvg } from './dom.js';
import { listGroupEdges, listItems, placeItems } from './groups.js';
import { clean, countOf, formatShare, fullName, shortName } from './text.js';

const HEIGHT = 26, LETTER = 6.6, MAKE = 'Make supernode';

export class SubgraphPanel {
  constructor(app) {
    this.app = app;
    this.svg = makeSvg('svg', { role: 'group', 'aria-label': 'Subgraph of pinned nodes', class: 'subgraph' });
    this.grouping = make('button', { type: 'button', 'aria-pressed': 'false', onclick: () => app.setGrouping(!app.grouping) }, MAKE);
    this.suggest = make('button', { type: 'button', onclick: () => this.addSuggested(), title: 'Put features that are fed alike and do alike into supernodes' }, 'Suggest supernodes');
    this.hint = make('p', { class: 'hint', role: 'status' });
    this.clear = make('button', { type: 'button', onclick: () => app.unpinAll() }, 'Unpin all');
    this.tidy = make('button', { type: 'button', onclick: () => app.setPlaces({}) }, 'Tidy up');
    this.box = make('div', { class: 'subgraph-box' }, this.svg);
    this.element = make('section', { class: 'panel pinned-nodes', 'aria-label': 'Pinned nodes' },
      make('div', { class: 'line head' }, make('h2', {}, 'Pinned nodes'), this.grouping, this.suggest, this.tidy, this.clear), this.hint, this.box);
    new ResizeObserver(() => this.show()).observe(this.box);
  }

  show() {
    const { app } = this, { graph, shown, pinned, groups, scores } = app;
    if (!graph) return;
    this.grouping.setAttribute('aria-pressed', String(Boolean(app.grouping)));
    this.grouping.textContent = app.grouping ? `${MAKE} of ${app.grouping.length}` : MAKE;
    this.clear.hidden = this.tidy.hidden = !pinned.size;
    if (this.graph !== graph || app.grouping) this.suggested = '';
    this.graph = graph;
    this.hint.textContent = app.grouping ? 'Click the nodes of the supernode, here or above; then press the button again, or let go of G.'
      : this.suggested ? this.suggested : pinned.size ? '' : 'No node is pinned. Ctrl-click a node, or press P. Hold G and click several to make a supernode.';
    this.hint.hidden = !this.hint.textContent;
    this.element.classList.toggle('empty', !pinned.size);
    const { clientWidth: width, clientHeight: height } = this.box;
    this.svg.setAttribute('viewBox', `0 0 ${width || 1} ${height || 1}`);
    const items = listItems(graph, groups, pinned), first = placeItems(graph, items, width, height);
    for (const item of items) {
      const saved = app.places[item.id];
      const place = saved ? { x: saved[0] * width, y: saved[1] * height } : first.get(item.id);
      const { wide } = Object.assign(item, this.measure(item, place.most));
      item.x = Math.min(Math.max(place.x, wide / 2 + 3), Math.max(width - wide / 2 - 3, wide / 2 + 3));
      item.y = Math.min(Math.max(place.y, HEIGHT), Math.max(height - HEIGHT, HEIGHT));
    }
    const focused = this.svg.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    const edges = listGroupEdges(graph, items, shown.edges, scores.visits);
    this.items = items;
    this.svg.replaceChildren(
      ...edges.sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight)).map((edge) => this.makeEdge(items, edge)),
      ...items.map((item) => this.makeItem(item)));
    if (focused !== null) [...this.svg.querySelectorAll('.item')].find((element) => element.dataset.id === focused)?.focus();
  }

  addSuggested() {
    const { app } = this;
    try {
      app.report(null);
      const { added, left } = app.suggestGroups(), share = app.shareOfInfluence(added.flatMap(({ members }) => members));
      this.suggested = added.length ? `${countOf(added.length, 'supernode')} suggested, with ${formatShare(share)} of the influence.`
        + (left ? ` There are ${left} more: press the button again.` : '')
        : 'No features outside supernodes are fed alike and do alike.';
      this.show();
    } catch (error) {
      app.report(error);
    }
  }

  // What an item shows of its name and members, and how wide it is: where many stand in a row, less.
  measure({ group, name, members }, most = 200) {
    const around = group < 0 ? 20 : 42, longest = Math.max(4, Math.min(22, Math.floor((most - around) / LETTER)));
    const text = group < 0 ? shortName(this.app.graph, members[0], longest) : clean(name, longest);
    const dots = group < 0 ? 0 : Math.max(2, Math.min(members.length, 16, Math.floor((most - 34) / 10)));
    return { text, dots, wide: Math.max(44, text.length * LETTER + around, dots * 10 + (dots && 34)) };
  }

  makeEdge(items, { source, target, weight }) {
    const from = items[source], to = items[target], size = Math.min(9, 0.8 + 9 * Math.abs(weight));
    const path = `M ${from.x} ${from.y} C ${from.x} ${(from.y + to.y) / 2}, ${to.x} ${(from.y + to.y) / 2}, ${to.x} ${to.y}`;
    return makeSvg('path', { d: path, class: weight > 0 ? 'raises' : 'lowers', 'stroke-width': size, fill: 'none' },
      makeSvg('title', {}, document.createTextNode(`${this.nameItem(from)} → ${this.nameItem(to)}: ${formatShare(weight)}`)));
  }

  nameItem({ group, name, members }) {
    return group < 0 ? fullName(this.app.graph, members[0])
      : `${clean(name, 400)}, ${countOf(members.length, 'node')}, ${formatShare(this.app.shareOfInfluence(members))} of the influence`;
  }

  makeItem(item) {
    const { app } = this, { graph } = app, { group, members, wide, text } = item;
    const node = members[0], isChosen = members.some((member) => app.grouping?.includes(member)) || (group < 0 ? app.clicked === node : app.group === group);
    const high = group < 0 ? HEIGHT : HEIGHT + 10;
    const element = makeSvg('g', {
      class: `item${group < 0 ? '' : ' group'}${isChosen ? ' chosen' : ''}`, tabindex: 0, role: 'button',
      'aria-label': this.nameItem(item), transform: `translate(${item.x} ${item.y})`,
      onpointerenter: () => app.hover(node), onpointerleave: () => app.hover(-1),
      onfocus: () => app.hover(node), onblur: () => app.hover(-1), onkeydown: (event) => this.press(event, item),
    },
    makeSvg('title', {}, document.createTextNode([...(group < 0 ? [] : [this.nameItem(item)]), ...members.map((member) => fullName(graph, member)).slice(0, 12)].join('\n'))),
    makeSvg('rect', { x: -wide / 2, y: -high / 2, width: wide, height: high, rx: group < 0 ? 5 : 9 }),
    makeSvg('text', { y: group < 0 ? 4 : -1, 'text-anchor': 'middle' }, document.createTextNode(text)));
    element.dataset.id = item.id;
    if (group >= 0) this.addMembers(element, item, high);
    this.listenItem(element, item);
    return element;
  }

  addMembers(element, { members, wide, dots }, high) {
    const { app } = this, { graph } = app;
    members.slice(0, dots).forEach((node, number, list) => element.append(makeSvg('circle', {
      cx: (number - (list.length - 1) / 2) * 10, cy: high / 2 - 7, r: node === app.clicked ? 4.4 : 3.4, class: `member ${graph.kind[node]}`,
      onpointerenter: (event) => { event.stopPropagation(); app.hover(node); },
    }, makeSvg('title', {}, document.createTextNode(fullName(graph, node))))));
    element.append(makeSvg('text', { class: 'close', x: wide / 2 - 9, y: -high / 2 + 12, 'text-anchor': 'middle' }, document.createTextNode('×')));
  }

  listenItem(element, item) {
    let from = null;
    element.addEventListener('pointerdown', (event) => {
      from = { x: event.clientX, y: event.clientY, moved: false, part: event.target };
      element.setPointerCapture(event.pointerId);
    });
    element.addEventListener('pointermove', (event) => {
      if (!from) return;
      const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
      from.moved ||= Math.hypot(dx, dy) > 4;
      if (from.moved) element.setAttribute('transform', `translate(${item.x + dx} ${item.y + dy})`);
    });
    element.addEventListener('pointerup', (event) => {
      const was = from;
      from = null;
      if (was?.moved) this.move(item, event.clientX - was.x, event.clientY - was.y);
      else if (was?.part.classList.contains('close')) this.app.ungroup(item.group);
      else if (was) this.clickItem(event, was.part, item);
    });
    element.addEventListener('dblclick', () => { if (item.group >= 0) this.rename(item); });
  }

  move(item, dx, dy) {
    const { clientWidth: width, clientHeight: height } = this.box;
    const round = (x) => Math.round(1000 * Math.min(Math.max(x, 0), 1)) / 1000;
    this.app.setPlaces({ ...this.app.places, [item.id]: [round((item.x + dx) / width), round((item.y + dy) / height)] });
  }

  clickItem(event, part, { group, members }) {
    const { app } = this, isMember = part.classList.contains('member');
    const member = isMember ? members[[...part.parentElement.querySelectorAll('.member')].indexOf(part)] : members[0];
    if (app.grouping) app.addToGroup(...members);
    else if (event.ctrlKey || event.metaKey) app.togglePin(members);
    else if (group < 0 || isMember) app.click(member === app.clicked ? -1 : member);
    else app.chooseGroup(group);
  }

  press(event, item) {
    const { app } = this, { group, members } = item;
    const steps = { ArrowLeft: [-12, 0], ArrowRight: [12, 0], ArrowUp: [0, -12], ArrowDown: [0, 12] };
    const actions = {
      Enter: () => (app.grouping ? app.addToGroup(...members) : group < 0 ? app.click(members[0]) : app.chooseGroup(group)),
      F2: () => (group < 0 ? null : this.rename(item)),
      Delete: () => (group < 0 ? app.togglePin(members) : app.ungroup(group)),
      p: () => app.togglePin(members),
    };
    actions[' '] = actions.Enter;
    const step = steps[event.key];
    if (step) this.move(item, ...step);
    else if (actions[event.key]) actions[event.key]();
    else return;
    event.preventDefault();
  }

  // A field over the item, for its name.
  rename(item) {
    const field = make('input', { type: 'text', class: 'rename', value: item.name, maxLength: 200, 'aria-label': 'Name of the supernode' });
    Object.assign(field.style, { left: `${item.x - 80}px`, top: `${item.y - 14}px` });
    let isOver = false;
    const end = (keep) => {
      if (isOver) return;
      isOver = true;
      field.remove();
      if (keep && field.value.trim() && field.value !== item.name) this.app.renameGroup(item.group, field.value.trim());
    };
    field.addEventListener('keydown', (event) => {
      if (event.key === 'Enter') end(true);
      if (event.key === 'Escape') end(false);
      event.stopPropagation();
    });
    field.addEventListener('blur', () => end(true));
    this.box.append(field);
    field.focus();
    field.select();
  }
}

// Elements. Texts become text nodes, never markup.

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'class') element.className = value;
    else if (name in element && name !== 'list' && name !== 'role' && !name.startsWith('aria')) element[name] = value;
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function makeSvg(tag, properties = {}, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function readColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Offers a file to the user.
export function download(name, content, type) {
  const link = make('a', { href: URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// A list that draws only the rows in sight, `height` pixels each.
export class LongList {
  constructor(label, height, draw) {
    Object.assign(this, { height, draw, count: 0, first: -1, last: -1 });
    this.space = make('div', { class: 'space', role: 'presentation' });
    this.element = make('div', { class: 'long-list', role: 'list', tabIndex: 0, 'aria-label': label, onscroll: () => this.refresh() }, this.space);
    new ResizeObserver(() => this.refresh()).observe(this.element);
  }

  show(count) {
    this.count = count;
    this.space.style.height = `${count * this.height}px`;
    this.element.scrollTop = 0;
    this.refresh(true);
  }

  refresh(always = false) {
    const first = Math.max(0, Math.floor(this.element.scrollTop / this.height) - 4);
    const last = Math.min(this.count, first + Math.ceil((this.element.clientHeight || 200) / this.height) + 8);
    if (!always && first === this.first && last === this.last) return;
    const focused = this.space.contains(document.activeElement) ? document.activeElement.dataset.row : null;
    Object.assign(this, { first, last });
    this.space.replaceChildren(...Array.from({ length: last - first }, (_, i) => this.makeRow(first + i)));
    if (focused !== null) this.space.querySelector(`[data-row="${focused}"]`)?.focus();
  }

  makeRow(number) {
    const row = this.draw(number);
    row.dataset.row = number;
    row.tabIndex = number === 0 ? 0 : -1;
    row.addEventListener('keydown', (event) => this.walk(event, number));
    const item = make('div', { role: 'listitem', class: 'item', 'aria-setsize': this.count, 'aria-posinset': number + 1 }, row);
    item.style.top = `${number * this.height}px`;
    return item;
  }

  walk(event, number) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const next = Math.min(Math.max(number + step, 0), this.count - 1);
    const top = next * this.height, box = this.element;
    if (top < box.scrollTop) box.scrollTop = top;
    if (top + this.height > box.scrollTop + box.clientHeight) box.scrollTop = top + this.height - box.clientHeight;
    this.refresh(true);
    this.space.querySelector(`[data-row="${next}"]`)?.focus();
  }
}

// What the user chose, kept in the address: it can be shared, reloaded, and left by the back button.

export const DEFAULTS = {
  graph: '', clicked: '', group: '', pinned: null, nodes: null, edges: null, hidden: ['loose'], sign: 'both',
  layers: '', tokens: '', text: '', density: '', faint: true, other: '', tab: 'Intervene',
};

const KINDS = { hidden: 'list', pinned: 'list', nodes: 'number', edges: 'number', faint: 'flag' };

export function readState(address) {
  const fields = new URLSearchParams(address.replace(/^#/, ''));
  const state = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) {
    if (!fields.has(name)) continue;
    if (KINDS[name] === 'list') state[name] = fields.getAll(name).filter((text) => text !== '');
    else if (KINDS[name] === 'number') state[name] = readShare(fields.get(name));
    else if (KINDS[name] === 'flag') state[name] = fields.get(name) === '1';
    else state[name] = fields.get(name);
  }
  return state;
}

export function writeState(state) {
  const fields = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value === null || JSON.stringify(value) === JSON.stringify(DEFAULTS[name])) continue;
    if (KINDS[name] === 'list') for (const text of value.length ? value : ['']) fields.append(name, text);
    else fields.set(name, KINDS[name] === 'flag' ? Number(value) : value);
  }
  return `#${fields}`;
}

// Puts the choices into the address; within a notebook's cell there is none.
export function keepAddress(state, isMinor) {
  const address = writeState(state);
  if (address === location.hash) return;
  try {
    if (isMinor) history.replaceState(null, '', address);
    else history.pushState(null, '', address);
  } catch (error) {
    if (error.name !== 'SecurityError') throw error;
  }
}

function readShare(text) {
  const number = Number(text);
  return text !== '' && number >= 0 && number <= 1 ? number : null;
}

// A range of percents such as "0.1-5", as shares: its least and its most; null for all.
export function readPercents(text) {
  const match = /^\s*(\d*\.?\d*)\s*-\s*(\d*\.?\d*)\s*%?\s*$/.exec(text);
  if (!match || !(match[1] || match[2])) return null;
  return [Number(match[1] || 0) / 100, match[2] ? Number(match[2]) / 100 : Infinity];
}

// A set of numbers such as "0-3, 7"; null for all.
export function readRanges(text) {
  const parts = text.split(',').map((part) => part.trim()).filter((part) => part);
  const ranges = parts.map((part) => /^(\d+)(?:\s*-\s*(\d*))?$/.exec(part)).filter((match) => match)
    .map(([, first, last]) => [Number(first), last === undefined ? Number(first) : last === '' ? Infinity : Number(last)]);
  return ranges.length ? (number) => ranges.some(([first, last]) => number >= first && number <= last) : null;
}

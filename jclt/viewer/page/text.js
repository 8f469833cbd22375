// Texts for people: names of nodes, numbers, and strings from files made safe to look at.

const MARKS = { '\n': '⏎', '\r': '⏎', '\t': '⇥' };

// One line without control characters and marks that turn the direction of writing; long texts lose their middle.
export function clean(text, longest = 80) {
  let letters = Array.from(String(text).slice(0, 4 * longest + 4), (letter) => MARKS[letter]
    ?? (/[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\u2028\u2029]/u.test(letter) ? escapeLetter(letter) : letter));
  if (letters.length > longest) letters = [...letters.slice(0, longest - 1), '…'];
  return letters.join('');
}

function escapeLetter(letter) {
  return '\\u' + letter.codePointAt(0).toString(16).padStart(4, '0');
}

// A token in quotes, so that its spaces can be seen.
export function quote(text, longest = 24) {
  return `‘${clean(text, longest)}’`;
}

export function formatNumber(x) {
  if (!Number.isFinite(x)) return '–';
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return x.toExponential(1);
  return x.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3).replace('-', '−');
}

export function formatShare(x) {
  const percent = 100 * x;
  return `${percent >= 10 || percent === 0 ? percent.toFixed(0) : percent.toFixed(percent >= 1 ? 1 : 2)}%`.replace('-', '−');
}

export function countOf(count, noun) {
  return `${count.toLocaleString('en')} ${noun}${count === 1 ? '' : 's'}`;
}

// A short name: a feature's label or `layer/number`, a token's text.
export function shortName(graph, node, longest = 24) {
  switch (graph.kind[node]) {
    case 'feature': return clean(graph.labels[node] || `${graph.layer[node]}/${graph.index[node]}`, longest);
    case 'error': return `error ${graph.layer[node]}`;
    case 'token': return quote(graph.tokens[graph.position[node]], longest);
    case 'position': return `position ${graph.position[node]}`;
    case 'head': return `head ${graph.layer[node]}.${graph.index[node]}`;
    case 'stream': return `stream ${graph.layer[node]}`;
    default: return clean(outputText(graph, node), longest);
  }
}

// The same with the place, for lists and screen readers.
export function fullName(graph, node) {
  const place = `at ${quote(graph.tokens[graph.position[node]] ?? '')} (${graph.position[node]})`;
  switch (graph.kind[node]) {
    case 'feature': {
      const number = `${graph.layer[node]}/${graph.index[node]}`;
      return `${graph.labels[node] ? `${clean(graph.labels[node])}, ` : ''}feature ${number} ${place}`;
    }
    case 'error': return `error of layer ${graph.layer[node]} ${place}`;
    case 'token': return `token ${quote(graph.tokens[graph.position[node]])} (${graph.position[node]})`;
    case 'position': return `embedding of position ${graph.position[node]}`;
    case 'head': return `head ${graph.layer[node]}.${graph.index[node]} ${place}`;
    case 'stream': return `residual stream ${graph.layer[node]} ${place}`;
    default: return `output ${clean(outputText(graph, node))}`;
  }
}

function outputText(graph, node) {
  const { text, token, probability } = graph.outputs[node - (graph.size - graph.outputs.length)];
  return token < 0 ? text : `‘${text}’ ${probability.toFixed(3)}`;
}

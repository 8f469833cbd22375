// The part of a canvas' context that the pictures use, written as SVG.

const measure = document.createElement('canvas').getContext('2d');
const escape = (text) => String(text).replace(/[&<>"]/g, (letter) => `&#${letter.charCodeAt(0)};`);
const round = (x) => Math.round(100 * x) / 100;
const ANCHORS = { left: 'start', center: 'middle', right: 'end' };

export class SvgContext {
  constructor(width, height, ground) {
    Object.assign(this, { globalAlpha: 1, textAlign: 'left', textBaseline: 'alphabetic', lineWidth: 1, moves: [], states: [] });
    this.parts = [`<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="system-ui, sans-serif" font-size="11">`];
    this.fillStyle = ground;
    this.fillRect(0, 0, width, height);
  }

  beginPath() { this.path = []; }

  moveTo(x, y) { this.path.push(`M${round(x)} ${round(y)}`); }

  lineTo(x, y) { this.path.push(`L${round(x)} ${round(y)}`); }

  closePath() { this.path.push('Z'); }

  rect(x, y, width, height) { this.path.push(`M${round(x)} ${round(y)}h${round(width)}v${round(height)}h${round(-width)}Z`); }

  arc(x, y, size) { this.path.push(`M${round(x - size)} ${round(y)}a${round(size)} ${round(size)} 0 1 0 ${round(2 * size)} 0a${round(size)} ${round(size)} 0 1 0 ${round(-2 * size)} 0Z`); }

  fill() { this.add('path', `d="${this.path.join('')}" fill="${escape(this.fillStyle)}"`); }

  stroke() { this.add('path', `d="${this.path.join('')}" fill="none" stroke="${escape(this.strokeStyle)}" stroke-width="${this.lineWidth}"`); }

  fillRect(x, y, width, height) { this.add('rect', `x="${round(x)}" y="${round(y)}" width="${round(width)}" height="${round(height)}" fill="${escape(this.fillStyle)}"`); }

  add(tag, fields) {
    const alpha = this.globalAlpha < 1 ? ` opacity="${this.globalAlpha}"` : '';
    const moves = this.moves.length ? ` transform="${this.moves.join(' ')}"` : '';
    this.parts.push(`<${tag} ${fields}${alpha}${moves}/>`);
  }

  fillText(text, x, y) { this.write(text, x, y, `fill="${escape(this.fillStyle)}"`); }

  strokeText(text, x, y) { this.write(text, x, y, `fill="none" stroke-linejoin="round" stroke="${escape(this.strokeStyle)}" stroke-width="${this.lineWidth}"`); }

  write(text, x, y, fields) {
    const moves = this.moves.length ? ` transform="${this.moves.join(' ')}"` : '';
    const middle = this.textBaseline === 'middle' ? 3.6 : 0, weight = this.font.startsWith('bold') ? ' font-weight="bold"' : '';
    this.parts.push(`<text x="${round(x)}" y="${round(y + middle)}" text-anchor="${ANCHORS[this.textAlign]}"${weight} ${fields}${moves}>${escape(text)}</text>`);
  }

  measureText(text) {
    measure.font = this.font;
    return measure.measureText(text);
  }

  save() { this.states.push([...this.moves]); }

  restore() { this.moves = this.states.pop(); }

  translate(x, y) { this.moves.push(`translate(${round(x)} ${round(y)})`); }

  rotate(angle) { this.moves.push(`rotate(${round(angle * 180 / Math.PI)})`); }

  finish() { return `${this.parts.join('\n')}\n</svg>\n`; }
}

// A first look at the shipped demo: a strip below the head, in nobody's way, that says what to try.

import { make } from './dom.js';

const COOKIE = 'jclt-first-look';
const PROMPT = 'Question: in the state of Mount Haven, what is the capital? Answer:';

// Each step says what to try, and marks the parts of the page that it speaks of.
const STEPS = [
  ['How does the model know that the answer is Denver? The graph shows it: tokens below, layers upward, the answer on top. Dots are features: numbers inside the model that mean something.', '.main-graph .graph'],
  ['Point at a dot: its name, and what leads to it and away from it. Blue raises, orange lowers. Click it: all of this stands on the right, sorted by weight.', '.main-graph .graph'],
  ['These are supernodes, features that work together. “state = Colorado” is the step in between: South Creek lies in Colorado, whose capital is Denver. Click this supernode, here or by its name in the graph.', '.pinned-nodes'],
  ['Mount Haven lies in Georgia. “Try it” writes a question about it; “Set to what this prompt has” gives it the features of that question. The answer becomes Atlanta.', '.tabs', 'Intervene'],
  ['Click a feature, and “Feature” shows the texts in which it is active, and the tokens that it makes likelier.', '.tabs', 'Feature'],
  ['Sliders keep more or less of the graph. The line below counts what is hidden, and says how much of the answer is still explained.', '.controls'],
  ['Other graphs are in the first field above, a prompt of your own goes into the second. “Files” has pictures, and this first look again.', 'header .tools'],
];

export class Tour {
  constructor(app) {
    this.app = app;
    this.step = -1;
    this.text = make('p', { 'aria-live': 'polite' });
    const button = (text, run) => make('button', { type: 'button', onclick: run }, text);
    this.tryIt = button('Try it', () => this.fill());
    this.back = button('Back', () => this.go(this.step - 1));
    this.next = button('Next', () => this.go(this.step + 1));
    this.end = button('Close', () => this.close());
    this.element = make('section', { class: 'tour', 'aria-label': 'First look', hidden: true, onkeydown: (event) => this.press(event) },
      this.text, make('div', { class: 'line' }, this.tryIt, this.back, this.next, this.end));
  }

  // Where the server offers it, until it was closed once.
  begin() {
    if (!document.cookie.split('; ').includes(`${COOKIE}=seen`)) this.go(0);
  }

  go(step) {
    document.querySelectorAll('.pointed').forEach((element) => element.classList.remove('pointed'));
    this.step = step;
    this.element.hidden = step < 0 || step >= STEPS.length;
    if (this.element.hidden) return this.remember();
    const [text, place, tab] = STEPS[step];
    this.text.replaceChildren(make('b', {}, `${step + 1} of ${STEPS.length} `), text);
    document.querySelector(place)?.classList.add('pointed');
    if (tab) this.app.tabs.chooseByName(tab);
    this.back.disabled = step === 0;
    this.next.textContent = step === STEPS.length - 1 ? 'Done' : 'Next';
    this.tryIt.hidden = tab !== 'Intervene';
  }

  // Chooses the state's supernode and writes the question about another.
  fill() {
    const { app } = this, group = app.groups.findIndex(({ name }) => name.startsWith('state = '));
    if (group >= 0) app.chooseGroup(group);
    app.tabs.chooseByName('Intervene').suggestPrompt(PROMPT);
  }

  press(event) {
    if (event.key === 'Escape') this.close();
  }

  close() {
    this.go(-1);
    document.querySelector('.graph canvas:last-of-type')?.focus();
  }

  // In a cookie, since other ports have another local storage.
  remember() {
    document.cookie = `${COOKIE}=seen; max-age=31536000; path=/; samesite=strict`;
  }
}

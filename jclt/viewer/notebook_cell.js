// A graph's page in a notebook's cell: a frame that can reach nothing outside itself, and a port between it and Python.

const CHOICES = ['_graph_name', 'pinned', 'supernodes', 'labels', 'places', 'thresholds', 'selected'];

function render({ model, el }) {
  const view = Math.random(); // the same graph may be shown in several cells
  let port = null, isOurs = false;
  const frame = document.createElement('iframe');
  frame.title = 'Graph';
  frame.sandbox = 'allow-scripts allow-downloads allow-forms'; // the page's policy lets no form be sent
  frame.style.cssText = `width: 100%; height: ${model.get('_height')}px; border: 1px solid #8888`;

  const readChoices = () => Object.fromEntries(CHOICES.map((name) => [name, model.get(name)]));

  function keep(choices) {
    isOurs = true;
    for (const name of Object.keys(choices)) model.set(name, choices[name]);
    isOurs = false;
    model.save_changes();
  }

  function ask({ number, name, values }) {
    try {
      model.send({ view, number, name, values });
    } catch (error) {
      port.postMessage({ number, error: `The notebook's kernel cannot be asked: ${error.message}` });
    }
  }

  const answer = (message) => { if (message.view === view) port?.postMessage(message); };
  const show = () => { if (!isOurs) port?.postMessage({ choices: readChoices() }); };

  // Also when the notebook moves the cell, which loads the frame again.
  frame.addEventListener('load', () => {
    const { port1, port2 } = new MessageChannel();
    port?.close();
    port = port1;
    port.onmessage = ({ data }) => (data.choices ? keep(data.choices) : ask(data));
    frame.contentWindow.postMessage({ choices: readChoices() }, '*', [port2]);
  });
  model.on('msg:custom', answer);
  for (const name of CHOICES) model.on(`change:${name}`, show);
  frame.srcdoc = model.get('_page');
  el.append(frame);
  return () => {
    model.off('msg:custom', answer);
    for (const name of CHOICES) model.off(`change:${name}`, show);
    port?.close();
  };
}

export default { render };

// A slider for each stack of pictures. Without this script all of them stand below each other.
for (const [number, stack] of document.querySelectorAll('.stepped').entries()) {
  const figures = [...stack.querySelectorAll('figure')];
  if (figures.length < 2) continue;
  const step = document.createElement('div');
  const label = document.createElement('label');
  const slider = document.createElement('input');
  step.className = 'step';
  slider.type = 'range';
  slider.id = `step-${number}`;
  slider.min = 0;
  slider.max = figures.length - 1;
  slider.value = 0;
  label.htmlFor = slider.id;
  const show = () => {
    const at = Number(slider.value);
    const title = figures[at].querySelector('strong').textContent.replace(/\.$/, '');
    figures.forEach((figure, i) => { figure.hidden = i !== at; });
    label.textContent = `${at + 1} of ${figures.length}: ${title}`;
    slider.setAttribute('aria-valuetext', title);
  };
  slider.addEventListener('input', show);
  step.append(label, slider);
  stack.insertBefore(step, figures[0]);
  show();
}

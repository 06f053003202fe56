"use strict";

const format = (value) => {
  if (value === null) return "-";
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : String(value);
};

// Values under the pointer.
for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector("svg");
  const tip = figure.querySelector(".tip");
  const cursor = figure.querySelector(".cursor");
  const data = JSON.parse(figure.querySelector("script").textContent);

  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let nearest = 0;
    data.x.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(data.x[nearest] - at)) nearest = i; });
    cursor.setAttribute("x1", data.x[nearest]);
    cursor.setAttribute("x2", data.x[nearest]);
    cursor.removeAttribute("hidden");

    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = "step " + data.steps[nearest];
    tip.append(head);
    data.series.forEach(([name, values], i) => {
      const row = document.createElement("div");
      const label = document.createElement("span");
      const swatch = document.createElement("i");
      swatch.className = "c" + (i % 8);
      label.append(swatch, name);
      const value = document.createElement("span");
      value.textContent = format(values[nearest]);
      row.append(label, value);
      tip.append(row);
    });
    tip.hidden = false;
    const left = event.clientX - figure.getBoundingClientRect().left;
    const fits = left + tip.offsetWidth + 24 < figure.clientWidth;
    tip.style.left = Math.max(4, fits ? left + 14 : left - tip.offsetWidth - 14) + "px";
    tip.style.top = box.top - figure.getBoundingClientRect().top + 8 + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("hidden", ""); });
}

// The gallery's filters.
const gallery = document.getElementById("gallery");
if (gallery) {
  const cards = [...gallery.querySelectorAll(".card")];
  const buttons = [...gallery.querySelectorAll("[data-filter]")];
  const select = gallery.querySelector("select");
  let filter = "all";

  const apply = () => {
    let shown = 0;
    for (const card of cards) {
      const kind = filter === "all" || card.dataset.said === filter || card.dataset.change === filter;
      const step = select.value === "all" || card.dataset.step === select.value;
      card.hidden = !(kind && step);
      shown += kind && step;
    }
    gallery.querySelector("#count").textContent = shown + " of " + cards.length;
  };
  select.addEventListener("change", apply);
  for (const button of buttons) {
    button.addEventListener("click", () => {
      filter = button.dataset.filter;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      apply();
    });
  }
  select.selectedIndex = select.options.length - 1;
  apply();
}

"use strict";
(() => {
  const list = document.querySelector(".samples");
  if (!list) return;
  const controls = document.querySelector(".controls");
  const [search, sort, count] = ["input", "select", "output"].map((name) => controls.querySelector(name));
  const samples = Array.from(list.children, (element) => ({
    element,
    text: element.textContent.toLowerCase(),
    changes: element.dataset.changes.split(" ").map(Number),
  }));

  function filter() {
    const wanted = search.value.trim().toLowerCase();
    for (const sample of samples) sample.element.hidden = !sample.text.includes(wanted);
    const found = samples.filter((sample) => !sample.element.hidden).length;
    count.textContent = `${found} of ${samples.length}`;
  }

  function order() {
    const [place, sign] = sort.value.split(" ").map(Number);
    const ordered = sort.value ? samples.toSorted((a, b) => sign * (a.changes[place] - b.changes[place])) : samples;
    list.append(...ordered.map((sample) => sample.element));
  }

  search.addEventListener("input", filter);
  sort.addEventListener("change", order);
  // A browser may keep what stood in the fields when the page is loaded anew.
  filter();
  order();
  controls.hidden = false;
})();
